"""FOAM: Adam whose moments are shared by neighbours in a row, for the matrices of a model, beside AdamW."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.groups.options import Options
from lowrank_optim.optimizers.base import Params
from lowrank_optim.optimizers.matrix_rules import MatrixRuleOptimizer
from lowrank_optim.rules import FoldedAdam


class FOAMAdamW(MatrixRuleOptimizer):
    """Adam on means of neighbours in a row, and the rest of every element beside them; AdamW for embeddings, head and vectors.

        ḡ, q = means of g and of g² over each 2^level neighbours,   m ← β₁m + (1−β₁)ḡ,   v ← β₂v + (1−β₂)q,   e = g − ḡ
        W ← (1 − ηλ) W − η s ((m + κe)/bc₁) / (√((v + κ²e²)/bc₂) + ε)

    `lowrank_optim.FoldedAdam` has the details. Built from

        lo.FOAMAdamW(lo.param_groups(model, **lo.FOAMAdamW.matrix_options))

    There is no subspace, no product and no refresh: a step reads and writes less than AdamW's. FOAM-Mini is `level=8`.

    With `match_reference=True`, ε is added before bias correction and the weights decay after the update, as in the released code.

    Args:
        params: groups, at least one of which names the rule.
        lr: learning rate η.
        adamw_lr: that of the groups trained by AdamW that name none; None takes `lr`, as the paper does. Groups that are added later
            name their own.
        level: the logarithm of the number of neighbours that share a moment, from 0 (Adam) to 10.
        betas, eps: of FoldedAdam and of AdamW.
        weight_decay: decoupled weight decay λ.
        residual_scale: κ, what the rest of an element counts.
        step_scale: s.
        **options: see `Options`. A group may have any field of `lowrank_optim.FoldedAdam`.

    Raises:
        ValueError: no group says which parameters are folded (a `rule`), or one has a `rank` or `density`.

    Memory: 8/2^level bytes for each element of a matrix, 8 for each of all else; a quarter of both with `state_bits=8`.

    Paper: Wen et al., "FOAM: Blocked State Folding for Memory-Efficient LLM Training", ICML 2026, arXiv:2512.07112.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = lo.FOAMAdamW(lo.param_groups(model, **lo.FOAMAdamW.matrix_options))
        >>> [tuple(optimizer.state[p]["exp_avg"].shape) for p in model.parameters()]
        [(32, 16), (32,)]
    """

    matrix_options: ClassVar[Mapping[str, Any]] = {"rule": "folded_adam"}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        adamw_lr: float | Tensor | None = None,
        level: int = 2,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        residual_scale: float = 1.0,
        step_scale: float = 0.25,
        **options: Unpack[Options],
    ) -> None:
        rule = FoldedAdam(betas, eps, level=level, residual_scale=residual_scale, step_scale=step_scale)
        super().__init__(
            params, rule=rule, lr=lr, adamw_lr=adamw_lr, betas=betas, eps=eps, weight_decay=weight_decay, **options
        )

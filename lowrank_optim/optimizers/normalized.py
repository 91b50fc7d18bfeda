"""Normalised gradients for the matrices of a model: SCALE, with momentum for the head only, and SinkGD, beside AdamW."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from lowrank_optim.groups.options import Options
from lowrank_optim.optimizers.base import Params
from lowrank_optim.optimizers.matrix_rules import MatrixRuleOptimizer
from lowrank_optim.rules import RowNorm, Sinkhorn


class SCALEOptimizer(MatrixRuleOptimizer):
    """Gradients with normalised rows, momentum for the output head only, AdamW for vectors.

        W ← (1 − ηλ) W − η m_i / max(rms_j(m_ij), 10⁻⁸),   m = G,  of the head m ← 0.9 m + 0.1 G

    Built from the groups of the paper,

        lo.SCALEOptimizer(lo.param_groups(model, **lo.SCALEOptimizer.matrix_options), lr=1e-3)

    in which rows (output neurons) of the layers' matrices and of the head are normalised, and the columns of embeddings, each over
    all tokens. Only the head has a moment. Head and embedding that are one tied weight are trained as the head. Groups that name no
    rule and have no rank are trained by AdamW. Another momentum is an option of the head's group, as `param_groups` makes it:
    `head={"rule": "row_norm", "momentum": 0.95}`. For RMNP see `lowrank_optim.RowNorm`.

    The paper's rates: 1e-3 up to 350M parameters, 2e-4 at 1B, 1e-4 at 7B, and 1e-3 for vectors.

    Args:
        params: groups, at least one of which names a rule.
        lr: learning rate η.
        adamw_lr: that of the groups trained by AdamW that name none; None takes `lr`. Groups that are added later name their own.
        betas, eps: of AdamW.
        weight_decay: decoupled weight decay λ.
        **options: see `Options`. A group may have any field of `lowrank_optim.RowNorm`.

    Raises:
        ValueError: no group says which parameters are normalised (a `rule`).

    Memory: 4 bytes for each element of the head, 8 for each of vectors. 2 and 1 with `state_bits` 16 and 8 for the head.

    Paper: Glentis et al., "A Minimalist Optimizer Design for LLM Pretraining", ICML 2026, arXiv:2506.16659.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> layers = {"embed": torch.nn.Embedding(9, 8), "up": torch.nn.Linear(8, 8), "lm_head": torch.nn.Linear(8, 9, bias=False)}
        >>> model = torch.nn.ModuleDict(layers)
        >>> optimizer = lo.SCALEOptimizer(lo.param_groups(model, **lo.SCALEOptimizer.matrix_options), lr=1e-3)
        >>> {name: sorted(optimizer.state[p])[:-1] for name, p in model.named_parameters()}
        {'embed.weight': [], 'up.weight': [], 'up.bias': ['exp_avg', 'exp_avg_sq'], 'lm_head.weight': ['exp_avg']}
    """

    matrix_options: ClassVar[Mapping[str, Any]] = {
        "rule": "row_norm",
        "head": {"rule": "row_norm", "momentum": 0.9},
        "embeddings": {"rule": "row_norm", "axis": "columns"},
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        adamw_lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, rule=RowNorm(), lr=lr, adamw_lr=adamw_lr, betas=betas, eps=eps, weight_decay=weight_decay, **options
        )


class SinkGDAdamW(MatrixRuleOptimizer):
    """Gradients whose rows and columns are normalised in turn, and AdamW for embeddings, head and vectors.

        X ← G;  L times:  X_i ← √n·X_i/‖X_i‖ for rows i,  X_j ← √m·X_j/‖X_j‖ for columns j;   W ← (1 − ηλ) W − η s X

    with L = `iterations` and s = `step_scale`. Matrices have no state. Built from

        lo.SinkGDAdamW(lo.param_groups(model, **lo.SinkGDAdamW.matrix_options))

    Embeddings need state: without it, the paper of SAGE has a perplexity of 192.7 in place of 34.3. `param_groups` takes
    `embeddings={"rule": lo.SAGE(), "lr": 2e-3}`, which trains them by SAGE, with half of AdamW's state.

    Args:
        params: groups, at least one of which names the rule or has a rank.
        lr: learning rate η.
        adamw_lr: that of the groups trained by AdamW that name none; None takes `lr`, as the paper does. Groups that are added later
            name their own.
        iterations: L.
        step_scale: s.
        betas, eps: of AdamW.
        weight_decay: decoupled weight decay λ.
        **options: see `Options`. A group may have any field of `lowrank_optim.Sinkhorn`.

    Raises:
        ValueError: no group says which parameters are normalised (a `rule`, or a `rank`, which may be None).

    Memory: nothing for matrices, 8 bytes for each element of all else.

    Paper: Scetbon et al., "Gradient Multi-Normalization for Stateless and Scalable LLM Training", NeurIPS 2025, arXiv:2502.06742.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = lo.SinkGDAdamW(lo.param_groups(model, **lo.SinkGDAdamW.matrix_options), lr=2e-2)
        >>> [sorted(optimizer.state[p]) for p in model.parameters()]
        [['step'], ['exp_avg', 'exp_avg_sq', 'step']]
    """

    matrix_options: ClassVar[Mapping[str, Any]] = {"rule": "sinkhorn"}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 2e-2,
        adamw_lr: float | Tensor | None = None,
        iterations: int = 5,
        step_scale: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        rule = Sinkhorn(iterations=iterations, step_scale=step_scale)
        super().__init__(
            params, rule=rule, lr=lr, adamw_lr=adamw_lr, betas=betas, eps=eps, weight_decay=weight_decay, **options
        )

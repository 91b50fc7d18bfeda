"""The ranks of ordered layers while they are trained: drawn for each step, penalised, and cut (Maestro)."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowrank_optim.kernels import as_python
from lowrank_optim.kernels.counter_rng import PURPOSE_RANKS, make_key, random_bits, random_word
from lowrank_optim.nn.ordered_cut import check_held, keep_components_, kept_rank
from lowrank_optim.nn.ordered_penalty import OrderedLayer, ordered_layers, proximal_step_
from lowrank_optim.sharding.gathered import put_shards_back

MODES = ("one_layer", "independent")


class OrderedRanks:
    """Draws how many components the ordered layers of a model use in each step, and drops those that have become unimportant.

        ranks = lo.nn.OrderedRanks(model)
        with ranks.sample():
            loss = criterion(model(x), y)
            loss.backward()
        optimizer.step()
        ranks.prox_(lr * penalty)                        # or ordered_penalty(model) in the loss
        …
        ranks.shrink_(threshold=1e-7, optimizer=optimizer)     # once in a while

    The draws are functions of (seed, number of the draw, ranks): processes with the same seed have the same, and a run that is
    resumed with `load_state_dict` has those of an undisturbed one.

    Args:
        model: with layers that `ordered_` made.
        mode: "one_layer": one layer and one b ≤ r, uniformly over all such pairs and without a pair twice until all have come; all
            other layers use all components (the paper). "independent": b from 1 to r for each layer by itself.
        seed: of the draws.

    Raises:
        ValueError: an unknown mode; a model without ordered layers.

    Memory: 8 bytes for each pair of a cycle ("one_layer"); `prox_` keeps a few float64 numbers on the CPU for each component, and
    `shrink_` copies what is left of one tensor at a time. Components that a draw leaves out have gradients of 0, not None: gradients
    and state are those of all r until `shrink_`.

    Example:
        >>> import torch, lowrank_optim as lo
        >>> model = lo.nn.ordered_(torch.nn.Sequential(torch.nn.Linear(16, 8)), include="0")
        >>> ranks = lo.nn.OrderedRanks(model)
        >>> with ranks.sample() as drawn:
        ...     loss = model(torch.randn(4, 16)).square().mean()
        ...     loss.backward()
        >>> list(drawn), ranks.shrink_(threshold=1e-7)
        (['0'], {'0': (8, 8)})

    Paper: Horváth et al., "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024, arXiv:2308.14929.
    """

    def __init__(
        self, model: nn.Module, mode: Literal["one_layer", "independent"] = "one_layer", seed: int = 0
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; valid values are 'one_layer' and 'independent'")
        self.model, self.mode, self.seed = model, mode, as_python(seed)
        self._cycle = self._position = 0
        self._order: tuple[tuple[int, int], Tensor] | None = None
        self._sampling = False
        ordered_layers(model)

    @property
    def ranks(self) -> dict[str, int]:
        """r of each ordered layer, by name; of layers with tied weights, the first."""
        return {layer.path: layer.rank for layer in ordered_layers(self.model)}

    # ------------------------------------------------------------------------------------------------------------- draws

    @contextmanager
    def sample(self) -> Iterator[dict[str, int]]:
        """A context in which layers use as many components as are drawn for it: {name: b} of those that use fewer than all may.

        With activation checkpointing, backward belongs into the context, too, for it runs layers again.

        Raises:
            RuntimeError: within another such context.
            ValueError: the model has no ordered layer any more.
        """
        if self._sampling:
            raise RuntimeError("ranks are sampled already; leave the first `with ranks.sample()` before the next")
        layers = ordered_layers(self.model)
        drawn = self._draw_one(layers) if self.mode == "one_layer" else self._draw_each(layers)
        self._sampling = True
        try:
            for number, rank in drawn.items():
                for module in layers[number].modules:
                    module.active_rank = rank
            yield {layers[number].path: rank for number, rank in drawn.items()}
        finally:
            self._sampling = False
            for layer in layers:
                for module in layer.modules:
                    module.active_rank = None

    def _draw_one(self, layers: list[OrderedLayer]) -> dict[int, int]:
        """The next pair of this cycle: number of the layer and b."""
        ends = list(accumulate(layer.rank for layer in layers))
        if not ends[-1]:
            return {}  # nothing is left of any layer
        if self._position >= ends[-1]:
            self._restart()
        kind = (self._cycle, ends[-1])
        if self._order is None or self._order[0] != kind:
            key = make_key(self.seed, 0, self._cycle, PURPOSE_RANKS)
            self._order = kind, random_bits(key, torch.arange(ends[-1], device="cpu")).argsort(stable=True)
        pair = int(self._order[1][self._position])
        self._position += 1
        number = next(number for number, end in enumerate(ends) if pair < end)
        return {number: pair - ends[number] + layers[number].rank + 1}

    def _draw_each(self, layers: list[OrderedLayer]) -> dict[int, int]:
        """b of every layer that has components."""
        draw, self._position = self._position, self._position + 1
        words = [random_word(make_key(self.seed, n + 1, self._cycle, PURPOSE_RANKS), draw) for n in range(len(layers))]
        return {n: 1 + (words[n] * layer.rank >> 32) for n, layer in enumerate(layers) if layer.rank}

    def _restart(self) -> None:
        self._cycle, self._position = self._cycle + 1, 0

    # ----------------------------------------------------------------------------------------------------------- penalty

    def prox_(self, step_size: float) -> None:
        """The proximal step of step_size·`ordered_penalty`, after `optimizer.step()`: exact, and with true zeros.

        For b = r, …, 1:  F_{b:} ← F_{b:} · max(0, 1 − step_size/‖F_{b:}‖), of both factors F of every layer. With a penalty λ and a
        learning rate η, step_size is η·λ.

        Waits for the device once. The r steps of all factors run side by side on the CPU, on one number for each component. With
        `fully_shard`, call it on all processes.

        Raises:
            ValueError: a step size that is negative or not finite; factors in 16 bits, in which a small shrinkage is rounded away.
        """
        step_size = as_python(step_size)
        if not (isinstance(step_size, int | float) and math.isfinite(step_size) and step_size >= 0):
            raise ValueError(
                f"step_size is {step_size!r}; it must be a number of at least 0: learning rate times penalty"
            )
        layers = self._resharded()
        proximal_step_([factor for layer in layers for factor in layer.factors if factor.requires_grad], step_size)

    # ------------------------------------------------------------------------------------------------------------ shrink

    @torch.no_grad()
    def shrink_(
        self, threshold: float = 1e-7, optimizer: torch.optim.Optimizer | None = None
    ) -> dict[str, tuple[int, int]]:
        """Drop the last components of each layer: r ← max{b : ‖U_{b:}‖·‖V_{b:}‖ ≥ threshold}. Parameters and state become smaller.

        Parameters stay the same objects, and the optimizer goes on with the rows of its state that are left. Gradients are cut, too.
        Optimizers of this package take any form of state along; of others, tensors of the parameter's shape. A resumed run builds
        model and optimizer, loads the model (which takes the ranks of the checkpoint), builds the optimizer and loads its state.

        Args:
            threshold: ε; the paper has 1e-7, its code 1e-5. 0 keeps everything.
            optimizer: that trains the factors; None if none does any more.

        Returns:
            {name: (r before, r now)} of every ordered layer.

        Raises:
            RuntimeError: within `sample()`; gradients of an unfinished step are kept (`update_in_backward`).
            ValueError: a threshold that is negative or not finite; an optimizer that does not hold the factors, or whose state cannot
                be cut; factors that are sharded or not finite; a model in DistributedDataParallel, which sends gradients in buckets
                of the old size: shrink `model.module`, and wrap it anew.
        """
        threshold = as_python(threshold)
        if not (isinstance(threshold, int | float) and math.isfinite(threshold) and threshold >= 0):
            raise ValueError(f"threshold is {threshold!r}; it must be a number of at least 0")
        if self._sampling:
            raise RuntimeError("shrink_ was called within `with ranks.sample()`; call it after that")
        if isinstance(self.model, DistributedDataParallel):
            raise ValueError(
                "the model is wrapped in DistributedDataParallel, whose buckets of gradients are made for its present shapes; make "
                "OrderedRanks of model.module, shrink it and wrap it anew"
            )
        layers = self._resharded()
        ranks = {layer.path: (layer.rank, kept_rank(layer, threshold)) for layer in layers}
        rows: dict[Tensor, int] = {}
        for layer in layers:
            old, new = ranks[layer.path]
            rows |= dict.fromkeys(layer.factors if new < old else (), new)
        check_held(layers, optimizer)
        keep_components_(rows, optimizer)
        if rows:
            self._restart()
        return ranks

    def _resharded(self) -> list[OrderedLayer]:
        """The layers, none of them gathered by `fully_shard`: what is written to gathered factors is lost."""
        gathered, layers = put_shards_back(self.model), ordered_layers(self.model)
        for layer in layers:
            for factor in layer.factors:
                gathered.check(layer.path, factor)
        return layers

    # ------------------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """Seed, mode, and which draw comes next: plain numbers and a name. The ranks are in the model's state dict."""
        return {"seed": self.seed, "mode": self.mode, "cycle": self._cycle, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the draws of another run.

        Raises:
            ValueError: keys or numbers that `state_dict` does not give, or another mode; nothing has changed then.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(f"the state has the keys {sorted(state)}; needed: {sorted(self.state_dict())}")
        if state["mode"] != self.mode:
            raise ValueError(f"the state is of mode {state['mode']!r}, this of {self.mode!r}")
        numbers = [as_python(state[name]) for name in ("seed", "cycle", "position")]
        if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers) or min(numbers[1:]) < 0:
            raise ValueError(f"the state is {dict(state)}; needed: integers, cycle and position of at least 0")
        self.seed, self._cycle, self._position = numbers
        self._order = None  # that of another seed

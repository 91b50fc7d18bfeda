"""What fits a budget: for each optimizer the memory of a set-up, and the largest batch, sequence and rank that the budget holds."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lowrank_optim.optimizers import LAYERWISE_METHODS
from lowrank_optim.planner.choices import resolve_optimizer
from lowrank_optim.planner.errors import PlanError
from lowrank_optim.planner.models import ModelChoice, resolve_model
from lowrank_optim.planner.parametrizations import resolve_parametrization
from lowrank_optim.planner.planning import make_setting
from lowrank_optim.planner.simulation.allocator import Rules, rules_for
from lowrank_optim.planner.simulation.estimate import Probe, deep
from lowrank_optim.planner.simulation.simulate import FIRST, ORDINARY, simulate

SLACK = 0.06
"""Share of the peak that is added for unused parts of the allocator's segments where those are not simulated: 2 to 6 % in
full simulations."""


@dataclass(frozen=True)
class Recipe:
    """One way to train, with the options that its authors or this package recommend.

    gives_up: what it does without, beside AdamW, in a few words.
    takes_rank: whether a rank means something: that of the layers where there is a parametrization, else the optimizer's.
    parametrization: (name, options) of layers in the place of plain ones.
    """

    title: str
    optimizer: str
    gives_up: str
    options: Mapping[str, Any]
    in_backward: bool = True
    weight_bits: int = 16
    takes_rank: bool = True
    parametrization: tuple[str, Mapping[str, Any]] | None = None

    def at_rank(self, rank: int | None) -> dict[str, Any]:
        """The arguments `optimizer` and `parametrization` of `plan` that say this recipe."""
        ranked = {"rank": rank} if self.takes_rank and rank is not None else {}
        if self.parametrization is None:
            return {"optimizer": (self.optimizer, {**self.options, **ranked}), "parametrization": None}
        name, options = self.parametrization
        return {"optimizer": (self.optimizer, dict(self.options)), "parametrization": (name, {**options, **ranked})}


RECIPES = (
    Recipe("AdamW", "adamw", "nothing", {}, in_backward=False, takes_rank=False),
    Recipe("AdamW 8-bit", "adamw_8bit", "the precision of moments", {}, in_backward=False, takes_rank=False),
    Recipe("GaLore 8-bit", "galore_8bit", "the gradient outside of a subspace", {}),
    Recipe("Fira 8-bit", "fira", "moments outside of a subspace", {"state_bits": 8, "basis_bits": 16}),
    Recipe("Alice 8-bit", "alice", "moments outside of a subspace", {"state_bits": 8, "basis_bits": 16}),
    Recipe("Q-GaLore, int8 weights", "qgalore", "that, and the precision of weights", {}, weight_bits=8),
    Recipe("APOLLO-Mini", "apollo_mini", "a rate for each element", {"rank": 1}, takes_rank=False),
    Recipe("LISA, 2 layers", "lisa", "training most layers at a time", {"active_layers": 2}, takes_rank=False),
    Recipe(
        "SLTrain 8-bit",
        "LowRankOptimizer",
        "dense weights, so the pretrained ones",
        {"rule": "adam", "state_bits": 8},
        parametrization=("sltrain", {"density": 0.05, "alpha": 8, "init": "fresh"}),
    ),
)
"""In the order of what they give up: the first that fits is the one to take."""


@dataclass(frozen=True)
class Row:
    """What one recipe needs at the set-up that was asked for, and what the budget holds.

    parts: bytes at the peak by kind.
    needed: of the card: peak, the allocator's slack, CUDA context.
    largest_batch: sequences of the length that was asked for; 0 where not even one fits.
    longest_sequence: tokens of a single sequence, a multiple of 64; None for images and latents.
    largest_rank: at the batch that was asked for; None where rank means nothing.
    """

    title: str
    optimizer: str
    rank: int | None
    in_backward: bool
    weight_bits: int
    gives_up: str
    parts: dict[str, int]
    peak: int
    needed: int
    when: str
    fits: bool
    largest_batch: int
    longest_sequence: int | None
    largest_rank: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Question:
    """What is asked for all recipes alike; `sequence_length` None is the default of the model, see `asked`."""

    model: str
    budget: int
    batch_size: int = 1
    sequence_length: int | None = None
    rank: int | None = None
    dtype: str = "bfloat16"
    activation_checkpointing: bool = True
    device: str = "cuda"
    world_size: int = 1
    fsdp: bool = False


def asked(question: Question, model: ModelChoice) -> Question:
    """The question with the sequence length that it means for this model.

    Raises:
        PlanError: a sequence length for a model that reads none.
    """
    return replace(question, sequence_length=model.length(question.sequence_length))


def what_fits(
    question: Question,
    recipes: tuple[Recipe, ...] | None = None,
    progress: Callable[[str, float], None] = lambda what, done: None,
) -> list[Row]:
    """A row for each recipe (None: `RECIPES`): those that fit first, each part in the recipes' order.

    Raises:
        PlanError: the model is unknown, or a module.
    """
    model = resolve_model(question.model)
    if model.layers is None or model.batch is None:
        raise PlanError("the table needs a model by name or config; plan a module with lowrank_optim.plan")
    question = asked(question, model)
    rows, recipes = [], RECIPES if recipes is None else recipes
    recipes = tuple(recipe for recipe in recipes if not (question.fsdp and recipe.weight_bits == 8))  # not sharded
    for number, recipe in enumerate(recipes):
        progress(recipe.title, number / len(recipes))
        rows.append(_Search(question, recipe, model).row())
    progress("", 1.0)
    return sorted(rows, key=lambda row: not row.fits)


class _Search:
    """Three probes of one recipe (the set-up itself, with more tokens, with another rank), and what follows from them."""

    def __init__(self, question: Question, recipe: Recipe, model: ModelChoice) -> None:
        self.question, self.recipe, self.model = question, recipe, model
        self.rules: Rules = rules_for(torch.device(question.device).type)
        assert model.width is not None
        self.width = model.width
        self.rank = (question.rank or max(1, self.width // 4)) if recipe.takes_rank else None
        ddp = question.world_size > 1 and not question.fsdp
        self.in_backward = recipe.in_backward and not ddp  # which does not go with it
        self.length = question.sequence_length or 1  # an image or a latent counts as one token here
        self.tokens = question.batch_size * self.length
        self.base = self._probe(self.tokens, self.rank)
        self.longer = self._probe(4 * self.tokens, self.rank)
        self.other = None if self.rank is None else self._probe(self.tokens, max(1, self.rank // 2))

    def row(self) -> Row:
        question, recipe = self.question, self.recipe
        needed = self._needed(self.base)
        point, peak = self.base.peak
        tokens = self._tokens_that_fit()
        return Row(
            recipe.title,
            recipe.optimizer,
            self.rank if self.rank is not None else recipe.options.get("rank"),
            self.in_backward,
            recipe.weight_bits,
            recipe.gives_up,
            {kind: round(size) for kind, size in self.base.kinds[point].items()},
            round(peak),
            needed,
            f"{point[0]}, {point[1]}" + (f" of {point[2]}" if point[2] else ""),
            needed <= question.budget,
            tokens // self.length,
            None if question.sequence_length is None else tokens // 64 * 64,
            self._rank_that_fits(),
        )

    def _probe(self, tokens: int, rank: int | None) -> Probe:
        question = self.question
        said = self.recipe.at_rank(rank)
        optimizer, layers_made = resolve_optimizer(said["optimizer"]), resolve_parametrization(said["parametrization"])
        layerwise = self.recipe.optimizer in LAYERWISE_METHODS
        depth = max(2, int(self.recipe.options.get("active_layers", 1))) if layerwise else 1
        assert self.model.batch is not None
        assert self.model.layers is not None
        batch = self.model.batch(tokens // self.length, self.length)

        def run(layers: int) -> Any:
            return simulate(
                make_setting(
                    self.model,
                    optimizer,
                    batch=batch,
                    dtype=getattr(torch, question.dtype),
                    device=torch.device(question.device),
                    layers=layers,
                    weight_bits=self.recipe.weight_bits,
                    parametrization=layers_made,
                    in_backward=self.in_backward and optimizer.updates_in_backward,
                    activation_checkpointing=question.activation_checkpointing,
                    steps=(FIRST, ORDINARY),
                )
            )

        if not self.model.layers_are_equal:
            depth = self.model.layers  # no few of them stand for all
        return deep(run, self.rules, self.model.layers, depth, question.world_size, question.fsdp)

    def _needed(self, probe: Probe) -> int:
        slack = SLACK if self.rules.block > 1 else 0.0
        return round(probe.peak[1] * (1.0 + slack)) + self.rules.context

    def _tokens_that_fit(self) -> int:
        """The most tokens in a batch, by bisection over the extrapolated peaks; exact where points are linear in the tokens."""

        def fits(tokens: int) -> bool:
            factor = (tokens - self.tokens) / (3 * self.tokens)
            return self._needed(self.base.combine(self.longer, factor)) <= self.question.budget

        return _largest(fits, 2**24)

    def _rank_that_fits(self) -> int | None:
        if self.rank is None or self.other is None or self.rank == max(1, self.rank // 2):
            return None
        base, other, rank = self.base, self.other, self.rank

        def fits(candidate: int) -> bool:
            factor = (rank - candidate) / (rank - max(1, rank // 2))
            return self._needed(base.combine(other, factor)) <= self.question.budget

        return _largest(fits, self.width)


def _largest(fits: Callable[[int], bool], bound: int) -> int:
    """The largest number up to `bound` that fits, where smaller ones fit if larger ones do; 0 if not even 1 does."""
    low, high = 0, bound
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low

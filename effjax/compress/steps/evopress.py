"""EvoPress: how much each layer is compressed, found by evolution under one budget.

    genome      a level for every kernel, or every branch, of every layer
    mutation    one gene goes a level up and another down, so that the cost stays what it was;
                min(r_1, r_2) such switches, r uniform on 1 .. 3
    fitness     KL(whole network || compressed one) on calibration batches
    selection   all offspring on few batches, the best of them on more, .., and the last with their parent

Levels are other steps of a recipe: layouts of fewer and fewer bits, more and more zeros, or a branch that is
left out. Every level is made of the whole network once; a candidate takes each kernel from one of them, and
all candidates are one compiled program, to which the genome is data.

Source: Sieberling, Kuznedelev, Kurtic and Alistarh, "EvoPress: Accurate Dynamic Model Compression via
Evolutionary Search", ICML 2025, arXiv:2410.14649, algorithm 1.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.compress.recovery import apart, evaluated_output
from effjax.compress.steps.round import Round
from effjax.compress.steps.sparsify import Sparsify
from effjax.compress.storage.masked import MaskedKernel
from effjax.compress.storage.trees import leaves_of, replaced, stored_in, whole
from effjax.compress.structure.layers import Layer, put_together, take_apart
from effjax.compress.structure.masks import branches, quieter
from effjax.compress.structure.units import without
from effjax.compress.subject import Calibration, Subject
from effjax.config import part
from effjax.errors import UsageError

Branch = Literal["mixer", "ffn"]
# The number of a layer and a path in it.
Gene = tuple[int, str]


@dataclasses.dataclass(frozen=True)
class LeaveOut:
    """A level at which a branch is not there."""

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Every branch gives nothing."""
        del calibration
        layers = take_apart(subject)
        return put_together(subject, [_silent(layer) for layer in layers])


@dataclasses.dataclass(frozen=True)
class Keep:
    """The level at which everything is as it was."""

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Changes nothing."""
        del calibration
        return subject


LEVELS = {"keep": Keep, "round": Round, "sparsify": Sparsify, "leave_out": LeaveOut}


@dataclasses.dataclass(frozen=True)
class EvoPress:
    """Searches for a level for every kernel or branch.

    Attributes:
      levels: from the least to the most compressed, steps of `LEVELS`.
      like: the level that all genes have at the start, whose cost is the budget; None starts from a
        random genome within `share`.
      share: of the cost of the first level; read where `like` is None.
      genes: what has a level of its own; only whole branches can be left out.
      branches: in which genes are.
      generations: of offspring.
      offspring: in each.
      survivors: how many are left after each selection.
      batches: on how many each selection is.
    """

    levels: tuple[Any, ...] = part(LEVELS)
    like: int | None = None
    share: float = 0.75
    genes: Literal["kernels", "branches"] = "kernels"
    branches: tuple[Branch, ...] = ("mixer", "ffn")
    generations: int = 50
    offspring: int = 16
    survivors: tuple[int, ...] = (4, 1)
    batches: tuple[int, ...] = (1, 4)

    def __post_init__(self) -> None:
        if len(self.levels) < 2:
            raise UsageError("a search is among at least two levels.")
        if self.like is not None and not 0 <= self.like < len(self.levels):
            raise UsageError(f"like={self.like} is no level of {len(self.levels)}.")
        if self.genes == "kernels" and any(isinstance(level, LeaveOut) for level in self.levels):
            raise UsageError("leave_out leaves out whole branches: set genes='branches'.")
        if len(self.survivors) != len(self.batches) or self.survivors[-1:] != (1,):
            raise UsageError("survivors and batches are of one length, and the last survivor is one.")

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Searches, and builds what was found.

        Raises:
          UsageError: for a budget that no genome meets.
        """
        quiet = dataclasses.replace(calibration, report=lambda told: None)
        made = [level.apply(subject, quiet) for level in self.levels]
        variants = [take_apart(network) for network in made]
        genes = self._genes(variants)
        costs = np.asarray(
            [
                [self._cost(level, network[at], path) for level, network in enumerate(variants)]
                for at, path in genes
            ]
        )  # [genes, levels]
        rng = np.random.default_rng(int(jax.random.randint(calibration.key, (), 0, 2**31 - 1)))
        fitness = self._fitness(subject, made, genes, calibration.first(max(self.batches)))
        start = self._start(costs, rng)
        first = fitness(start, self.batches[-1])
        genome, value = evolved(
            start, costs, fitness, rng, self.generations, self.offspring, self.survivors, self.batches
        )
        calibration.report(
            f"KL {first:.4g} at the start, {value:.4g} after {self.generations} generations; cost "
            f"{costs[np.arange(len(genes)), genome].sum() / costs[:, 0].sum():.4f} of the first level."
        )
        return put_together(subject, self._built(subject, variants, genes, genome))

    def _genes(self, variants: Sequence[Sequence[Layer]]) -> list[Gene]:
        """What has a level of its own: of kernels those that some level stores otherwise."""
        found: list[Gene] = []
        for at, same in enumerate(zip(*variants, strict=True)):
            branches = [
                branch for branch in self.branches if getattr(same[0].block, branch, None) is not None
            ]
            if self.genes == "branches":
                found += [(at, branch) for branch in branches]
                continue
            kernels = {path for layer in same for path in stored_in(layer.params)}
            found += [(at, path) for path in sorted(kernels) if path.split("/")[0] in branches]
        if not found:
            raise UsageError("no level changes a kernel of a branch: there is nothing to search for.")
        return found

    def _cost(self, level: int, layer: Layer, path: str) -> float:
        """Bytes that a gene takes; of zeros those of the other numbers."""
        if isinstance(self.levels[level], LeaveOut):
            return 0.0
        total = 0.0
        for leaf in _under(layer.params, path).values():
            if isinstance(leaf, MaskedKernel):
                total += float(jnp.sum(leaf.kernel != 0)) * leaf.kernel.dtype.itemsize
            else:
                total += sum(array.nbytes for array in jax.tree.leaves(leaf))
        return total

    def _start(
        self, costs: Float[np.ndarray, "genes levels"], rng: np.random.Generator
    ) -> Int[np.ndarray, " genes"]:
        if self.like is not None:
            return np.full(len(costs), self.like)
        genome, budget = np.zeros(len(costs), int), self.share * costs[:, 0].sum()
        rows = np.arange(len(costs))
        waiting = [gene for gene in rng.permutation(rows) for _ in range(costs.shape[1] - 1)]
        while costs[rows, genome].sum() > budget and waiting:
            genome[waiting.pop(0)] += 1
        if costs[rows, genome].sum() > budget:
            raise UsageError(
                f"share={self.share} is less than the last level costs: give more, or another level."
            )
        return genome

    def _fitness(
        self,
        subject: Subject,
        made: Sequence[Subject],
        genes: Sequence[Gene],
        batches: Sequence[Any],
    ) -> Callable[[Int[np.ndarray, " genes"], int], float]:
        """KL from the whole network, of a genome on so many batches."""
        arrays = [take_apart(network.with_params(whole(network.params, jnp.float32))) for network in made]
        stacked = [
            jax.tree.map(
                lambda *leaves: jnp.stack(leaves), *(_under(each[at].params, path) for each in arrays)
            )
            for at, path in genes
        ]
        whole_output = jax.jit(lambda variables, batch: evaluated_output(subject, variables, batch))
        goals = [whole_output(subject.variables, batch) for batch in batches]

        @jax.jit
        def far(stacked: Any, genome: Array, batch: Any, goal: Array) -> Array:
            layers = list(take_apart(subject))
            for (at, _), choices, gene in zip(genes, stacked, genome, strict=True):
                taken = {path: leaf[gene] for path, leaf in choices.items()}
                layers[at] = _with(layers[at], replaced(layers[at].params, taken))
            network = put_together(subject, layers)
            output = evaluated_output(network, network.variables, batch)
            return apart(subject, output, goal, 1.0, batch.get("weights"))

        def fitness(genome: Int[np.ndarray, " genes"], count: int) -> float:
            values = [
                far(stacked, jnp.asarray(genome), *pair) for pair in zip(batches[:count], goals, strict=False)
            ]
            return float(np.mean([float(value) for value in values]))

        return fitness

    def _built(
        self,
        subject: Subject,
        variants: Sequence[Sequence[Layer]],
        genes: Sequence[Gene],
        genome: Int[np.ndarray, " genes"],
    ) -> list[Layer]:
        """The layers, each gene from its level."""
        layers = list(take_apart(subject))
        for (at, path), level in zip(genes, genome, strict=True):
            if isinstance(self.levels[level], LeaveOut):
                layers[at] = without(layers[at], cast(Branch, path))
                continue
            chosen = variants[level][at].variables
            variables = {
                name: _grafted(layers[at].variables.get(name, {}), tree, path.split("/"))
                for name, tree in chosen.items()
            }
            layers[at] = dataclasses.replace(layers[at], variables={**layers[at].variables, **variables})
        return layers


def evolved(
    start: Int[np.ndarray, " genes"],
    costs: Float[np.ndarray, "genes levels"],
    fitness: Callable[[Int[np.ndarray, " genes"], int], float],
    rng: np.random.Generator,
    generations: int,
    offspring: int,
    survivors: Sequence[int],
    batches: Sequence[int],
) -> tuple[Int[np.ndarray, " genes"], float]:
    """The best genome, and how good it is on the most batches: never worse than the start.

    Args:
      start: a genome.
      costs: of every level of every gene.
      fitness: of a genome on so many batches; less is better.
      rng: of mutations.
      generations: of offspring.
      offspring: in each.
      survivors: how many are left after each selection.
      batches: on how many each selection is.
    """
    parent, best = start, fitness(start, batches[-1])
    for _ in range(generations):
        crowd = [mutated(parent, costs, rng) for _ in range(offspring)]
        crowd = list({tuple(genome): genome for genome in crowd if (genome != parent).any()}.values())
        values = [np.inf] * len(crowd)
        for left, count in zip(survivors, batches, strict=True):
            values = [fitness(genome, count) for genome in crowd]
            order = np.argsort(values, kind="stable")[:left]
            crowd, values = [crowd[i] for i in order], [values[i] for i in order]
        if crowd and values[0] < best:
            parent, best = crowd[0], values[0]
    return parent, best


def mutated(
    genome: Int[np.ndarray, " genes"], costs: Float[np.ndarray, "genes levels"], rng: np.random.Generator
) -> Int[np.ndarray, " genes"]:
    """Another genome of the same cost: one gene a level up and one down, a few times.

    Args:
      genome: levels.
      costs: of every level of every gene.
      rng: of the draw.
    """
    made = genome.copy()
    for _ in range(min(rng.integers(1, 4), rng.integers(1, 4))):
        pairs = [
            (up, down)
            for up in np.flatnonzero(made + 1 < costs.shape[1])
            for down in np.flatnonzero(made > 0)
            if up != down
            and np.isclose(
                costs[up, made[up]] - costs[up, made[up] + 1],
                costs[down, made[down] - 1] - costs[down, made[down]],
                rtol=1e-3,  # shares of zeros are whole numbers, one more or less
            )
        ]
        if not pairs:
            break
        up, down = pairs[rng.integers(len(pairs))]
        made[up] += 1
        made[down] -= 1
    return made


def _silent(layer: Layer) -> Layer:
    params = layer.params
    for branch in branches(layer):
        params = quieter(params, branch, 0.0)
    return _with(layer, params)


def _under(params: Any, path: str) -> dict[str, Any]:
    """The leaves at a path and below it, by their whole paths."""
    return {at: leaf for at, leaf in leaves_of(params).items() if at == path or at.startswith(f"{path}/")}


def _grafted(tree: Mapping[str, Any], source: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The tree with what the source has at a path, if it has anything."""
    head, *rest = path
    if head not in source:
        return dict(tree)
    return {**tree, head: _grafted(tree.get(head, {}), source[head], rest) if rest else source[head]}


def _with(layer: Layer, params: Mapping[str, Any]) -> Layer:
    return dataclasses.replace(layer, variables={**layer.variables, "params": params})

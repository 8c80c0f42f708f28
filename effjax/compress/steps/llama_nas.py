"""LLaMA-NAS: a smaller network out of a trained one, by a search over depth and hidden widths with NSGA-II.

    genome       how many of the first layers stay, and of each the share of its hidden units, the first ones
    objectives   multiply-accumulates, exact, and the task's loss on calibration batches, both to be small
    round        measure a population; fit  loss ~ w . one_hot(genome)  by ridge regression on all measured;
                 evolve by NSGA-II on what that predicts; the next population is the best that is unmeasured

Every candidate is the whole network with masks, which are data to one compiled program; the one that is built
is sliced out and is an ordinary network, without any training of its own. What it is worth follows from how
the whole one was trained: by `train.nested` (`effjax.compress.structure.nested`) its prefixes are networks
themselves; of an ordinary one they are what is left of it.

Selection is that of deap: Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", 2002.

Source: Sarah et al., "LLaMA-NAS: Efficient Neural Architecture Search for Large Language Models", 2024,
arXiv:2405.18377; the predictor in the loop is that of LINAS, Cummings et al. 2022, arXiv:2205.10358.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from effjax.compress.blocks import evaluated
from effjax.compress.structure.cost import costs
from effjax.compress.structure.layers import Layer, put_together, take_apart
from effjax.compress.structure.masks import Part, branches, masked_loss
from effjax.compress.structure.units import keep, sizes
from effjax.compress.subject import Calibration, Subject
from effjax.errors import UsageError

Genome = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LlamaNas:
    """Searches a Pareto front, and builds one network of it.

    Attributes:
      left: share of the multiply-accumulates that the network which is built may have.
      depths: shares of the layers to choose from, rounded to layers.
      widths: shares of the hidden units of each layer to choose from, rounded to units.
      population: candidates that are measured together.
      evaluations: candidates that are measured in all.
      generations: of evolution on the predictor, between two populations.
      mutation: chance of each gene to be drawn anew.
      batches: of training data that the loss is of.
    """

    left: float = 0.67
    depths: tuple[float, ...] = (0.75, 0.875, 1.0)
    widths: tuple[float, ...] = (0.5, 1.0)
    population: int = 50
    evaluations: int = 250
    generations: int = 20
    mutation: float = 0.1
    batches: int = 4

    def __post_init__(self) -> None:
        for name in ("depths", "widths"):
            values = getattr(self, name)
            if not values or not all(0 < value <= 1 for value in values):
                raise UsageError(f"{name}={values} are shares above 0, to 1.")
        if not 0 < self.left <= 1 or not 0 <= self.mutation <= 1:
            raise UsageError(f"left={self.left} is above 0, to 1, and mutation={self.mutation} a chance.")
        if min(self.population, self.evaluations, self.batches) < 1 or self.generations < 0:
            raise UsageError("population, evaluations and batches are at least 1, generations not negative.")

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Searches, and slices the best network within the budget.

        Raises:
          UsageError: for a network whose layers cannot be masked, or a budget that no candidate meets.
        """
        space = Space.of(subject, self.depths, self.widths)
        batches = [evaluated(batch) for batch in calibration.first(self.batches)]
        loss = masked_loss(subject, batches)
        whole = space.macs(space.largest)
        least = space.macs(space.smallest)
        if least > self.left * whole:
            raise UsageError(f"left={self.left} is less than the smallest network has: {least / whole:.3f}.")
        rng = np.random.default_rng(np.asarray(jax.random.key_data(calibration.key)))
        measured = searched(
            space.choices,
            lambda genome: (space.macs(genome), loss(space.masks(genome))),
            space.macs,
            self,
            rng,
            (space.smallest, space.largest),
        )
        for genome in front(measured):
            cost, value = measured[genome]
            calibration.report(f"loss {value:.4f} with {cost / whole:.4f} of the MACs: {space.said(genome)}.")
        within = {genome: told for genome, told in measured.items() if told[0] <= self.left * whole}
        best = min(within, key=lambda genome: within[genome][1])
        told = f"{len(measured)} of {space.count:.3g} networks measured"
        calibration.report(f"{told}; built: {space.said(best)}.")
        return put_together(subject, space.built(best))


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
    """All networks inside a network.

    Attributes:
      layers: of the whole one.
      depths: numbers of layers, rising.
      widths: for every layer its numbers of hidden units, rising.
      prices: multiply-accumulates of the layers, and of all else on the first, which always stays.
    """

    layers: tuple[Layer, ...]
    depths: tuple[int, ...]
    widths: tuple[tuple[int, ...], ...]
    prices: Sequence[Any]

    @classmethod
    def of(cls, subject: Subject, depths: Sequence[float], widths: Sequence[float]) -> "Space":
        """The space of some shares.

        Raises:
          UsageError: for layers that cannot be left out or narrowed.
        """
        layers = take_apart(subject)
        for layer in layers:
            if not sizes(layer).hidden or set(branches(layer)) != {"mixer", "ffn"}:
                raise UsageError(f"{layer.where} cannot be left out or narrowed: search before it changes.")
        prices = costs(subject, layers)
        return cls(
            layers=layers,
            depths=_counts(depths, len(layers)),
            widths=tuple(_counts(widths, sizes(layer).hidden) for layer in layers),
            prices=prices,
        )

    @property
    def choices(self) -> tuple[int, ...]:
        """How many values every gene has: the depth, then the layers."""
        return (len(self.depths), *(len(widths) for widths in self.widths))

    @property
    def smallest(self) -> Genome:
        """The least of everything."""
        return (0,) * len(self.choices)

    @property
    def largest(self) -> Genome:
        """The most of everything."""
        return tuple(count - 1 for count in self.choices)

    @property
    def count(self) -> float:
        """Different networks: the widths of layers that are left out do not matter."""
        return float(sum(np.prod([float(len(w)) for w in self.widths[:depth]]) for depth in self.depths))

    def macs(self, genome: Genome) -> float:
        """Multiply-accumulates of an example."""
        total = 0.0
        for at in range(self.depths[genome[0]]):
            has = dataclasses.replace(sizes(self.layers[at]), hidden=self.widths[at][genome[1 + at]])
            total += self.prices[at].of(has)
        return total

    def masks(self, genome: Genome) -> dict[tuple[int, Part], np.ndarray]:
        """The network as masks of the whole one."""
        made: dict[tuple[int, Part], np.ndarray] = {}
        depth = self.depths[genome[0]]
        for at, layer in enumerate(self.layers):
            there = np.float32(at < depth)
            made[at, "mixer"] = made[at, "ffn"] = np.asarray(there)
            units = np.arange(sizes(layer).hidden) < self.widths[at][genome[1 + at]]
            made[at, "hidden"] = units.astype(np.float32)
        return made

    def built(self, genome: Genome) -> list[Layer]:
        """The layers of the network, sliced."""
        made = []
        for at in range(self.depths[genome[0]]):
            layer, count = self.layers[at], self.widths[at][genome[1 + at]]
            made.append(layer if count == sizes(layer).hidden else keep(layer, "hidden", range(count)))
        return made

    def said(self, genome: Genome) -> str:
        """The network in words."""
        depth = self.depths[genome[0]]
        widths = (str(self.widths[at][genome[1 + at]]) for at in range(depth))
        return f"{depth} layers of {', '.join(widths)} hidden units"


def searched(
    choices: Sequence[int],
    measure: Callable[[Genome], tuple[float, float]],
    cost: Callable[[Genome], float],
    how: LlamaNas,
    rng: np.random.Generator,
    first: Sequence[Genome] = (),
) -> dict[Genome, tuple[float, float]]:
    """All genomes that were measured, with their two objectives.

    Args:
      choices: how many values every gene has.
      measure: both objectives of a genome, small is good.
      cost: the first of them, for nothing.
      how: the search.
      rng: of everything drawn.
      first: genomes that are measured in any case.
    """
    measured: dict[Genome, tuple[float, float]] = {}
    waiting = list(dict.fromkeys([*first, *_drawn(choices, how.population, rng)]))
    while waiting and len(measured) < how.evaluations:
        for genome in waiting[: how.evaluations - len(measured)]:
            measured[genome] = measure(genome)
        weights = predictor(choices, measured)
        predicted = lambda genome, w=weights: (cost(genome), float(one_hot(choices, genome) @ w))  # noqa: E731
        crowd = front(measured) + _drawn(choices, how.population, rng)
        for _ in range(how.generations):
            crowd = survivors([*crowd, *_bred(crowd, choices, how, rng)], predicted, how.population)
        fresh = [genome for genome in dict.fromkeys(crowd) if genome not in measured]
        drawn = _drawn(choices, how.population, rng)
        waiting = fresh or [genome for genome in drawn if genome not in measured]
    return measured


def one_hot(choices: Sequence[int], genome: Genome) -> Float[np.ndarray, " features"]:
    """Ones for the value of every gene, and one for all."""
    parts = [np.eye(count)[value] for count, value in zip(choices, genome, strict=True)]
    return np.concatenate([*parts, [1.0]])


def predictor(
    choices: Sequence[int], measured: dict[Genome, tuple[float, float]], ridge: float = 1e-3
) -> Float[np.ndarray, " features"]:
    """Weights of features, by ridge regression of the second objective.

    Args:
      choices: how many values every gene has.
      measured: both objectives.
      ridge: added to the squares of the weights.
    """
    rows = np.stack([one_hot(choices, genome) for genome in measured])
    goal = np.asarray([value for _, value in measured.values()])
    centre = goal.mean()
    square = rows.T @ rows + ridge * np.eye(rows.shape[1])
    weights = np.linalg.solve(square, rows.T @ (goal - centre))
    weights[-1] += centre
    return np.asarray(weights)


def front(measured: dict[Genome, tuple[float, float]]) -> list[Genome]:
    """The genomes that no other is better than in both objectives, by the first."""
    found: list[Genome] = []
    best = np.inf
    for genome, (_, value) in sorted(measured.items(), key=lambda item: item[1]):
        if value < best:
            found, best = [*found, genome], value
    return found


def survivors(
    crowd: Sequence[Genome], objectives: Callable[[Genome], tuple[float, float]], count: int
) -> list[Genome]:
    """Those that NSGA-II keeps: by fronts, and of the last one those that stand most alone.

    Args:
      crowd: genomes.
      objectives: of a genome, small is good.
      count: how many are kept.

    Raises:
      UsageError: without the package deap.
    """
    try:
        from deap import base, tools  # an optional extra
    except ImportError:
        raise UsageError("the search needs the package deap: pip install 'effjax[search]'.") from None

    class Fitness(base.Fitness):  # type: ignore[misc]
        weights = (-1.0, -1.0)

    class Individual:
        def __init__(self, genome: Genome) -> None:
            self.genome, self.fitness = genome, Fitness(objectives(genome))

    unique = [Individual(genome) for genome in dict.fromkeys(crowd)]
    return [one.genome for one in tools.selNSGA2(unique, min(count, len(unique)))]


def _counts(shares: Sequence[float], whole: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(share * whole)) for share in shares}))


def _drawn(choices: Sequence[int], count: int, rng: np.random.Generator) -> list[Genome]:
    values: Int[np.ndarray, "n g"] = rng.integers(0, np.asarray(choices), (count, len(choices)))
    return [tuple(map(int, row)) for row in values]


def _bred(
    crowd: Sequence[Genome], choices: Sequence[int], how: LlamaNas, rng: np.random.Generator
) -> list[Genome]:
    """As many children, of two parents each: every gene of either, and some drawn anew."""
    rows = np.asarray(crowd)
    pairs = rng.integers(0, len(rows), (2, len(rows)))
    made = np.where(rng.random(rows.shape) < 0.5, rows[pairs[0]], rows[pairs[1]])
    new = rng.integers(0, np.asarray(choices), rows.shape)
    made = np.where(rng.random(rows.shape) < how.mutation, new, made)
    return [tuple(map(int, row)) for row in made]

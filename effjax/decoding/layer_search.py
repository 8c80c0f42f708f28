"""Search over layer plans: for each example, a short plan that is right.

    score(child) = Q/v + c sqrt(ln t / v) - lambda |plan| / L          Kocsis and Szepesvari 2006, less length

Monte Carlo tree search whose nodes are plans and whose edges change a few blocks: skip one or two that stand
together, or run one a second time. A node of v visits gets a new child, with a plan that the tree does not
have, where it has fewer than sqrt(v) (progressive widening, Coulom 2007: of 28 blocks a plan has 83 changes);
otherwise the best child is gone to. The new plan is run, and 1 for a right answer or 0 is added to Q of the
nodes above it. Of all plans that were right the one of least

    |plan| + worth (-log p(answers))

is taken, which with worth 0 is the shortest, and of equals one that runs the fewest different blocks. An
example for which none was right has no plan. The second part is ours: a small network is often right by
chance, and what a plan gives sure answers to can be told from an example, which luck cannot.

The searches of many examples go side by side: in each turn every one of them names a plan, and all are run in
one call, whose shapes do not change.

Source: Heakl et al., "Dr.LLM: Dynamic Layer Routing in LLMs", ICLR 2026, arXiv:2510.12773. c, lambda, the
share of random choices, the sizes of skips and the end of a search (a plan two blocks shorter, or a first
right one) are those of the authors' code, which by default makes 200 turns; its readme says 50. There a node
is expanded once only, so that the tree is a chain, and a block can run more than twice; here it is a tree,
and a block runs at most twice.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from effjax.decoding.layer_plan import Plan
from effjax.decoding.layer_router import EXECUTE, REPEAT, SKIP
from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Search:
    """How plans are searched for.

    Attributes:
      turns: plans that are tried for an example, at most.
      exploration: c.
      length_penalty: lambda.
      random: share of the choices among children that are drawn.
      skips: blocks that one change may skip.
      longest: the longest plan, in multiples of the depth.
      worth: layers that a nat of an example's loss is worth, among plans that are right.
      enough: an example is done when a right plan is so many blocks shorter than the whole network, or when
        it is right where the whole network is not; None goes on to the last turn.
    """

    turns: int = 50
    exploration: float = 1.8
    length_penalty: float = 3.0
    random: float = 0.1
    skips: tuple[int, ...] = (1, 2)
    longest: float = 2.0
    worth: float = 0.0
    enough: int | None = 2

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise UsageError(f"turns={self.turns}: try at least one plan.")
        if not 0.0 <= self.random <= 1.0:
            raise UsageError(f"random={self.random} must be a share between 0 and 1.")
        if self.longest < 1.0:
            raise UsageError(f"longest={self.longest}: allow at least the whole network, 1.")

    def changes(self, plan: Plan) -> list[Plan]:
        """The plans that are one change away."""
        depth = len(plan)
        found = {_with(plan, start, SKIP, size) for size in self.skips for start in range(depth - size + 1)}
        found |= {_with(plan, layer, REPEAT, 1) for layer in range(depth) if plan[layer] == EXECUTE}
        return sorted(each for each in found if each != plan and sum(each) <= self.longest * depth)


@dataclasses.dataclass
class Node:
    """One plan in the tree of an example.

    Attributes:
      plan: it.
      above: the node whose change it is; None at the root.
      left: changes that are not tried yet, in the order in which they will not be: the last one is next.
      below: the nodes of those that are.
      visits: v.
      right: Q.
      closed: whether nothing new can be reached from it.
    """

    plan: Plan
    above: "Node | None"
    left: list[Plan]
    below: list["Node"] = dataclasses.field(default_factory=list)
    visits: int = 0
    right: float = 0.0
    closed: bool = False

    def score(self, search: Search, turn: int) -> float:
        """What children are compared by."""
        known = self.right / self.visits
        unknown = search.exploration * math.sqrt(math.log(turn) / self.visits)
        return known + unknown - search.length_penalty * sum(self.plan) / len(self.plan)


class Tree:
    """The search of one example."""

    def __init__(self, search: Search, depth: int, rng: np.random.Generator) -> None:
        self._search, self._rng, self._turn = search, rng, 0
        self._seen: set[Plan] = set()
        self._root = self._node((EXECUTE,) * depth, None)
        self._at = self._root
        self.results: dict[Plan, bool] = {}
        self.losses: dict[Plan, float] = {}

    def name(self) -> Plan:
        """The plan to try next."""
        self._turn += 1
        node = self._root
        while node.visits and not self._root.closed:
            while node.left and node.left[-1] in self._seen:
                node.left.pop()
            open_ones = [each for each in node.below if not each.closed]
            if node.left and (len(node.below) < math.sqrt(node.visits) or not open_ones):
                node.below.append(self._node(node.left.pop(), node))
                node = node.below[-1]
            elif not open_ones:
                node.closed = True
                node = self._root
            elif self._rng.random() < self._search.random:
                node = open_ones[self._rng.integers(len(open_ones))]
            else:
                node = max(open_ones, key=lambda each: each.score(self._search, self._turn))
        self._at = node
        return node.plan

    def hear(self, right: bool, loss: float) -> None:
        """What came of it."""
        self.results[self._at.plan], self.losses[self._at.plan] = right, loss
        node: Node | None = self._at
        while node is not None:
            node.visits += 1
            node.right += right
            node = node.above

    @property
    def done(self) -> bool:
        """Whether what was found is enough, or nothing is left to try."""
        enough, whole, best = self._search.enough, self._root.plan, self.best
        if enough is None or best is None or self._root.closed:
            return self._root.closed
        return not self.results[whole] or sum(best) <= sum(whole) - enough

    @property
    def best(self) -> Plan | None:
        """The plan to take of those that were right, None where none was."""

        def cost(plan: Plan) -> tuple[float, int, Plan]:
            return sum(plan) + self._search.worth * self.losses[plan], len(plan) - plan.count(SKIP), plan

        return min((plan for plan, found in self.results.items() if found), key=cost, default=None)

    def _node(self, plan: Plan, above: Node | None) -> Node:
        self._seen.add(plan)
        left = self._search.changes(plan)
        self._rng.shuffle(left)  # type: ignore[arg-type]
        return Node(plan, above, left)


def find_plans(
    search: Search,
    run: Callable[[Int[np.ndarray, "examples depth"]], tuple[Any, Any]],
    examples: int,
    depth: int,
    seed: int = 0,
) -> tuple[Int[np.ndarray, "examples depth"], Int[np.ndarray, " examples"], Int[np.ndarray, " examples"]]:
    """Searches for all examples side by side.

    Args:
      search: how.
      run: from one plan for each example to whether its answer is right, and its loss in nats.
      examples: how many there are.
      depth: blocks of the network.
      seed: of every example's draws.

    Returns:
      The plan of each example (of blocks that all execute where none was right), whether it is right, and
      whether the whole network is.
    """
    trees = [Tree(search, depth, np.random.default_rng((seed, i))) for i in range(examples)]
    plans = np.full((examples, depth), EXECUTE, np.int32)
    for _ in range(search.turns):
        going = [i for i, tree in enumerate(trees) if not tree.done]
        if not going:
            break
        for i in going:
            plans[i] = trees[i].name()
        told, losses = map(np.asarray, run(plans))
        for i in going:
            trees[i].hear(bool(told[i]), float(losses[i]))
    found = [tree.best for tree in trees]
    whole = (EXECUTE,) * depth
    best = np.array([whole if plan is None else plan for plan in found], np.int32).reshape(examples, depth)
    right = np.array([plan is not None for plan in found], np.int32)
    return best, right, np.array([tree.results[whole] for tree in trees], np.int32)


def agreed(
    plans: Int[np.ndarray, "plans depth"],
    right: Bool[np.ndarray, "plans examples"],
    losses: Float[np.ndarray, "plans examples"],
    cost: float,
    worth: float = 0.0,
) -> tuple[Int[np.ndarray, "examples depth"], Bool[np.ndarray, " examples"]]:
    """Plans on which examples agree, so that there is something to learn.

    Where blocks can stand in for each other every example finds another plan, and a router that follows the
    majority at each block skips them all. Here an example takes, of the plans that answer it, that of least

        |plan| + worth (-log p(answers)) - L / cost (share of all examples that it answers)

    Args:
      plans: that are offered to all.
      right: whether each answers each example.
      losses: of each example with each plan, in nats.
      cost: share of the answers that may be lost if all layers are saved.
      worth: layers that a nat of an example's loss is worth.

    Returns:
      The plan of each example (of blocks that all execute where none is right), and whether it is right.
    """
    depth = plans.shape[1]
    price = plans.sum(axis=1) - depth / cost * right.mean(axis=1)  # [K]
    each = np.where(right, price[:, None] + worth * losses, np.inf)  # [K, N]
    known = np.asarray(np.any(right, axis=0))  # [N]
    return np.where(known[:, None], plans[np.argmin(each, axis=0)], EXECUTE).astype(np.int32), known


def _with(plan: Plan, start: int, count: int, size: int) -> Plan:
    """The plan with `size` blocks from `start` on at another count."""
    return (*plan[:start], *(count,) * size, *plan[start + size :])

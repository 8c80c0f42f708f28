"""Where a method meets a block: what it is told, and what it does to the tokens on their way through."""

import dataclasses
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from flax import linen as nn
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.mixers.context import Context
from effjax.mixers.stats import Stats
from effjax.tokens.assignment import Assignment, Plan, apply, with_ends
from effjax.tokens.tokens import Tokens

Place = Literal["before_block", "in_mixer", "after_mixer"]


@dataclasses.dataclass(frozen=True)
class Where:
    """Which layer of how many, from 0."""

    layer: int
    depth: int


@runtime_checkable
class Method(Protocol):
    """How tokens are reduced at one layer: a frozen dataclass without parameters.

    Attributes:
      needs: fields of `Stats` that it reads besides the features.
      place: before the block; behind the mixer's residual connection, where the FFN is next; or between the
        weights of attention and their sum, so that what is left out is never summed.
      proportional: whether attention counts sizes from here on.

    A method with a `share` makes the attention of its layer leave out all weights but the largest, see
    `effjax.mixers.context`.
    """

    needs: ClassVar[tuple[str, ...]]
    place: ClassVar[Place]
    proportional: bool

    def points(self, depth: int) -> dict[int, "Method"]:
        """The layers of a network of this depth that reduce, each with its method."""

    def plan(self, tokens: Tokens, stats: Stats, where: Where) -> Plan | None:
        """Where the tokens between the ends go; None leaves all as they are."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A method at its layer."""

    method: Method
    where: Where


class Passage:
    """The residual stream on its way through a block: an array, or a bag of tokens that the block may reduce.

    A block mixes through `mix`, writes to `x`, and says with `reduce` where its mixer's branch is closed.
    """

    def __init__(self, x: Array | Tokens, context: Context, point: Point | None) -> None:
        self._tokens = x if isinstance(x, Tokens) else None
        self._point = point
        self._context = context
        self._plan: Plan | None = None
        self.x: Array = x.x if isinstance(x, Tokens) else x
        if point is not None and point.method.place == "before_block":
            self._apply(point.method.plan(self._bag(), Stats(self.x), point.where))

    def mix(self, mixer: nn.Module, h: Float[Array, "b *places c"], train: bool) -> Float[Array, "b *left c"]:
        """Runs the mixer; where rows are chosen inside it, the stream keeps these alone."""
        context = self._context if self._tokens is None else self._bag().context(self._context)
        point = self._point
        if point is None or point.method.place == "before_block":
            return mixer(h, context, train=train)
        needs = point.method.needs
        context = dataclasses.replace(context, share=getattr(point.method, "share", context.share))
        stats = Stats(h)
        if point.method.place == "after_mixer" and not needs:
            y = mixer(h, context, train=train)
        elif not hasattr(mixer, "observe"):
            raise UsageError(
                f"{type(point.method).__name__} reads {' and '.join(needs)}, which {type(mixer).__name__} "
                f"does not have: use a method that needs features alone."
            )
        else:
            y, stats = mixer.observe(h, context, needs, self._choose(point), train=train)
        if point.method.place == "after_mixer":
            self._plan = point.method.plan(self._bag(), stats, point.where)
        elif self._plan is not None:
            self._apply(self._plan)
        return y

    def check_unmixed(self) -> None:
        """Refuses to reduce behind a mixer where the block has none."""
        if self._point is not None and self._point.method.place != "before_block":
            method, layer = type(self._point.method).__name__, self._point.where.layer
            raise UsageError(f"{method} reduces at layer {layer}, which has no mixer: choose other layers.")

    def reduce(self) -> None:
        """Carries out what was planned, where the method stands behind the mixer."""
        if self._point is not None and self._point.method.place == "after_mixer":
            self._apply(self._plan)

    def out(self, x: Array) -> Array | Tokens:
        """What the block hands on."""
        return x if self._tokens is None else dataclasses.replace(self._tokens, x=x)

    def record(self) -> Array | None:
        """At a point: which token each original one is in now."""
        return None if self._point is None else self._bag().origin

    def _bag(self) -> Tokens:
        assert self._tokens is not None
        return dataclasses.replace(self._tokens, x=self.x)

    def _apply(self, plan: Plan | None) -> None:
        assert self._point is not None
        if plan is not None:
            self._tokens = apply(plan, self._bag(), self._point.method.proportional)
            self.x = self._tokens.x

    def _choose(self, point: Point) -> Any:
        if point.method.place != "in_mixer":
            return None

        def choose(stats: Stats) -> Array | None:
            """The rows of the attention matrix that are kept."""
            bag = self._bag()
            self._plan = point.method.plan(bag, stats, point.where)
            if self._plan is None:
                return None
            assert isinstance(self._plan, Assignment)
            return with_ends(bag, self._plan.keep)

        return choose

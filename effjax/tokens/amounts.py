"""How many tokens a layer keeps, and at which layers."""

import dataclasses
import math
from typing import Any, TypeVar

from effjax.errors import UsageError
from effjax.tokens.tokens import Tokens

M = TypeVar("M")


@dataclasses.dataclass(frozen=True)
class Amount:
    """How much a method removes, and where: the fields that most methods begin with.

    Attributes:
      keep: share of the tokens that a layer keeps; or
      remove: tokens that a layer removes.
      layers: which ones reduce; None means all.

    Raises:
      UsageError: where not exactly one of `keep` and `remove` is given, for a share outside (0, 1], or a
        negative number.
    """

    keep: float | None = None
    remove: int | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.remove is None):
            raise UsageError("say either keep, a share in (0, 1], or remove, a number of tokens.")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UsageError(f"keep={self.keep:g} is no share in (0, 1]: 0.9 leaves nine tokens of ten.")
        if self.remove is not None and self.remove < 0:
            raise UsageError(f"remove={self.remove} is negative.")

    def points(self, depth: int) -> dict[int, Any]:
        """The layers that reduce, each with this method."""
        return at_layers(self, depth, self.layers)

    def removed(self, tokens: Tokens, most: int | None = None) -> int:
        """How many of the tokens between the ends go, at most `most`; None leaves at least one.

        A number for all layers may be more than the last ones have: they remove what they can. More than the
        original tokens is a mistake.

        Raises:
          UsageError: where more are asked for than there were.
        """
        most = tokens.count - 1 if most is None else most
        if self.remove is not None:
            if self.remove > tokens.original:
                raise UsageError(
                    f"remove={self.remove} asks for more tokens than the {tokens.original} that are there."
                )
            return min(self.remove, most)
        assert self.keep is not None
        return min(math.floor(tokens.count - tokens.count * self.keep), most)


def at_layers(method: M, depth: int, layers: tuple[int, ...] | None) -> dict[int, M]:
    """The same method at some layers; None means all.

    Raises:
      UsageError: for a layer that the network does not have.
    """
    layers = tuple(range(depth)) if layers is None else layers
    check_layers(layers, depth)
    return dict.fromkeys(sorted(layers), method)


def check_layers(layers: tuple[int, ...], depth: int) -> None:
    """Raises UsageError for a layer that is not there."""
    for layer in layers:
        if not 0 <= layer < depth:
            raise UsageError(f"layer {layer} is not there: the network has {depth} layers, 0 to {depth - 1}.")


def inflected(remove: int, inflection: float, depth: int) -> tuple[int, ...]:
    """Numbers of tokens a layer that rise (up to +1) or fall (down to -1) evenly with depth around `remove`.

    The schedules of ToMe, Bolya et al. 2023, appendix D; -1 removes most at
    the first layer and none at the last.
    """
    first = int(remove * (1.0 - inflection))
    step = 2 * (remove - first) / max(depth - 1, 1)
    return tuple(int(first + step * layer) for layer in range(depth))


def with_keep(method: M, keep: float) -> M:
    """The same method at another strength.

    Raises:
      UsageError: for a method whose strength is no share.
    """
    names = {field.name for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    if "keep" not in names:
        raise UsageError(f"{type(method).__name__} has no share to change: give it by hand.")
    more = {"remove": None} if "remove" in names else {}
    return dataclasses.replace(method, keep=keep, **more)  # type: ignore[type-var]

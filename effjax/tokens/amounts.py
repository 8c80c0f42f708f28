"""How many tokens a layer keeps, and at which layers."""

import dataclasses
import math
from typing import TypeVar

from effjax.errors import UsageError

M = TypeVar("M")


def check_keep(keep: float | None, remove: int | None) -> None:
    """Exactly one says how many tokens stay.

    Raises:
      UsageError: for none or both of them, a share outside (0, 1], or a negative number.
    """
    if (keep is None) == (remove is None):
        raise UsageError("say either keep, a share in (0, 1], or remove, a number of tokens.")
    if keep is not None and not 0 < keep <= 1:
        raise UsageError(f"keep={keep:g} is no share in (0, 1]: 0.9 leaves nine tokens of ten.")
    if remove is not None and remove < 0:
        raise UsageError(f"remove={remove} is negative.")


def removed(
    count: int, keep: float | None, remove: int | None, most: int, original: int | None = None
) -> int:
    """How many of `count` tokens go, at most `most`.

    A number for all layers may be more than the last ones have: they remove what they can. More than the
    `original` tokens (None means `count`) is a mistake.

    Raises:
      UsageError: where more are asked for than there are.
    """
    if remove is not None:
        there = count if original is None else original
        if remove > there:
            raise UsageError(f"remove={remove} asks for more tokens than the {there} that are there.")
        return min(remove, most)
    assert keep is not None
    return min(math.floor(count - count * keep), most)


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

"""Names of what pyramids share: blocks of a stage by their number, and norms that keep running averages."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn

from effjax.interop.names import Ignored, Name, Row
from effjax.models.pyramid import Stage

PLACE = "o i 1 1 -> i o"  # a convolution of 1 x 1 places
DEPTHWISE = "c 1 u v -> u v c"
COUNTERS = Ignored(r".*\.num_batches_tracked", "counts training steps, which nothing here reads")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one block of a stage, or every so many of them, stand among our variables.

    Attributes:
      block: the definition.
      before: the block in front of it; None at the start of the stage.
      ours: path to it.
      numbers: of the blocks in their stage.
      stacked: whether ours have an axis for them.
    """

    block: nn.Module
    before: nn.Module | None
    ours: str
    numbers: Sequence[int]
    stacked: bool


def places(stage: Stage, ours: str) -> Iterator[Place]:
    """Every block of a stage: the first, the members of the cycle, and those behind the last whole cycle."""
    start = int(stage.first is not None)
    if stage.first is not None:
        yield Place(stage.first, None, f"{ours}/first", (0,), False)
    if stage.depth == start:
        return
    length = len(stage.blocks)
    cycles, rest = divmod(stage.depth - start, length)
    end = start + cycles * length
    for m, block in enumerate(stage.blocks):
        before = stage.blocks[m - 1] if m else stage.first
        if cycles:
            path = f"{ours}/stack" if length == 1 else f"{ours}/stack/members_{m}"
            yield Place(block, before, path, range(start + m, end, length), True)
        if m < rest:
            before = stage.blocks[m - 1] if m or cycles else stage.first
            yield Place(block, before, f"{ours}/rest_{m}", (end + m,), True)


def blocks(
    stage: Stage, ours: str, theirs: str, rows: Callable[[Place], Iterable[Name]], offset: int = 0
) -> Iterator[Name]:
    """The rows of all blocks of a stage.

    Args:
      stage: the definition.
      ours: path to it.
      theirs: name of what holds their blocks by number.
      rows: names and paths inside one block.
      offset: what is added to a block's number to give theirs.
    """
    for place in places(stage, ours):
        numbers = [number + offset for number in place.numbers]
        number = "{block}" if place.stacked else str(numbers[0])
        at = {"block": numbers} if place.stacked else {}
        for row in rows(place):
            yield under(row, place.ours, f"{theirs}.{number}", at)


def stage_rows(
    stage: Stage, ours: str, theirs: str, rows: Callable[[Any, str, str], Iterable[Row]]
) -> list[Row]:
    """Like `blocks`, for rows that are made with whole names and paths.

    Args:
      stage: the definition.
      ours: path to it.
      theirs: name of their block, `{layer}` for its number.
      rows: makes the rows of one block from it, their name and our path.
    """
    made: list[Row] = []
    for place in places(stage, ours):
        if place.stacked:
            made += [_at(row, place.numbers) for row in rows(place.block, theirs, place.ours)]
        else:
            made += rows(place.block, theirs.replace("{layer}", str(place.numbers[0])), place.ours)
    return made


def _at(row: Row, layers: Sequence[int]) -> Row:
    return row if isinstance(row, Ignored) else dataclasses.replace(row, at={**row.at, "layer": layers})


def under(row: Name, ours: str, theirs: str, at: Mapping[str, Sequence[int]] | None = None) -> Name:
    """A row of a part, as a row of the whole that the part stands in."""
    paths = tuple(_below(ours, path) for path in row.our_paths)
    names = tuple(f"{theirs}.{name}" for name in row.their_names)
    return dataclasses.replace(
        row,
        ours=paths[0] if isinstance(row.ours, str) else paths,
        theirs=names[0] if isinstance(row.theirs, str) else names,
        at={**row.at, **(at or {})},
    )


def _below(prefix: str, path: str) -> str:
    collection, _, rest = path.rpartition(":")
    rest = f"{prefix}/{rest}" if prefix else rest
    return f"{collection}:{rest}" if collection else rest


def batch_norm(theirs: str, ours: str) -> tuple[Name, ...]:
    """Scale, bias and running averages of a batch norm."""
    return (
        Name(f"{theirs}.weight", f"{ours}/scale"),
        Name(f"{theirs}.bias", f"{ours}/bias"),
        Name(f"{theirs}.running_mean", f"batch_stats:{ours}/mean"),
        Name(f"{theirs}.running_var", f"batch_stats:{ours}/var"),
    )


def affine(theirs: str, ours: str) -> tuple[Name, ...]:
    """Scale and bias of a norm without averages."""
    return Name(f"{theirs}.weight", f"{ours}/scale"), Name(f"{theirs}.bias", f"{ours}/bias")


def layer(theirs: str, ours: str, layout: str, bias: bool = True, **more: Any) -> tuple[Name, ...]:
    """Kernel, and bias where there is one, of a convolution or projection."""
    rows = (Name(f"{theirs}.weight", f"{ours}/kernel", layout, **more),)
    return (*rows, Name(f"{theirs}.bias", f"{ours}/bias", **more)) if bias else rows

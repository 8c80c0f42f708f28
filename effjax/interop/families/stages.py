"""The rows of a pyramid's stages, wherever their blocks stand among our parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

from effjax.interop import names as n
from effjax.models.pyramid import Stage

Rows = Callable[[Any, str, str], list[n.Row]]


def stage_rows(stage: Stage, ours: str, theirs: str, rows: Rows) -> list[n.Row]:
    """The rows of all blocks of a stage.

    A stage keeps its blocks in stacks, those of a cycle side by side in one and what is left of an uneven
    depth in others, and the first one alone; their blocks have one running number.

    Args:
      stage: the stage.
      ours: its path, `stages_2`.
      theirs: the name of their block, `{layer}` for its number.
      rows: makes the rows of one block from it, their name and our path.
    """
    made: list[n.Row] = []
    begin = 0
    if stage.first is not None:
        made += rows(stage.first, theirs.replace("{layer}", "0"), f"{ours}/first")
        begin = 1
    kinds = len(stage.blocks)
    cycles, rest = divmod(stage.depth - begin, kinds) if kinds else (0, 0)
    end = begin + cycles * kinds
    for member, block in enumerate(stage.blocks if cycles else ()):
        path = f"{ours}/stack" if kinds == 1 else f"{ours}/stack/members_{member}"
        made += [_placed(row, range(begin + member, end, kinds)) for row in rows(block, theirs, path)]
    for i in range(rest):
        of_block = rows(stage.blocks[i], theirs, f"{ours}/rest_{i}")
        made += [_placed(row, range(end + i, end + i + 1)) for row in of_block]
    return made


def _placed(row: n.Row, layers: range) -> n.Row:
    return row if isinstance(row, n.Ignored) else dataclasses.replace(row, at={**row.at, "layer": layers})

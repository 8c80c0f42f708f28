"""Compares a name map with the tensors that are there, before anything is read.

What does not fit is one error that lists every name with its expected and its found shape; a name that
differs between layers by its number alone is written once, as `blocks.{0-11}.attn.qkv.bias`.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from effjax.errors import UsageError
from effjax.interop.names import Entry, Name, Row, ignored_by
from effjax.interop.resize import Change, Request
from effjax.interop.weights import Spec

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a dotted name
_MOST_LINES = 200


@dataclasses.dataclass(frozen=True)
class Step:
    """One row to read.

    Attributes:
      entry: the row.
      dtype: of its tensors, which is one.
      changes: `{their name: what resizes it}`.
    """

    entry: Entry
    dtype: Any
    changes: Mapping[str, Change]

    def tensors(self) -> Iterator[str]:
        """Their names, in the order they are read."""
        for index in self.entry.indices():
            yield from self.entry.names(index)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be read.

    Attributes:
      steps: rows to read.
      fresh: our leaves that start anew.
      notes: sentences about what is resized, replaced or left out.
    """

    steps: tuple[Step, ...]
    fresh: tuple[str, ...]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One name that does not fit."""

    kind: str
    name: str
    expected: tuple[int, ...] | None = None
    found: tuple[int, ...] | None = None
    remark: str = ""


def compare(
    what: str,
    specs: Mapping[str, Spec],
    rows: Sequence[Row],
    entries: Sequence[Entry],
    absent: Sequence[Name],
    *,
    request: Request,
    replace: bool,
) -> Plan:
    """Matches every tensor of both sides.

    Args:
      what: the weights and what they are read as, for messages.
      specs: shape and dtype of their tensors.
      rows: the name map.
      entries: its rows, resolved against our leaves.
      absent: classifier rows whose leaves our model does not have.
      request: what resizers may know.
      replace: whether a classifier that does not fit starts anew.

    Raises:
      UsageError: where something is missing, unexpected, or of a shape that cannot be resized.
    """
    problems: list[Problem] = []
    steps: list[Step] = []
    fresh: list[str] = []
    notes: list[tuple[str, str]] = []  # what happens, and to which name
    known = {name for row in absent for name in row.their_names} if replace else set()
    notes += [("is left out: the model has no classifier", name) for name in sorted(known) if name in specs]
    for entry in entries:
        step, wrong = _match_row(entry, specs, request)
        known.update(step.tensors())
        if wrong and entry.row.classifier and replace:
            fresh += entry.row.our_paths
            notes += [("starts anew", path) for path in entry.row.our_paths]
            continue
        problems += wrong
        steps.append(step)
        notes += [(f"{_shape(specs[name].shape)} is resized", name) for name in step.changes]
    for name in specs:
        if name in known:
            continue
        ignored = ignored_by(rows, name)
        if ignored is None:
            remark = 'classes="replace" leaves it out' if _of(name, absent) else ""
            problems.append(Problem("unexpected", name, None, tuple(specs[name].shape), remark))
        else:
            notes.append((f"is left out: {ignored.reason}", name))
    if problems:
        raise UsageError(f"{what}: the weights do not fit.\n{describe(problems)}")
    return Plan(tuple(steps), tuple(fresh), _sentences(notes))


def _match_row(entry: Entry, specs: Mapping[str, Spec], request: Request) -> tuple[Step, list[Problem]]:
    problems: list[Problem] = []
    changes: dict[str, Change] = {}
    dtypes: dict[Any, str] = {}
    resize = entry.row.resize
    remark = 'classes="replace" starts it anew' if entry.row.classifier else ""
    for index in entry.indices():
        for name, shape in zip(entry.names(index), entry.shapes, strict=True):
            if name not in specs:
                paths = " + ".join(entry.row.our_paths)
                problems.append(Problem("missing", name, shape, None, remark or f"for {paths}"))
                continue
            found = tuple(specs[name].shape)
            dtypes.setdefault(specs[name].dtype, name)
            if entry.floating and not jnp.issubdtype(specs[name].dtype, jnp.floating):
                remark = f"it holds {specs[name].dtype}, and ours are real numbers"
                problems.append(Problem("wrong dtype", name, shape, found, remark))
                continue
            if resize is not None and (found != shape or request.source_grid is not None):
                change = resize.prepare(found, shape, request)
                if not isinstance(change, str):
                    changes[name] = change
                    continue
                remark = change
            if found != shape:
                problems.append(Problem("wrong shape", name, shape, found, remark))
    if len(dtypes) > 1:
        told = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
        problems.append(
            Problem("mixed dtypes", entry.row.their_names[0], remark=f"{told}: one leaf has one dtype")
        )
    return Step(entry, next(iter(dtypes), None), changes), problems


def describe(problems: Sequence[Problem]) -> str:
    """A line for each problem; names that differ by one number alone share one."""
    groups: dict[Any, list[Problem]] = {}
    for problem in problems:
        key = (problem.kind, _NUMBER.sub("#", problem.name), problem.expected, problem.found, problem.remark)
        groups.setdefault(key, []).append(problem)
    lines = []
    for (kind, _, expected, found, remark), members in groups.items():
        for name in _joined([problem.name for problem in members]):
            parts = [f"  {kind:<12} {_shown(name)}"]
            parts += [f"expected {_shape(expected)}"] if expected is not None else []
            parts += [f"found {_shape(found)}"] if found is not None else []
            parts += [f"({remark})"] if remark else []
            lines.append("  ".join(parts))
    order = ("missing", "wrong shape", "wrong dtype", "mixed dtypes", "unexpected")
    lines.sort(key=lambda line: next(i for i, kind in enumerate(order) if line.startswith(f"  {kind}")))
    rest = len(lines) - _MOST_LINES
    return "\n".join([*lines[:_MOST_LINES], *([f"  and {rest} more"] if rest > 0 else [])])


def _sentences(notes: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """One sentence for all names that the same happens to, where they differ by one number."""
    groups: dict[Any, list[str]] = {}
    for text, name in notes:
        groups.setdefault((text, _NUMBER.sub("#", name)), []).append(name)
    return tuple(f"{_shown(name)} {text}." for (text, _), names in groups.items() for name in _joined(names))


def _joined(names: Sequence[str]) -> list[str]:
    """Writes names that differ in one number as one name: `a.{0-2,5}.b`."""
    numbers = [tuple(map(int, _NUMBER.findall(name))) for name in names]
    varying = [place for place, values in enumerate(zip(*numbers, strict=True)) if len(set(values)) > 1]
    if len(names) == 1 or len(varying) != 1:
        return list(names)
    [place] = varying
    values = sorted({number[place] for number in numbers})
    matches = list(_NUMBER.finditer(names[0]))
    start, end = matches[place].span()
    return [f"{names[0][:start]}{{{_ranges(values)}}}{names[0][end:]}"]


def _ranges(values: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _shown(name: str) -> str:
    """A name as a terminal may be given it: whoever made the file may have put anything there."""
    name = name if len(name) <= 200 else f"{name[:200]}..."
    return name if name.isprintable() else repr(name)


def _of(name: str, rows: Sequence[Name]) -> bool:
    return any(name in row.their_names for row in rows)


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape[:8]))}{', ...' if len(shape) > 8 else ''}]"

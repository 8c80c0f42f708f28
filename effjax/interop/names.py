"""The name map: which tensor of another library is which of our parameters, as data.

A row says their name, our path and how the array is laid out, as an einops pattern from theirs to ours:

    Name("head.weight", "head/kernel", "o i -> i o")
    Name("blocks.{layer}.norm1.weight", "blocks/mixer_norm/scale")
    Name("blocks.{layer}.attn.qkv.weight", QKV_KERNELS, "(part h d) i -> i h d")

A placeholder such as `{layer}` is a leading axis of our leaf: `Stack` keeps `[depth, ...]`, experts add an
axis of their own. A row with several of our paths splits their tensor: along the axis `part` of the pattern
where it names one, else along `axis`, each of ours taking as much as it needs. A row with several of their
names joins them along `axis`. Leaves outside the parameters stand behind their collection's name:

    Name("bn.running_mean", "batch_stats:norm/mean")

Patterns read backwards give the way out, so one table serves both directions
and a round trip is exact.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import einops
import jax.numpy as jnp
import numpy as np

from effjax.errors import UsageError
from effjax.interop.variables import collection_of

Shape = tuple[int, ...]

AS_IS = ""  # the same shape on both sides
LINEAR = "o i -> i o"  # torch keeps a projection as [out, in]
HEADS_IN = "(h d) i -> i h d"  # onto heads: query, key, value
HEADS_IN_BIAS = "(h d) -> h d"
HEADS_OUT = "o (h d) -> h d o"  # from heads back to the width
FUSED_IN = "(part h d) i -> i h d"  # query, key and value in one matrix
FUSED_IN_BIAS = "(part h d) -> h d"
CONV = "o i h w -> h w i o"  # OIHW to HWIO
DEPTHWISE = "c 1 h w -> h w c"  # a convolution with as many groups as channels
POINTWISE = "o i 1 1 -> i o"  # a convolution of one place, which is a projection
PATCHES = "o c p q -> (p q c) o"  # a convolution whose stride is its kernel; needs sizes p and q

_TOKEN = re.compile(r"\([^)]*\)|\S+")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True)
class Name:
    """One row of a name map.

    Attributes:
      theirs: name of a tensor, or of several that are joined; `{layer}` and the like are leading axes of
        ours.
      ours: path of a leaf, or of several that the tensor is split into.
      layout: einops pattern from theirs to ours, without the placeholders' axes; "" is the same shape. Where
        a tensor is split into leaves of different kinds, a pattern for each of them.
      sizes: lengths of axes that our shape leaves open, such as `p` and `q` in `PATCHES`.
      axis: of theirs, along which several are joined or split.
      parts: lengths along `axis` where several of theirs are joined; None is equal parts.
      at: `{placeholder: their numbers}` where these are not 0, 1, 2, ...: `{"layer": range(1, 24, 2)}`.
      resize: changes their array to another shape on loading, see `effjax.interop.resize`; None refuses.
      classifier: the leaf depends on the number of classes, and may be replaced on request.
    """

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...]
    layout: str | tuple[str, ...] = AS_IS
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    axis: int = 0
    parts: tuple[int, ...] | None = None
    at: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    resize: Any = None
    classifier: bool = False

    @property
    def their_names(self) -> tuple[str, ...]:
        """Their names, always as a tuple."""
        return (self.theirs,) if isinstance(self.theirs, str) else tuple(self.theirs)

    @property
    def layouts(self) -> tuple[str, ...]:
        """A pattern for each of our paths."""
        return (self.layout,) * len(self.our_paths) if isinstance(self.layout, str) else self.layout

    @property
    def our_paths(self) -> tuple[str, ...]:
        """Our paths, always as a tuple."""
        return (self.ours,) if isinstance(self.ours, str) else tuple(self.ours)


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Tensors of theirs that are no parameters of ours.

    Attributes:
      theirs: a regular expression that matches the whole name.
      reason: why it may be left out, for people.
    """

    theirs: str
    reason: str


Row = Name | Ignored


class Entry:
    """A row with every shape resolved against our leaves.

    Attributes:
      row: the row.
      counts: lengths of the placeholders' axes.
      ours: shapes of our leaves without those axes.
      joined: shape of their tensor, after joining where there are several.
      shapes: shape of each of their tensors.
      floating: whether our leaves hold real numbers.
    """

    def __init__(self, row: Name, leaves: Mapping[str, Any]) -> None:
        self.row = row
        self.placeholders = tuple(dict.fromkeys(_PLACEHOLDER.findall(row.their_names[0])))
        lead = len(self.placeholders)
        shapes = [tuple(leaves[path].shape) for path in row.our_paths]
        if any(len(shape) < lead or shape[:lead] != shapes[0][:lead] for shape in shapes):
            raise UsageError(
                f"{self} has {lead} placeholders, which the leaves of shape {shapes} do not fit."
            )
        self.counts: Shape = shapes[0][:lead]
        self.floating = all(jnp.issubdtype(leaves[path].dtype, jnp.floating) for path in row.our_paths)
        for placeholder, count in zip(self.placeholders, self.counts, strict=True):
            if len(row.at.get(placeholder, range(count))) != count:
                raise UsageError(f"{self}: `at` lists another number of {placeholder} than our {count}.")
        self.ours: tuple[Shape, ...] = tuple(shape[lead:] for shape in shapes)
        self._sides = tuple(_sides(layout) for layout in row.layouts)
        self._interleaved = "part" in re.findall(r"\w+", self._sides[0][0])
        self._alone = [self._their_shape(i, shape) for i, shape in enumerate(self.ours)]
        self.joined: Shape = self._join_shape()
        self.shapes: tuple[Shape, ...] = self._split_shape()

    def __str__(self) -> str:
        return f"the row {' + '.join(self.row.their_names)} <-> {' + '.join(self.row.our_paths)}"

    @property
    def viewable(self) -> bool:
        """Whether ours are views of memory laid out as theirs: no axes are merged on our side."""
        return not any("(" in right for _, right in self._sides)

    def indices(self) -> Iterator[Shape]:
        """All values of the placeholders, as indices into the leading axes of ours."""
        return itertools.product(*map(range, self.counts))

    def names(self, index: Shape) -> tuple[str, ...]:
        """Their names at one value of the placeholders."""
        at = self.row.at
        numbers = {p: at[p][i] if p in at else i for p, i in zip(self.placeholders, index, strict=True)}
        return tuple(name.format(**numbers) for name in self.row.their_names)

    def slices(self) -> list[tuple[slice, ...]]:
        """Where each of theirs stands in the joined array."""
        return _slices(self.row.axis, [shape[self.row.axis] if shape else 1 for shape in self.shapes])

    def to_ours(self, joined: np.ndarray) -> list[np.ndarray]:
        """Splits and rearranges `[*lead, *joined]` into ours `[*lead, *ours]`, as views where it can."""
        lead = joined.ndim - len(self.joined)
        if self._interleaved:
            return list(self._rearrange(joined, lead, 0, stacked=True))
        if len(self.ours) == 1:
            return [self._rearrange(joined, lead, 0)]
        cuts = _slices(lead + self.row.axis, [shape[self.row.axis] for shape in self._alone])
        return [self._rearrange(joined[cut], lead, i) for i, cut in enumerate(cuts)]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Their tensors from our arrays at one value of the placeholders; the inverse of `to_ours`."""
        if self._interleaved:
            joined = self._backwards(0, list(ours), "part ")
        elif len(ours) == 1:
            joined = self._backwards(0, ours[0])
        else:
            pieces = [self._backwards(i, array) for i, array in enumerate(ours)]
            joined = np.concatenate(pieces, axis=self.row.axis)
        if len(self.shapes) == 1:
            return [joined]
        return [joined[cut] for cut in self.slices()]

    def _rearrange(self, array: np.ndarray, lead: int, which: int, stacked: bool = False) -> np.ndarray:
        left, right = self._sides[which]
        if not right:
            return array
        axes = " ".join(f"lead{i}" for i in range(lead))
        front = "part " if stacked else ""
        pattern = f"{axes} {left} -> {front}{axes} {right}"
        return einops.rearrange(array, pattern, **self._lengths(which))

    def _backwards(self, which: int, array: Any, front: str = "") -> np.ndarray:
        left, right = self._sides[which]
        if not right:
            return array
        return einops.rearrange(array, f"{front}{right} -> {left}", **self.row.sizes)

    def _lengths(self, which: int) -> dict[str, int]:
        """Lengths of the axes of the pattern that stand alone on our side, and those that the row gives."""
        tokens = _TOKEN.findall(self._sides[which][1])
        lengths = {t: n for t, n in zip(tokens, self.ours[which], strict=True) if t.isidentifier()}
        if self._interleaved:
            lengths["part"] = len(self.ours)
        return {**lengths, **self.row.sizes}

    def _their_shape(self, which: int, ours: Shape) -> Shape:
        """Shape of the tensor that a leaf of ours comes from; einops works it out on a view of one byte."""
        front = "part " if self._interleaved else ""
        if front:
            ours = (len(self.ours), *ours)
        try:
            return self._backwards(which, np.broadcast_to(np.uint8(0), ours), front).shape
        except einops.EinopsError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UsageError(f"{self} does not fit a leaf of shape {list(ours)}: {reason}.") from None

    def _join_shape(self) -> Shape:
        first, *rest = self._alone
        if self._interleaved or not rest:
            if any(shape != first for shape in rest):
                raise UsageError(f"{self} interleaves leaves of different shapes: {self._alone}.")
            return first
        total = sum(shape[self.row.axis] for shape in self._alone)
        return _with_length(first, self.row.axis, total)

    def _split_shape(self) -> tuple[Shape, ...]:
        count = len(self.row.their_names)
        if count == 1:
            return (self.joined,)
        total = self.joined[self.row.axis]
        parts = self.row.parts or (total // count,) * count
        if sum(parts) != total or len(parts) != count:
            raise UsageError(f"{self}: {count} parts {parts} do not make up a length of {total}.")
        return tuple(_with_length(self.joined, self.row.axis, part) for part in parts)


def resolve(rows: Sequence[Row], leaves: Mapping[str, Any]) -> tuple[list[Entry], list[Name]]:
    """Resolves a name map against our leaves.

    Args:
      rows: the name map.
      leaves: `{path: anything with shape and dtype}` of all variables.

    Returns:
      The resolved rows, and the classifier rows whose leaves this model does not have.

    Raises:
      UsageError: where rows name leaves that do not exist, leave some out, or name one twice. This is a
        mistake in a family, not in somebody's weights.
    """
    entries, absent, wrong = [], [], []
    seen: set[str] = set()
    collections = set(map(collection_of, leaves))
    lacking: set[str] = set()
    for row in rows:
        if isinstance(row, Ignored):
            continue
        missing = [path for path in row.our_paths if path not in leaves]
        if missing and row.classifier:
            absent.append(row)
            continue
        lacking.update({*map(collection_of, missing)} - collections)
        missing_here = [path for path in missing if collection_of(path) in collections]
        wrong += [f"{path} is in the name map and not in the model" for path in missing_here]
        wrong += [f"{path} is twice in the name map" for path in row.our_paths if path in seen]
        seen.update(row.our_paths)
        if not missing:
            entries.append(Entry(row, leaves))
    wrong += [
        f"{path} {list(leaves[path].shape)} is in the model and not in the name map"
        for path in leaves
        if path not in seen
    ]
    wrong += [f"all of {name} is missing: give the variables, not the parameters alone" for name in lacking]
    if wrong:
        raise UsageError("the name map does not fit the model:\n  " + "\n  ".join(wrong))
    return entries, absent


def ignored_by(rows: Sequence[Row], name: str) -> Ignored | None:
    """The row that says their tensor `name` is no parameter, if one does."""
    return next((row for row in rows if isinstance(row, Ignored) and re.fullmatch(row.theirs, name)), None)


def _sides(layout: str) -> tuple[str, str]:
    left, _, right = layout.partition("->")
    return left.strip(), right.strip()


def _with_length(shape: Shape, axis: int, length: int) -> Shape:
    return (*shape[:axis], length, *shape[axis + 1 :])


def _slices(axis: int, lengths: Sequence[int]) -> list[tuple[slice, ...]]:
    """Consecutive slices of the given lengths along one axis."""
    ends = list(itertools.accumulate(lengths))
    return [(slice(None),) * axis + (slice(e - n, e),) for n, e in zip(lengths, ends, strict=True)]

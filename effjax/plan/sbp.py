"""Split, broadcast, partial: what a sharding makes of an operation, and what changing one costs.

Along an axis of p devices a tensor T of |T| bytes is

    S(i)  cut along its dimension i
    B     whole on every device
    P     a sum that nobody has added up: T is what the devices hold, added

An operation has signatures: layouts of its operands with which every device computes by itself a layout of
the result. Of a contraction they follow from its letters, and nothing else has to be tabled:

    "mk,kn->mn"   along m   S(0), B    -> S(0)        along k   S(1), S(0) -> P
                  along n   B,    S(1) -> S(1)        whole     B, B -> B
                  linear in an operand: P, B -> P and B, P -> P

Where what is made has another layout than what is needed, it is boxed, at so many bytes over all links:

    S(i) -> S(j)  (p-1)/p |T|   all-to-all            S -> B  (p-1) |T|    all-gather
    P -> S        (p-1) |T|     reduce-scatter        P -> B  2(p-1) |T|   all-reduce
    B -> S, P and S -> P  0

`cheapest` chooses a signature for every operation so that the boxing of a graph costs least.

Yuan et al. 2021, arXiv:2110.15032 (OneFlow).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import lax

from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Split:
    """Cut along a dimension."""

    dimension: int


@dataclasses.dataclass(frozen=True)
class Broadcast:
    """Whole on every device."""


@dataclasses.dataclass(frozen=True)
class Partial:
    """To be added up over the devices."""


Layout = Split | Broadcast | Partial
B, P = Broadcast(), Partial()


@dataclasses.dataclass(frozen=True)
class Signature:
    """Layouts with which an operation needs nobody else.

    Attributes:
      operands: in their order.
      result: what comes out.
    """

    operands: tuple[Layout, ...]
    result: Layout


def contraction(equation: str) -> tuple[Signature, ...]:
    """The signatures of an einsum.

    Args:
      equation: as of `jnp.einsum`, with an arrow and no ellipsis; no operand has a letter twice.

    Raises:
      UsageError: for an equation of another kind.
    """
    front, arrow, result = equation.replace(" ", "").partition("->")
    operands = front.split(",")
    if not arrow or "." in equation or any(len(set(one)) < len(one) for one in (*operands, result)):
        raise UsageError(f"'{equation}' is no equation whose operands have each letter once, with an arrow.")
    found = []
    for letter in dict.fromkeys(front.replace(",", "")):
        cut = tuple(Split(one.index(letter)) if letter in one else B for one in operands)
        found.append(Signature(cut, Split(result.index(letter)) if letter in result else P))
    for number in range(len(operands)):
        one = tuple(P if other == number else B for other in range(len(operands)))
        found.append(Signature(one, P))
    return (*found, Signature((B,) * len(operands), B))


def pointwise(dimensions: int, operands: int = 1, linear: bool = False) -> tuple[Signature, ...]:
    """The signatures of an operation on equal shapes, place by place.

    Args:
      dimensions: of the shape.
      operands: how many.
      linear: whether it is a sum of its operands, and so may be taken of parts: adding, and no gelu.
    """
    alike: list[Layout] = [
        *(Split(dimension) for dimension in range(dimensions)),
        B,
        *([P] if linear else []),
    ]
    return tuple(Signature((layout,) * operands, layout) for layout in alike)


def boxing(source: Layout, target: Layout, devices: int, size: int) -> float:
    """Bytes that all devices together receive where a tensor of `size` bytes changes its layout."""
    if source in (target, B) or (isinstance(source, Split) and target == P):
        return 0.0
    if isinstance(source, Split):
        moved = (devices - 1) / devices if isinstance(target, Split) else devices - 1
    else:
        moved = 2 * (devices - 1) if target == B else devices - 1
    return float(moved * size)


def boxing_on(source: Sequence[Layout], target: Sequence[Layout], mesh: Sequence[int], size: int) -> float:
    """The same on a mesh of several axes, one axis after the other, the last first.

    Args:
      source: a layout for each axis.
      target: likewise.
      mesh: devices along each axis.
      size: bytes of the tensor.
    """
    total, now = 0.0, list(source)
    for axis in reversed(range(len(mesh))):
        others = [other for other in range(len(mesh)) if other != axis]
        groups = math.prod(mesh[other] for other in others)
        cut = math.prod(mesh[other] for other in others if isinstance(now[other], Split))
        total += groups * boxing(now[axis], target[axis], mesh[axis], 1) * size / cut
        now[axis] = target[axis]
    return total


def received(kind: str, devices: int, size: int) -> float:
    """Bytes that a collective of XLA's brings to all devices of a group, of a whole array of `size` bytes."""
    each = {"all-reduce": 2 * (devices - 1), "all-gather": devices - 1, "reduce-scatter": devices - 1}
    return float({**each, "all-to-all": (devices - 1) / devices}[kind] * size)


def boxed(x: jax.Array, source: Layout, target: Layout, axis: str) -> jax.Array:
    """Changes the layout of what a device holds of a tensor; within `jax.shard_map` over the axis."""
    number, devices = lax.axis_index(axis), lax.axis_size(axis)
    if source == target:
        return x
    if isinstance(target, Split):
        dimension = target.dimension
        if isinstance(source, Split):
            return lax.all_to_all(x, axis, dimension, source.dimension, tiled=True)
        if source == P:
            return lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True)
        part = x.shape[dimension] // devices
        return lax.dynamic_slice_in_dim(x, number * part, part, dimension)
    if target == B:
        if isinstance(source, Split):
            return lax.all_gather(x, axis, axis=source.dimension, tiled=True)
        return lax.psum(x, axis)
    if isinstance(source, Split):  # each adds its own part, and zeros elsewhere
        whole = list(x.shape)
        whole[source.dimension] *= devices
        place = number * x.shape[source.dimension]
        return lax.dynamic_update_slice_in_dim(jax.numpy.zeros(whole, x.dtype), x, place, source.dimension)
    return jax.numpy.where(number == 0, x, jax.numpy.zeros_like(x))


@dataclasses.dataclass(frozen=True)
class Operation:
    """A node of a graph.

    Attributes:
      name: of what it makes.
      operands: names of what it takes.
      signatures: how it may be laid out; of an input, its possible layouts with no operands.
      size: bytes of what it makes.
    """

    name: str
    operands: tuple[str, ...]
    signatures: tuple[Signature, ...]
    size: int


def given(name: str, size: int, *layouts: Layout) -> Operation:
    """An input that has one of these layouts."""
    return Operation(name, (), tuple(Signature((), layout) for layout in layouts), size)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A signature for every operation.

    Attributes:
      chosen: by the name of what is made.
      bytes: that boxing brings to all devices.
    """

    chosen: Mapping[str, Signature]
    bytes: float


def cost(graph: Sequence[Operation], chosen: Mapping[str, Signature], devices: int) -> float:
    """Bytes of the boxing between operations; what several need in one layout is boxed once."""
    sizes = {one.name: one.size for one in graph}
    asked = {
        (name, layout)
        for one in graph
        for name, layout in zip(one.operands, chosen[one.name].operands, strict=True)
    }
    return sum(boxing(chosen[name].result, layout, devices, sizes[name]) for name, layout in asked)


def cheapest(graph: Sequence[Operation], devices: int, ends: Mapping[str, Layout] | None = None) -> Plan:
    """The plan whose boxing costs least.

    By dynamic programming over the graph in its order: what is still to be used, with its layout and the
    layouts that were asked of it, is all that the rest depends on. Exact, at a cost that grows with how
    much is alive at a time.

    Args:
      graph: operations, each behind its operands.
      devices: along the axis.
      ends: layouts in which results are needed.

    Raises:
      UsageError: for a graph out of order, or an end that nothing makes.
    """
    ends = ends or {}
    whole = [*graph, *(_end(name, layout) for name, layout in ends.items())]
    place = {one.name: number for number, one in enumerate(whole)}
    for number, one in enumerate(whole):
        late = [name for name in one.operands if place.get(name, number) >= number]
        if late:
            raise UsageError(f"{one.name} takes {', '.join(late)}, which no operation before it makes.")
    last = {name: number for number, one in enumerate(whole) for name in one.operands}
    # What is alive -> (layout, layouts asked of it); and of each such state the cheapest way there.
    states: dict[Any, tuple[float, dict[str, Signature]]] = {frozenset(): (0.0, {})}
    sizes = {one.name: one.size for one in whole}
    for number, one in enumerate(whole):
        following: dict[Any, tuple[float, dict[str, Signature]]] = {}
        for state, (paid, chosen) in states.items():
            alive = {name: (layout, asked) for name, layout, asked in state}
            for signature in one.signatures:
                after, price = dict(alive), paid
                for name, wanted in zip(one.operands, signature.operands, strict=True):
                    layout, asked = after[name]
                    if wanted not in asked:
                        price += boxing(layout, wanted, devices, sizes[name])
                        after[name] = layout, asked | {wanted}
                after = {name: kept for name, kept in after.items() if last.get(name, -1) > number}
                if last.get(one.name, -1) > number:
                    after[one.name] = signature.result, frozenset()
                key = frozenset((name, layout, asked) for name, (layout, asked) in after.items())
                if key not in following or price < following[key][0]:
                    following[key] = price, {**chosen, one.name: signature}
        states = following
    price, chosen = min(states.values(), key=lambda way: way[0])
    return Plan({one.name: chosen[one.name] for one in graph}, price)


def _end(name: str, layout: Layout) -> Operation:
    return Operation(f"end of {name}", (name,), (Signature((layout,), layout),), 0)

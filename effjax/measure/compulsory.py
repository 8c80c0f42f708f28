"""The bytes that no schedule can avoid: what goes in and what comes out, once each."""

import dataclasses
import math
from collections.abc import Collection

from effjax.measure.bits import bytes_of
from effjax.measure.graph import Graph, Node, devices_of, scan_layout
from effjax.measure.traffic import is_fused, is_update, taken


@dataclasses.dataclass(frozen=True)
class Compulsory:
    """Bytes that must move, by where they lie; the leaves of all arguments are the inputs, in order."""

    inputs: tuple[int, ...]
    constants: int
    outputs: tuple[int, ...]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.inputs) + self.constants + sum(self.outputs)


def compulsory(graph: Graph, donated: Collection[int] = ()) -> Compulsory:
    """Bytes of inputs and captured constants that are used, read once, and of outputs, written once.

    Of an input that only gathers and slices touch (a table of embeddings), the rows taken count. An input
    returned as it came counts nothing. Where a donated input is updated in part and returned (a cache of keys
    and values), the other parts stay where they are and count only if something reads them. Of the branches
    of a `cond` the one that asks for least counts; of a `while` only its condition, as it may end at once.

    Args:
      graph: the whole function.
      donated: numbers of the inputs whose memory the outputs may take.
    """
    inputs = {*graph.inputs, *graph.constants}
    made_by = {result: node for node in graph.nodes for result in node.results}
    used = [0] * len(graph.avals)
    written = dict.fromkeys(graph.outputs, 0)
    for out in written:
        if out is None or out in inputs:
            continue
        origin, updated = _origin(made_by, out)
        if origin in donated:
            written[out] = min(updated, bytes_of(graph.avals[out]))
        else:
            written[out] = bytes_of(graph.avals[out])
            used[out] = _size(graph, out)
    _backwards(graph, used)

    def read(number: int) -> int:
        return math.ceil(bytes_of(graph.avals[number]) * used[number] / max(1, _size(graph, number)))

    return Compulsory(
        inputs=tuple(map(read, graph.inputs)),
        constants=sum(map(read, {*graph.constants} - {*graph.inputs})),
        # What is returned twice is written once.
        outputs=tuple(written.pop(out, 0) for out in graph.outputs),
    )


def _backwards(graph: Graph, used: list[int]) -> None:
    """Fills in how many elements of each value the program needs, given those of the outputs."""
    for node in reversed(graph.nodes):
        if node.bodies:
            needs = _nested(node, [used[result] > 0 for result in node.results])
        else:
            needs = [_needed(graph, node, used, position) for position in range(len(node.operands))]
        for operand, need in zip(node.operands, needs, strict=True):
            used[operand] = min(_size(graph, operand), used[operand] + need)


def _needed(graph: Graph, node: Node, used: list[int], position: int) -> int:
    operand = _size(graph, node.operands[position])
    wanted = max((used[result] for result in node.results), default=0)
    if node.equation.effects:
        return operand
    if node.name in ("gather", "dynamic_slice", "slice") and position == 0:
        return min(wanted, taken(node))
    if is_update(node):
        return wanted if position == 0 else operand
    # Half of an elementwise result asks for half of its operand; a product may ask for all of it.
    same = all(_size(graph, result) == operand for result in node.results)
    return wanted if same and is_fused(node) else operand


def _nested(node: Node, wanted: list[bool]) -> list[int]:
    """What the bodies need: of branches that which asks for least, of loops one trip of what stays."""
    needs: list[list[int]] = []
    for place, body in enumerate(node.bodies):
        used = [0] * len(body.avals)
        condition = node.name == "while" and place == 0
        for out, want in zip(body.outputs, [True] if condition else wanted, strict=True):
            # A carry that comes out as it went in asks for nothing.
            if out is not None and out not in body.inputs and want:
                used[out] = _size(body, out)
        _backwards(body, used)
        of_body = dict(zip(node.operands_of(place), (used[number] for number in body.inputs), strict=True))
        needs.append([of_body.get(operand, 0) for operand in node.operands])
    if node.name == "cond":
        return [1, *[min(column) for column in zip(*(need[1:] for need in needs), strict=True)]]
    if node.name == "while":
        # It may stop before the first trip.
        return needs[0]
    if node.name == "shard_map":
        return [need * devices_of(node.equation) for need in needs[0]]
    length = node.equation.params["length"]
    constants, carries = scan_layout(node.equation)
    return [need * (1 if place < constants + carries else length) for place, need in enumerate(needs[0])]


def _origin(made_by: dict[int, Node], number: int) -> tuple[int, int]:
    """The value whose memory an output continues through updates in place, and the bytes they write.

    Through a scan: a carry, or a stacked output updated from the stacked input of the same shape.
    """
    updated = 0
    while (node := made_by.get(number)) is not None:
        if is_update(node):
            source = 2 if node.name.startswith("scatter") else 1
            updated += bytes_of(node.equation.invars[source].aval)
            number = node.operands[0]
        elif node.name == "scan":
            body = node.bodies[0]
            out = body.outputs[node.results.index(number)]
            inner = {result: node for node in body.nodes for result in node.results}
            if out is None:
                break
            start, each = _origin(inner, out)
            if start not in body.inputs:
                break
            updated += each * node.equation.params["length"]
            number = node.operands[body.inputs.index(start)]
        else:
            break
    return number, updated


def _size(graph: Graph, number: int) -> int:
    return math.prod(getattr(graph.avals[number], "shape", ()))

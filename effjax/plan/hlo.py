"""Reads the text of a compiled program: its computations, how often each runs, what it multiplies.

Only what a plan needs: names, types, opcodes, operands and attributes of instructions. The text of TPU, GPU
and CPU programs differs in layouts and in what the compilers fuse, not in this.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\) -> .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*)$")
_OPCODE = re.compile(r"([a-z][a-z0-9-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+[a-z]*)?)\[([\d,]*)\]")

# The attributes that name computations an instruction runs once, on its own operands.
_CALLS = {
    "call": ("to_apply",),
    "fusion": ("calls",),
    "async-start": ("calls",),
    "custom-call": ("called_computations",),
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    """Everything behind the operands; for a constant, its value."""

    def called(self, attribute: str) -> tuple[str, ...]:
        """The computations that an attribute names: `body=%region.1`, `calls={%a, %b}`."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[^\s,}}]+)", self.attributes)
        return tuple(re.findall(r"%([^\s,}]+)", found.group(1))) if found else ()


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: computations by name, instructions of each by name, in order."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str


def parse(text: str) -> Module:
    """Reads the text of an HLO module."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _LINE.match(line)):
            instruction = _instruction(*found.groups())
            if instruction is not None:
                current.update(_taken(instruction, current))
                current[instruction.name] = instruction
    return Module(computations, entry)


def _instruction(name: str, rest: str) -> Instruction | None:
    end = _close(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    opcode = _OPCODE.match(rest)
    if opcode is None:
        return None
    close = _close(rest, opcode.end() - 1)
    inside, attributes = rest[opcode.end() : close], rest[close + 1 :]
    if opcode.group(1) == "constant":
        attributes = inside
    operands = tuple(re.findall(r"%([^\s,()]+)", inside))
    return Instruction(name, type_, opcode.group(1), operands, attributes)


def _taken(instruction: Instruction, before: Mapping[str, Instruction]) -> dict[str, Instruction]:
    """The elements of tuples that an instruction takes in passing: newer compilers write `%tuple#1`."""
    found = {}
    for operand in instruction.operands:
        name, mark, place = operand.rpartition("#")
        if mark and operand not in before and name in before:
            type_ = _elements(before[name].type)[int(place)]
            found[operand] = Instruction(operand, type_, "get-tuple-element", (name,), f"index={place}")
    return found


def _elements(type_: str) -> list[str]:
    """The types of a tuple's elements."""
    elements, depth, start = [], 0, 1
    for place, letter in enumerate(type_):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            elements.append(re.sub(r"/\*.*?\*/", "", type_[start:place]).strip())
            start = place + 1
    return elements


def _close(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    return len(text) - 1


def arrays(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """The element type and shape of each array of a type, which may be a tuple."""
    return [
        (element, tuple(int(side) for side in sides.split(",") if side))
        for element, sides in _ARRAY.findall(type_)
        if element not in ("token", "opaque")
    ]


def bytes_of(type_: str) -> int:
    """Bytes of all arrays of a type; two int4 take one byte."""
    return sum(math.ceil(math.prod(shape) * _bits(element) / 8) for element, shape in arrays(type_))


def _bits(element: str) -> int:
    if element == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", element)
    return int(found.group(1)) if found else 0


def walk(module: Module) -> Iterator[tuple[Instruction, Mapping[str, Instruction], int | None]]:
    """Every instruction that runs, the computation it stands in, and how often it runs.

    A number of None stands for a loop whose length the text does not say. Branches of conditionals are left
    out: which one runs depends on data, and a floor may not count what might not happen.
    """
    yield from _walk(module, module.entry, 1)


def _walk(
    module: Module, name: str, times: int | None
) -> Iterator[tuple[Instruction, Mapping[str, Instruction], int | None]]:
    computation = module.computations.get(name, {})
    for instruction in computation.values():
        yield instruction, computation, times
        if instruction.opcode == "while":
            trips = trip_count(module, instruction)
            inner = None if trips is None or times is None else times * trips
            for body in instruction.called("body"):
                yield from _walk(module, body, inner)
        else:
            for attribute in _CALLS.get(instruction.opcode, ()):
                for called in instruction.called(attribute):
                    yield from _walk(module, called, times)


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often a `while` runs: as the compiler says, or as its condition and its body show.

    The condition compares one carried integer with a constant, the body adds constants to it, and it starts
    at 0, as JAX's loops and those that the partitioner makes do. None for any other loop.
    """
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known.group(1))
    (condition,) = (module.computations.get(name, {}) for name in loop.called("condition"))
    (body,) = (module.computations.get(name, {}) for name in loop.called("body"))
    compared = [one for one in condition.values() if "direction=LT" in one.attributes]
    if len(compared) != 1 or compared[0].opcode != "compare":
        return None
    counter, bound = (condition.get(name) for name in compared[0].operands)
    if counter is None or bound is None or bound.opcode != "constant":
        return None
    place = _place(counter)
    step = None if place is None else _step(body, place)
    return -(-int(bound.attributes) // step) if step else None


def _place(instruction: Instruction) -> int | None:
    """Which carried value an instruction takes out of the loop's tuple."""
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found.group(1)) if instruction.opcode == "get-tuple-element" and found else None


def _step(body: Mapping[str, Instruction], place: int) -> int | None:
    """What one trip adds to the carried value at a place."""
    root = list(body.values())[-1]
    current = body.get(root.operands[place]) if root.opcode == "tuple" else None
    total = 0
    while current is not None and current.opcode in ("add", "copy"):
        operands = [body[name] for name in current.operands]
        amounts = [int(one.attributes) for one in operands if one.opcode == "constant"]
        if len(amounts) != (current.opcode == "add"):
            return None
        total += sum(amounts)
        current = next(one for one in operands if one.opcode != "constant")
    return total if current is not None and _place(current) == place else None


@dataclasses.dataclass(frozen=True)
class Product:
    """Matrix products `[batch, m, k] x [batch, k, n]` of one shape."""

    batch: int
    m: int
    n: int
    k: int
    times: int
    """How many, those of all trips together."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all of them."""
        return self.batch * self.m * self.n * self.k * self.times


def products(module: Module) -> list[Product]:
    """The matrix products of a program whose dots are still written out, those with the most work first."""
    found: collections.Counter[tuple[int, int, int, int]] = collections.Counter()
    for instruction, computation, times in walk(module):
        if instruction.opcode == "dot" and times is not None:
            lhs, rhs = (arrays(computation[name].type)[0][1] for name in instruction.operands[:2])
            batch = math.prod(lhs[side] for side in _sides(instruction, "lhs_batch_dims"))
            k = math.prod(lhs[side] for side in _sides(instruction, "lhs_contracting_dims"))
            found[batch, math.prod(lhs) // (batch * k), math.prod(rhs) // (batch * k), k] += times
    listed = [Product(*shape, times) for shape, times in found.items()]
    return sorted(listed, key=lambda one: -one.macs)


def _sides(instruction: Instruction, name: str) -> list[int]:
    found = re.search(rf"{name}=\{{([\d,]*)\}}", instruction.attributes)
    return [int(side) for side in found.group(1).split(",") if side] if found else []


def multiply_accumulates(module: Module) -> tuple[int, list[str]]:
    """What one device multiplies and adds, in a program whose dots and convolutions are still written out.

    Returns:
      Multiply-accumulates, and the loops that could not be counted.
    """
    total, unknown = 0, []
    for instruction, computation, times in walk(module):
        one = _macs(instruction, computation)
        if one and times is None:
            unknown.append(f"{instruction.name}: in a loop whose length is not known")
        elif one and times is not None:
            total += one * times
    return total, unknown


def _macs(instruction: Instruction, computation: Mapping[str, Instruction]) -> int:
    if instruction.opcode not in ("dot", "convolution", "ragged-dot"):
        return 0
    output = math.prod(arrays(instruction.type)[0][1])
    lhs, rhs = (arrays(computation[name].type)[0][1] for name in instruction.operands[:2])
    if instruction.opcode == "convolution":
        return _convolution(instruction.attributes, arrays(instruction.type)[0][1], lhs, rhs)
    return output * math.prod(lhs[side] for side in _sides(instruction, "lhs_contracting_dims"))


def _convolution(attributes: str, output: tuple[int, ...], lhs: tuple[int, ...], rhs: tuple[int, ...]) -> int:
    """As `effjax.measure` counts one: positions x kernel, the smaller grid where input and output differ."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None  # every convolution has them
    of_lhs, _, of_output = labels.groups()
    spatial = [label for label in of_output if label.isdigit()]
    positions = math.prod(min(lhs[of_lhs.index(s)], output[of_output.index(s)]) for s in spatial)
    return output[of_output.index("b")] * positions * math.prod(rhs)

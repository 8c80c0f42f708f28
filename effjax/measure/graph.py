"""A jaxpr laid flat: calls inlined, dead work gone, every equation with its module path.

A compiler sees through calls, so whatever asks what is fused with what, or how long a value lives, must too.
What remains nested is what runs another number of times than the equations around it: the bodies of `scan`,
`while`, `cond` and `shard_map`. What is written once for each platform is laid flat too, as it is written
for those that are not named: the arithmetic that an operation stands for, and not a detour that one needs.

Everything that a version of JAX may lay out differently is read in this file and in `loops.py`: how a scan
marks its carries, what a closed jaxpr is, how name stacks print.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

# Primitives whose one jaxpr runs once, on the equation's own operands.
_CALLS = ("checkpoint", "closed_call", "composite", "core_call", "jit", "named_call", "pjit", "remat2")
_CALLS_WITH_RULES = ("custom_jvp_call", "custom_vjp_call", "custom_vmap_call")
# Of a kernel that is chosen at lowering the reference, whose arithmetic it does.
_KERNELS = ("kernel_or_reference",)
_INLINED = frozenset(_CALLS + _CALLS_WITH_RULES + _KERNELS)


@dataclasses.dataclass(frozen=True)
class Node:
    """One equation; its operands and results are numbers into `Graph.avals`."""

    equation: Any
    operands: tuple[int, ...]
    results: tuple[int, ...]
    scope: str
    """Module path within the graph: `ViT/blocks/attention/query`."""
    bodies: tuple["Graph", ...] = ()
    """Of `scan` and `shard_map` the body, of `while` the condition and the body, of `cond` the branches."""

    @property
    def name(self) -> str:
        """The name of the primitive."""
        return self.equation.primitive.name

    def operands_of(self, body: int) -> tuple[int, ...]:
        """What of the operands a body sees, in the order of its inputs; stacked ones by the slice."""
        if self.name == "cond":
            return self.operands[1:]
        if self.name == "while":
            condition, constants = (self.equation.params[name] for name in ("cond_nconsts", "body_nconsts"))
            carries = self.operands[condition + constants :]
            seen = self.operands[condition : condition + constants] if body else self.operands[:condition]
            return seen + carries
        return self.operands


@dataclasses.dataclass
class Graph:
    """Nodes in the order of the program, over numbered values.

    Attributes:
      avals: the abstract value of each number.
      inputs: numbers of the jaxpr's inputs.
      constants: numbers of the arrays that it, or a call inlined into it, closed over.
      outputs: numbers of the outputs that are wanted; None in place of the others.
      literals: values of the scalars written in the program, by number.
      nodes: what an output or an effect needs.
    """

    avals: list[Any] = dataclasses.field(default_factory=list)
    inputs: list[int] = dataclasses.field(default_factory=list)
    constants: list[int] = dataclasses.field(default_factory=list)
    outputs: list[int | None] = dataclasses.field(default_factory=list)
    literals: dict[int, Any] = dataclasses.field(default_factory=dict)
    nodes: list[Node] = dataclasses.field(default_factory=list)

    def number(self, variable: Any) -> int:
        """Numbers a new value."""
        self.avals.append(variable.aval)
        return len(self.avals) - 1


def flatten(jaxpr: Any, wanted: Sequence[bool] | None = None) -> Graph:
    """Lays a jaxpr flat, leaving out what no wanted output needs.

    Args:
      jaxpr: open or closed.
      wanted: for each output, whether anything reads it; all of them by default.
    """
    jaxpr = _open(jaxpr)
    wanted = [True] * len(jaxpr.outvars) if wanted is None else wanted
    graph = Graph()
    graph.inputs = [graph.number(variable) for variable in jaxpr.invars]
    graph.outputs = _inline(graph, jaxpr, graph.inputs, wanted, "")
    _prune(graph)
    return graph


def _inline(
    graph: Graph, jaxpr: Any, inputs: Sequence[int], wanted: Sequence[bool], scope: str
) -> list[int | None]:
    """Appends the nodes of a jaxpr to the graph; returns the numbers of its outputs."""
    jaxpr = _open(jaxpr)
    numbers = dict(zip(jaxpr.invars, inputs, strict=True))
    for variable in jaxpr.constvars:
        numbers[variable] = graph.number(variable)
        graph.constants.append(numbers[variable])

    def number_of(atom: Any) -> int:
        if is_variable(atom):
            return numbers[atom]
        number = graph.number(atom)
        graph.literals[number] = atom.val
        return number

    for equation, read in live_equations(jaxpr, wanted):
        operands = tuple(number_of(atom) for atom in equation.invars)
        inner = join_scopes(scope, scope_of(equation))
        default = _default_branch(equation)
        if equation.primitive.name in _INLINED or default is not None:
            body, seen = (jaxprs_of(equation)[0], operands) if default is None else (default, operands[1:])
            outputs = _inline(graph, body, seen, read, inner)
            made = zip(equation.outvars, outputs, strict=True)
            numbers.update({variable: number for variable, number in made if number is not None})
        else:
            results = [graph.number(variable) for variable in equation.outvars]
            numbers.update(zip(equation.outvars, results, strict=True))
            bodies = tuple(flatten(body, want) for body, want in _bodies(equation, read))
            graph.nodes.append(Node(equation, operands, tuple(results), inner, bodies))
    return [number_of(out) if want else None for out, want in zip(jaxpr.outvars, wanted, strict=True)]


def _default_branch(equation: Any) -> Any:
    """The branch of `jax.lax.platform_dependent` for all platforms that it does not name, if it is one."""
    platforms = equation.params.get("branches_platforms") if equation.primitive.name == "cond" else None
    return equation.params["branches"][platforms.index(None)] if platforms and None in platforms else None


def _bodies(equation: Any, read: list[bool]) -> list[tuple[Any, list[bool] | None]]:
    """The jaxprs that stay nested, each with which of its outputs are wanted."""
    parameters = equation.params
    match equation.primitive.name:
        case "scan":
            carries = scan_layout(equation)[1]
            return [(jaxprs_of(equation)[0], [True] * carries + read[carries:])]
        case "while":
            return [(parameters["cond_jaxpr"], None), (parameters["body_jaxpr"], None)]
        case "cond":
            return [(branch, read) for branch in parameters["branches"]]
        case "shard_map":
            return [(parameters["jaxpr"], read)]
    return []


def _prune(graph: Graph) -> None:
    """Drops what an inlined call turned out not to need."""
    needed = {number for number in graph.outputs if number is not None}
    kept = []
    for node in reversed(graph.nodes):
        if needed.intersection(node.results) or node.equation.effects:
            kept.append(node)
            needed.update(node.operands)
    graph.nodes = kept[::-1]


def scan_layout(equation: Any) -> tuple[int, int]:
    """How many of a scan's operands are constants, and how many are carries; the rest are stacked.

    Only stacked inputs and outputs gain a dimension on their way out of the body. Told this way, rather than
    from `num_carry`, because jax 0.12 renamed the fields that say it.
    """
    inner = _open(jaxprs_of(equation)[0])
    carries = sum(_rank(a) == _rank(b) for a, b in zip(equation.outvars, inner.outvars, strict=True))
    unstacked = sum(_rank(a) == _rank(b) for a, b in zip(equation.invars, inner.invars, strict=True))
    return unstacked - carries, carries


def devices_of(equation: Any) -> int:
    """How many devices run the body of a `shard_map`: those along the axes it makes manual."""
    parameters = equation.params
    mesh = parameters["mesh"].shape
    name = "newly_manual_axes" if "newly_manual_axes" in parameters else "manual_axes"  # as jax 0.10.1 has it
    axes = parameters[name]
    return math.prod(mesh[axis] for axis in axes)


def live_equations(jaxpr: Any, wanted: Sequence[bool]) -> list[tuple[Any, list[bool]]]:
    """The equations that a wanted output needs, in order, each with which of its outputs are read.

    A compiler drops the rest, so counting it would not agree with what runs.
    """
    needed = {out for out, want in zip(jaxpr.outvars, wanted, strict=True) if want and is_variable(out)}
    live = []
    for equation in reversed(jaxpr.eqns):
        read = [out in needed for out in equation.outvars]
        if any(read) or equation.effects:
            live.append((equation, read))
            needed.update(filter(is_variable, equation.invars))
    return live[::-1]


def jaxprs_of(equation: Any) -> list[Any]:
    """Every jaxpr among the parameters of an equation."""
    found = []
    for parameter in equation.params.values():
        for item in parameter if isinstance(parameter, list | tuple) else [parameter]:
            if hasattr(item, "eqns"):
                found.append(item)
    return found


def scope_of(equation: Any) -> str:
    """The module path of an equation: `ViT/blocks/attention/query`, whatever transformations went over it.

    Linen opens a named scope for each module call, under the module's name, with the method's name behind a
    dot unless it is `__call__`. Dropped: the marks of `jvp`, `transpose`, `vmap` and rematerialisation,
    methods, and einsum's own scopes. So a layer's backward pass stands with the layer.
    """
    path: list[str] = []
    for part in str(equation.source_info.name_stack).split("/"):
        while wrapped := re.fullmatch(r"\w+\((.*)\)", part):
            part = wrapped.group(1)
        if not part or "->" in part or part in ("rematted_computation", "checkpoint"):
            continue
        module, dot, _ = part.partition(".")
        if not (dot and path and path[-1] == module):
            path.append(module)
    return "/".join(path)


def join_scopes(outer: str, inner: str) -> str:
    """Joins two scope paths, either of which may be empty."""
    return f"{outer}/{inner}" if outer and inner else outer or inner


def is_variable(atom: Any) -> bool:
    """Whether an operand is a variable, not a literal."""
    return not hasattr(atom, "val")


def _open(jaxpr: Any) -> Any:
    """The jaxpr inside a closed one; from jax 0.12 on the two are one class."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _rank(atom: Any) -> int:
    return len(getattr(atom.aval, "shape", ()))

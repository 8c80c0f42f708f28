"""One pass over a jaxpr: what each equation does, how often it runs, and in which module it stands.

Everything that a version of JAX may lay out differently is read in this file and in `loops.py`: how a scan
marks its carries, what a closed jaxpr is, how name stacks print.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from effjax.errors import UsageError, did_you_mean
from effjax.matching import Rules, compile_rules
from effjax.measure import loops, operations

# Primitives whose one jaxpr runs once, on the equation's own operands.
_CALLS = ("checkpoint", "closed_call", "composite", "core_call", "jit", "named_call", "pjit", "remat2")
_CALLS_WITH_RULES = ("custom_jvp_call", "custom_vjp_call")


class Value(NamedTuple):
    """What is known of a variable without running anything."""

    weight: bool = False
    """It depends on parameters and constants alone."""
    number: int | None = None
    """Its value, where it is a known integer scalar: a loop's bound, mostly."""


@dataclasses.dataclass
class Tally:
    """Multiply-accumulates by `(scope, kind)`, and what could not be counted, in words."""

    macs: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    unknown: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: "Tally", times: int = 1) -> None:
        """Adds another tally, its work done `times` over."""
        for key, macs in other.macs.items():
            self.macs[key] += macs * times
        if times:
            self.unknown += [line for line in other.unknown if line not in self.unknown]


class Walker:
    """Walks jaxprs under one choice of branches and of trip counts that the program does not say.

    Args:
      branches: `(regexp, index)` rules that pick the branch of a `cond` by its scope; the dearest by default.
      trips: `(regexp, trips)` rules for `while` loops whose trip count depends on data.
    """

    def __init__(self, branches: Rules = (), trips: Rules = ()) -> None:
        self._branches = compile_rules(branches, "branches")
        self._trips = compile_rules(trips, "trips")
        self._handlers: dict[str, Callable[..., tuple[Tally, list[Value]]]] = {
            "scan": self._scan,
            "while": self._while,
            "cond": self._cond,
            "shard_map": self._shard_map,
            **dict.fromkeys(_CALLS + _CALLS_WITH_RULES, self._call),
        }

    def walk(
        self, jaxpr: Any, values: Sequence[Value], wanted: Sequence[bool], scope: str = ""
    ) -> tuple[Tally, list[Value]]:
        """Counts one run of `jaxpr`, leaving out what no wanted output needs.

        Args:
          jaxpr: open or closed.
          values: what is known of each input.
          wanted: for each output, whether anything reads it.
          scope: the scope path around the jaxpr.

        Returns:
          The tally, and what is known of each output.
        """
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        known = dict.fromkeys(jaxpr.constvars, Value(weight=True))
        known.update(zip(jaxpr.invars, values, strict=True))
        tally = Tally()
        for equation, read in live_equations(jaxpr, wanted):
            operands = [_value_of(known, operand) for operand in equation.invars]
            inner = join_scopes(scope, scope_of(equation))
            done, results = self._equation(equation, operands, read, inner)
            tally.add(done)
            known.update(zip(equation.outvars, results, strict=True))
        outputs = zip(jaxpr.outvars, wanted, strict=True)
        return tally, [_value_of(known, out) if want else Value() for out, want in outputs]

    def _equation(
        self, equation: Any, values: list[Value], wanted: list[bool], scope: str
    ) -> tuple[Tally, list[Value]]:
        name = equation.primitive.name
        if name in self._handlers:
            return self._handlers[name](equation, values, wanted, scope)
        tally, weights = Tally(), [value.weight for value in values]
        number = values[0].number if name == "convert_element_type" else None
        if name == "dot_general":
            tally.macs[scope, operations.kind_of_dot(equation, weights)] = operations.dot_macs(equation)
        elif name == "conv_general_dilated":
            tally.macs[scope, "convolution"] = operations.convolution_macs(equation)
        elif name == "ragged_dot_general":
            tally.macs[scope, "dense"] = operations.ragged_dot_macs(equation)
        elif name == "pallas_call":
            _kernel(equation, scope, tally)
        elif operations.is_opaque(name) or self._hides_work(equation):
            tally.unknown.append(f"{name} at {scope or 'the top'}: its work is not known")
        return tally, [Value(all(weights), number)] * len(equation.outvars)

    def _call(self, equation: Any, values: list[Value], wanted: list[bool], scope: str) -> Any:
        return self.walk(_jaxprs_of(equation)[0], values, wanted, scope)

    def _shard_map(self, equation: Any, values: list[Value], wanted: list[bool], scope: str) -> Any:
        """The body is what one device does; every device along the manual axes does it."""
        once, results = self.walk(equation.params["jaxpr"], values, wanted, scope)
        mesh = equation.params["mesh"].shape
        tally = Tally()
        tally.add(once, math.prod(mesh[axis] for axis in equation.params["newly_manual_axes"]))
        return tally, results

    def _scan(self, equation: Any, values: list[Value], wanted: list[bool], scope: str) -> Any:
        body = _jaxprs_of(equation)[0]
        inner = getattr(body, "jaxpr", body)
        # Only stacked inputs and outputs gain a dimension on their way out of the body. Told this way,
        # rather than from `num_carry`, because jax 0.12 renamed the fields that say it.
        carries = sum(_rank(a) == _rank(b) for a, b in zip(equation.outvars, inner.outvars, strict=True))
        unstacked = sum(_rank(a) == _rank(b) for a, b in zip(equation.invars, inner.invars, strict=True))
        constants = unstacked - carries
        # A carry that starts as a constant takes up activations on the way.
        carry = Value(weight=all(value.weight for value in values))
        # Of a stacked or carried number only the first value would be known.
        inputs = [*values[:constants], *[carry] * carries, *(Value(v.weight) for v in values[unstacked:])]
        once, results = self.walk(body, inputs, [True] * carries + wanted[carries:], scope)
        tally = Tally()
        tally.add(once, equation.params["length"])
        return tally, [carry] * carries + [Value(value.weight) for value in results[carries:]]

    def _while(self, equation: Any, values: list[Value], wanted: list[bool], scope: str) -> Any:
        parameters = equation.params
        condition_constants, body_constants = parameters["cond_nconsts"], parameters["body_nconsts"]
        carry = Value(weight=all(value.weight for value in values))
        carries = [carry] * (len(values) - condition_constants - body_constants)
        constants = values[condition_constants : condition_constants + body_constants]
        test, _ = self.walk(
            parameters["cond_jaxpr"], [*values[:condition_constants], *carries], [True], scope
        )
        body, _ = self.walk(parameters["body_jaxpr"], [*constants, *carries], [True] * len(carries), scope)
        trips = loops.trip_count(equation, [value.number for value in values])
        if trips is None:
            trips = _choose(self._trips, scope)
        tally = Tally()
        if trips is not None:
            tally.add(body, trips)
            tally.add(test, trips + 1)
        else:
            each = body.macs.total() + test.macs.total()
            if each:
                place = scope or "the top"
                tally.unknown.append(f"while at {place}: {each:,} MACs a trip, its trip count is not known")
            tally.unknown += [*test.unknown, *body.unknown]
        return tally, carries

    def _cond(self, equation: Any, values: list[Value], wanted: list[bool], scope: str) -> Any:
        """The dearest branch, or the one that a rule picks."""
        branches = equation.params["branches"]
        walked = [self.walk(branch, values[1:], wanted, scope) for branch in branches]
        results = [
            Value(all(v.weight for v in column)) for column in zip(*(r for _, r in walked), strict=True)
        ]
        chosen = _choose(self._branches, scope)
        if chosen is None:
            tally = max((t for t, _ in walked), key=lambda t: (len(t.unknown), t.macs.total()))
        elif 0 <= chosen < len(branches):
            tally = walked[chosen][0]
        else:
            raise UsageError(
                f"branches: {scope!r} has no branch {chosen}. "
                f"{did_you_mean('', [str(i) for i in range(len(branches))])}"
            )
        return tally, results

    def _hides_work(self, equation: Any) -> bool:
        """Whether an equation of no known form holds a computation that multiplies and adds."""
        for jaxpr in _jaxprs_of(equation):
            inner = getattr(jaxpr, "jaxpr", jaxpr)
            tally, _ = self.walk(inner, [Value()] * len(inner.invars), [True] * len(inner.outvars))
            if tally.macs.total() or tally.unknown:
                return True
        return False


def live_equations(jaxpr: Any, wanted: Sequence[bool]) -> list[tuple[Any, list[bool]]]:
    """The equations that a wanted output needs, in order, each with which of its outputs are read.

    A compiler drops the rest, so counting it would not agree with what runs.
    """
    needed = {out for out, want in zip(jaxpr.outvars, wanted, strict=True) if want and _is_variable(out)}
    live = []
    for equation in reversed(jaxpr.eqns):
        read = [out in needed for out in equation.outvars]
        if any(read) or equation.effects:
            live.append((equation, read))
            needed.update(filter(_is_variable, equation.invars))
    return live[::-1]


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


def _kernel(equation: Any, scope: str, tally: Tally) -> None:
    """A kernel costs what it declares; its body says how one block is done, not how many."""
    declared = equation.params["cost_estimate"]
    if declared is None:
        name = equation.params.get("name") or "without a name"
        tally.unknown.append(f"pallas_call {name} at {scope or 'the top'}: it declares no cost_estimate")
    else:
        tally.macs[scope, "kernel"] = int(declared.flops) // 2


def _choose(rules: list[tuple[re.Pattern[str], Any]], scope: str) -> int | None:
    return next((value for pattern, value in rules if pattern.fullmatch(scope)), None)


def _jaxprs_of(equation: Any) -> list[Any]:
    """Every jaxpr among the parameters of an equation."""
    found = []
    for parameter in equation.params.values():
        for item in parameter if isinstance(parameter, list | tuple) else [parameter]:
            if hasattr(item, "eqns"):
                found.append(item)
    return found


def _value_of(known: dict[Any, Value], operand: Any) -> Value:
    if _is_variable(operand):
        return known[operand]
    return Value(weight=True, number=loops.integer(operand.val))


def _is_variable(operand: Any) -> bool:
    return not hasattr(operand, "val")


def _rank(operand: Any) -> int:
    return len(getattr(operand.aval, "shape", ()))

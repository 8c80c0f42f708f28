"""How often a `while` runs, where the program says so.

`lax.fori_loop` with Python bounds is a scan when it is differentiable and a `while` otherwise; a hand-written
`while_loop` with a counter has the same form. Recognised: the condition compares one carried counter with
a bound that does not change, and the body adds a constant to the counter. Everything else is unknown, and
the caller must say so rather than count one trip.
"""

from collections.abc import Sequence
from typing import Any

_MIRRORED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "ne": "ne"}


def trip_count(equation: Any, numbers: Sequence[int | None]) -> int | None:
    """Returns the trips of a `while` equation, or None where they depend on data.

    Args:
      equation: the `while` equation.
      numbers: for each operand of the equation, its value where that is a known integer.
    """
    condition, body = (_open(equation.params[name]) for name in ("cond_jaxpr", "body_jaxpr"))
    condition_constants, body_constants = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    start = condition_constants + body_constants
    carried = {var: i for i, var in enumerate(body.invars[body_constants:])}
    steps = [_step(body, var, out) for var, out in zip(carried, body.outvars, strict=True)]
    # What the condition sees: its own constants, then the carried values.
    seen = {var: i for i, var in enumerate(condition.invars)}

    def first_value_and_step(operand: Any) -> tuple[int | None, int | None]:
        if hasattr(operand, "val"):
            return _literal(operand), 0
        place = seen.get(operand)
        if place is None:
            return None, None
        if place < condition_constants:
            return numbers[place], 0
        place -= condition_constants
        return numbers[start + place], steps[place]

    comparison = next((e for e in condition.eqns if e.outvars[0] is condition.outvars[0]), None)
    if comparison is None or comparison.primitive.name not in _MIRRORED:
        return None
    name = comparison.primitive.name
    (first, step), (bound, bound_step) = map(first_value_and_step, comparison.invars)
    if step == 0:
        name, first, step, bound, bound_step = _MIRRORED[name], bound, bound_step, first, step
    if first is None or bound is None or not step or bound_step != 0:
        return None
    return _trips(name, first, step, bound)


def _trips(comparison: str, first: int, step: int, bound: int) -> int | None:
    """Length of the arithmetic sequence `first, first + step, ...` that satisfies the comparison.

    None where it would never end (or only by overflow).
    """
    if comparison == "ne":
        trips, rest = divmod(bound - first, step)
        return trips if rest == 0 and trips >= 0 else None
    if comparison in ("gt", "ge"):
        first, step, bound = -first, -step, -bound
    if comparison in ("le", "ge"):
        bound += 1
    if first >= bound:
        return 0
    return -((first - bound) // step) if step > 0 else None


def _step(body: Any, var: Any, out: Any) -> int | None:
    """What one trip adds to a carried value: 0 where it passes through, None where it is not a constant."""
    if out is var:
        return 0
    equation = next((e for e in body.eqns if out in e.outvars), None)
    if equation is None or equation.primitive.name not in ("add", "sub"):
        return None
    left, right = equation.invars
    if right is var and equation.primitive.name == "add":
        left, right = right, left
    amount = _literal(right)
    if left is not var or amount is None:
        return None
    return -amount if equation.primitive.name == "sub" else amount


def _literal(operand: Any) -> int | None:
    """The integer a literal operand holds; a jaxpr's literals are scalars."""
    if not hasattr(operand, "val"):
        return None
    return integer(operand.val)


def integer(value: Any) -> int | None:
    """A scalar as a Python integer, or None where it is not one: a float counter rounds, so is not known."""
    if getattr(value, "shape", ()) != () or not (isinstance(value, int) or _kind(value) in "iu"):
        return None
    return int(value)


def _kind(value: Any) -> str:
    return getattr(getattr(value, "dtype", None), "kind", "?")


def _open(jaxpr: Any) -> Any:
    """The jaxpr inside a closed one; from jax 0.12 on the two are one class."""
    return getattr(jaxpr, "jaxpr", jaxpr)

"""Multiply-accumulates of one equation of a jaxpr, from its shapes alone.

A multiply-accumulate (MAC) is one multiplication whose product is added to a sum. Published tables count
these and often print them under the name FLOPs; XLA counts the multiplication and the addition, hence twice
as many.
"""

import math
from collections.abc import Callable
from typing import Any


def dot_macs(equation: Any) -> int:
    """`dot_general`: every output element sums over the contracted dimensions."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs, out = equation.invars[0].aval, equation.outvars[0].aval
    return math.prod(out.shape) * math.prod(lhs.shape[d] for d in contracted)


def ragged_dot_macs(equation: Any) -> int:
    """`ragged_dot_general`: every row meets the matrix of its own group, once.

    The group sizes are values, so this is what full groups cost: rows beyond the last group count too.
    """
    dimensions = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batched) = dimensions.dot_dimension_numbers
    lhs, rhs = equation.invars[0].aval, equation.invars[1].aval
    shared = {*contracted, *batched, *dimensions.rhs_group_dimensions}
    return math.prod(lhs.shape) * math.prod(size for d, size in enumerate(rhs.shape) if d not in shared)


def convolution_macs(equation: Any) -> int:
    """`conv_general_dilated`: output positions x kernel positions x input channels of a group.

    Padding counts as if it were data, as published tables do. Along a dimension with fewer inputs than
    outputs (a transposed convolution, or the input gradient of one that strides or shrinks) the extra outputs
    come from zeros put between or around the inputs: there each *input* position meets each kernel position
    once. So either gradient of a convolution costs exactly what the convolution does.
    """
    dimensions = equation.params["dimension_numbers"]
    lhs, rhs = equation.invars[0].aval, equation.invars[1].aval
    out = equation.outvars[0].aval
    places = zip(dimensions.lhs_spec[2:], dimensions.out_spec[2:], strict=True)
    positions = math.prod(min(lhs.shape[i], out.shape[o]) for i, o in places)
    return out.shape[dimensions.out_spec[0]] * positions * math.prod(rhs.shape)


def kind_of_product(equation: Any, weights: list[bool]) -> str:
    """`"convolution"`, `"attention"` or `"dense"`.

    A dot is attention where both operands are activations and a batch dimension pairs them, else dense;
    a ragged dot is dense. An operand is a weight where it depends on parameters and constants alone. The
    batch dimension is what tells attention from a weight gradient, which also multiplies two activations but
    contracts the batch. Called attention by this rule although they are not: the weight gradient of *stacked*
    matrices written as one batched dot (experts without `ragged_dot`), and Muon's orthogonalisation of such
    a stack.
    """
    if equation.primitive.name != "dot_general":
        return "convolution" if equation.primitive.name == "conv_general_dilated" else "dense"
    _, (batched, _) = equation.params["dimension_numbers"]
    return "attention" if batched and not any(weights) else "dense"


def kind_of(equation: Any) -> str:
    """`"gather"` for what finds, takes or puts elements by their place, `"elementwise"` for all the rest."""
    name = equation.primitive.name
    return "gather" if name in _PLACED or name.startswith("scatter") else "elementwise"


_PLACED = {"approx_top_k", "dynamic_slice", "dynamic_update_slice", "gather", "sort", "top_k"}

MACS: dict[str, Callable[[Any], int]] = {
    "conv_general_dilated": convolution_macs,
    "dot_general": dot_macs,
    "ragged_dot_general": ragged_dot_macs,
}

"""Arithmetic of equations that hold no products to sum: XLA's conventions, from shapes alone.

XLA's `HloCostAnalysis` counts one operation for each output element of every elementwise instruction,
comparisons, selections, bit operations, integer arithmetic and changes of type included; one for each
element that a reduction folds into another; none for moving data. Transcendentals (exponentials, logarithms,
roots, powers, trigonometry) it counts apart, one each and no operation. What JAX expands into several
instructions counts as those: the table below was read off `jax.jit(f).lower(x).cost_analysis()`, one
function at a time, in float32; the tests compare with it again.

What XLA folds while it reads the program is folded here where a literal shows it: x * 1, x + 0. It also finds
equal expressions and constant arrays, which is what remains between the two counts.

Two conventions are not followed. XLA calls a running sum of n elements n (n - 1) additions, as its window
says; here it is n - 1, as any backend computes it to within a factor of log n. And XLA knows nothing of a
custom call.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from effjax.measure.graph import is_variable

_ELEMENTWISE = frozenset(
    """abs add add_any and bitcast_convert_type ceil clamp clz complex div eq eq_to floor ge gt imag is_finite
    le le_to lt lt_to max min mul mulhi ne neg not or pmax pmin population_count psum psum2 psum_invariant
    real reduce_precision reduce_scatter rem round select_n shift_left shift_right_arithmetic
    shift_right_logical sign square sub unreduced_psum xor""".split()  # noqa: SIM905
)
_TRANSCENDENTAL = frozenset(
    "atan atan2 cbrt cos erf exp expm1 log log1p pow rsqrt sin sqrt tan tanh".split()  # noqa: SIM905
)

# Operations and transcendentals of one element, where JAX expands the primitive.
_EXPANDED = {
    "acos": (3, 2),
    "acosh": (7, 4),
    "asin": (3, 2),
    "asinh": (11, 3),
    "atanh": (6, 2),
    "conj": (4, 0),
    "cosh": (3, 2),
    "erf_inv": (37, 2),
    "erfc": (62, 1),
    "exp2": (1, 1),
    "log2": (1, 1),
    "logistic": (3, 1),
    "nextafter": (24, 0),
    "one_minus_square": (2, 0),
    "sinh": (10, 3),
}

# Nothing but movement, names and placement.
_MOVEMENT = frozenset(
    """after_all all_gather all_gather_invariant all_to_all axis_index broadcast broadcast_in_dim broadcast_to
    concatenate copy copy_p create_token debug_callback debug_print device_put dynamic_slice
    dynamic_update_slice empty expand_dims gather iota layout_constraint mesh_cast name optimization_barrier
    pad pbroadcast pcast platform_index ppermute pvary ragged_all_to_all random_clone random_unwrap
    random_wrap reduced_vary_cast relayout reshard reshape rev sharding_constraint slice split squeeze stack
    stop_gradient tie tile top_k transpose unstack with_memory_space_constraint zeros_like""".split()  # noqa: SIM905
)

# Operations and transcendentals of folding one element into the running result.
_REDUCTIONS = frozenset(
    "reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor".split()  # noqa: SIM905
)
_RUNNING = {"cumlogsumexp": (8, 2), "cummax": (1, 0), "cummin": (1, 0), "cumprod": (1, 0), "cumsum": (1, 0)}
# Finding the place of the largest also carries the place, and lets a NaN win.
_PLACE_OF_FLOAT, _PLACE_OF_INTEGER = 9, 7

# Threefry-2x32, 20 rounds, over a pair of words: 120 operations to make the pair, one to fold it into the
# 32 bits that an element of `random_bits` takes.
_THREEFRY_PAIR = 120


def arithmetic(equation: Any) -> tuple[int, int] | None:
    """Returns the operations and the transcendentals of one equation without products to sum.

    None where they are not known: calls out of the program, library factorisations, series whose length
    differs between versions of JAX, primitives newer than this table.
    """
    name = equation.primitive.name
    if name in _MOVEMENT:
        return 0, 0
    if name in _BY_SHAPE:
        return _BY_SHAPE[name](equation)
    if name in _REDUCTIONS:
        return _size(equation.invars[0]) - _size(equation.outvars[0]), 0
    if name in _RUNNING:
        return _running(equation)
    if name.startswith("scatter"):
        return _size(equation.invars[2]), 0
    outputs = sum(_size(out) for out in equation.outvars)
    if name in _ELEMENTWISE:
        return (0 if _changes_nothing(equation) else outputs), 0
    if name in _TRANSCENDENTAL:
        return 0, outputs
    if name in _EXPANDED:
        each, transcendentals = _EXPANDED[name]
        return each * outputs, transcendentals * outputs
    return None


def _changes_nothing(equation: Any) -> bool:
    """A multiplication by one, an addition or subtraction of zero. (A division by one XLA keeps.)"""
    name = equation.primitive.name
    neutral = {"add": 0, "mul": 1, "sub": 0}.get(name)
    operands = equation.invars[1:] if name == "sub" else equation.invars
    literals = [operand.val for operand in operands if not is_variable(operand)]
    return neutral is not None and any(jnp.ndim(value) == 0 and value == neutral for value in literals)


def _running(equation: Any) -> tuple[int, int]:
    """Running sums: one fold for each element after the first."""
    each, transcendentals = _RUNNING[equation.primitive.name]
    shape = equation.invars[0].aval.shape
    folded = math.prod(shape) - math.prod(shape) // max(1, shape[equation.params["axis"]])
    return each * folded, transcendentals * folded


def _place(equation: Any) -> tuple[int, int]:
    """`argmax`, `argmin`."""
    operand = equation.invars[0]
    each = _PLACE_OF_FLOAT if jnp.issubdtype(operand.aval.dtype, jnp.floating) else _PLACE_OF_INTEGER
    return each * (_size(operand) - _size(equation.outvars[0])), 0


def _convert(equation: Any) -> tuple[int, int]:
    """`convert_element_type`, which also stands where only the weakness of a type changes."""
    before, after = equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype
    return (0 if before == after else _size(equation.outvars[0])), 0


def _integer_power(equation: Any) -> tuple[int, int]:
    """`x ** 5` squares twice and multiplies once; a negative power divides once more."""
    power = equation.params["y"]
    multiplications = max(0, abs(power).bit_length() - 1) + max(0, abs(power).bit_count() - 1)
    return (multiplications + (power < 0)) * _size(equation.outvars[0]), 0


def _sort(equation: Any) -> tuple[int, int]:
    """XLA's n log2 n comparisons, n being all elements of the array, whatever is sorted with it."""
    elements = _size(equation.invars[0])
    return elements * max(0, (elements - 1).bit_length()), 0


def _polynomial(equation: Any) -> tuple[int, int]:
    """Horner's rule: a product and a sum for each coefficient after the first."""
    return 2 * (len(equation.invars) - 2) * _size(equation.outvars[0]), 0


def _window(equation: Any) -> tuple[int, int]:
    """Windows of n elements: n - 1 to fold each."""
    window = math.prod(equation.params["window_dimensions"])
    return (window - 1) * _size(equation.outvars[0]), 0


def _window_gradient(equation: Any) -> tuple[int, int]:
    """For each window, finds the element that was taken and adds to it."""
    window = math.prod(equation.params["window_dimensions"])
    return window * _size(equation.invars[0]), 0


def _fft(equation: Any) -> tuple[int, int]:
    """XLA's 8 times the product of log2 of the transformed sides, for each element that comes in."""
    logarithms = math.prod(side.bit_length() - 1 for side in equation.params["fft_lengths"])
    return 8 * logarithms * _size(equation.invars[0]), 0


def _random_bits(equation: Any) -> tuple[int, int]:
    """Threefry's rounds; the generators of the hardware count as XLA has it, one transcendental a word."""
    out = equation.outvars[0]
    if equation.invars[0].aval.dtype.name != "key<fry>":
        return 0, _size(out)
    narrowed = out.aval.dtype.itemsize < 4
    return (_THREEFRY_PAIR + 1 + narrowed) * _size(out), 0


def _key(equation: Any) -> tuple[int, int]:
    """A key made from another is one pair of words."""
    return _THREEFRY_PAIR * _size(equation.outvars[0]), 0


def _threefry(equation: Any) -> tuple[int, int]:
    """Two words in, two words out."""
    return _THREEFRY_PAIR * _size(equation.outvars[0]), 0


def _generator(equation: Any) -> tuple[int, int]:
    """`rng_bit_generator`, `rng_uniform`: as XLA has it, one transcendental an element made."""
    return 0, sum(_size(out) for out in equation.outvars)


_BY_SHAPE: dict[str, Callable[[Any], tuple[int, int]]] = {
    "approx_top_k": _sort,
    "argmax": _place,
    "argmin": _place,
    "convert_element_type": _convert,
    "fft": _fft,
    "integer_pow": _integer_power,
    "polynomial": _polynomial,
    "random_bits": _random_bits,
    "random_fold_in": _key,
    "random_seed": _key,
    "random_split": _key,
    "reduce": lambda equation: (_size(equation.invars[0]) - _size(equation.outvars[0]), 0),
    "reduce_window": _window,
    "reduce_window_max": _window,
    "reduce_window_min": _window,
    "reduce_window_sum": _window,
    "rng_bit_generator": _generator,
    "rng_uniform": _generator,
    "scatter": lambda equation: (0, 0),
    "select_and_gather_add": _window,
    "select_and_scatter_add": _window_gradient,
    "sort": _sort,
    "threefry2x32": _threefry,
}


def _size(atom: Any) -> int:
    """Elements of an operand or result; a token has none."""
    return math.prod(getattr(atom.aval, "shape", (0,)))

"""Attention to neighbours on maps of one to three axes, forward and backward, on TPU.

    y_i = sum_j p_ij v_j,    p_ij = softmax_j(scale q_i k_j + b_ij),    j among the keys that i sees

Which those are is said axis by axis; a key is seen that is seen along every axis.

    nearest    clip(i - w // 2, 0, n - w) and the w - 1 places after it: at the edges the neighbourhood is
               moved inwards, so that every query has as many keys. Hassani et al. 2023, arXiv:2204.07143
    dilated    the same among the places that are d apart. Hassani and Shi 2022, arXiv:2209.15001
    causal     i and the w - 1 places before it. Hassani et al. 2024, arXiv:2403.04690
    windows    the places of i's window on the map rolled by a shift. Liu et al. 2021, arXiv:2103.14030;
               stripes of H x s and s x W places are windows, Dong et al. 2022, arXiv:2107.00652

They are one kernel with other index maps, which `axes.py` has.
"""

import math
from typing import Any

import jax

from pallas_kernels.neighborhood_attention import cost, reference, tpu
from pallas_kernels.neighborhood_attention.axes import Axis
from pallas_kernels.op import Implementation, Interpret, Op, Unsupported

DTYPES = ("float32", "bfloat16", "float16")

OP = Op(
    name="neighborhood_attention",
    reference=reference.neighborhood_attention,
    tpu=tpu.forward,
    tpu_backward=tpu.backward,
    cost=lambda *arrays, **options: cost.forward(*arrays, axes=_axes(arrays[0], **options)),
)


def neighborhood_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    *,
    window: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    shift: int | tuple[int, ...] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
    interpret: Interpret = False,
    strict: bool = False,
) -> jax.Array:
    """softmax(scale q k^T + bias) v over the keys that a query sees; logits in float32.

    Args:
      q: `[B, *map, H, D]` queries on a map of one, two or three axes.
      k: `[B, *map, H, D]` keys.
      v: `[B, *map, H, D]` values.
      bias: of any type of floats, or None. For nearest keys `[2 w - 1, ..., H]` with an axis for each of the
        map, read at w - 1 + (key - query) / dilation. For windows `[H, P, P]`, by query and key among their P
        places, row by row.
      window: keys that a query sees along an axis, or places of a window; one number is for all axes.
      dilation: distance of neighbours.
      causal: whether a query sees no later key, along an axis.
      shift: how far the map of windows is rolled towards its beginning, where places of both ends of the map
        do not see each other; 0 rolls nothing. None is for nearest keys.
      scale: factor of the products; None means `1 / sqrt(D)`.
      implementation: `reference`, `tpu`; None chooses by the platform that is lowered for.
      interpret: runs the named kernel on any platform.
      strict: whether a kernel that does not lower is an error; else the reference is used, with a warning.

    Returns:
      `[B, *map, H, D]`.

    Raises:
      Unsupported: for shapes that do not fit together, a window that does not fit on the map, types that no
        implementation takes, and for what the named implementation does not take.
    """
    _check(q, k, v)
    axes = _axes(q, window, dilation, causal, shift)
    _check_bias(bias, axes, q.shape[-2])
    return OP(
        *(q, k, v, bias),
        implementation=implementation,
        interpret=interpret,
        strict=strict,
        axes=axes,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    )


def _axes(
    q: Any, window: Any, dilation: Any = 1, causal: Any = False, shift: Any = None, **_: Any
) -> tuple[Axis, ...]:
    """What is said of each axis."""
    sides = q.shape[1:-2]

    def each(name: str, value: Any) -> tuple[Any, ...]:
        several = value if isinstance(value, tuple) else (value,) * len(sides)
        if len(several) != len(sides):
            raise Unsupported(f"neighborhood_attention: {name}={value} is not of the {len(sides)} axes.")
        return several

    given = each("window", window), each("dilation", dilation), each("causal", causal), each("shift", shift)
    axes = tuple(Axis(*one) for one in zip(sides, *given, strict=True))
    for axis in axes:
        if axis.window < 1 or axis.dilation < 1 or axis.window * axis.dilation > axis.length:
            raise Unsupported(
                f"neighborhood_attention: window={axis.window} with dilation={axis.dilation} does not fit on"
                f" a side of {axis.length} places: their product is 1 to {axis.length}."
            )
        if axis.shift is None:
            continue
        if axis.dilation != 1 or axis.causal or axis.length % axis.window:
            raise Unsupported(
                "neighborhood_attention: windows (shift is not None) are not dilated nor causal, and divide"
                f" the map: a side of {axis.length} has no windows of {axis.window}."
            )
        if not 0 <= axis.shift < axis.window:
            raise Unsupported(
                f"neighborhood_attention: shift={axis.shift} is 0 to {axis.window - 1}, less than the window."
            )
    return axes


def _check(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    if q.ndim not in (4, 5, 6) or not q.shape == k.shape == v.shape:
        raise Unsupported(
            "neighborhood_attention takes q, k and v [B, *map, H, D] of one shape on a map of one to three"
            f" axes, not {q.shape}, {k.shape} and {v.shape}."
        )
    if 0 in q.shape:
        raise Unsupported(f"neighborhood_attention needs at least one query: {q.shape}.")
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in DTYPES:
        raise Unsupported(
            f"neighborhood_attention takes q, k and v of one type, {', '.join(DTYPES)}, not {q.dtype},"
            f" {k.dtype} and {v.dtype}."
        )


def _check_bias(bias: jax.Array | None, axes: tuple[Axis, ...], heads: int) -> None:
    kinds = {axis.shift is None for axis in axes}
    if len(kinds) > 1:
        raise Unsupported("neighborhood_attention: either all axes have windows (shift), or none.")
    if bias is None:
        return
    places = math.prod(axis.window for axis in axes)
    nearest = axes[0].shift is None
    wanted = (*(2 * axis.window - 1 for axis in axes), heads) if nearest else (heads, places, places)
    if bias.shape != wanted or not jax.numpy.issubdtype(bias.dtype, jax.numpy.floating):
        raise Unsupported(
            f"neighborhood_attention: a bias {bias.dtype}{list(bias.shape)} is not of floats{list(wanted)}."
        )

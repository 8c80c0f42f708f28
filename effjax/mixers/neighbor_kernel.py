"""Attention to neighbours and in windows by `pallas_kernels.neighborhood_attention`, for mixers on a map."""

from typing import Any, Literal

from jaxtyping import Array, Float

from effjax.parallel.each_device import on_each_device

Implementation = Literal["plain", "kernel", "reference"]


def by_kernel(
    q: Float[Array, "b height width h d"],
    k: Float[Array, "b height width h d"],
    v: Float[Array, "b height width h d"],
    bias: Float[Array, "..."] | None,
    *,
    window: tuple[int, int],
    dilation: int = 1,
    shift: tuple[int, int] | None = None,
    scale: float,
    implementation: Literal["kernel", "reference"],
) -> Float[Array, "b height width h d"]:
    """Softmax attention of each place to its nearest places, or to those of its window.

    Args:
      q: queries.
      k: keys.
      v: values.
      bias: `[offsets, offsets, H]` of nearest places, `[H, places, places]` of windows.
      window: places along each side.
      dilation: distance of nearest places.
      shift: how far the map of windows is rolled up and to the left; None is for nearest places.
      scale: factor of the products.
      implementation: `kernel` is that of the platform; where it has none, or with a warning none for these
        shapes, what `reference` is everywhere.
    """
    # Pallas is slow to import, and most programs have no use for it.
    from pallas_kernels import neighborhood_attention as kernels

    chosen: Any = "reference" if implementation == "reference" else None

    def attend(*arrays: Any) -> Any:
        return kernels.neighborhood_attention(
            *arrays, window=window, dilation=dilation, shift=shift, scale=scale, implementation=chosen
        )

    # Each device has its own maps and heads.
    maps = ("batch", None, None, "heads", None)
    of_bias = (None, None, "heads") if shift is None else ("heads", None, None)
    return on_each_device(attend, (maps, maps, maps, of_bias), maps)(q, k, v, bias)

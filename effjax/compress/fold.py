"""Linear maps that stand one behind another, or side by side, as one.

    affine behind       s (x K + b) + t            =  x (K s) + (b s + t)
    affine before       (s x + t) K + b            =  x (s K) + (t K + b)
    batch norm          s = gamma / sqrt(var + epsilon),  t = beta - mean s,  in evaluation
    side by side        x K_1 + b_1 + x K_2 + b_2  =  x (K_1 + K_2) + (b_1 + b_2)
    dilation r          taps r places apart       =  a dense kernel with r - 1 zeros between them

A layer is the dictionary of its parameters, `kernel` and perhaps `bias`. A kernel has its output channels
last: `[i, *o]` for a projection, `[u, v, i, o]` for a convolution, `[u, v, c]` for a depthwise one.

Source: RepVGG, Ding et al. 2021, section 3.3; for dilated kernels UniRepLKNet, Ding et al. 2024, section 3.2.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError

Layer = Mapping[str, Array]


class Affine(NamedTuple):
    """y = scale x + shift, a channel at a time."""

    scale: Float[Array, " c"]
    shift: Float[Array, " c"]


def batch_norm(params: Layer, statistics: Layer, epsilon: float) -> Affine:
    """What a batch norm does in evaluation.

    Args:
      params: its `scale` and `bias`.
      statistics: its running `mean` and `var`.
      epsilon: added to the variance.
    """
    scale = params["scale"] / jnp.sqrt(statistics["var"] + epsilon)
    return Affine(scale, params["bias"] - statistics["mean"] * scale)


def affine_behind(layer: Layer, affine: Affine) -> dict[str, Array]:
    """The layer that equals `layer` and then `affine`, over its output channels."""
    kernel = layer["kernel"]
    scale = affine.scale.reshape((1,) * (kernel.ndim - affine.scale.ndim) + affine.scale.shape)
    bias = affine.shift + (layer["bias"] * affine.scale if "bias" in layer else 0)
    return {"kernel": kernel * scale, "bias": bias}


def affine_before(layer: Layer, affine: Affine) -> dict[str, Array]:
    """The projection that equals `affine`, over its one input axis, and then `layer`.

    A convolution over several places has no such form: its zeros beyond the edges come behind the affine map.
    """
    kernel = layer["kernel"]
    scale = affine.scale.reshape(affine.scale.shape + (1,) * (kernel.ndim - 1))
    bias = jnp.tensordot(affine.shift, kernel, 1, precision=jax.lax.Precision.HIGHEST)
    return {"kernel": kernel * scale, "bias": bias + layer["bias"] if "bias" in layer else bias}


def side_by_side(layers: Sequence[Layer], side: int) -> dict[str, Array]:
    """The convolution that equals the sum of several over the same map.

    Args:
      layers: with kernels of odd sides, centred.
      side: of the kernel that takes them up.
    """
    biases = [layer["bias"] for layer in layers if "bias" in layer]
    kernel = sum((grown(layer["kernel"], side) for layer in layers), start=jnp.zeros(()))
    return {"kernel": kernel} | ({"bias": sum(biases, start=jnp.zeros_like(biases[0]))} if biases else {})


def grown(kernel: Float[Array, "u v *channels"], side: int) -> Float[Array, "side side *channels"]:
    """A kernel of odd sides in the middle of a larger one of zeros.

    Raises:
      UsageError: where it does not fit in the middle.
    """
    missing = [side - n for n in kernel.shape[:2]]
    if any(n < 0 or n % 2 for n in missing):
        raise UsageError(
            f"a kernel of {kernel.shape[0]} x {kernel.shape[1]} has no place in the middle of "
            f"{side} x {side}."
        )
    return jnp.pad(kernel, [(n // 2, n // 2) for n in missing] + [(0, 0)] * (kernel.ndim - 2))


def dense_form(kernel: Float[Array, "u v *channels"], dilation: int) -> Float[Array, "u2 v2 *channels"]:
    """A dilated kernel without dilation: zeros stand between its taps."""
    spread = [(0, 0, dilation - 1)] * 2 + [(0, 0, 0)] * (kernel.ndim - 2)
    return jax.lax.pad(kernel, jnp.zeros((), kernel.dtype), spread)


def identity(channels: int) -> dict[str, Array]:
    """The depthwise convolution that keeps a map as it is."""
    return {"kernel": jnp.ones((1, 1, channels))}

"""Equivalent transforms: channels scaled where they are made and back where they are read.

    norm -> kernels        g' = g / s, b' = b / s        W'[c, :] = s_c W[c, :]
    kernel -> kernel       V'[:, c] = V[:, c] / s_c      W'[c, :] = s_c W[c, :]

The block computes the same, and what is rounded has other ranges: Xiao et al., "SmoothQuant", ICML 2023, with
scales that are learned in Shao et al., "OmniQuant", ICLR 2024, section 3.3. Which pairs a block has depends
on what stands between the two. `pairs_of` tries all that are known by name, and keeps those that change
nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.compress.storage.trees import replaced
from effjax.layers.stored import Place


@dataclasses.dataclass(frozen=True, order=True)
class Pair:
    """Channels that one part of a block makes and others read.

    Attributes:
      maker: path of a module: a norm, or a projection.
      readers: paths of kernels.
    """

    maker: str
    readers: tuple[str, ...]


KNOWN = (
    Pair("mixer_norm", ("mixer/query/kernel", "mixer/key/kernel", "mixer/value/kernel")),
    Pair("ffn_norm", ("ffn/gate/kernel", "ffn/expand/kernel")),
    Pair("ffn_norm", ("ffn/expand/kernel",)),
    Pair("mixer/value", ("mixer/output/kernel",)),
    Pair("ffn/expand", ("ffn/contract/kernel",)),
)


def channels(leaves: Mapping[str, Any], places: Mapping[str, Place], pair: Pair) -> int | None:
    """How many channels a pair shares; None where the block has no such pair.

    Args:
      leaves: parameters of a block by path.
      places: its kernels that are arrays.
      pair: what is asked for.
    """
    if not all(path in places for path in pair.readers):
        return None
    if f"{pair.maker}/scale" in leaves:
        made = leaves[f"{pair.maker}/scale"].size
    elif f"{pair.maker}/kernel" in places:
        made = places[f"{pair.maker}/kernel"].matrix[1]
    else:
        return None
    return made if all(places[path].matrix[0] % made == 0 for path in pair.readers) else None


def scaled(
    leaves: Mapping[str, Any], places: Mapping[str, Place], scales: Mapping[Pair, Float[Array, " c"]]
) -> dict[str, Any]:
    """Parameters of a block with channels scaled.

    Args:
      leaves: its parameters by path.
      places: its kernels that are arrays.
      scales: of every pair.
    """
    made = dict(leaves)
    for pair, scale in scales.items():
        for name in ("scale", "bias"):
            path = f"{pair.maker}/{name}"
            if path in made:
                made[path] = made[path] / scale.reshape(made[path].shape)
        path = f"{pair.maker}/kernel"
        if path in made:
            made[path] = made[path] / scale.reshape((1,) * len(places[path].ins) + places[path].outs)
        for path in pair.readers:
            place = places[path]
            made[path] = made[path] * _read(scale, place).reshape(place.ins + (1,) * len(place.outs))
    return made


def pairs_of(
    params: Any,
    leaves: Mapping[str, Any],
    places: Mapping[str, Place],
    run: Callable[[Any], Any],
    key: Array,
) -> tuple[Pair, ...]:
    """The known pairs of a block that leave it as it is when they are scaled.

    Args:
      params: of the block.
      leaves: the same by path.
      places: its kernels that are arrays.
      run: the block from its parameters to what it gives.
      key: of the scales that are tried.
    """
    goal = run(params)
    found: list[Pair] = []
    top = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(goal))
    for pair in KNOWN:
        count = channels(leaves, places, pair)
        if count is None or any(other.maker == pair.maker for other in found):
            continue
        scale = jnp.exp(jax.random.uniform(key, (count,), minval=-1.0, maxval=1.0))
        y = run(replaced(params, scaled(leaves, places, {pair: scale})))
        far = jax.tree.leaves(jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), y, goal))
        if max(map(float, far)) <= 1e-4 * top:
            found.append(pair)
    return tuple(found)


def _read(scale: Float[Array, " c"], place: Place) -> Float[Array, " k"]:
    """The scale of every input; heads that share keys and values lie beside each other."""
    rows = place.matrix[0]
    if rows == scale.size:
        return scale
    size = place.ins[-1]
    return jnp.repeat(scale.reshape(-1, size), rows // scale.size, 0).reshape(-1)

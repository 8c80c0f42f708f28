"""Low-rank adapters: a trained matrix is tuned by the product of two thin ones, and is one matrix again.

    W' = W + (alpha / r) A B                        A [i, r], B [r, o]; W stays as it is

A is drawn and B starts from zero, so that tuning starts from the trained model. Of a kernel with several
input or output axes (heads) the product has all of them; of one with depth in front every layer has its own.
Two pure functions, and the choice of what is trained is the optimiser's:

    >>> adapters = drawn(params, rules, rank=8, key=key)       # beside params, and trained alone
    >>> tuned = merged(params, adapters, scale=2.0)            # parameters of the same model

Rules are ordered `(regexp, axes)` pairs as of Muon in `effjax.train.optimizers`: `in out out` says how the
trailing axes of a kernel are meant, and "" that it has no adapter.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685, section 4.1. A
is drawn as the authors' code does it, uniformly with the variance 1 / (3 i).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PRNGKeyArray

from effjax.errors import UsageError
from effjax.matching import match, named_leaves

Rules = Sequence[tuple[str, str]]

# Queries and values of attention and all of a gated perceptron: what the code of CATS tunes.
KERNELS: Rules = (
    (r"(.*/)?mixer/(query|value)/kernel", "in out out"),
    (r"(.*/)?ffn/(gate|expand|contract)/kernel", "in out"),
)


def drawn(params: Any, rules: Rules, rank: int, key: PRNGKeyArray) -> dict[str, Any]:
    """Makes the adapters of a model: `a` and `b` at the path of each kernel.

    Args:
      params: of the model; only paths and shapes are read.
      rules: which kernels have one, and how their axes are meant.
      rank: r above.
      key: draws A.

    Raises:
      UsageError: for a rank below 1, axes that a kernel does not have, or rules that match no parameter.
    """
    if rank < 1:
        raise UsageError(f"rank={rank}: an adapter has at least one.")
    chosen = named_leaves(match(rules, params, default="", where="rules"))
    shapes = {path: jnp.shape(leaf) for path, leaf in named_leaves(params).items() if chosen[path]}
    if not shapes:
        raise UsageError("no kernel has an adapter: give rules that choose some.")
    keys = jax.random.split(key, len(shapes))
    made: dict[tuple[str, ...], Array] = {}
    for each, (path, shape) in zip(keys, shapes.items(), strict=True):
        lead, ins, outs = _cut(path, shape, chosen[path])
        bound = math.prod(ins) ** -0.5
        a = jax.random.uniform(each, (*lead, *ins, rank), jnp.float32, -bound, bound)
        at = path.split("/")
        made |= {(*at, "a"): a, (*at, "b"): jnp.zeros((*lead, rank, *outs), jnp.float32)}
    return unflatten_dict(made)


def merged(params: Mapping[str, Any], adapters: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """W' above for every kernel that has an adapter, in the kernel's dtype.

    Args:
      params: of the model.
      adapters: as `drawn` makes them.
      scale: alpha / r.
    """
    leaves, thin = flatten_dict(params), flatten_dict(adapters)
    for path in {path[:-1] for path in thin}:
        kernel = leaves[path]
        product = _product(thin[(*path, "a")], thin[(*path, "b")], kernel.shape)
        leaves[path] = kernel + (scale * product).astype(kernel.dtype)
    return unflatten_dict(leaves)


def _product(a: Float[Array, "..."], b: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """A B in the shape of the kernel; how many axes stand in front follows from the three shapes."""
    lead = a.ndim + b.ndim - 2 - len(shape)
    rank = a.shape[-1]
    product = a.reshape(*shape[:lead], -1, rank) @ b.reshape(*shape[:lead], rank, -1)
    return product.reshape(shape)


def _cut(
    path: str, shape: tuple[int, ...], axes: str
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The axes in front, of the input and of the output."""
    roles = axes.split()
    ins, outs = roles.count("in"), roles.count("out")
    if not ins or not outs or roles != ["in"] * ins + ["out"] * outs:
        raise UsageError(f"rules: {axes!r} must name the trailing axes, such as 'in out', inputs first.")
    if len(roles) > len(shape):
        raise UsageError(f"rules: {path} has the shape {shape}, fewer axes than {axes!r}.")
    front = len(shape) - len(roles)
    return shape[:front], shape[front : front + ins], shape[front + ins :]

"""Depth as one scan over identical blocks.

The parameters of all layers are stacked: a kernel `[i, o]` of the block stands in the tree as `[depth, i,
o]`, at the path it would have in one block, with the logical axis `layers` in front. A forward pass is
`jax.lax.scan` over these slices, so that compile time does not grow with depth, and rematerialisation is a
policy on the scan's body.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta

from effjax.errors import UsageError, did_you_mean

# What the backward pass may keep of each layer instead of computing it again.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Stack(nn.Module):
    """`depth` copies of `block`, run as a scan.

    A block's method takes `(x, each, *shared, train)` and returns `(x, out)`: `each` is that layer's slice
    of per-layer inputs (drop rates, caches), `shared` is the same for all layers (conditioning, positions),
    `out` is whatever the layer hands back (a new cache, an auxiliary loss, None), stacked over layers by
    the scan.

    Attributes:
      block: the definition to repeat; only its fields are used.
      depth: number of layers.
      remat: name of a rematerialisation policy in `REMAT`.
      unroll: layers a scan iteration; `depth` unrolls the loop whole.
    """

    block: nn.Module
    depth: int
    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def __call__(
        self, x: Any, *shared: Any, each: Any = None, method: str = "__call__", train: bool = False
    ) -> tuple[Any, Any]:
        """Runs all layers on `x` and returns `(x, outs)`."""
        if self.remat not in REMAT:
            raise UsageError(f"remat is {self.remat!r}. {did_you_mean(self.remat, REMAT)}")
        block = self.block.clone(parent=None, name=None)

        if self.is_initializing():
            first = jax.tree.map(lambda leaf: leaf[0], each)

            def init(key):
                return block.init({"params": key}, x, first, *shared, method=method)["params"]

            stacked = jax.vmap(init)(jax.random.split(self.make_rng("params"), self.depth))
            stacked = meta.add_axis(stacked, 0, {nn.PARTITION_NAME: "layers"})
            for name, value in stacked.items():
                self.put_variable("params", name, value)

        params = meta.unbox(self.variables["params"])
        keys = None
        if train and self.has_rng("dropout"):
            keys = jax.random.split(self.make_rng("dropout"), self.depth)

        def layer(x, slices):
            params, each, key = slices
            rngs = {} if key is None else {"dropout": key}
            return block.apply({"params": params}, x, each, *shared, train=train, rngs=rngs, method=method)

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.remat], prevent_cse=False)
        return jax.lax.scan(layer, x, (params, each, keys), length=self.depth, unroll=self.unroll)

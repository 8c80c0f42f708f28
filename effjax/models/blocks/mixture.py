"""Mixture of Blocks: of a group of blocks, the condition of each example says which are run.

    p = softmax(silu(c) W + b),   T = the `chosen` largest entries of p
    x <- B_j(x)  for j in T, in the order of depth;   the others are left out

What a block that runs gives is not weighed, so that with all of them on the group is the dense network. The
router learns by the factor 1 + p_j - stop(p_j) of what block j adds, which is 1. A block that no example of
the batch wants is not computed, and time is saved where a batch agrees: in sampling, where all examples share
the time, mostly; in training examples differ, and blocks are computed for all and kept for some.

    L = balance members sum_j f_j mean(p_j)

keeps blocks in even use; f_j is the share of examples, divided by `chosen`, that run block j.

Source: Zheng et al., "Dense2MoE: Restructuring Diffusion Transformer to MoE for Efficient Text-to-Image
Generation", ICCV 2025, arXiv:2510.09094. Its text could not be had; what the router reads and how it learns
are ours.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense
from effjax.mixers.context import Context
from effjax.models.blocks.adaln import Layer
from effjax.models.blocks.several import Several


class MixtureOfBlocks(Several):
    """Blocks one behind the other, of which each example runs some.

    Attributes:
      chosen: how many of them.
      balance: weight of the loss `block_balance`; 0 leaves it out.
    """

    chosen: int = 1
    balance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.chosen <= len(self.members):
            raise UsageError(
                f"chosen={self.chosen} of {len(self.members)} blocks: choose from 1 to all of them."
            )

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        each: Layer,
        c: Float[Array, "b c"] | None,
        context: Context,
        train: bool = False,
    ) -> tuple[Float[Array, "b n c"], None]:
        """Runs the chosen members one behind the other; all share the condition of the group.

        Raises:
          UsageError: where a step cache wants what single branches gave.
        """
        if each.kept is not None:
            raise UsageError("blocks that are left out have no branches to keep: take another step cache.")
        told = c if each.c is None else each.c
        assert told is not None
        p, on = self.choose(told, train)  # 2 x [B, members]
        own = dataclasses.replace(each, c=told)
        # What sows or learns cannot be left out.
        whole = train or any(map(self.is_mutable_collection, ("params", "losses", "intermediates")))
        for j in range(len(self.members)):

            def run(block: "MixtureOfBlocks", x: Array, j: int = j) -> Array:
                y, _ = block.members[j](x, own, told, context, train=train)  # type: ignore[operator]
                return jnp.asarray(y)

            if whole:
                y = run(self, x)  # [B, N, C]
            else:
                y = nn.cond(jnp.any(on[:, j]), run, lambda _, x: x, self, x)  # [B, N, C]
            factor = (p - jax.lax.stop_gradient(p))[:, j, None, None].astype(x.dtype)  # [B, 1, 1], zero
            x = jnp.where(on[:, j, None, None], y + factor * (y - x), x)  # [B, N, C]
        return x, None

    @nn.nowrap
    def choose(
        self, c: Float[Array, "b c"], train: bool
    ) -> tuple[Float[Array, "b members"], Bool[Array, "b members"]]:
        """The share of each block for each example, and whether it runs."""
        count = len(self.members)
        logits = Dense(count, ("embed", None), name="router")(nn.silu(c))  # [B, members]
        p = jax.nn.softmax(logits.astype(jnp.float32))
        _, index = jax.lax.top_k(p, self.chosen)
        on = jnp.any(index[:, :, None] == jnp.arange(count)[None, None], axis=1)  # [B, members]
        if self.balance and train and not self.is_initializing():
            used = jnp.mean(on, axis=0) / self.chosen
            loss = self.balance * count * jnp.sum(used * jnp.mean(p, axis=0))
            self.sow("losses", "block_balance", loss)
        return p, on

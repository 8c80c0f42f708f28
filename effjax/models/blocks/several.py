"""Several denoising blocks as the one that a stack repeats: one behind the other, or side by side.

    cycle       x <- B_k(... B_2(B_1(x)))
    parallel    x <- x + [B_1(x) - x, B_2(x) - x, ...] W + b,    W = [I; I; ...] and b = 0 at the start

The members of a cycle may be of different kinds: layers a, b, a, b, ... are one scan over pairs. Blocks side
by side read the same input, so that a network of half as many steps has as much to compute. A step cache
takes either for one layer, which has the branches of all members.

Source of the second: Chandrasegaran et al., "Exploring Diffusion Transformer Designs via Grafting", NeurIPS
2025, section 6, where a linear projection merges what two blocks give; here it merges what they add, so that
it can start as the sum.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.config import part
from effjax.errors import UsageError
from effjax.layers.dense import Dense
from effjax.mixers.context import Context
from effjax.models.blocks.adaln import Layer
from effjax.models.blocks.denoising_layer import LAYERS


class Several(nn.Module):
    """What blocks of several members have in common.

    Attributes:
      members: the blocks, each of one layer.
    """

    members: tuple[nn.Module, ...] = part(LAYERS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.members:
            raise UsageError(f"{type(self).__name__} needs members: name at least one block.")
        for member in self.members:
            if hasattr(member, "router"):
                raise UsageError(f"{type(member).__name__} is routed with its whole stack: no member.")

    @property
    def epsilon(self) -> float:
        """Of the first member's norms."""
        epsilon: float = self.members[0].epsilon  # type: ignore[attr-defined]
        return epsilon

    @nn.nowrap
    def own(self, each: Layer) -> list[Layer]:
        """What is each member's own: its part of the branches."""
        if each.kept is None:
            return [each] * len(self.members)
        cuts = [part.reshape(len(self.members), -1, *part.shape[1:]) for part in (each.fresh, each.kept)]
        return [dataclasses.replace(each, fresh=fresh, kept=kept) for fresh, kept in zip(*cuts, strict=True)]


class Cycle(Several):
    """Blocks one behind the other."""

    def __call__(
        self,
        x: Float[Array, "b n c"],
        each: Layer,
        c: Float[Array, "b c"] | None,
        context: Context,
        train: bool = False,
    ) -> tuple[Float[Array, "b n c"], Float[Array, "branches b n c"] | None]:
        """Runs every member on what the one before it gave; all share the condition of the cycle."""
        kept = []
        for member, own in zip(self.members, self.own(each), strict=True):
            x, of_member = member(x, own, c, context, train=train)  # [B, N, C]
            kept.append(of_member)
        return x, _together(kept)


class Parallel(Several):
    """Blocks side by side, merged by a projection."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        each: Layer,
        c: Float[Array, "b c"] | None,
        context: Context,
        train: bool = False,
    ) -> tuple[Float[Array, "b n c"], Float[Array, "branches b n c"] | None]:
        """Runs every member on `x`; all share the condition."""
        added, kept = [], []
        for member, own in zip(self.members, self.own(each), strict=True):
            y, of_member = member(x, own, c, context, train=train)  # [B, N, C]
            added.append(y - x)
            kept.append(of_member)
        merge = Dense(x.shape[-1], ("mlp", "embed"), kernel_init=_sum, name="merge")
        return x + merge(jnp.concatenate(added, axis=-1)), _together(kept)


def members(block: nn.Module) -> tuple[nn.Module, ...]:
    """The layers that a block is made of: itself, or its members."""
    return block.members if isinstance(block, Several) else (block,)


def copied(module: nn.Module) -> nn.Module:
    """The same definition made of other instances, which share no parameters with it."""
    values = {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.name != "parent"}  # type: ignore[arg-type]
    parts: dict[str, Any] = {name: copied(v) for name, v in values.items() if isinstance(v, nn.Module)}
    return module.clone(**parts)


def _together(kept: list[Any]) -> Float[Array, "branches b n c"] | None:
    return None if kept[0] is None else jnp.concatenate(kept)


def _sum(key: Array, shape: tuple[int, int], dtype: Any) -> Float[Array, "i o"]:
    """The matrix that adds its inputs up: identities above each other."""
    return jnp.tile(jnp.eye(shape[1], dtype=dtype), (shape[0] // shape[1], 1))

"""The block of a diffusion transformer: adaLN-Zero.

    z <- z + g_1 * mixer((1 + a_1) * norm(z) + b_1)            (b_1, a_1, g_1, b_2, a_2, g_2) = silu(c) W_c
    z <- z + g_2 * ffn((1 + a_2) * norm(z) + b_2)

`W_c` starts at zero, so that every block starts as the identity.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, figure 3.
"""

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax import ffn, mixers, tokens
from effjax.config import part
from effjax.layers.modulation import Modulation, modulate
from effjax.layers.norms import norm
from effjax.mixers.context import Context
from effjax.tokens.around import around


@flax.struct.dataclass
class Layer:
    """What is one block's own.

    Attributes:
      c: `[B, C]`, its condition; None where all share one.
      fresh: `[branches]`, which of its branches are computed.
      kept: `[branches, B, N, C]`, what they gave before; None computes all and keeps nothing.
      route: what its `router` decided from the time alone; None where it has none.
    """

    c: Any = None
    fresh: Any = None
    kept: Any = None
    route: Any = None

    def branch(self, number: int, compute: Callable[..., Array], block: nn.Module, h: Array) -> Array:
        """What a branch gives: computed, or what was kept of it."""
        if self.kept is None:
            return compute(block, h)
        again: Array = nn.cond(self.fresh[number], compute, lambda block, h: self.kept[number], block, h)
        return again


class DiTBlock(nn.Module):
    """The adaLN-Zero block: mixer and FFN, each behind a modulated norm and a gate.

    To whoever asks for `intermediates` it sows what went into both and came out, as `operators`:
    `{"mixer": (h, y), "ffn": (h, y)}`, before the gates.

    Attributes:
      mixer: how tokens mix; None leaves that branch out, with its part of the modulation.
      ffn: how channels mix; likewise.
      epsilon: of the layer norms.
      ffn_epsilon: of the second one; None means `epsilon`.
      ffn_affine: whether the second one has a scale and a bias of its own besides the modulation.
      reduce: how tokens are merged before the mixer and restored behind it, a kind in `effjax.tokens` that
        reads features alone.
    """

    mixer: Any = part(mixers.KINDS)
    ffn: Any = part(ffn.KINDS)
    epsilon: float = 1e-6
    ffn_epsilon: float | None = None
    ffn_affine: bool = False
    reduce: Any = part(tokens.METHODS, default=None)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        each: Layer,
        c: Float[Array, "b c"] | None,
        context: Context,
        train: bool = False,
    ) -> tuple[Float[Array, "b n c"], Float[Array, "2 b n c"] | None]:
        """Returns `(x, kept)`; conditioned by `c` like every block, or by `each.c`, this block's own.

        Where `each.kept` holds what the branches gave before, one that is not fresh gives that again, and
        `kept` is what they gave now.
        """
        c = c if each.c is None else each.c
        assert c is not None
        branches = (self.mixer is not None) + (self.ffn is not None)
        steered = iter(Modulation(3 * branches, x.shape[-1], name="modulation")(c)) if branches else iter(())
        read = h = mixed = fed = jnp.zeros_like(x)
        if self.mixer is not None:
            shift, scale, gate = itertools.islice(steered, 3)  # 3 x [B, C]
            read = modulate(norm("layer_plain", self.epsilon, "mixer_norm")(x), shift, scale)  # [B, N, C]
            mixed = each.branch(0, lambda block, h: block._mixed(h, context, train), self, read)  # [B, N, C]
            x = x + gate[:, None] * mixed  # [B, N, C]
        if self.ffn is not None:
            shift, scale, gate = steered  # 3 x [B, C]
            epsilon = self.epsilon if self.ffn_epsilon is None else self.ffn_epsilon
            h = norm("layer" if self.ffn_affine else "layer_plain", epsilon, "ffn_norm")(x)  # [B, N, C]
            h = modulate(h, shift, scale)
            fed = each.branch(1, lambda block, h: block.ffn(h, train=train), self, h)  # [B, N, C]
            x = x + gate[:, None] * fed  # [B, N, C]
        kept = None if each.kept is None else jnp.stack([mixed, fed])  # [2, B, N, C]
        if not self.is_initializing():
            self.sow("intermediates", "operators", {"mixer": (read, mixed), "ffn": (h, fed)})
        return nn.with_logical_constraint(x, ("batch", "length", "features")), kept

    @nn.nowrap
    def _mixed(self, h: Float[Array, "b n c"], context: Context, train: bool) -> Float[Array, "b n c"]:
        if self.reduce is None:
            return self.mixer(h, context, train=train)
        return around(self.reduce, h, lambda h, context: self.mixer(h, context, train=train), context)

"""Blocks of video denoisers: attention along time, attention within each frame, and the FFN.

    z <- z + W_t mixer_t(norm_t(z)) + b_t                      tokens of the same place, over the frames
    z <- z + g_1 * mixer((1 + a_1) * norm(z) + b_1)            tokens of the same frame
    z <- z + g_2 * ffn((1 + a_2) * norm(z) + b_2)              (b_1, a_1, g_1, b_2, a_2, g_2) = silu(c) W_c

The last two are DiT's adaLN-Zero block on each frame, all frames modulated alike. The first is neither
modulated nor gated, has a norm with weights of its own, and a second projection behind that of its attention.
`W_c` starts at zero; the temporal part starts as it is drawn.

Source: Lu et al., "VDT: General-purpose Video Diffusion Transformers via Mask Modeling", ICLR 2024, section
3.2 and figure 2, and the published code (RERV/VDT), after which the temporal part is made.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax import ffn, mixers
from effjax.config import part
from effjax.layers.dense import Dense, xavier
from effjax.layers.modulation import Modulation, modulate
from effjax.layers.norms import norm
from effjax.mixers.context import Context
from effjax.models.blocks.adaln import Layer


class SpatioTemporalBlock(nn.Module):
    """VDT's block.

    Attributes:
      temporal: how the tokens of one place mix over time.
      mixer: how the tokens of one frame mix.
      ffn: how channels mix.
      epsilon: of the modulated layer norms.
      temporal_epsilon: of the norm in front of the temporal mixer.
    """

    temporal: nn.Module = part(mixers.KINDS)
    mixer: nn.Module = part(mixers.KINDS)
    ffn: nn.Module = part(ffn.KINDS)
    epsilon: float = 1e-6
    temporal_epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b f n c"],
        each: Layer,
        c: Float[Array, "b c"],
        context: Context,
        train: bool = False,
    ) -> tuple[Float[Array, "b f n c"], Float[Array, "3 b f n c"] | None]:
        """Returns `(x, kept)`; like `DiTBlock`, with a third branch, the temporal mixer, in front.

        What is kept of a branch is what its mixer or FFN gave, before projection and gate.
        """
        channels = x.shape[-1]
        h = norm("layer", self.temporal_epsilon, "temporal_norm")(x)  # [B, F, N, C]
        travelled = each.branch(0, lambda block, h: block._over_time(h, context, train), self, h)
        axes = (None, "embed")
        project = Dense(channels, axes, kernel_init=xavier, name="temporal_projection")
        x = x + project(travelled)  # [B, F, N, C]

        b_1, a_1, g_1, b_2, a_2, g_2 = Modulation(6, channels, name="modulation")(c)  # 6 x [B, C]
        h = _modulated(norm("layer_plain", self.epsilon, "mixer_norm")(x), b_1, a_1)  # [B, F, N, C]
        mixed = each.branch(1, lambda block, h: block._in_frames(h, context, train), self, h)
        x = x + g_1[:, None, None] * mixed  # [B, F, N, C]
        h = _modulated(norm("layer_plain", self.epsilon, "ffn_norm")(x), b_2, a_2)  # [B, F, N, C]
        fed = each.branch(2, lambda block, h: block._fed(h, train), self, h)  # [B, F, N, C]
        x = x + g_2[:, None, None] * fed  # [B, F, N, C]
        kept = None if each.kept is None else jnp.stack([travelled, mixed, fed])  # [3, B, F, N, C]
        return nn.with_logical_constraint(x, ("batch", "time", "length", "features")), kept

    @nn.nowrap
    def _over_time(self, h: Float[Array, "b f n c"], context: Context, train: bool) -> Array:
        b, f, n, c = h.shape
        h = jnp.swapaxes(h, 1, 2).reshape(b * n, f, c)  # [B N, F, C]
        h = self.temporal(h, context, train=train)
        return jnp.swapaxes(h.reshape(b, n, f, c), 1, 2)  # [B, F, N, C]

    @nn.nowrap
    def _in_frames(self, h: Float[Array, "b f n c"], context: Context, train: bool) -> Array:
        b, f, n, c = h.shape
        mixed: Array = self.mixer(h.reshape(b * f, n, c), context, train=train)  # [B F, N, C]
        return mixed.reshape(b, f, n, c)

    @nn.nowrap
    def _fed(self, h: Float[Array, "b f n c"], train: bool) -> Array:
        b, f, n, c = h.shape
        fed: Array = self.ffn(h.reshape(b, f * n, c), train=train)  # [B, F N, C]
        return fed.reshape(b, f, n, c)


def _modulated(
    h: Float[Array, "b f n c"], shift: Float[Array, "b c"], scale: Float[Array, "b c"]
) -> Float[Array, "b f n c"]:
    return modulate(h.reshape(h.shape[0], -1, h.shape[-1]), shift, scale).reshape(h.shape)


KINDS = {"spatio_temporal": SpatioTemporalBlock}

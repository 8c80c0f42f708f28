"""The block of a text-to-video diffusion transformer: adaLN-Zero, with the text read between its two halves.

    z <- z + g_1 * mixer((1 + a_1) * norm(z) + b_1)            (b_1, a_1, g_1, b_2, a_2, g_2) = silu(c) W_c
    z <- z + attention from norm(z) to the text
    z <- z + g_2 * ffn((1 + a_2) * norm(z) + b_2)

`W_c` and the output of the attention to the text start at zero, so that every block starts as the identity.

Sources: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, figure 3; Chen et al.,
"PixArt-alpha", ICLR 2024, section 2.3 for the text, which its code reads from z without a norm; as LinGen has
it, figure 2, for whatever mixes the tokens of a video.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax import ffn, mixers
from effjax.config import part
from effjax.layers.dense import zeros
from effjax.layers.modulation import Modulation, modulate
from effjax.layers.norms import norm
from effjax.mixers.context import Context
from effjax.mixers.cross_attention import CrossAttention
from effjax.models.blocks.adaln import Layer


class VideoTextBlock(nn.Module):
    """Mixer, text and FFN of one layer.

    Attributes:
      heads: of the attention to the text.
      mixer: how the tokens of a video `[B, F, H, W, C]` mix.
      ffn: how channels mix.
      epsilon: of the layer norms.
      log_bits: of the codes of what is taken from a token of the text; None does not round.
    """

    heads: int
    mixer: nn.Module = part(mixers.KINDS)
    ffn: nn.Module = part(ffn.KINDS)
    epsilon: float = 1e-6
    log_bits: int | None = None

    def setup(self) -> None:
        """Names the attention to the text."""
        self.text = CrossAttention(self.heads, output_init=zeros, log_bits=self.log_bits)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n c"],
        each: Layer,
        c: Float[Array, "b c"],
        text: Float[Array, "b l c"],
        valid: Bool[Array, "b l"],
        context: Context,
        point: int = 0,
        train: bool = False,
    ) -> tuple[Float[Array, "b n c"], Float[Array, "3 b n c"] | None]:
        """Returns `(x, kept)`, where `kept` is as in `effjax.models.blocks.adaln`.

        Args:
          x: tokens of a video, frame by frame and row by row.
          each: which branches are computed.
          c: what steers the norms.
          text: words.
          valid: words that exist.
          context: its `grid` has frames, rows and columns.
          point: the turn of this layer.
          train: passed on.
        """
        frames, height, width = context.grid
        context = dataclasses.replace(context, turn=point)

        def mixes(block: "VideoTextBlock", h: Array) -> Array:
            volume = h.reshape(h.shape[0], frames, height, width, -1)  # [B, F, H, W, C]
            mixed: Array = block.mixer(volume, context, train=train)
            return mixed.reshape(h.shape)

        b_1, a_1, g_1, b_2, a_2, g_2 = Modulation(6, x.shape[-1], name="modulation")(c)  # 6 x [B, C]
        h = modulate(norm("layer_plain", self.epsilon, "mixer_norm")(x), b_1, a_1)  # [B, N, C]
        mixed = each.branch(0, mixes, self, h)  # [B, N, C]
        x = x + g_1[:, None] * mixed  # [B, N, C]
        h = norm("layer_plain", self.epsilon, "text_norm")(x)  # [B, N, C]
        read = each.branch(1, lambda block, h: block.text(h, text, valid), self, h)  # [B, N, C]
        x = x + read
        h = modulate(norm("layer_plain", self.epsilon, "ffn_norm")(x), b_2, a_2)  # [B, N, C]
        fed = each.branch(2, lambda block, h: block.ffn(h, train=train), self, h)  # [B, N, C]
        x = x + g_2[:, None] * fed  # [B, N, C]
        kept = None if each.kept is None else jnp.stack([mixed, read, fed])  # [3, B, N, C]
        return nn.with_logical_constraint(x, ("batch", "length", "features")), kept


KINDS = {"video_text": VideoTextBlock}

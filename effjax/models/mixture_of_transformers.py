"""Mixture-of-Transformers: all weights of the blocks for each modality, one attention over all tokens.

    h_i = x_i + norm^m(W_o^m attention(W_q^m x, W_k^m x, W_v^m x)_i),    m = m(i)
    y_i = h_i + norm^m(FFN^m(h_i))

Text and image tokens stand in one sequence and are numbers of one vocabulary, so that the number of a token
says its modality. The work of a token is that of a dense model; the parameters of the blocks are there as
many times as there are modalities. Tables and the last norm are common. Liang et al., 2024,
arXiv:2411.04996, section 2, in the setting of Chameleon.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.config import part
from effjax.errors import UsageError
from effjax.ffn.modal import ModalGated
from effjax.layers.modal import Modalities, ModalNorm
from effjax.mixers.context import Context
from effjax.mixers.modal_attention import ModalAttention
from effjax.models.lm import LM, DecoderBlock


class ModalBlock(DecoderBlock):
    """`DecoderBlock` with weights for each modality.

    Attributes:
      mixer: the attention.
      ffn: the feed-forward layer.
    """

    mixer: ModalAttention = part({"modal_attention": ModalAttention})
    ffn: ModalGated = part({"modal_gated": ModalGated})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mixer.modalities != self.ffn.modalities:
            raise UsageError(
                f"the mixer has {self.mixer.modalities} modalities and the FFN {self.ffn.modalities}."
            )
        if self.norm not in ("rms", "layer"):
            raise UsageError(f"norm={self.norm!r}: a block by modality knows rms and layer.")

    @nn.nowrap
    def normalised(
        self, x: Float[Array, "b n c"], name: str, context: Context, train: bool
    ) -> Float[Array, "b n c"]:
        """One of the norms of the block."""
        kind: Literal["rms", "layer"] = "rms" if self.norm == "rms" else "layer"
        return ModalNorm(kind, self.epsilon, self.mixer.modalities, name=name)(x, context.modality)

    @nn.nowrap
    def channels(self, h: Float[Array, "b n c"], context: Context, train: bool) -> Float[Array, "b n c"]:
        """The FFN."""
        return self.ffn(h, context.modality)


class MixtureOfTransformers(LM):
    """`LM` whose blocks have weights for each modality.

    Attributes:
      block: the block that the stack repeats.
      first: the first token of each modality but the first one, rising: tokens below `first[0]` are of
        modality 0, those from there to below `first[1]` of modality 1.
    """

    block: ModalBlock
    first: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        count = self.block.mixer.modalities
        rising = all(a < b for a, b in zip((0, *self.first), (*self.first, self.vocab), strict=True))
        if len(self.first) != count - 1 or not rising:
            raise UsageError(
                f"first={self.first} must name the first token of each of {count} modalities but the first "
                f"one, rising and below vocab={self.vocab}."
            )

    def forward(
        self, tokens: Int[Array, "b n"], context: Context, caches: Any, train: bool
    ) -> tuple[Float[Array, "b n vocab"], Any]:
        """Embedding, blocks and head; without caches the tokens are whole sequences."""
        ids = sum((tokens >= number for number in self.first), jnp.zeros_like(tokens))
        modality = Modalities.of(ids, len(self.first) + 1)
        return super().forward(tokens, dataclasses.replace(context, modality=modality), caches, train)

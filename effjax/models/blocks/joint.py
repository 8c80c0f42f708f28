"""The joint block of picture and text: joint attention and a feed-forward layer for each stream.

    (b_1, a_1, g_1, b_2, a_2, g_2) = bias + c (1 + scale)                                AdaLN-affine
    [x, x'] <- [x, x'] + g_1 * joint([(1 + a_1) * norm_1(x) + b_1, the same of x'])
    x       <- x + g_2 * ffn((1 + a_2) * norm_2(x) + b_2),   x' in the same way

Six vectors `c` of the time are shared by the whole network; a block has a bias and a scale of its own for
each of them and each stream, 12 vectors a stream in the place of the matrix of adaLN-Zero. With a scale of
zero this is adaLN-single of PixArt-alpha, whose table the bias is. `norm_1` has a scale and a bias besides.

Source: Shen et al., "E-MMDiT", 2025, arXiv:2510.27135, and its code, AMD-AGI/Nitro-E.
"""

import flax.linen as nn
from jaxtyping import Array, Float

from effjax.ffn.mlp import MLP
from effjax.layers.dense import named
from effjax.layers.modulation import modulate
from effjax.layers.norms import norm
from effjax.mixers.joint_attention import JointAttention, Pattern

# Two streams: tokens of the picture, and of the text or None behind the last layer that has one.
Streams = tuple[Float[Array, "b n c"], Float[Array, "b l c"] | None]


class AdaLNAffine(nn.Module):
    """What a block makes of the shared vectors, bias + c (1 + scale); both start with a variance of 1 / C."""

    @nn.compact
    def __call__(self, c: Float[Array, "b parts c"]) -> tuple[Float[Array, "b c"], ...]:
        """Returns the vectors in the order they are used."""
        shape = c.shape[1:]
        init = named(nn.initializers.normal(shape[-1] ** -0.5), (None, "norm"))
        scale, bias = self.param("scale", init, shape), self.param("bias", init, shape)
        own = bias.astype(c.dtype)[None] + c * (1 + scale.astype(c.dtype))[None]  # [B, parts, C]
        return tuple(own[:, i] for i in range(shape[0]))  # parts x [B, C]


class JointBlock(nn.Module):
    """Joint attention, then a feed-forward layer a stream.

    Attributes:
      mixer: the joint attention; where it does not answer the text, that is read without modulation and ends
        here.
      ratio: expansion of the feed-forward layers.
      mixer_epsilon: of the norms before attention.
      ffn_epsilon: of those before the feed-forward layers.
    """

    mixer: JointAttention
    ratio: float = 3.0
    mixer_epsilon: float = 1e-5
    ffn_epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self,
        streams: Streams,
        each: None,
        c: Float[Array, "b 6 c"],
        point: Pattern | None = None,
        train: bool = False,
    ) -> tuple[Streams, None]:
        """Returns both streams; `c` are the shared vectors, `point` which tokens attend to each other."""
        image, text = streams
        assert text is not None
        b_1, a_1, g_1, b_2, a_2, g_2 = AdaLNAffine(name="image_affine")(c)  # 6 x [B, C]
        h = modulate(norm("layer", self.mixer_epsilon, "image_norm")(image), b_1, a_1)  # [B, N, C]
        h_text = norm("layer", self.mixer_epsilon, "text_norm")(text)  # [B, L, C]
        if self.mixer.answers_text:
            s_1, r_1, p_1, s_2, r_2, p_2 = AdaLNAffine(name="text_affine")(c)  # 6 x [B, C]
            h_text = modulate(h_text, s_1, r_1)
        h, answer = self.mixer(h, h_text, point or Pattern())  # [B, N, C], [B, L, C]
        image = image + g_1[:, None] * h
        image = image + g_2[:, None] * self._fed(image, b_2, a_2, "image_ffn")  # [B, N, C]
        if answer is None:
            return (image, None), None
        text = text + p_1[:, None] * answer
        text = text + p_2[:, None] * self._fed(text, s_2, r_2, "text_ffn")  # [B, L, C]
        return (image, text), None

    @nn.nowrap
    def _fed(
        self, x: Float[Array, "b n c"], shift: Float[Array, "b c"], scale: Float[Array, "b c"], name: str
    ) -> Float[Array, "b n c"]:
        h = norm("layer_plain", self.ffn_epsilon, f"{name}_norm")(x)  # [B, N, C]
        return MLP(ratio=self.ratio, activation="gelu_tanh", name=name)(modulate(h, shift, scale))

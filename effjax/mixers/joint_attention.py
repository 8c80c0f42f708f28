"""Joint attention: two streams, a picture's tokens and a text's, attend to both at once.

    q, k, v = [x W_q, x' W'_q], [x W_k, x' W'_k], [x W_v, x' W'_v]        each stream its own matrices
    [y, y'] = softmax(q k^T / sqrt(d)) v,    out = y W_o,    out' = y' W'_o

In regions (`Pattern`) a token of the picture meets only those of its region, at a cost that falls with their
number. Patterns that alternate from layer to layer let every token reach every other in two layers:
Alternating Subregion Attention. The text is either cut by the same pattern, as in the published code, or
shared by all regions: then every token meets all of the text, and the text meets all.

Sources: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024,
section 4 (joint attention); Shen et al., "E-MMDiT", 2025, arXiv:2510.27135, and its code, AMD-AGI/Nitro-E.
"""

import dataclasses
from typing import Literal

import einops
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.axes import constrain
from effjax.layers.dense import Dense
from effjax.layers.norms import norm
from effjax.mixers.dot_product import softmax_attention

Heads = Float[Array, "b n h d"]


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which tokens of a row make a region: token n belongs to number `(n // run) % regions`.

    Attributes:
      regions: how many there are; 1 is full attention.
      run: tokens one behind the other that stay together.
    """

    regions: int = 1
    run: int = 1

    def __post_init__(self) -> None:
        if self.regions < 1 or self.run < 1:
            raise UsageError(f"regions={self.regions} and run={self.run} must be at least 1.")

    def cut(self, x: Float[Array, "b n c"], what: str) -> Float[Array, "b_regions m c"]:
        """Makes every region a row of its own, `m = n / regions` tokens long.

        Raises:
          UsageError: where the tokens of `what` cannot be dealt evenly.
        """
        if self.regions == 1:
            return x
        if x.shape[1] % (self.regions * self.run):
            raise UsageError(
                f"{x.shape[1]} tokens of the {what} make no {self.regions} regions of runs of {self.run}: "
                f"their number must be a multiple of {self.regions * self.run}."
            )
        dealt = "b (m s r) c -> (b s) (m r) c"
        return einops.rearrange(x, dealt, s=self.regions, r=self.run)

    def join(self, x: Float[Array, "b_regions m c"]) -> Float[Array, "b n c"]:
        """Lays the tokens of all regions out as they were: the inverse of `cut`."""
        if self.regions == 1:
            return x
        dealt = "(b s) (m r) c -> b (m s r) c"
        return einops.rearrange(x, dealt, s=self.regions, r=self.run)


class Projections(nn.Module):
    """Queries, keys and values of one stream.

    Attributes:
      heads: number of heads.
      qk_norm: whether queries and keys pass an RMS norm over each head.
      asks: whether there are queries.
      epsilon: of the norm.
    """

    heads: int
    qk_norm: bool
    asks: bool = True
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> tuple[Heads | None, Heads, Heads]:
        """Projects; the first is None where the stream does not ask."""
        size, axes = (self.heads, x.shape[-1] // self.heads), ("embed", "heads", "head_dim")
        q = Dense(size, axes, name="query")(x) if self.asks else None  # [B, N, H, D]
        k = Dense(size, axes, name="key")(x)  # [B, N, H, D]
        v = Dense(size, axes, name="value")(x)  # [B, N, H, D]
        if self.qk_norm:
            q = None if q is None else norm("rms", self.epsilon, "query_norm")(q)
            k = norm("rms", self.epsilon, "key_norm")(k)
        return q, k, v


class JointAttention(nn.Module):
    """Softmax attention of picture and text to both.

    Attributes:
      heads: number of heads, the same in both streams.
      qk_norm: whether queries and keys pass an RMS norm over each head.
      text_in_regions: whether the text is cut as the picture is, or all regions share it.
      answers_text: whether the text gets an output; the last layer of a network has no use for it.
    """

    heads: int
    qk_norm: bool = True
    text_in_regions: Literal["split", "shared"] = "split"
    answers_text: bool = True

    @nn.compact
    def __call__(
        self, image: Float[Array, "b n c"], text: Float[Array, "b l c"], pattern: Pattern
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b l c"] | None]:
        """Mixes the tokens of both, those of a region of `pattern` with each other.

        Raises:
          UsageError: where the pattern cannot deal the tokens evenly, those of the picture or of a text that
            is split, or the heads do not divide the width.
        """
        width, regions = image.shape[-1], pattern.regions
        if width % self.heads:
            raise UsageError(f"heads={self.heads} does not divide the width {width}.")
        split = self.text_in_regions == "split"
        image = pattern.cut(image, "picture")  # [B s, N/s, C]
        text = pattern.cut(text, "text") if split else text  # [B s, L/s, C] or [B, L, C]
        q, k, v = Projections(self.heads, self.qk_norm, name="image")(image)  # [B s, N/s, H, D]
        asked = Projections(self.heads, self.qk_norm, self.answers_text, name="text")(text)
        q_text, k_text, v_text = asked  # [.., .., H, D]
        assert q is not None
        if split or regions == 1:
            both = q if q_text is None else jnp.concatenate([q, q_text], axis=1)
            y = _attention(both, (k, k_text), (v, v_text))  # [B s, (N + L)/s, H, D]
            y, y_text = y[:, : q.shape[1]], None if q_text is None else y[:, q.shape[1] :]
        else:
            k_all, v_all = (jnp.repeat(part, regions, axis=0) for part in (k_text, v_text))  # [B s, L, H, D]
            y, y_text = _attention(q, (k, k_all), (v, v_all)), None  # [B s, N/s, H, D]
            if q_text is not None:
                k, v = (part.reshape(len(text), -1, *part.shape[2:]) for part in (k, v))  # [B, N, H, D]
                y_text = _attention(q_text, (k, k_text), (v, v_text))  # [B, L, H, D]
        image = pattern.join(self._output(y, width, "image_output"))  # [B, N, C]
        if y_text is None:
            return constrain(image), None
        text = self._output(y_text, width, "text_output")  # [B s, L/s, C] or [B, L, C]
        return constrain(image), constrain(pattern.join(text) if split else text)

    @nn.nowrap
    def _output(self, y: Heads, width: int, name: str) -> Float[Array, "b n c"]:
        return Dense(width, ("heads", "head_dim", "embed"), inputs=2, name=name)(y)


def _attention(q: Heads, keys: tuple[Array, Array], values: tuple[Array, Array]) -> Heads:
    """From queries to two streams one behind the other."""
    k, v = (jnp.concatenate(parts, axis=1) for parts in (keys, values))
    return softmax_attention(q, k, v, mask=None, causal=False)

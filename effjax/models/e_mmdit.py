"""E-MMDiT: a text-to-image transformer that does most of its work on few tokens.

    z = patches W + positions,  z' = text W',  c = silu(MLP(frequencies(t))) W_c    six vectors for all blocks
    [z, z'] <- joint blocks on all tokens                                         depths[0] of them
    u_r = W_2r gelu(W_1r (r x r neighbours side by side)),  r in ratios           multi-path compression
    [u, z'] <- joint blocks on [u_2, u_4]                                         depths[1], most of them
    w_r = W_4r gelu(W_3r (channels of u_r dealt to r x r places))                 token reconstruction
    z <- W_6 gelu(W_5 [w_2, w_4, z]) + positions                                  Position Reinforcement
    [z, z'] <- joint blocks on all tokens                                         depths[2]
    prediction = unpatch(norm(z) W_out)

256 tokens of a 512 pixel picture become 64 + 16 in the middle. Blocks take the patterns of Alternating
Subregion Attention in turn, see `effjax.mixers.joint_attention`; their modulation is AdaLN-affine, see
`effjax.models.blocks.joint`. Text has no positions and no mask: padding is features like others.

Source: Shen et al., "E-MMDiT: Revisiting Multimodal Diffusion Transformer Design for Fast Image Synthesis
under Limited Resources", 2025, arXiv:2510.27135, and its code, AMD-AGI/Nitro-E. The code has queries of the
text in the last block too, which nothing reads and which are left out here; it starts from PyTorch's default
initial values, where here matrices start as Xavier's, and biases, `W_c` and `W_out` at zero; and its null
text is the features of an empty one, here zeros.
"""

from typing import Any, Literal

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.dense import Dense, zeros
from effjax.layers.modulation import Modulation, TimeEmbed
from effjax.layers.norms import norm
from effjax.layers.patches import PatchEmbed, add_positions, sincos_at, unpatch
from effjax.layers.stack import Stack
from effjax.mixers.joint_attention import JointAttention, Pattern
from effjax.models.blocks.joint import JointBlock, Streams


def _activated(h: Float[Array, "*batch c"], dim: int, name: str) -> Float[Array, "*batch dim"]:
    """The second half of every path: gelu, then a projection."""
    h = jax.nn.gelu(h, approximate=True)
    return Dense(dim, ("mlp", "embed"), name=f"{name}_contract")(h)


class Compress(nn.Module):
    """Multi-path compression: a grid of tokens at several coarser scales, one behind the other.

    Attributes:
      ratios: side of the neighbourhoods that become one token.
    """

    ratios: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b m c"]:
        """Returns `m = sum h w / r^2` tokens, scale by scale, each row by row."""
        b, _, _, dim = x.shape
        paths = []
        for r in self.ratios:
            h = PatchEmbed(r, dim, name=f"path_{r}_expand")(x)  # [B, h/r, w/r, C]
            paths.append(_activated(h, dim, f"path_{r}").reshape(b, -1, dim))  # [B, h w / r r, C]
        return jnp.concatenate(paths, axis=1)


class Reconstruct(nn.Module):
    """The other way round: every scale is spread over the grid, and merged with what was compressed.

    Attributes:
      ratios: as in `Compress`.
    """

    ratios: tuple[int, ...]

    @nn.compact
    def __call__(self, coarse: Float[Array, "b m c"], fine: Float[Array, "b h w c"]) -> Float[Array, "b n c"]:
        """Returns `n = h w` tokens from the coarse ones and `fine`, the grid before compression."""
        b, rows, columns, dim = fine.shape
        scales, begun = [], 0
        for r in self.ratios:
            h, w = rows // r, columns // r
            x = coarse[:, begun : begun + h * w]  # [B, h w / r r, C]
            begun += h * w
            x = einops.rearrange(x, "b (h w) (c p q) -> b (h p w q) c", h=h, w=w, p=r, q=r)  # [B, n, C / r r]
            x = Dense(dim, (None, "mlp"), name=f"path_{r}_expand")(x)  # [B, n, C]
            scales.append(_activated(x, dim, f"path_{r}"))  # [B, n, C]
        x = jnp.concatenate([*scales, fine.reshape(b, -1, dim)], axis=-1)  # [B, n, (1 + scales) C]
        x = Dense(dim, ("embed", "mlp"), name="merge_expand")(x)  # [B, n, C]
        return _activated(x, dim, "merge")  # [B, n, C]


class EMMDiT(nn.Module):
    """Predicts a velocity, noise or the clean picture from a noisy one, its time and the features of a text.

    Attributes:
      patch: side of a patch in pixels of the latent.
      dim: channels of a token.
      heads: of attention.
      depths: joint blocks before compression, on the compressed tokens and behind.
      ratios: sides of the neighbourhoods that compression makes one token of, one a path.
      patterns: `(regions, run)` of Alternating Subregion Attention, which the blocks take in turn; one of
        `(1, 1)` is full attention everywhere. They have no part in the parameters.
      text_in_regions: whether the text is cut as the picture is, or shared by all regions.
      ratio: expansion of the feed-forward layers.
      qk_norm: whether queries and keys pass an RMS norm over each head.
      null_class: whether a text of zeros stands for no text, which classifier-free guidance needs.
      learned_sigma: whether the network also predicts variances, in as many channels again.
      frequencies: sines and cosines in the time embedding.
      position_step: from one patch to the next; published is a sixth at 512 and at 1024 pixels.
      position_side: positions are centred on a grid of so many.
      remat: rematerialisation policy, a name in `effjax.layers.stack.REMAT`.
      unroll: rounds of patterns a scan iteration.
    """

    patch: int
    dim: int
    heads: int
    depths: tuple[int, int, int] = (4, 16, 4)
    ratios: tuple[int, ...] = (2, 4)
    patterns: tuple[tuple[int, int], ...] = ((1, 1), (4, 1), (4, 4))
    text_in_regions: Literal["split", "shared"] = "split"
    ratio: float = 3.0
    qk_norm: bool = True
    null_class: bool = True
    learned_sigma: bool = False
    frequencies: int = 256
    position_step: float = 1 / 6
    position_side: int = 96
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.depths) != 3 or min(self.depths) < 1:
            raise UsageError(f"depths={self.depths} must be three numbers of blocks, each at least 1.")
        if not self.ratios or not self.patterns:
            raise UsageError(f"ratios={self.ratios} and patterns={self.patterns} need at least one each.")
        for r in self.ratios:
            if self.dim % r**2:
                raise UsageError(f"dim={self.dim} must be a multiple of {r**2} for ratios={self.ratios}.")

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "b height width channels"],
        t: Float[Array, " b"],
        text: Float[Array, "b length features"],
        train: bool = False,
    ) -> Float[Array, "b height width out"]:
        """Returns the prediction: `channels` channels, then as many of the variance where it is learned.

        Args:
          x_t: noisy pictures; both sides must be multiples of the patch times every ratio.
          t: times in the unit of training steps, 0 to 1000; `Process.network_time` gives them.
          text: features of the text's tokens, all zeros where there is no text.
          train: not used.

        Raises:
          UsageError: where patches or compression do not tile the picture, or regions its tokens.
        """
        self._check(x_t.shape[1], x_t.shape[2])
        grid = PatchEmbed(self.patch, self.dim, name="embed")(x_t)  # [B, h, w, C]
        b, h, w, _ = grid.shape
        positions = jnp.asarray(self._positions(h, w))  # [h w, C]
        image = add_positions(grid.reshape(b, h * w, self.dim), positions)  # [B, h w, C]
        image = nn.with_logical_constraint(image, ("batch", "length", "features"))
        embed = Dense(self.dim, (None, "embed"), name="text_embed")
        words: Any = embed(text.astype(image.dtype))  # [B, L, C], None behind the last block
        c = TimeEmbed(self.dim, self.frequencies, name="time_embed")(t, image.dtype)  # [B, C]
        shared = jnp.stack(Modulation(6, self.dim, name="modulation")(c), axis=1)  # [B, 6, C]

        image, words = self._blocks(0, (image, words), shared, train)  # [B, h w, C], [B, L, C]
        fine = image.reshape(b, h, w, self.dim)  # [B, h, w, C]
        coarse = Compress(self.ratios, name="compress")(fine)  # [B, M, C]
        coarse, words = self._blocks(1, (coarse, words), shared, train)  # [B, M, C], [B, L, C]
        image = Reconstruct(self.ratios, name="reconstruct")(coarse, fine)  # [B, h w, C]
        image = add_positions(image, positions)  # [B, h w, C]
        image, words = self._blocks(2, (image, words), shared, train)  # [B, h w, C]

        out = x_t.shape[-1] * (2 if self.learned_sigma else 1)
        x = norm("layer_plain", 1e-6, "norm")(image)  # [B, h w, C]
        x = Dense(self.patch**2 * out, ("embed", None), kernel_init=zeros, name="output")(x)
        return unpatch(x, (h, w), self.patch)  # [B, H, W, out]

    def null(self, text: Float[Array, "b length features"]) -> Float[Array, "b length features"]:
        """No text, for each example: all zeros."""
        return jnp.zeros_like(text)

    @nn.nowrap
    def _blocks(self, group: int, streams: Streams, shared: Float[Array, "b 6 c"], train: bool) -> Streams:
        """The blocks of a group, each with its pattern; the network's last does not go on with the text."""
        begun, depth, rounds = sum(self.depths[:group]), self.depths[group], len(self.patterns)
        turns = tuple(Pattern(*self.patterns[(begun + i) % rounds]) for i in range(rounds))
        stacked = depth - (group == 2)
        options: dict[str, Any] = dict(remat=self.remat, unroll=self.unroll)
        if stacked:
            stack = Stack(self._block(True), stacked, **options, name=f"blocks_{group}")
            streams, _ = stack(streams, shared, train=train, turns=turns)
        if stacked < depth:
            stack = Stack(self._block(False), 1, **options, name="last")
            streams, _ = stack(streams, shared, train=train, turns=(turns[stacked % rounds],))
        return streams

    @nn.nowrap
    def _block(self, answers_text: bool) -> JointBlock:
        mixer = JointAttention(self.heads, self.qk_norm, self.text_in_regions, answers_text, parent=None)
        return JointBlock(mixer, self.ratio, parent=None)

    @nn.nowrap
    def _positions(self, h: int, w: int) -> Float[np.ndarray, "n dim"]:
        """Sines and cosines of the places, whose middle is the same on grids of all sizes."""
        row, column = (((self.position_side - n) // 2 + np.arange(n)) * self.position_step for n in (h, w))
        return sincos_at(row, column, self.dim)

    @nn.nowrap
    def _check(self, height: int, width: int) -> None:
        for r in self.ratios:
            if height % (self.patch * r) or width % (self.patch * r):
                raise UsageError(
                    f"a picture of {height} x {width} has no neighbourhoods of {r} x {r} patches of "
                    f"{self.patch}: both sides must be multiples of {self.patch * r}."
                )

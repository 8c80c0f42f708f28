"""The block of PT-DiT: global attention by proxy, local attention in windows, text, FFN.

    z <- z + proxy attention(z)                                          (effjax.mixers.proxy_attention)
    z <- z + g_1 * window attention((1 + a_1) * norm(z) + b_1)
    z <- z + (g_3 * shifted window attention((1 + a_3) * norm(z) + b_3)) Z
    z <- z + cross attention(z, text)                                    where there is a text; no norm
    z <- z + g_2 * ffn((1 + a_2) * norm(z) + b_2)
    (b_1, a_1, g_1, b_2, a_2, g_2) = s + T,    (b_3, a_3, g_3) = s[:3] + T_3

`s` `[6, C]` comes from the time and is the same for all blocks, which have the tables T and T_3 of their own:
adaLN-single. The windows are those of the proxies. Z starts at zero, and so does the output of the text's
attention; the tables start as normals of deviation C^-1/2, like their source. Windows have no position bias.

Sources: Wang et al., "Qihoo-T2X", ICLR 2025, arXiv:2409.04005, section 3.2; order, norms and gates as in its
code (Ascend/MindSpeed-MM, `pt_dit_diffusers.py`). adaLN-single: Chen et al., "PixArt-alpha", ICLR 2024,
arXiv:2310.00426, section 2.3. The code steers the windows of one example by the times of others, unless all
times of a batch are the same as in sampling; here each example has its own. Where one window covers a whole
side nothing is shifted along it, where the code cuts that window in two.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax import ffn
from effjax.config import part
from effjax.layers.dense import Dense, named, zeros
from effjax.layers.modulation import modulate
from effjax.layers.norms import norm
from effjax.mixers import volumes
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.mixers.cross_attention import CrossAttention
from effjax.mixers.proxy_attention import Choice, ProxyAttention
from effjax.mixers.volumes import Volume
from effjax.models.blocks.adaln import Layer


@flax.struct.dataclass
class Told:
    """What all blocks are told alike.

    Attributes:
      steer: `[B, 6, C]`, shifts, scales and gates before a block's own table is added.
      text: `[B, L, C]`, or None.
      valid: `[B, L]` bool, which tokens of the text are words.
      volume: frames, rows and columns of tokens, which windows tile; the tokens stand window by window.
    """

    steer: Any
    text: Any
    valid: Any
    volume: Volume = flax.struct.field(pytree_node=False)


class ProxyBlock(nn.Module):
    """The PT-Block, on tokens that stand window by window.

    Attributes:
      heads: of every attention.
      ffn: how channels mix.
      window: frames, rows and columns of tokens that one proxy stands for: the compression ratio. A side that
        is longer than the volume's is cut to it.
      choice: what stands for a window, see `effjax.mixers.proxy_attention`.
      epsilon: of the layer norms.
      log_bits: of the codes of what is taken from a token of the text; None does not round.
    """

    heads: int
    ffn: nn.Module = part(ffn.KINDS)
    window: Volume = (1, 2, 2)
    choice: Choice = "mean"
    epsilon: float = 1e-6
    log_bits: int | None = None

    def setup(self) -> None:
        """Names the four attentions."""
        self.proxy = ProxyAttention(self.heads, self.choice, self.epsilon)
        self.local = Attention(self.heads)
        self.shifted = Attention(self.heads)
        self.text = CrossAttention(self.heads, output_init=zeros, log_bits=self.log_bits)

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], each: Layer, told: Told, train: bool = False
    ) -> tuple[Float[Array, "b n c"], Float[Array, "branches b n c"] | None]:
        """Returns `(x, kept)`; where `each.kept` holds what branches gave before, see `Layer`."""
        b_1, a_1, g_1, b_2, a_2, g_2 = self._steered("table", told.steer)  # 6 x [B, C]
        b_3, a_3, g_3 = self._steered("shifted_table", told.steer[:, :3])  # 3 x [B, C]
        gave: list[Array] = []

        def branch(compute: Any, h: Array) -> Array:
            gave.append(each.branch(len(gave), compute, self, h))
            return gave[-1]

        x = x + branch(lambda block, h: block._global(h, told, train), x)  # [B, N, C]
        h = modulate(self._norm("local_norm")(x), b_1, a_1)  # [B, N, C]
        x = x + g_1[:, None] * branch(lambda block, h: block._local(h, told, train), h)
        h = modulate(self._norm("shifted_norm")(x), b_3, a_3)  # [B, N, C]
        y = g_3[:, None] * branch(lambda block, h: block._shifted(h, told, train), h)  # [B, N, C]
        x = x + Dense(x.shape[-1], ("embed", None), kernel_init=zeros, name="shifted_project")(y)
        if told.text is not None:
            x = x + branch(lambda block, h: block.text(h, told.text, told.valid), x)  # [B, N, C]
        h = modulate(self._norm("ffn_norm")(x), b_2, a_2)  # [B, N, C]
        x = x + g_2[:, None] * branch(lambda block, h: block.ffn(h, train=train), h)  # [B, N, C]
        kept = None if each.kept is None else jnp.stack(gave)  # [branches, B, N, C]
        return nn.with_logical_constraint(x, ("batch", "length", "features")), kept

    @nn.nowrap
    def _steered(self, name: str, steer: Float[Array, "b parts c"]) -> tuple[Float[Array, "b c"], ...]:
        """The vectors that steer this block: those of the time, and a table of its own."""
        parts, width = steer.shape[1:]
        init = named(nn.initializers.normal(width**-0.5), (None, "embed"))
        table = self.param(name, init, (parts, width), jnp.float32)
        steer = steer + table.astype(steer.dtype)[None]
        return tuple(steer[:, i] for i in range(parts))

    @nn.nowrap
    def _norm(self, name: str) -> nn.Module:
        return norm("layer_plain", self.epsilon, name)

    @nn.nowrap
    def _windows(self, x: Float[Array, "b n c"], told: Told) -> Float[Array, "b windows places c"]:
        """The tokens of each window by themselves."""
        frames, rows, columns = volumes.fitted(self.window, told.volume)
        return x.reshape(x.shape[0], -1, frames * rows * columns, x.shape[-1])

    @nn.nowrap
    def _global(self, x: Float[Array, "b n c"], told: Told, train: bool) -> Float[Array, "b n c"]:
        return self.proxy(self._windows(x, told), train=train).reshape(x.shape)

    @nn.nowrap
    def _local(self, h: Float[Array, "b n c"], told: Told, train: bool) -> Float[Array, "b n c"]:
        """Attention inside each window."""
        cut = self._windows(h, told)  # [B, w, m, C]
        y = self.local(cut.reshape(-1, *cut.shape[2:]), Context(), train=train)  # [B w, m, C]
        return y.reshape(h.shape)

    @nn.nowrap
    def _shifted(self, h: Float[Array, "b n c"], told: Told, train: bool) -> Float[Array, "b n c"]:
        """The same in windows half a window further; places that were apart do not see each other."""
        grid = told.volume
        size = volumes.fitted(self.window, grid)
        shift = volumes.shift_of(size, grid, True)
        x = volumes.reverse(self._windows(h, told), grid, size)  # [B, f, h, w, C]
        cut = volumes.cut(x, size, shift)  # [B, windows, m, C]
        context = Context()
        if (labels := volumes.regions(grid, size, shift)) is not None:
            beside = jnp.broadcast_to(jnp.asarray(labels)[None], cut.shape[:3])  # [B, windows, m]
            context = Context(segments=beside.reshape(-1, cut.shape[2]))
        y = self.shifted(cut.reshape(-1, *cut.shape[2:]), context, train=train)  # [B windows, m, C]
        x = volumes.laid_out(y.reshape(cut.shape), grid, size, shift)  # [B, f, h, w, C]
        return volumes.cut(x, size).reshape(h.shape)

"""LinGen: a text-to-video diffusion transformer whose cost is linear in the pixels of a video.

    z = patches of each frame W + positions in the frame + positions in time
    c = MLP(frequencies(t)),   words = MLP(text)
    z <- block(z, c, words)                                        see `effjax.models.blocks.video_text`
    prediction = unpatch(((1 + a) * norm(z) + b) W_out)                 (b, a) = silu(c) W_f

The mixer of its blocks is `effjax.mixers.mate`, whose order of tokens and windows rotate over four layers.
With `attention` in its place it is the diffusion transformer that the paper compares with.

Source: Wang et al., "LinGen: Towards High-Resolution Minute-Length Text-to-Video Generation with Linear
Computational Complexity", CVPR 2025, figure 2. Positions, embedding of the text and widths are not in what
was read of it, see `configs/diffusion/lingen.py`.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.config import part
from effjax.errors import UsageError
from effjax.layers.dense import Dense, zeros
from effjax.layers.modulation import Modulation, TimeEmbed, modulate
from effjax.layers.norms import norm
from effjax.layers.patches import PatchEmbed, sincos_line, sincos_table, unpatch
from effjax.layers.stack import Stack
from effjax.mixers.context import Context
from effjax.mixers.mate import PERIOD
from effjax.models.blocks import video_text
from effjax.models.blocks.adaln import Layer


@flax.struct.dataclass
class Stream:
    """What runs through the layers, between `begin`, `layers` and `finish`.

    Attributes:
      x: `[B, N, C]`, the tokens, frame by frame and row by row.
      c: `[B, C]`, the embedded time.
      text: `[B, L, C]`, the embedded words.
      valid: `[B, L]`, words that exist.
      grid: frames, rows and columns of tokens.
      channels: of the noisy video.
    """

    x: Any
    c: Any
    text: Any
    valid: Any
    grid: tuple[int, int, int] = flax.struct.field(pytree_node=False)
    channels: int = flax.struct.field(pytree_node=False)


class LinGen(nn.Module):
    """Predicts noise, clean video or velocity from a noisy video, its time and a text.

    In pieces (`begin`, `layers`, `finish`, `recall`) like `effjax.models.dit.DiT`, for step caches.

    Attributes:
      patch: side of a patch in pixels (of the latent, where there is one); every frame is cut by itself.
      dim: channels of a token.
      depth: number of blocks.
      block: what the stack repeats, with an `epsilon` that the last norm shares.
      learned_sigma: whether the network also predicts variances, in as many channels again.
      frequencies: sines and cosines in the time embedding.
      remat: rematerialisation policy, a name in `effjax.layers.stack.REMAT`.
      unroll: rounds of four layers a scan iteration.
    """

    patch: int
    dim: int
    depth: int
    block: nn.Module = part(video_text.KINDS)
    learned_sigma: bool = False
    frequencies: int = 256
    remat: str = "none"
    unroll: int = 1

    branches: ClassVar[int] = 3
    null_class: ClassVar[bool] = True

    def setup(self) -> None:
        """Names the parts that stand in front of the last modulation."""
        self.embed = PatchEmbed(self.patch, self.dim)
        self.time_embed = TimeEmbed(self.dim, self.frequencies)
        self.text_expand = Dense(self.dim, (None, "mlp"))
        self.text_contract = Dense(self.dim, ("mlp", "embed"))
        self.blocks = Stack(self.block, self.depth, remat=self.remat, unroll=self.unroll)

    def __call__(
        self,
        x_t: Float[Array, "b *places channels"],
        t: Float[Array, " b"],
        text: Float[Array, "b *words e"],
        train: bool = False,
    ) -> Float[Array, "b frames height width out"]:
        """Returns the prediction: `channels` channels, then as many of the variance where it is learned.

        Args:
          x_t: noisy videos `[B, F, H, W, channels]`; both sides must be multiples of the patch.
          t: times in the unit of training steps, 0 to 1000; `Process.network_time` gives them.
          text: features `[B, L, E]` of a text encoder; words that are all zeros do not exist.
          train: passed on to mixers and FFN.

        Raises:
          UsageError: for something else than a video or a text, or patches that do not tile the frames.
        """
        return self.finish(self.layers(self.begin(x_t, t, text), train=train))

    def null(self, text: Float[Array, "b l e"]) -> Float[Array, "b l e"]:
        """The text that says nothing, for each example."""
        return jnp.zeros_like(text)

    def begin(
        self, x_t: Float[Array, "b *places channels"], t: Float[Array, " b"], text: Float[Array, "b *words e"]
    ) -> Stream:
        """What enters the first layer."""
        if x_t.ndim != 5 or text.ndim != 3:
            raise UsageError(
                f"a text-to-video model takes [batch, frames, height, width, channels] and a text of [batch, "
                f"words, features]; these are {list(x_t.shape)} and {list(text.shape)}: set "
                f"config.task.content and config.task.condition to the fields that hold them."
            )
        b, frames = x_t.shape[:2]
        x = self.embed(x_t.reshape(-1, *x_t.shape[2:]))  # [B F, h, w, C]
        grid = frames, x.shape[1], x.shape[2]
        x = x.reshape(b, frames, -1, self.dim)  # [B, F, h w, C]
        # Added up in the program: the sum of a long video would be a constant of gigabytes.
        plane, line = (
            jnp.asarray(t) for t in (sincos_table(grid[1:], self.dim), sincos_line(frames, self.dim))
        )
        places = plane[None] + line[:, None]  # [F, h w, C]
        x = (x + places.astype(x.dtype)[None]).reshape(b, -1, self.dim)  # [B, N, C]
        x = nn.with_logical_constraint(x, ("batch", "length", "features"))
        valid: Bool[Array, "b l"] = jnp.any(text != 0, axis=-1)
        words = self.text_contract(nn.gelu(self.text_expand(text.astype(x.dtype))))  # [B, L, C]
        return Stream(x, self.time_embed(t, x.dtype), words, valid, grid, x_t.shape[-1])

    def layers(self, stream: Stream, part: tuple[int, int] | None = None, train: bool = False) -> Stream:
        """Runs the layers of `part`, from the first to before the second; None means all."""
        x, _ = self._run(stream, Layer(), train=train, part=part)
        return dataclasses.replace(stream, x=x)

    def recall(
        self,
        stream: Stream,
        fresh: Bool[Array, "depth 3"],
        kept: Float[Array, "depth 3 b n c"],
    ) -> tuple[Stream, Float[Array, "depth 3 b n c"]]:
        """Runs all layers, where branches that are not fresh give what was kept of them."""
        x, kept = self._run(stream, Layer(None, fresh, kept))
        return dataclasses.replace(stream, x=x), kept

    def _run(self, stream: Stream, each: Layer, **options: Any) -> tuple[Array, Any]:
        shared = stream.c, stream.text, stream.valid, Context(grid=stream.grid)
        return self.blocks(stream.x, *shared, each=each, turns=tuple(range(PERIOD)), **options)

    @nn.compact
    def finish(self, stream: Stream) -> Float[Array, "b frames height width out"]:
        """The prediction from what left the last layer."""
        shift, scale = Modulation(2, self.dim, name="modulation")(stream.c)  # 2 x [B, C]
        frames, rows, columns = stream.grid
        x = modulate(norm("layer_plain", self.block.epsilon, "norm")(stream.x), shift, scale)  # [B, N, C]
        out = stream.channels * (2 if self.learned_sigma else 1)
        project = Dense(self.patch**2 * out, ("embed", None), kernel_init=zeros, name="output")
        x = project(x).reshape(-1, rows * columns, self.patch**2 * out)  # [B F, h w, p p out]
        x = unpatch(x, (rows, columns), self.patch)  # [B F, H, W, out]
        return x.reshape(-1, frames, *x.shape[1:])  # [B, F, H, W, out]

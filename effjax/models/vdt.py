"""Video diffusion transformer: DiT on clips, with attention along time in every block.

    z = patches of each frame W + positions in the frame + positions in time
    c = MLP(frequencies(t)) + table[label]
    z <- block(z, c)                                                    see `effjax.models.blocks.video`
    prediction = unpatch(((1 + a) * norm(z) + b) W_out)                 (b, a) = silu(c) W_f

Given frames enter as tokens among the others, clean where the others are noisy: the model itself knows no
masks, see `effjax.diffusion.masks` and `effjax.diffusion.known`.

Source: Lu et al., "VDT: General-purpose Video Diffusion Transformers via Mask Modeling", ICLR 2024, figure 2,
and the published code (RERV/VDT), which modulates every block by a projection of its own. Its label table has
1001 rows, of which it reads the first (and, in training, the null class in its place); here an unconditional
model has one class.

The paper's table gives 28.5M parameters for S and 595.9M for L, the published code makes 41.7M and 860.9M.
What the table gives are the matrices of both attentions and the FFN, 16 C^2 a block (28.3M and 594.5M), and
one C^2 more; the modulations (6 C^2 a block) and the second temporal projections (C^2) are not in it.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.config import part
from effjax.errors import UsageError
from effjax.layers.dense import Dense, zeros
from effjax.layers.modulation import Modulation, modulate
from effjax.layers.norms import norm
from effjax.layers.patches import PatchEmbed, sincos_line, sincos_table, unpatch
from effjax.layers.stack import Stack
from effjax.mixers.context import Context
from effjax.models.blocks import video
from effjax.models.blocks.adaln import Layer
from effjax.models.dit import Condition, Stream


class VDT(nn.Module):
    """Predicts noise, clean video or velocity from a noisy video, its time and its class.

    In pieces (`begin`, `layers`, `finish`, `recall`) like `effjax.models.dit.DiT`, for step caches.

    Attributes:
      patch: side of a patch in pixels (of the latent, where there is one).
      dim: channels of a token.
      depth: number of blocks.
      frames: of a video.
      block: what the stack repeats, with an `epsilon` that the last norm shares.
      classes: number of labels; an unconditional model has one.
      null_class: whether the label table has a row for "no label", which classifier-free guidance needs.
      learned_sigma: whether the network also predicts variances, in as many channels again.
      frequencies: sines and cosines in the time embedding.
      remat: rematerialisation policy, a name in `effjax.layers.stack.REMAT`.
      unroll: layers a scan iteration.
    """

    patch: int
    dim: int
    depth: int
    frames: int
    block: nn.Module = part(video.KINDS)
    classes: int = 1
    null_class: bool = False
    learned_sigma: bool = True
    frequencies: int = 256
    remat: str = "none"
    unroll: int = 1

    branches: ClassVar[int] = 3

    def setup(self) -> None:
        """Names the parts that stand in front of the last modulation."""
        self.embed = PatchEmbed(self.patch, self.dim)
        rows = self.classes + self.null_class
        self.conditioned = Condition(rows, self.dim, self.frequencies, inclusive=False)
        nn.share_scope(self, self.conditioned)  # its parameters stand beside the others
        self.blocks = Stack(self.block, self.depth, remat=self.remat, unroll=self.unroll)

    def __call__(
        self,
        x_t: Float[Array, "b *places channels"],
        t: Float[Array, " b"],
        label: Int[Array, " b"],
        train: bool = False,
    ) -> Float[Array, "b frames height width out"]:
        """Returns the prediction: `channels` channels, then as many of the variance where it is learned.

        Args:
          x_t: noisy videos `[B, F, H, W, channels]`; both sides must be multiples of the patch.
          t: times in the unit of training steps, 0 to 1000; `Process.network_time` gives them.
          label: classes, already dropped to the null class where training drops them.
          train: passed on to mixers and FFN.

        Raises:
          UsageError: for something else than a video, one of another length, or patches that do not tile it.
        """
        return self.finish(self.layers(self.begin(x_t, t, label), train=train))

    def null(self, label: Int[Array, " b"]) -> Int[Array, " b"]:
        """The label that means "no label", for each example."""
        return jnp.full_like(label, self.classes)

    def begin(
        self, x_t: Float[Array, "b *places channels"], t: Float[Array, " b"], label: Int[Array, " b"]
    ) -> Stream:
        """What enters the first layer; its tokens are `[B, F, N, C]`."""
        if x_t.ndim != 5:
            raise UsageError(
                f"a video model takes [batch, frames, height, width, channels], and this is "
                f"{list(x_t.shape)}: set config.task.content to the field that holds a video."
            )
        if x_t.shape[1] != self.frames:
            raise UsageError(
                f"the model is made for {self.frames} frames and this video has {x_t.shape[1]}: cut it to "
                f"{self.frames}, or set config.model.frames."
            )
        x = self.embed(x_t.reshape(-1, *x_t.shape[2:]))  # [B F, h, w, C]
        grid = x.shape[1], x.shape[2]
        x = x.reshape(x_t.shape[0], self.frames, -1, self.dim)  # [B, F, h w, C]
        places = sincos_table(grid, self.dim)[None] + sincos_line(self.frames, self.dim)[:, None]
        x = x + jnp.asarray(places, x.dtype)[None]  # [B, F, h w, C]
        x = nn.with_logical_constraint(x, ("batch", "time", "length", "features"))
        c, _ = self.conditioned(t, label, x.dtype)  # [B, C]
        return Stream(x, c, None, None, grid, x_t.shape[-1])

    def layers(self, stream: Stream, part: tuple[int, int] | None = None, train: bool = False) -> Stream:
        """Runs the layers of `part`, from the first to before the second; None means all."""
        x, _ = self.blocks(stream.x, stream.c, Context(), each=Layer(), train=train, part=part)
        return dataclasses.replace(stream, x=x)

    def recall(
        self,
        stream: Stream,
        fresh: Bool[Array, "depth 3"],
        kept: Float[Array, "depth 3 b f n c"],
    ) -> tuple[Stream, Float[Array, "depth 3 b f n c"]]:
        """Runs all layers, where branches that are not fresh give what was kept of them."""
        x, kept = self.blocks(stream.x, stream.c, Context(), each=Layer(None, fresh, kept))
        return dataclasses.replace(stream, x=x), kept

    @nn.compact
    def finish(self, stream: Stream) -> Float[Array, "b frames height width out"]:
        """The prediction from what left the last layer."""
        shift, scale = Modulation(2, self.dim, name="modulation")(stream.c)  # 2 x [B, C]
        batch, frames, places, _ = stream.x.shape
        x = norm("layer_plain", self.block.epsilon, "norm")(stream.x)  # [B, F, h w, C]
        x = modulate(x.reshape(batch, -1, self.dim), shift, scale)  # [B, F h w, C]
        out = stream.channels * (2 if self.learned_sigma else 1)
        project = Dense(self.patch**2 * out, ("embed", None), kernel_init=zeros, name="output")
        x = project(x).reshape(batch * frames, places, -1)  # [B F, h w, p p out]
        x = unpatch(x, stream.grid, self.patch)  # [B F, H, W, out]
        return x.reshape(batch, frames, *x.shape[1:])  # [B, F, H, W, out]

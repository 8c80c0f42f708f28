"""PT-DiT: a diffusion transformer of pictures and videos whose tokens meet by proxy.

    z = patches W + positions, window by window
    c = MLP(frequencies(t)) (+ table[label]),   s = silu(c) W_s          the same for all blocks
    z <- block(z, s, MLP(text))                                          effjax.models.blocks.proxy
    prediction = unpatch(((1 + a) * norm(z) + b) W_out)                  (b, a) = c + T

Positions are sines and cosines: a quarter of the channels for the frame, the rest for column and row. The
published models are told a text. A text is features `[B, L, D]` of some encoder (T5), where a token of zeros
is no word and is not seen; a text without any word is one token of zeros, so that the biases of its MLP learn
to say nothing. The paper's ablations are told a class, how its code does not show: here it is added to the
time, as in DiT, and the blocks have no attention to a text.

`W_out` starts at zero, `W_s` and the layers of the embeddings as normals of 0.02, as in PixArt-alpha.

Source: Wang et al., "Qihoo-T2X", ICLR 2025, arXiv:2409.04005, section 3; its code in Ascend/MindSpeed-MM.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from effjax.errors import UsageError
from effjax.layers.activations import activation
from effjax.layers.dense import Dense, named, zeros
from effjax.layers.modulation import TimeEmbed, modulate
from effjax.layers.norms import norm
from effjax.layers.patches import PatchEmbed, add_positions, sincos_table, unpatch
from effjax.layers.stack import Stack
from effjax.mixers import volumes
from effjax.mixers.volumes import Volume
from effjax.models.blocks.adaln import Layer
from effjax.models.blocks.proxy import ProxyBlock, Told

_normal = nn.initializers.normal(0.02)


@flax.struct.dataclass
class Stream:
    """What runs through the layers, between `begin`, `layers` and `finish`.

    Attributes:
      x: `[B, N, C]`, the tokens, window by window.
      c: `[B, C]`, the embedded time, which the last modulation reads.
      told: what all blocks are told.
      shape: of one noisy picture or video.
    """

    x: Any
    c: Any
    told: Told
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)


class PTDiT(nn.Module):
    """Predicts noise, clean content or velocity of a picture or video, told its time and a text or a class.

    The network is `begin`, `layers` and `finish` one behind the other, which step caches call by themselves.

    Attributes:
      patch: side of a patch in pixels (of the latent, where there is one).
      dim: channels of a token, a multiple of 16.
      depth: number of blocks.
      block: what the stack repeats.
      text: channels of the text's features; 0 where it is told no text.
      classes: number of labels; 0 where it is told none. The label `classes` means "no label" where there is
        a null class.
      null_class: whether it knows to be told nothing, which classifier-free guidance needs.
      learned_sigma: whether the network also predicts variances, in as many channels again.
      frequencies: sines and cosines in the time embedding.
      remat: rematerialisation policy, a name in `effjax.layers.stack.REMAT`.
      unroll: layers a scan iteration.
    """

    patch: int
    dim: int
    depth: int
    block: ProxyBlock
    text: int = 0
    classes: int = 0
    null_class: bool = True
    learned_sigma: bool = True
    frequencies: int = 256
    remat: str = "none"
    unroll: int = 1

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.classes):
            raise UsageError(
                f"text={self.text} and classes={self.classes}: give the channels of a text's features, or a "
                f"number of classes, and leave the other at 0."
            )
        if self.dim % 16:
            raise UsageError(f"dim={self.dim}: positions of frames, rows and columns need a multiple of 16.")
        super().__post_init__()

    @property
    def branches(self) -> int:
        """What a layer adds to the stream one after the other."""
        return 5 if self.text else 4

    def setup(self) -> None:
        """Names the parts that stand in front of the last modulation."""
        self.embed = PatchEmbed(self.patch, self.dim)
        self.blocks = Stack(self.block, self.depth, remat=self.remat, unroll=self.unroll)

    def __call__(
        self,
        x_t: Float[Array, "b *volume channels"],
        t: Float[Array, " b"],
        condition: Shaped[Array, "b *rest"],
        train: bool = False,
    ) -> Float[Array, "b *volume out"]:
        """Returns the prediction: `channels` channels, then as many of the variance where it is learned.

        Args:
          x_t: noisy pictures `[B, H, W, C]` or videos `[B, F, H, W, C]`.
          t: times in the unit of training steps, 0 to 1000; `Process.network_time` gives them.
          condition: features of texts `[B, L, text]`, or labels `[B]`.
          train: passed on to attention and FFN.

        Raises:
          UsageError: where patches do not tile the picture, or windows its tokens; for features of another
            width, or labels where it reads a text.
        """
        return self.finish(self.layers(self.begin(x_t, t, condition), train=train))

    def null(self, condition: Shaped[Array, "b *rest"]) -> Shaped[Array, "b *rest"]:
        """The condition that says nothing: no word, or the label that means "no label"."""
        return jnp.zeros_like(condition) if self.text else jnp.full_like(condition, self.classes)

    @nn.compact
    def begin(
        self,
        x_t: Float[Array, "b *volume channels"],
        t: Float[Array, " b"],
        condition: Shaped[Array, "b *rest"],
    ) -> Stream:
        """What enters the first layer."""
        self._check(x_t.shape, condition.shape)
        batch, (frames, *sides) = x_t.shape[0], x_t.shape[1:-1] if x_t.ndim == 5 else (1, *x_t.shape[1:-1])
        x = self.embed(x_t.reshape(-1, *sides, x_t.shape[-1]))  # [B F, h, w, C]
        volume = frames, x.shape[1], x.shape[2]
        x = add_positions(x.reshape(batch, -1, self.dim), jnp.asarray(positions(volume, self.dim)))
        x = volumes.partition(x.reshape(batch, *volume, self.dim), self._window(volume))  # [B, w, m, C]
        x = nn.with_logical_constraint(x.reshape(batch, -1, self.dim), ("batch", "length", "features"))
        c = TimeEmbed(self.dim, self.frequencies, name="time_embed")(t, x.dtype)  # [B, C]
        text = valid = None
        if self.text:
            text, valid = self._read(condition.astype(x.dtype))  # [B, L, C], [B, L]
        else:
            init, rows = named(_normal, (None, "embed")), self.classes + self.null_class
            embedded = nn.Embed(rows, self.dim, embedding_init=init, name="label_embed")(condition)
            c = c + embedded.astype(c.dtype)  # [B, C]
        steer = Dense((6, self.dim), ("embed", None, "mlp"), kernel_init=_normal, name="steer")(nn.silu(c))
        return Stream(x, c, Told(steer, text, valid, volume), x_t.shape[1:])

    def layers(self, stream: Stream, part: tuple[int, int] | None = None, train: bool = False) -> Stream:
        """Runs the layers of `part`, from the first to before the second; None means all."""
        x, _ = self.blocks(stream.x, stream.told, each=Layer(), train=train, part=part)  # [B, N, C]
        return dataclasses.replace(stream, x=x)

    def recall(
        self,
        stream: Stream,
        fresh: Bool[Array, "depth branches"],
        kept: Float[Array, "depth branches b n c"],
    ) -> tuple[Stream, Float[Array, "depth branches b n c"]]:
        """Runs all layers, where branches that are not fresh give what was kept of them."""
        x, kept = self.blocks(stream.x, stream.told, each=Layer(None, fresh, kept))
        return dataclasses.replace(stream, x=x), kept

    @nn.compact
    def finish(self, stream: Stream) -> Float[Array, "b *volume out"]:
        """The prediction from what left the last layer."""
        init = named(nn.initializers.normal(self.dim**-0.5), (None, "embed"))
        table = self.param("table", init, (2, self.dim), jnp.float32).astype(stream.c.dtype)
        shift, scale = (stream.c + row[None] for row in table)  # 2 x [B, C]
        x = modulate(norm("layer_plain", self.block.epsilon, "norm")(stream.x), shift, scale)  # [B, N, C]
        *leading, channels = stream.shape
        out = channels * (2 if self.learned_sigma else 1)
        x = Dense(self.patch**2 * out, ("embed", None), kernel_init=zeros, name="output")(
            x
        )  # [B, N, p p out]
        volume = stream.told.volume
        window = self._window(volume)
        cut = x.reshape(x.shape[0], -1, window[0] * window[1] * window[2], x.shape[-1])  # [B, w, m, p p out]
        x = volumes.reverse(cut, volume, window)  # [B, F, h, w, p p out]
        x = unpatch(x.reshape(-1, volume[1] * volume[2], x.shape[-1]), volume[1:], self.patch)
        return x.reshape(-1, *leading, out)  # [B, (F,) H, W, out]

    @nn.nowrap
    def _window(self, volume: Volume) -> Volume:
        """The window of this volume.

        Raises:
          UsageError: where it does not tile the volume.
        """
        window = volumes.fitted(self.block.window, volume)
        if volumes.tiled(volume, window) != volume:
            told = [" x ".join(map(str, sides)) for sides in (window, volume)]
            raise UsageError(
                f"windows of {told[0]} (frames, rows, columns) do not tile {told[1]} tokens: choose a window "
                f"that divides them, or another number of frames or size of picture."
            )
        return window

    @nn.nowrap
    def _check(self, shape: tuple[int, ...], condition: tuple[int, ...]) -> None:
        """Refuses content that is no picture or video, and a condition of another kind."""
        if len(shape) not in (4, 5):
            raise UsageError(
                f"content of shape {shape}: give pictures [B, H, W, C] or videos [B, F, H, W, C]."
            )
        expected = f"[B, L, {self.text}]" if self.text else "[B]"
        if len(condition) != (3 if self.text else 1) or (self.text and condition[-1] != self.text):
            told = "features of texts" if self.text else "labels"
            raise UsageError(
                f"the condition has shape {condition}, and this model is told {told} {expected}."
            )

    @nn.nowrap
    def _read(self, text: Float[Array, "b l e"]) -> tuple[Float[Array, "b l c"], Bool[Array, "b l"]]:
        """The text's features as wide as the network, and which of them are seen."""
        words = jnp.any(text != 0, axis=-1)  # [B, L]
        silent = ~jnp.any(words, axis=-1, keepdims=True) & (jnp.arange(text.shape[1]) == 0)[None]  # [B, L]
        h = Dense(self.dim, (None, "mlp"), kernel_init=_normal, name="text_expand")(text)  # [B, L, C]
        h = activation("gelu_tanh")(h)
        return Dense(self.dim, ("mlp", "embed"), kernel_init=_normal, name="text_contract")(h), words | silent


def positions(volume: Volume, dim: int) -> Float[np.ndarray, "n dim"]:
    """Sines and cosines of the frame in a quarter of the channels, then `sincos_table` of column and row."""
    frames, height, width = volume
    frequencies = 10_000.0 ** (-np.arange(dim // 8, dtype=np.float64) / (dim // 8))
    angle = np.arange(frames)[:, None] * frequencies[None]  # [F, dim / 8]
    times = np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)  # [F, dim / 4]
    places = sincos_table((height, width), dim - dim // 4)  # [h w, 3 dim / 4]
    return np.concatenate([np.repeat(times, len(places), axis=0), np.tile(places, (frames, 1))], axis=1)

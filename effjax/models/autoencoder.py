"""A convolutional autoencoder of pictures, whose code is a normal distribution at every place.

    (m, log s^2) = encode(x)         [H / f, W / f, latent] each,   f = 2^(stages - 1)
    z = (m + s n - shift) * scale    the latents that a diffusion model sees, n normal
    x' = decode(z)

Residual blocks of two 3 x 3 convolutions behind group norms, a halving of the sides between stages, and
attention over all places in the middle.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, appendix
G.1; widths, group norms and the scale of Stable Diffusion are those of diffusers' `AutoencoderKL`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.layers.conv import Conv
from effjax.layers.dense import Dense
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context

# Bounds of the logarithm of the variance.
_LOWEST, _HIGHEST = -30.0, 20.0


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), where a projection brings x to another width.

    Attributes:
      features: output channels.
      groups: of the norms.
    """

    features: int
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w o"]:
        """Keeps the places."""
        h = nn.silu(_norm(self.groups, "norm_1")(x))  # [B, H, W, C]
        h = Conv(self.features, name="conv_1")(h)  # [B, H, W, O]
        h = nn.silu(_norm(self.groups, "norm_2")(h))
        h = Conv(self.features, name="conv_2")(h)
        if x.shape[-1] != self.features:
            x = Dense(self.features, (None, "embed"), name="shortcut")(x)  # [B, H, W, O]
        return x + h


class Middle(nn.Module):
    """A residual block, attention of one head over all places, and another residual block."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Keeps the shape."""
        x = Residual(x.shape[-1], self.groups, name="before")(x)  # [B, H, W, C]
        tokens = _norm(self.groups, "norm")(x).reshape(x.shape[0], -1, x.shape[-1])  # [B, H W, C]
        mixed = Attention(heads=1, name="attention")(tokens, Context())
        return Residual(x.shape[-1], self.groups, name="behind")(x + mixed.reshape(x.shape))


class Encoder(nn.Module):
    """From pictures to twice as many channels as the code has.

    Attributes:
      widths: channels of every stage, the finest first.
      blocks: residual blocks a stage.
      out: output channels.
      groups: of the norms.
    """

    widths: tuple[int, ...]
    blocks: int
    out: int
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 out"]:
        """Halves the sides between stages; the missing row and column of zeros stand at the end."""
        x = Conv(self.widths[0], name="input")(x)  # [B, H, W, C_0]
        for i, width in enumerate(self.widths):
            for j in range(self.blocks):
                x = Residual(width, self.groups, name=f"stage_{i}_block_{j}")(x)  # [B, H_i, W_i, C_i]
            if i + 1 < len(self.widths):
                x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
                x = Conv(width, stride=2, padding=0, name=f"downsample_{i}")(x)
        x = Middle(self.groups, name="middle")(x)
        return Conv(self.out, name="output")(nn.silu(_norm(self.groups, "norm")(x)))


class Decoder(nn.Module):
    """From a code to pictures: an encoder backwards, with one more residual block a stage.

    Attributes:
      widths: channels of every stage, the finest first.
      blocks: residual blocks a stage of the encoder.
      out: channels of a picture.
      groups: of the norms.
    """

    widths: tuple[int, ...]
    blocks: int
    out: int
    groups: int

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 out"]:
        """Doubles the sides between stages, by repetition and a convolution."""
        x = Conv(self.widths[-1], name="input")(z)  # [B, h, w, C_last]
        x = Middle(self.groups, name="middle")(x)
        for i, width in enumerate(reversed(self.widths)):
            for j in range(self.blocks + 1):
                x = Residual(width, self.groups, name=f"stage_{i}_block_{j}")(x)  # [B, H_i, W_i, C_i]
            if i + 1 < len(self.widths):
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = Conv(width, name=f"upsample_{i}")(x)
        return Conv(self.out, name="output")(nn.silu(_norm(self.groups, "norm")(x)))


class Autoencoder(nn.Module):
    """Encodes pictures in [-1, 1] and decodes latents.

    Attributes:
      widths: channels of every stage, the finest first; Stable Diffusion's by default.
      latent: channels of the code.
      channels: of a picture.
      blocks: residual blocks a stage.
      groups: of the group norms; divides all widths.
      scale: what latents are multiplied by, one over their spread.
      shift: what is taken off before.
      projected: whether the code passes through a projection on either side, as in Stable Diffusion 1 and 2.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    latent: int = 4
    channels: int = 3
    blocks: int = 2
    groups: int = 32
    scale: float = 0.18215
    shift: float = 0.0
    projected: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths or any(width % self.groups for width in self.widths):
            raise UsageError(f"groups={self.groups} must divide every one of widths={self.widths}.")
        if self.scale <= 0:
            raise UsageError(f"scale={self.scale:g} must be positive: one over the spread of the latents.")

    def setup(self) -> None:
        """Names the two halves and what stands between them."""
        shape = tuple(self.widths), self.blocks
        self.encoder = Encoder(*shape, 2 * self.latent, self.groups)
        self.decoder = Decoder(*shape, self.channels, self.groups)
        if self.projected:
            self.to_code = Dense(2 * self.latent, (None, None))
            self.from_code = Dense(self.latent, (None, None))

    @property
    def factor(self) -> int:
        """How many pixels a side of the picture one place of the code stands for."""
        return 2 ** (len(self.widths) - 1)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Shape of the latents of a picture of `shape`.

        Raises:
          UsageError: for a picture of other channels, or with sides that the factor does not divide.
        """
        height, width, channels = shape
        if channels != self.channels:
            raise UsageError(f"the autoencoder takes {self.channels} channels, and pictures have {channels}.")
        if height % self.factor or width % self.factor:
            raise UsageError(
                f"pictures of {height} x {width} cannot be encoded: sides must be multiples of {self.factor}."
            )
        return height // self.factor, width // self.factor, self.latent

    def encode(self, x: Float[Array, "b h w c"]) -> tuple[Array, Array]:
        """Mean and logarithm of the variance of the code, `[B, H / f, W / f, latent]` each."""
        self.latent_shape(x.shape[1:])
        h = self.encoder(x)  # [B, h, w, 2 latent]
        h = self.to_code(h) if self.projected else h
        mean, spread = jnp.split(h, 2, axis=-1)
        return mean, jnp.clip(spread, _LOWEST, _HIGHEST)

    def latents(
        self, x: Float[Array, "b h w c"], noise: Float[Array, "b h2 w2 l"] | None = None
    ) -> Float[Array, "b h2 w2 l"]:
        """What a diffusion model sees of pictures; the mean without noise."""
        mean, spread = self.encode(x)
        return self.scaled(mean if noise is None else drawn(mean, spread, noise))

    def scaled(self, code: Float[Array, "b h w l"]) -> Float[Array, "b h w l"]:
        """Latents from a code."""
        return (code - self.shift) * self.scale

    def decode(self, latents: Float[Array, "b h w l"]) -> Float[Array, "b h2 w2 c"]:
        """Pictures from latents.

        Raises:
          UsageError: for latents of other channels.
        """
        if latents.shape[-1] != self.latent:
            raise UsageError(
                f"the autoencoder decodes latents of {self.latent} channels, and these have "
                f"{latents.shape[-1]}."
            )
        z = latents / self.scale + self.shift
        return self.decoder(self.from_code(z) if self.projected else z)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        noise: Float[Array, "b h2 w2 l"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b h w c"]:
        """The pictures again, from the mean of their code or, with noise, from a draw of it.

        `train` changes nothing: there is no dropout and no batch norm.
        """
        return self.decode(self.latents(x, noise))


def drawn(
    mean: Float[Array, "b *rest"], spread: Float[Array, "b *rest"], noise: Float[Array, "b *rest"]
) -> Float[Array, "b *rest"]:
    """One code of a distribution; `spread` is log s^2."""
    return mean + jnp.exp(spread / 2) * noise


def divergence(mean: Float[Array, "b *rest"], spread: Float[Array, "b *rest"]) -> Float[Array, " b"]:
    """KL(N(m, s^2) || N(0, 1)) in nats, summed over the code; `spread` is log s^2."""
    each = (jnp.square(mean) + jnp.exp(spread) - 1 - spread) / 2
    return jnp.sum(each, axis=tuple(range(1, mean.ndim)))


def _norm(groups: int, name: str) -> nn.Module:
    """Group norm with torch's epsilon of these networks; its axes are too small to be cut."""
    partitioned = nn.with_logical_partitioning
    return nn.GroupNorm(
        groups,
        epsilon=1e-6,
        scale_init=partitioned(jax.nn.initializers.ones, ("norm",)),
        bias_init=partitioned(jax.nn.initializers.zeros, ("norm",)),
        name=name,
    )

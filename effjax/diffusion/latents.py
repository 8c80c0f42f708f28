"""What stands between pictures and what a diffusion model sees.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.errors import UsageError
from effjax.models.autoencoder import Autoencoder


@dataclasses.dataclass(frozen=True)
class Latents:
    """A trained autoencoder, which stays as it is.

    Attributes:
      model: the autoencoder; its `scale` makes latents of unit spread.
      weights: folder of its weights: of a training run, or of what `experiments.convert` wrote.
      encoded: whether the data hold latents already, so that it only decodes what is drawn.
    """

    model: Autoencoder
    weights: str
    encoded: bool = False

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what is noised, of an example of `shape` in the data.

        Raises:
          UsageError: for latents of other channels than the autoencoder's.
        """
        if self.encoded:
            if shape[-1] != self.model.latent:
                raise UsageError(
                    f"the data hold latents of {shape[-1]} channels, and the autoencoder's have "
                    f"{self.model.latent}: name the autoencoder that made them in config.task.latents."
                )
            return tuple(shape)
        return *shape[:-3], *self.model.latent_shape(tuple(shape[-3:]))

    def encode(
        self,
        variables: Any,
        x: Float[Array, "b *frames h w c"],
        noise: Float[Array, "b *frames h2 w2 l"] | None = None,
    ) -> Float[Array, "b *frames h2 w2 l"]:
        """What is noised, of examples of the data: a draw of their code with noise, else its mean."""
        if self.encoded:
            return x
        noise = None if noise is None else noise.reshape(-1, *noise.shape[-3:])
        pictures = x.reshape(-1, *x.shape[-3:])  # frame by frame
        made: Array = self.model.apply(variables, pictures, noise, method="latents")  # type: ignore[assignment]
        return made.astype(jnp.float32).reshape(*x.shape[:-3], *made.shape[1:])

    def decode(
        self, variables: Any, latents: Float[Array, "b *frames h w l"]
    ) -> Float[Array, "b *frames h2 w2 c"]:
        """Pictures in [-1, 1]."""
        flat = latents.reshape(-1, *latents.shape[-3:])
        made: Array = self.model.apply(variables, flat, method="decode")  # type: ignore[assignment]
        return made.astype(jnp.float32).reshape(*latents.shape[:-3], *made.shape[1:])

"""An autoencoder of pictures: reconstruct, from a code that stays near a normal distribution.

    loss = mean |x - x'|^p + w KL(N(m, s^2) || N(0, 1)) / pixels          p = 1 or 2, w a millionth

Source: Rombach et al., CVPR 2022, section 3.1, without its perceptual and adversarial terms.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from effjax.diffusion.examples import mean_of_each
from effjax.errors import UsageError
from effjax.layers.stored import dtype_of
from effjax.models.autoencoder import Autoencoder, divergence, drawn
from effjax.train.tasks.mean import Mean, Means

Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Autoencoding:
    """Trains an `Autoencoder` on the field `image`, pictures in [-1, 1].

    Attributes:
      model: the autoencoder.
      distance: between pictures: `absolute` or `squared`.
      kl: w, the weight of the divergence.
    """

    model: Autoencoder
    distance: Literal["absolute", "squared"] = "absolute"
    kl: float = 1e-6

    unit = "images"

    def __post_init__(self) -> None:
        if self.kl < 0:
            raise UsageError(f"kl={self.kl:g} must not be negative.")

    def init(self, key: PRNGKeyArray, batch: Batch) -> Any:
        """Makes the variables from a batch of which only shapes matter."""
        return self.model.init(key, batch["image"])

    def prepare(self, batch: Batch, key: PRNGKeyArray) -> Batch:
        """Draws the noise of the code."""
        images = batch["image"]
        shape = self.model.latent_shape(images.shape[1:])
        return {"image": images, "noise": jax.random.normal(key, (images.shape[0], *shape))}

    def loss(self, variables: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Means, Any]:
        """The loss and its parts."""
        parts, _ = self._parts(variables, batch["image"], batch["noise"])
        loss = parts[self.distance] + self.kl * parts["kl"] / math.prod(batch["image"].shape[1:])  # [B]
        return {name: Mean.of(value) for name, value in {"loss": loss, **parts}.items()}, {}

    def metrics(self, variables: Any, batch: Batch) -> Means:
        """How pictures come back from the mean of their code, and what a diffusion model needs of it."""
        parts, mean = self._parts(variables, batch["image"])
        parts |= {"loss": parts[self.distance]}
        parts |= {"latent_mean": mean_of_each(mean), "latent_square": mean_of_each(mean**2)}
        return {name: Mean.of(value, batch["mask"]) for name, value in parts.items()}

    def _parts(
        self, variables: Any, images: Array, noise: Array | None = None
    ) -> tuple[dict[str, Array], Array]:
        """Mean absolute and squared error and the divergence of each picture, and the mean of the code."""
        dtype = dtype_of(variables["params"])
        code_of: Any = self.model.apply(variables, images.astype(dtype), method="encode")
        mean, spread = (value.astype(jnp.float32) for value in code_of)
        code = mean if noise is None else drawn(mean, spread, noise)
        latents = self.model.scaled(code).astype(dtype)
        again: Array = self.model.apply(variables, latents, method="decode")  # type: ignore[assignment]
        error = again.astype(jnp.float32) - images.astype(jnp.float32)  # [B, H, W, C]
        parts = {
            "absolute": mean_of_each(jnp.abs(error)),
            "squared": mean_of_each(error**2),
            "kl": divergence(mean, spread),
        }
        return parts, mean

    def finish(self, values: dict[str, float]) -> dict[str, float]:
        """The peak signal-to-noise ratio in decibels, and the spread of the code: `scale` is one over it."""
        values = dict(values)
        values["psnr"] = -10 * math.log10(max(values["squared"], 1e-12) / 4)  # pictures span 2
        if "latent_square" in values:
            square, mean = values.pop("latent_square"), values["latent_mean"]
            values["latent_std"] = math.sqrt(max(square - mean**2, 0.0))
        return values

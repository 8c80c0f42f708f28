"""Parts of a picture or a video that are given: the network sees them clean, and they stay as they are.

    x_t <- known * content + (1 - known) * x_t                  before every call, and behind every step

Source: Lu et al., "VDT: General-purpose Video Diffusion Transformers via Mask Modeling", ICLR 2024, section
3.3; in training `effjax.train.tasks.diffusion.Diffusion` does the same.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.diffusion.denoiser import Condition, Denoiser, Memory


@flax.struct.dataclass
class Known:
    """What is given of each example.

    Attributes:
      content: `[B, ..., C]`, clean; what is not given of it has no effect.
      where: `[B, ..., 1]` bool, true where it is given.
    """

    content: Any
    where: Any

    def into(self, x: Float[Array, "b *rest"]) -> Float[Array, "b *rest"]:
        """`x` with the given parts in their places."""
        return jnp.where(self.where, jnp.asarray(self.content, x.dtype), x)


def given(denoiser: Denoiser, known: Known) -> Denoiser:
    """Wraps a denoiser, guided or cached or not, so that it sees the given parts clean.

    What it predicts there means nothing: a sampler puts the given parts back (`samplers.walk`).
    """

    def predict(x_t: Array, t: Array, condition: Condition, memory: Memory) -> tuple[Array, Memory]:
        return denoiser.predict(known.into(x_t), t, condition, memory)

    def start(x: Array, t: Array, condition: Condition) -> Memory:
        return denoiser.start(known.into(x), t, condition)

    return Denoiser(predict, start)

"""Mixup and CutMix on device, over the whole batch.

    mixup:   x = lam x_i + (1 - lam) x_j                 lam ~ Beta(alpha, alpha)          Zhang et al. 2018
    cutmix:  x = x_i with a box of area (1 - lam) from x_j, lam then the true share of x_i   Yun et al. 2019
    both:    y = lam y_i + (1 - lam) y_j,   j = B - 1 - i

One draw a batch decides between the two, as in DeiT's recipe.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from effjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How pictures of a batch are mixed.

    Attributes:
      mixup: alpha of mixup's Beta distribution; 0 switches it off.
      cutmix: alpha of CutMix's Beta distribution; 0 switches it off.
      switch: probability of CutMix where both are on.
      probability: probability that a batch is mixed at all.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    probability: float = 1.0

    def __post_init__(self) -> None:
        if self.mixup < 0 or self.cutmix < 0 or not (self.mixup or self.cutmix):
            raise UsageError("mixing needs mixup > 0 or cutmix > 0; leave the section out to switch it off.")


def mix(
    images: Float[Array, "b h w c"],
    targets: Float[Array, "b classes"],
    key: PRNGKeyArray,
    mixing: Mixing,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
    """Mixes example `i` with example `B - 1 - i`."""
    k_apply, k_switch, k_mixup, k_cutmix, k_box = jax.random.split(key, 5)
    other = images[::-1]
    lam_mixup = jax.random.beta(k_mixup, mixing.mixup or 1.0, mixing.mixup or 1.0)
    lam_cutmix = jax.random.beta(k_cutmix, mixing.cutmix or 1.0, mixing.cutmix or 1.0)

    blended = lam_mixup * images + (1 - lam_mixup) * other  # [B, H, W, C]
    inside = box(k_box, lam_cutmix, images.shape[1], images.shape[2])  # [H, W]
    pasted = jnp.where(inside[None, :, :, None], other, images)  # [B, H, W, C]
    lam_box = 1.0 - jnp.mean(inside.astype(jnp.float32))

    switch = mixing.switch if mixing.mixup and mixing.cutmix else float(mixing.cutmix > 0)
    use_cutmix = jax.random.bernoulli(k_switch, switch)
    apply = jax.random.bernoulli(k_apply, mixing.probability)
    lam = jnp.where(apply, jnp.where(use_cutmix, lam_box, lam_mixup), 1.0)
    mixed = jnp.where(apply, jnp.where(use_cutmix, pasted, blended), images)
    return mixed.astype(images.dtype), lam * targets + (1 - lam) * targets[::-1]


def box(key: PRNGKeyArray, lam: Float[Array, ""], height: int, width: int) -> Array:
    """A box of sides `sqrt(1 - lam)` times the picture's, centred anywhere and cut at the border."""
    k_row, k_column = jax.random.split(key)
    share = jnp.sqrt(1.0 - lam)

    def inside(key: PRNGKeyArray, size: int) -> Array:
        centre = jax.random.randint(key, (), 0, size)
        half = jnp.floor(size * share).astype(jnp.int32) // 2
        place = jnp.arange(size)
        return (place >= centre - half) & (place < centre + half)

    return inside(k_row, height)[:, None] & inside(k_column, width)[None, :]


def one_hot(labels: Int[Array, " b"], classes: int, smoothing: float = 0.0) -> Float[Array, "b classes"]:
    """Targets with `1 - smoothing` on the label and `smoothing` spread evenly over all classes."""
    return jax.nn.one_hot(labels, classes) * (1.0 - smoothing) + smoothing / classes

"""Which parts of a video are given, and which are to be drawn: one model for many tasks.

    network's input = known * content + (1 - known) * x_t

`known` is 1 where the clean video is given. A mask kind says where that is, as `[F, H, W]`:

    unconditional    nowhere: generation
    forward          the first frames: prediction
    backward         the last frames: what came before
    interpolation    every so many frames
    image_to_video   one frame
    random_frames    each frame with a probability
    completion       everything outside of a rectangle, and some frames at both ends

Source: Lu et al., "VDT: General-purpose Video Diffusion Transformers via Mask Modeling", ICLR 2024, section
3.3, whose mask is 1 where this one is 0. The defaults are those of the published code. There, completion
hides a union of rectangles that covers half of the frame, and one mask serves a whole batch; here it is one
rectangle, and every example has a mask of its own.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from effjax.errors import UsageError

Shape = tuple[int, int, int]
Known = Bool[Array, "f h w"]


@dataclasses.dataclass(frozen=True)
class Unconditional:
    """Nothing is given.

    Attributes:
      weight: how often this kind is drawn, against those of the other kinds.
    """

    weight: float = 1.0

    def known(self, key: Key[Array, ""], shape: Shape) -> Known:
        """What is given of a video of `(F, H, W)`."""
        return jnp.zeros(shape, bool)


@dataclasses.dataclass(frozen=True)
class Forward:
    """The first frames are given.

    Attributes:
      given: how many.
      weight: how often this kind is drawn.
    """

    given: int = 8
    weight: float = 1.0

    def __post_init__(self) -> None:
        _at_least("given", self.given, 1)

    def known(self, key: Key[Array, ""], shape: Shape) -> Known:
        """What is given of a video of `(F, H, W)`."""
        _leaves_something(self.given, shape)
        return _frames(jnp.arange(shape[0]) < self.given, shape)


@dataclasses.dataclass(frozen=True)
class Backward:
    """The last frames are given.

    Attributes:
      given: how many.
      weight: how often this kind is drawn.
    """

    given: int = 8
    weight: float = 1.0

    def __post_init__(self) -> None:
        _at_least("given", self.given, 1)

    def known(self, key: Key[Array, ""], shape: Shape) -> Known:
        """What is given of a video of `(F, H, W)`."""
        _leaves_something(self.given, shape)
        return _frames(jnp.arange(shape[0]) >= shape[0] - self.given, shape)


@dataclasses.dataclass(frozen=True)
class Interpolation:
    """Frames at even distances are given, the first among them.

    Attributes:
      every: frames from one given to the next.
      weight: how often this kind is drawn.
    """

    every: int = 4
    weight: float = 1.0

    def __post_init__(self) -> None:
        _at_least("every", self.every, 2)

    def known(self, key: Key[Array, ""], shape: Shape) -> Known:
        """What is given of a video of `(F, H, W)`."""
        return _frames(jnp.arange(shape[0]) % self.every == 0, shape)


@dataclasses.dataclass(frozen=True)
class ImageToVideo:
    """One frame is given.

    Attributes:
      frame: which, counted from 0; None draws it.
      weight: how often this kind is drawn.
    """

    frame: int | None = None
    weight: float = 1.0

    def known(self, key: Key[Array, ""], shape: Shape) -> Known:
        """What is given of a video of `(F, H, W)`."""
        _leaves_something(1, shape)
        if self.frame is not None and not 0 <= self.frame < shape[0]:
            raise UsageError(f"frame={self.frame} is none of a video's {shape[0]}: they count from 0.")
        frame = jax.random.randint(key, (), 0, shape[0]) if self.frame is None else self.frame
        return _frames(jnp.arange(shape[0]) == frame, shape)


@dataclasses.dataclass(frozen=True)
class RandomFrames:
    """Each frame is given with a probability, also all of them.

    Attributes:
      probability: that a frame is.
      weight: how often this kind is drawn.
    """

    probability: float = 0.2
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.probability < 1:
            raise UsageError(f"probability={self.probability:g} must be at least 0 and below 1.")

    def known(self, key: Key[Array, ""], shape: Shape) -> Known:
        """What is given of a video of `(F, H, W)`."""
        return _frames(jax.random.bernoulli(key, self.probability, shape[:1]), shape)


@dataclasses.dataclass(frozen=True)
class Completion:
    """A rectangle is to be drawn, the same in all frames but the first and the last ones.

    Attributes:
      area: least and greatest share of the frame that it covers, drawn evenly.
      aspect: least and greatest height over width, drawn evenly in their logarithm.
      ends: most frames that are given whole at each end, drawn evenly from none.
      weight: how often this kind is drawn.
    """

    area: tuple[float, float] = (0.1, 0.5)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    ends: int = 3
    weight: float = 1.0

    def __post_init__(self) -> None:
        for name, (least, greatest) in (("area", self.area), ("aspect", self.aspect)):
            if not 0 < least <= greatest:
                raise UsageError(f"{name}={least:g},{greatest:g} must be two rising numbers above 0.")
        if self.area[1] > 1:
            raise UsageError(f"area={self.area[0]:g},{self.area[1]:g}: a rectangle covers at most 1.")
        _at_least("ends", self.ends, 0)

    def known(self, key: Key[Array, ""], shape: Shape) -> Known:
        """What is given of a video of `(F, H, W)`."""
        count, *sides = shape
        _leaves_something(2 * self.ends, shape)
        k_area, k_aspect, k_place, k_ends = jax.random.split(key, 4)
        area = jax.random.uniform(k_area, minval=self.area[0], maxval=self.area[1]) * math.prod(sides)
        least, greatest = (math.log(bound) for bound in self.aspect)
        aspect = jnp.exp(jax.random.uniform(k_aspect, minval=least, maxval=greatest))
        lengths = jnp.sqrt(jnp.stack([area * aspect, area / aspect]))  # height and width
        inside = []
        for side, length, place in zip(sides, lengths, jax.random.uniform(k_place, (2,)), strict=True):
            length = jnp.clip(jnp.round(length), 1, side)
            start = jnp.floor(place * (side - length + 1))
            at = jnp.arange(side)
            inside.append((start <= at) & (at < start + length))
        before, after = jax.random.randint(k_ends, (2,), 0, self.ends + 1)
        frame = jnp.arange(count)
        drawn = ((before <= frame) & (frame < count - after))[:, None, None]  # [F, 1, 1]
        return ~(drawn & inside[0][None, :, None] & inside[1][None, None, :])  # [F, H, W]


Mask = Unconditional | Forward | Backward | Interpolation | ImageToVideo | RandomFrames | Completion

KINDS = {
    "unconditional": Unconditional,
    "forward": Forward,
    "backward": Backward,
    "interpolation": Interpolation,
    "image_to_video": ImageToVideo,
    "random_frames": RandomFrames,
    "completion": Completion,
}


def check_weights(masks: Sequence[Mask]) -> None:
    """Refuses weights that are no probabilities.

    Raises:
      UsageError: naming the first.
    """
    for mask in masks:
        if not mask.weight > 0:
            raise UsageError(f"weight={mask.weight:g} must be above 0: leave {type(mask).__name__} out.")


def draw_known(
    masks: Sequence[Mask], keys: Key[Array, " b"], shape: Sequence[int]
) -> Bool[Array, "b f h w 1"]:
    """For each example what is given: first a kind is drawn by its weight, then its mask.

    Args:
      masks: the kinds.
      keys: one for each example.
      shape: of a video, `(F, H, W, C)`.

    Raises:
      UsageError: for something that is no video, or a kind that leaves nothing of it to draw.
    """
    if len(shape) != 4:
        raise UsageError(
            f"masks say what is given of a video [F, H, W, C], and this content is {list(shape)}: leave "
            f"masks out, or give the task a video."
        )
    count, height, width, _ = shape
    logits = jnp.log(jnp.asarray([mask.weight for mask in masks], jnp.float32))

    def one(key: Any) -> Known:
        k_kind, k_mask = jax.random.split(key)
        candidates = jnp.stack([mask.known(k_mask, (count, height, width)) for mask in masks])
        return jnp.take(candidates, jax.random.categorical(k_kind, logits), axis=0)

    known: Array = jax.vmap(one)(keys)
    return known[..., None]


def _frames(given: Bool[Array, " f"], shape: Shape) -> Known:
    return jnp.broadcast_to(given[:, None, None], shape)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{name}={value} must be at least {least}.")


def _leaves_something(given: int, shape: Shape) -> None:
    if given >= shape[0]:
        raise UsageError(
            f"{given} frames given of a video of {shape[0]} leave nothing to draw: give at most "
            f"{shape[0] - 1}."
        )

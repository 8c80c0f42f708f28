"""Held-out clips of which parts are given, and how well the rest of them is drawn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped

from effjax.config import build_kind
from effjax.diffusion import masks
from effjax.diffusion.examples import example_keys
from effjax.train.program import Program
from experiments.run import kind_spec
from experiments.run.told import held_out

_MASKS = 2**31  # apart from the numbers of pictures, whose keys are for noise


@dataclasses.dataclass(frozen=True)
class Clips:
    """The first clips of the evaluation data.

    Attributes:
      content: in [-1, 1].
      known: what of them is given.
      told: what the model is told of each.
    """

    content: Float[np.ndarray, "n f h w c"]
    known: Bool[np.ndarray, "n f h w 1"]
    told: Shaped[np.ndarray, "n *rest"]

    def copied(self) -> Float[np.ndarray, "n f h w c"]:
        """What is given, repeated until more is: the last given value of every place.

        Before the first given frame it is that one, and 0 where nothing of a place is given.
        """
        clips = np.where(self.known, self.content, 0.0).astype(np.float32)
        seen = self.known.copy()
        frames = clips.shape[1]
        for at, before in [(i, i - 1) for i in range(1, frames)] + [
            (i, i + 1) for i in range(frames)[-2::-1]
        ]:
            fill = seen[:, before] & ~seen[:, at]
            clips[:, at] = np.where(fill, clips[:, before], clips[:, at])
            seen[:, at] |= fill
        return clips

    def error(self, drawn: Float[np.ndarray, "n f h w c"]) -> float:
        """Mean squared error over all that is not given."""
        where = np.broadcast_to(~self.known, self.content.shape)
        return float(np.mean((drawn - self.content)[where] ** 2))


def parse(spec: str) -> masks.Mask:
    """Reads `--given`: `KIND` or `KIND:FIELD=VALUE,FIELD=VALUE`, a kind in `effjax.diffusion.masks`.

    Raises:
      UsageError: for what cannot be read, an unknown kind or field, or a value that the kind refuses.
    """
    kind, fields = kind_spec.read("given", spec, "forward:given=2")
    mask: masks.Mask = build_kind(masks.KINDS, {"kind": kind, **fields}, f"--given={spec}")
    return mask


def held_out_clips(program: Program, given: masks.Mask, number: int, seed: int) -> Clips:
    """The first clips that the run is evaluated on, and what of each is given.

    Args:
      program: of a run that draws videos.
      given: says which parts are.
      number: of clips; where the data has fewer, all.
      seed: decides masks that are random.

    Raises:
      UsageError: for a run without evaluation data, or a mask that leaves nothing of a clip to draw.
    """
    content, told = held_out(program, number)
    clips = content.astype(np.float32)
    keys = example_keys(jax.random.fold_in(jax.random.key(seed), _MASKS), jnp.arange(len(clips)))
    known = np.asarray(masks.draw_known((given,), keys, clips.shape[1:]))
    return Clips(clips, known, told)

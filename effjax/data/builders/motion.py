"""`motion`: bodies that stand still and move at once, in three dimensions and as a camera sees them.

A clip is a function of its number alone. Every bone swings about its place with a phase that all share, and
the phase runs in bursts: between them the body hardly moves, so that few frames tell most of a clip, but not
evenly spread ones.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float

FRAMES = 64
# What each joint hangs on, its distance in metres, and where it rests: right, up and to the front. Feet alone
# hang to the back, so that a picture says how deep a joint lies, by how short its bone looks.
SKELETON = {
    "pelvis": (None, 0.0, (0, 0, 0)),
    "chest": ("pelvis", 0.5, (0, 1, 0.8)),
    "head": ("chest", 0.3, (0, 1, 0.8)),
    "left_elbow": ("chest", 0.4, (-1, -0.5, 0.8)),
    "left_hand": ("left_elbow", 0.35, (-0.3, -1, 0.8)),
    "right_elbow": ("chest", 0.4, (1, -0.5, 0.8)),
    "right_hand": ("right_elbow", 0.35, (0.3, -1, 0.8)),
    "left_knee": ("pelvis", 0.5, (-0.4, -1, 0.8)),
    "left_foot": ("left_knee", 0.5, (0, -1, -0.8)),
    "right_knee": ("pelvis", 0.5, (0.4, -1, 0.8)),
    "right_foot": ("right_knee", 0.5, (0, -1, -0.8)),
}
DISTANCE = 4.0  # of the camera from the pelvis, in metres
TURN = 0.4  # the most that a body faces aside, in radians
NOISE = 0.008  # standard deviation of what the camera sees, in its units
SPLITS = {"train": range(0, 1024), "test": range(1024, 1280)}


class Motion(tfds.core.GeneratorBasedBuilder):
    """Clips of a body of 11 joints in 64 frames.

    Fields, both float32: `seen` `[64, 11, 2]`, the joints in the picture, with a little noise, in units of a
    metre at the pelvis; `joints` `[64, 11, 3]`, in metres, how far they are right of the pelvis, below it and
    behind it for the camera, which they face.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing is downloaded; TFDS's own look-up wants a package it does not require

    def _info(self) -> tfds.core.DatasetInfo:
        def packed(coordinates: int) -> tfds.features.Tensor:
            shape = FRAMES, len(SKELETON), coordinates
            return tfds.features.Tensor(shape=shape, dtype=np.float32, encoding="zlib")

        return tfds.core.DatasetInfo(
            builder=self,
            description="Bodies that stand still and move at once.",
            features=tfds.features.FeaturesDict({"seen": packed(2), "joints": packed(3)}),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(numbers) for split, numbers in SPLITS.items()}

    def _generate_examples(self, numbers: range) -> Iterator[tuple[int, dict[str, Any]]]:
        for number in numbers:
            yield number, draw(number)


def draw(number: int) -> dict[str, np.ndarray]:
    """Returns clip `number` with the fields of `Motion`."""
    rng = np.random.Generator(np.random.PCG64(number))
    body = _body(rng, _phase(rng))  # [F, J, 3]
    turn = rng.uniform(-TURN, TURN)
    right, up, front = np.moveaxis(body, -1, 0)
    across = np.cos(turn) * right + np.sin(turn) * front
    behind = np.sin(turn) * right - np.cos(turn) * front
    joints = np.stack([across, -up, behind], axis=-1)  # [F, J, 3]
    seen = joints[..., :2] * DISTANCE / (DISTANCE + joints[..., 2:])
    seen = seen + rng.normal(0.0, NOISE, seen.shape)
    return {"seen": seen.astype(np.float32), "joints": joints.astype(np.float32)}


def _phase(rng: np.random.Generator) -> Float[np.ndarray, " frames"]:
    """How far the motion is in each frame: in two or three bursts of a few frames, and hardly between."""
    frames = np.arange(FRAMES)[:, None]
    count = rng.integers(2, 4)
    centres, widths = rng.uniform(4, FRAMES - 4, count), rng.uniform(0.8, 2.0, count)
    speed = np.exp(-0.5 * ((frames - centres) / widths) ** 2) / widths  # [F, bursts]
    return np.cumsum(speed @ rng.uniform(0.5, 1.5, count) + 0.01)


def _body(
    rng: np.random.Generator, phase: Float[np.ndarray, " frames"]
) -> Float[np.ndarray, "frames joints 3"]:
    """Joints in metres from the pelvis, right, up and to the front."""
    joints: dict[str, np.ndarray] = {}
    for name, (parent, length, rest) in SKELETON.items():
        if parent is None:
            joints[name] = np.zeros((FRAMES, 3))
            continue
        swing, pace, start = rng.uniform(0.2, 0.8, 3), rng.uniform(0.5, 1.5, 3), rng.uniform(0, 2 * np.pi, 3)
        way = np.array(rest) + swing * np.sin(pace * phase[:, None] + start)  # [F, 3]
        joints[name] = joints[parent] + length * way / np.linalg.norm(way, axis=-1, keepdims=True)
    return np.stack(list(joints.values()), axis=1)

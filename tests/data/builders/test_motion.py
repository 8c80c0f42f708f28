import numpy as np
import pytest

from effjax.data.builders import motion
from effjax.data.sources import Tfds

NUMBERS = range(12)


@pytest.mark.parametrize("number", NUMBERS)
def test_bones_keep_their_length_and_the_picture_is_a_projection(number):
    clip = motion.draw(number)
    names = list(motion.SKELETON)
    assert clip["seen"].shape == (motion.FRAMES, len(names), 2)
    joints = clip["joints"].astype(np.float64)
    for i, (parent, length, _) in enumerate(motion.SKELETON.values()):
        start = joints[:, names.index(parent)] if parent else 0.0
        np.testing.assert_allclose(np.linalg.norm(joints[:, i] - start, axis=-1), length, atol=1e-5)
    seen = joints[..., :2] * motion.DISTANCE / (motion.DISTANCE + joints[..., 2:])
    errors = clip["seen"] - seen
    assert 0.8 * motion.NOISE < errors.std() < 1.2 * motion.NOISE
    assert (joints[:, names.index("head"), 1] < 0).all()  # down is positive


def test_few_frames_hold_most_of_the_motion():
    """The 16 liveliest of 63 steps make up most of the way of all joints."""
    shares = []
    for number in NUMBERS:
        steps = np.linalg.norm(np.diff(motion.draw(number)["joints"], axis=0), axis=-1).sum(-1)
        shares.append(np.sort(steps)[-16:].sum() / steps.sum())
    assert np.mean(shares) > 0.8


def test_clips_are_read_as_they_were_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(motion, "SPLITS", {"train": range(3), "test": range(3, 5)})
    reader = Tfds("motion", split="test", data_dir=str(tmp_path)).open()
    assert len(reader) == 2
    found = sorted((reader[i] for i in range(2)), key=lambda clip: clip["joints"].sum())
    drawn = sorted((motion.draw(n) for n in (3, 4)), key=lambda clip: clip["joints"].sum())
    for ours, expected in zip(found, drawn, strict=True):
        for name in expected:
            np.testing.assert_array_equal(ours[name], expected[name])

"""From videos of bytes to small clips of floats."""

import numpy as np
import pytest

from effjax.config import build
from effjax.data import Data
from effjax.data.builders.scenes import draw
from effjax.data.video import Clip, FlipVideo
from effjax.errors import UsageError


def generator(seed=0):
    return np.random.Generator(np.random.Philox(seed))


def video(frames=8, height=12, width=8, channels=3):
    return np.random.default_rng(1).integers(0, 256, (frames, height, width, channels), dtype=np.uint8)


def apply(transform, source, seed=0):
    before = source.copy()
    result = transform({"video": source, "label": 3}, generator(seed))
    np.testing.assert_array_equal(source, before)
    assert result["label"] == 3
    return result["video"]


def test_pixels_are_means_of_squares_between_minus_one_and_one():
    source = video()
    small = apply(Clip(size=4), source)
    assert small.shape == (8, 4, 4, 3)
    assert small.dtype == np.float32
    mean = source[3, 3:6, 2:4, 1].astype(np.float64).mean()
    assert small[3, 1, 1, 1] == pytest.approx(mean / 127.5 - 1, abs=1e-5)
    extremes = apply(Clip(size=4), np.stack([np.zeros((4, 4, 1)), np.full((4, 4, 1), 255)]).astype(np.uint8))
    np.testing.assert_allclose([extremes.min(), extremes.max()], [-1, 1], atol=1e-6)


def test_frames_are_chosen():
    source = video()
    whole = apply(Clip(), source)
    assert whole.shape == source.shape
    np.testing.assert_array_equal(apply(Clip(frames=3), source), whole[:3])
    np.testing.assert_array_equal(apply(Clip(frames=3, every=3), source), whole[[0, 3, 6]])
    np.testing.assert_array_equal(apply(Clip(every=3), source), whole[::3])


def test_scenes_move():
    clip = apply(Clip(size=16), draw(3)["video"])
    assert clip.shape == (8, 16, 16, 3)
    assert np.all(np.abs(np.diff(clip, axis=0)).max((1, 2, 3)) > 0.1)


def test_flips_are_of_whole_videos():
    source = video()
    ways = {"horizontal": np.s_[:, :, ::-1], "vertical": np.s_[:, ::-1], "backwards": np.s_[::-1]}
    never = dict.fromkeys(ways, 0.0)
    np.testing.assert_array_equal(apply(FlipVideo(**never), source), source)
    for name, way in ways.items():
        np.testing.assert_array_equal(apply(FlipVideo(**never | {name: 1.0}), source), source[way])
    seen = {apply(FlipVideo(0.5, 0.5, 0.5), source, seed).tobytes() for seed in range(60)}
    assert len(seen) == 8


@pytest.mark.parametrize(
    ("clip", "source", "message"),
    [
        (Clip(frames=9), video(), "9 frames, every 1, which is 9 of the source, and its videos have 8"),
        (Clip(frames=4, every=3), video(), "which is 10 of the source"),
        (Clip(size=5), video(), "videos of 5 x 5 out of 12 x 8, which it does not divide"),
        (
            Clip(),
            video()[0],
            r"takes uint8 videos \[frames, height, width, channels\], not uint8 \[12, 8, 3\]",
        ),
        (Clip(), video().astype(np.float32), "not float32"),
    ],
)
def test_videos_that_do_not_fit(clip, source, message):
    with pytest.raises(UsageError, match=message):
        apply(clip, source)


def test_a_source_without_videos():
    with pytest.raises(UsageError, match="takes the field 'video', and the source has image, label"):
        Clip()({"image": video()[0], "label": 1}, generator())


@pytest.mark.parametrize("name", ["frames", "every", "size"])
def test_counts_are_positive(name):
    with pytest.raises(UsageError, match=f"{name}=0 must be at least 1"):
        Clip(**{name: 0})


def test_clips_have_names_in_a_config():
    section = dict(
        batch_size=2,
        source=dict(kind="tfds", name="scenes", fields=("video",)),
        transforms=(dict(kind="clip", frames=4, size=16), dict(kind="flip_video")),
        expected=dict(fields=dict(video=dict(shape=(8, 64, 64, 3), dtype="uint8"))),
    )
    batch = build(Data, section, "config.data").described().example_batch()
    assert {name: value.shape for name, value in batch.items()} == {"video": (2, 4, 16, 16, 3)}

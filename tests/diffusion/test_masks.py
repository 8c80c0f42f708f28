"""What is given of a video, by every kind of mask, and how kinds are drawn."""

import jax
import numpy as np
import pytest

from effjax.config import build_kind
from effjax.diffusion import masks
from effjax.errors import UsageError

SHAPE = (8, 6, 5, 3)


def known(mask, count=1, shape=SHAPE, seed=0):
    keys = jax.random.split(jax.random.key(seed), count)
    return np.asarray(jax.jit(lambda keys: masks.draw_known((mask,), keys, shape))(keys))[..., 0]


def frames_of(where):
    """Which frames are given whole; the others must not be given at all."""
    share = where.reshape(*where.shape[:2], -1).mean(-1)
    assert set(np.unique(share)) <= {0.0, 1.0}
    return share.astype(bool)


@pytest.mark.parametrize(
    ("mask", "frames"),
    [
        (masks.Unconditional(), []),
        (masks.Forward(given=2), [0, 1]),
        (masks.Backward(given=3), [5, 6, 7]),
        (masks.Interpolation(every=3), [0, 3, 6]),
        (masks.ImageToVideo(frame=0), [0]),
        (masks.ImageToVideo(frame=5), [5]),
    ],
)
def test_frames_that_are_given(mask, frames):
    (given,) = frames_of(known(mask))
    np.testing.assert_array_equal(np.flatnonzero(given), frames)


def test_one_frame_is_any_frame():
    given = frames_of(known(masks.ImageToVideo(), 400))
    np.testing.assert_array_equal(given.sum(1), 1)
    assert given.mean(0).min() > 0.5 / 8


def test_random_frames_come_as_often_as_asked():
    given = frames_of(known(masks.RandomFrames(probability=0.3), 500))
    assert given.mean() == pytest.approx(0.3, abs=0.03)
    assert abs(np.corrcoef(given[:, 0], given[:, 1])[0, 1]) < 0.15


def test_completion_hides_one_rectangle_of_the_asked_area():
    shape = (8, 40, 30, 3)
    mask = masks.Completion(area=(0.2, 0.3), aspect=(0.5, 2.0), ends=2)
    where = known(mask, 200, shape)
    starts, ends = [], []
    for given in where:
        hidden = ~given
        drawn = np.flatnonzero(hidden.any((1, 2)))
        assert np.all(hidden[drawn] == hidden[drawn[0]])  # the same in all frames that are drawn
        starts.append(drawn[0])
        ends.append(7 - drawn[-1])
        assert len(drawn) == drawn[-1] - drawn[0] + 1
        rows, columns = np.flatnonzero(hidden[drawn[0]].any(1)), np.flatnonzero(hidden[drawn[0]].any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert hidden[drawn[0]].sum() == height * width  # a rectangle
        assert 0.17 < height * width / 1200 < 0.34
        assert 0.45 < height / width < 2.2
    assert set(starts) == set(ends) == {0, 1, 2}
    tops = [np.flatnonzero((~given).any((0, 2)))[0] for given in where]
    assert min(tops) == 0
    assert len(set(tops)) > 10


def test_kinds_are_drawn_by_their_weight_for_each_example():
    kinds = (masks.Forward(given=1, weight=1.0), masks.Backward(given=1, weight=3.0))
    keys = jax.random.split(jax.random.key(1), 2000)
    draw = jax.jit(lambda keys: masks.draw_known(kinds, keys, (4, 1, 1, 1)))
    drawn = draw(keys)
    first, last = np.asarray(drawn[:, 0, 0, 0, 0]), np.asarray(drawn[:, -1, 0, 0, 0])
    np.testing.assert_array_equal(first, ~last)
    assert last.mean() == pytest.approx(0.75, abs=0.04)
    # An example depends on its key alone.
    np.testing.assert_array_equal(draw(keys[7:9]), drawn[7:9])


def test_every_kind_has_a_name_and_can_be_drawn():
    for kind in masks.KINDS:
        fields = {"given": 2} if kind in ("forward", "backward") else {}
        mask = build_kind(masks.KINDS, {"kind": kind, **fields}, "config.task.masks[0]")
        assert known(mask, 2).shape == (2, 8, 6, 5)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (masks.Forward(given=8), "8 frames given of a video of 8 leave nothing to draw: give at most 7"),
        (masks.Backward(given=9), "9 frames given of a video of 8"),
        (masks.Completion(ends=4), "8 frames given of a video of 8"),
        (masks.ImageToVideo(frame=8), "frame=8 is none of a video's 8"),
    ],
)
def test_masks_that_leave_nothing_to_draw(mask, message):
    with pytest.raises(UsageError, match=message):
        masks.draw_known((mask,), jax.random.split(jax.random.key(0), 1), SHAPE)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("forward", dict(given=0), "given=0 must be at least 1"),
        ("interpolation", dict(every=1), "every=1 must be at least 2"),
        ("random_frames", dict(probability=1.0), "probability=1 must be at least 0 and below 1"),
        ("completion", dict(area=(0.5, 0.1)), "area=0.5,0.1 must be two rising numbers"),
        ("completion", dict(area=(0.5, 1.5)), "a rectangle covers at most 1"),
        ("completion", dict(ends=-1), "ends=-1 must be at least 0"),
    ],
)
def test_refused_fields(kind, fields, message):
    with pytest.raises(UsageError, match=message):
        masks.KINDS[kind](**fields)


def test_pictures_have_no_masks():
    with pytest.raises(UsageError, match=r"given of a video \[F, H, W, C\], and this content is \[6, 5, 3\]"):
        masks.draw_known((masks.Unconditional(),), jax.random.split(jax.random.key(0), 1), SHAPE[1:])


def test_weights_are_above_zero():
    with pytest.raises(UsageError, match="weight=0 must be above 0: leave Backward out"):
        masks.check_weights((masks.Forward(), masks.Backward(weight=0.0)))

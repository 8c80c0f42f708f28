import itertools

import numpy as np
import pytest

from effjax.data.builders import scenes
from effjax.data.sources import Tfds

NUMBERS = range(24)


@pytest.mark.parametrize("number", NUMBERS)
def test_boxes_enclose_masks_exactly(number):
    scene = scenes.draw(number)
    instances = scene["instances"][..., 0]
    count = int((scene["classes"] > 0).sum())
    assert sorted(np.unique(instances[instances > 0])) == list(range(1, count + 1))
    for i in range(count):
        rows, columns = np.nonzero(instances == i + 1)
        expected = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]) / scenes.SIZE
        np.testing.assert_array_equal(scene["boxes"][i], expected.astype(np.float32))
        np.testing.assert_array_equal(scene["segmentation"][instances == i + 1], scene["classes"][i])
        assert (scene["flow"][instances == i + 1] == scene["velocity"][i]).all()
    assert not scene["boxes"][count:].any()
    assert not scene["segmentation"][instances == 0].any()
    assert not scene["flow"][instances == 0].any()


@pytest.mark.parametrize("number", NUMBERS)
def test_nearer_objects_have_later_numbers(number):
    scene = scenes.draw(number)
    instances, depth = scene["instances"][..., 0], scene["depth"][..., 0]
    depths = [scene_depth(depth, instances == i) for i in range(int(instances.max()) + 1)]
    assert depths[0] == scenes.GROUND_DEPTH
    assert all(far > near + 0.09 for far, near in itertools.pairwise(depths))


def scene_depth(depth, mask):
    values = np.unique(depth[mask])
    assert len(values) == 1  # an object is flat
    return values[0]


def test_the_nearer_hides_the_farther(monkeypatch):
    """Wherever shapes overlap, what is seen is the one of least depth among those that cover the pixel."""
    inside, shapes = scenes._inside, []

    def spy(kind, centre, radius):
        shapes.append(inside(kind, centre, radius))
        return shapes[-1]

    monkeypatch.setattr(scenes, "_inside", spy)
    overlapping = 0
    for number in NUMBERS:
        shapes.clear()
        depth = scenes.draw(number)["depth"][..., 0]
        whole = np.stack(shapes[: len(shapes) // scenes.FRAMES])  # the shapes of frame 0, unhidden
        overlapping += int((whole.sum(0) > 1).sum())
        # A shape's own depth is the largest seen within it: anything else there lies before it.
        own = np.array([depth[mask].max() for mask in whole])
        layers = np.where(whole, own[:, None, None], scenes.GROUND_DEPTH)
        np.testing.assert_array_equal(depth, layers.min(0).astype(np.float32))
    assert overlapping > 1000


@pytest.mark.parametrize("number", NUMBERS)
def test_objects_move_by_their_velocity(number):
    """The nearest object is never hidden: in every frame it is where its velocity says, in its own colour."""
    scene = scenes.draw(number)
    last = int((scene["classes"] > 0).sum())
    rows, columns = np.nonzero(scene["instances"][..., 0] == last)
    colour = scene["image"][rows[0], columns[0]]
    velocity = scene["velocity"][last - 1].astype(int)
    for frame in range(scenes.FRAMES):
        down, right = rows + frame * velocity[0], columns + frame * velocity[1]
        here = (down >= 0) & (down < scenes.SIZE) & (right >= 0) & (right < scenes.SIZE)
        assert (scene["video"][frame][down[here], right[here]] == colour).all()
    np.testing.assert_array_equal(scene["video"][0], scene["image"])


def test_prepared_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "SPLITS", {"train": range(3), "test": range(3, 5)})
    reader = Tfds("scenes", split="test", data_dir=str(tmp_path)).open()
    read = [reader[i] for i in range(len(reader))]
    drawn = [scenes.draw(number) for number in (3, 4)]
    for example in read:
        (match,) = [scene for scene in drawn if (scene["image"] == example["image"]).all()]
        assert set(example) == set(match)
        for name, value in match.items():
            np.testing.assert_array_equal(example[name], value)
            assert example[name].dtype == value.dtype


def test_splits_are_disjoint():
    assert not set(scenes.SPLITS["train"]) & set(scenes.SPLITS["test"])

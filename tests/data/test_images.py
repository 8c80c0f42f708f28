import dataclasses

import numpy as np
import pytest

from effjax.data import images
from effjax.data.augment import OPERATIONS, RandAugment
from effjax.errors import UsageError


def generator(seed=0):
    return np.random.Generator(np.random.Philox(seed))


def picture(height=20, width=30, channels=3):
    return np.random.default_rng(1).integers(0, 256, (height, width, channels), dtype=np.uint8)


def apply(transform, image, seed=0):
    before = image.copy()
    result = transform({"image": image, "label": 3}, generator(seed))
    np.testing.assert_array_equal(image, before)  # nobody writes into what they were given
    assert result["label"] == 3
    return result["image"]


DEFAULTS = {
    "resize": {"size": (8, 12)},
    "center_crop": {"size": 8},
    "random_resized_crop": {"size": 8},
    "one_hot_text": {"words": 10},
}
FLOATS = {"random_erasing"}
MAKE_FLOATS = {"normalize", "to_float"}


@pytest.mark.parametrize("kind", sorted(images.KINDS))
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_type_and_determinism(kind, channels):
    transform = images.KINDS[kind](**DEFAULTS.get(kind, {}))
    if kind == "normalize":
        transform = images.Normalize((0.5,), (0.5,))
    image = picture(channels=channels)
    image = image.astype(np.float32) if kind in FLOATS else image
    shapes = {"resize": (8, 12), "center_crop": (8, 8), "random_resized_crop": (8, 8)}
    results = [apply(transform, image, seed) for seed in range(20)]
    for result in results:
        assert result.shape == (*shapes.get(kind, (20, 30)), channels)
        assert result.dtype == (np.float32 if kind in FLOATS | MAKE_FLOATS else np.uint8)
    np.testing.assert_array_equal(results[7], apply(transform, image, 7))
    differ = any((result != results[0]).any() for result in results)
    assert differ == transform.random


def test_resize_keeps_a_constant_and_averages_when_it_shrinks():
    np.testing.assert_array_equal(apply(images.Resize((7, 5)), np.full((20, 30, 3), 77, np.uint8)), 77)
    stripes = np.tile(np.array([0, 200], np.uint8), 16)[None, :, None].repeat(32, 0)
    small = apply(images.Resize((4, 4), "bilinear"), stripes)
    np.testing.assert_allclose(small, 100, atol=4)


def test_center_crop_takes_the_middle():
    image = picture(16, 24)
    np.testing.assert_array_equal(apply(images.CenterCrop(16, crop=1.0), image), image[:, 4:20])
    np.testing.assert_array_equal(apply(images.CenterCrop(14), image), image[1:15, 5:19])
    upright = image.transpose(1, 0, 2).copy()
    np.testing.assert_array_equal(apply(images.CenterCrop(16, crop=1.0), upright), upright[4:20])
    with pytest.raises(UsageError, match=r"crop=1\.5"):
        images.CenterCrop(16, crop=1.5)


def test_random_resized_crop_keeps_its_bounds():
    transform = images.RandomResizedCrop(8, scale=(0.25, 0.5), ratio=(0.5, 2.0))
    rng = generator()
    areas, ratios = [], []
    for _ in range(500):
        top, left, height, width = transform.box(100, 120, rng)
        assert 0 <= top <= 100 - height
        assert 0 <= left <= 120 - width
        areas.append(height * width / 12_000)
        ratios.append(width / height)
    assert min(areas) > 0.24
    assert max(areas) < 0.51
    assert min(ratios) > 0.49
    assert max(ratios) < 2.05
    assert abs(np.mean(areas) - 0.375) < 0.02
    assert 0.3 < np.mean(np.array(ratios) > 1) < 0.7  # the logarithm of the ratio is uniform
    # A strip in which no crop fits: the largest centred one within the ratios.
    assert images.RandomResizedCrop(8).box(10, 300, rng) == (0, 143, 10, 13)
    assert images.RandomResizedCrop(8).box(300, 10, rng) == (143, 0, 13, 10)


def test_crop_at_full_scale_is_the_image():
    image = picture(16, 16)
    whole = images.RandomResizedCrop(16, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_array_equal(apply(whole, image), image)


def test_flip():
    image = picture()
    np.testing.assert_array_equal(apply(images.RandomFlip(1.0), image), image[:, ::-1])
    np.testing.assert_array_equal(apply(images.RandomFlip(0.0), image), image)
    flipped = sum((apply(images.RandomFlip(), image, seed) != image).any() for seed in range(400))
    assert 160 < flipped < 240


@pytest.mark.parametrize(("down", "right"), [(1, 0), (-2, 3), (0, 0), (5, -6), (-50, 50)])
def test_shift_moves_and_fills(down, right):
    image = picture(5, 6) // 2 + 1
    moved = images.shift(image, down, right)
    for row in range(5):
        for column in range(6):
            source = (row - down, column - right)
            inside = 0 <= source[0] < 5 and 0 <= source[1] < 6
            np.testing.assert_array_equal(moved[row, column], image[source] if inside else 0)


def test_random_shift_is_uniform_over_its_moves():
    image = np.zeros((5, 5, 1), np.uint8)
    image[2, 2] = 1
    places = [tuple(np.argwhere(apply(images.RandomShift(1), image, seed)[..., 0])[0]) for seed in range(450)]
    counts = {place: places.count(place) for place in places}
    assert set(counts) == {(row, column) for row in (1, 2, 3) for column in (1, 2, 3)}
    assert min(counts.values()) > 25


def test_erasing():
    image = np.full((40, 40, 3), 9.0, np.float32)
    always = images.RandomErasing(1.0, area=(0.1, 0.2))
    shares, noise = [], []
    for seed in range(60):
        gone = apply(always, image, seed) != 9.0
        rows, columns = np.flatnonzero(gone.any((1, 2))), np.flatnonzero(gone.any((0, 2)))
        assert gone[np.ix_(rows, columns)].all()  # one rectangle, all channels
        assert gone.sum() == 3 * len(rows) * len(columns)
        shares.append(gone.mean())
        noise.append(apply(always, image, seed)[gone])
    assert min(shares) > 0.09
    assert max(shares) < 0.22
    values = np.concatenate(noise)
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1.0) < 0.02
    np.testing.assert_array_equal(apply(images.RandomErasing(0.0), image), image)
    with pytest.raises(UsageError, match="put it after normalize"):
        apply(always, picture())


def test_normalize_values():
    image = np.array([[[0, 51, 255]]], np.uint8)
    mean, std = np.array(images.ImageNetMean), np.array(images.ImageNetStd)
    expected = (image / 255 - mean) / std
    np.testing.assert_allclose(apply(images.Normalize(), image), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(apply(images.ToFloat(), image), image / 127.5 - 1, rtol=1e-6, atol=1e-6)
    with pytest.raises(UsageError, match="3 values in mean for images of 1 channels"):
        apply(images.Normalize(), picture(channels=1))
    with pytest.raises(UsageError, match="only one transform may make floats"):
        apply(images.Normalize(), image.astype(np.float32))


def test_pillow_takes_bytes_only():
    with pytest.raises(UsageError, match="not float32 of 3: put them before normalize"):
        apply(images.Resize((4, 4)), picture().astype(np.float32))
    with pytest.raises(UsageError, match="1 or 3 channels, not uint8 of 2"):
        apply(RandAugment(), picture(channels=2))


def test_rand_augment_at_probability_zero_is_the_identity():
    image = picture()
    for seed in range(5):
        np.testing.assert_array_equal(apply(RandAugment(probability=0.0), image, seed), image)
        np.testing.assert_array_equal(apply(RandAugment(count=0), image, seed), image)


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_every_operation_changes_a_picture_at_full_strength(name, monkeypatch):
    image = picture() // 2 + 40
    monkeypatch.setattr("effjax.data.augment.OPERATIONS", {name: OPERATIONS[name]})
    full = RandAugment(count=1, magnitude=10.0, magnitude_std=0.0, probability=1.0)
    for channels in (1, 3):
        result = apply(full, image[..., :channels])
        assert result.shape == (20, 30, channels)
        # Colour has nothing to do in a grey picture.
        assert (result != image[..., :channels]).any() or (name == "color" and channels == 1)


def test_operations_with_a_strength_do_nothing_at_zero(monkeypatch):
    image = picture()
    always_on = {"auto_contrast", "equalize", "invert", "posterize"}  # 4 bits are the most posterize keeps
    for name in set(OPERATIONS) - always_on:
        monkeypatch.setattr("effjax.data.augment.OPERATIONS", {name: OPERATIONS[name]})
        still = RandAugment(1, magnitude=0.0, magnitude_std=0.0, probability=1.0, interpolation="nearest")
        np.testing.assert_array_equal(apply(still, image), image, err_msg=name)


@pytest.mark.parametrize("kind", sorted(images.KINDS))
def test_definitions_are_values(kind):
    one = images.KINDS[kind](**DEFAULTS.get(kind, {}))
    assert one == dataclasses.replace(one)
    assert hash(one) == hash(dataclasses.replace(one))

import numpy as np
import pytest
from PIL import Image

from effjax.config import build_kind
from effjax.data import images
from effjax.errors import UsageError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return rng(7).integers(0, 256, (height, width, channels), dtype=np.uint8)


def apply(transform: object, image: np.ndarray, seed: int = 0) -> np.ndarray:
    before = image.copy()
    result = transform({"image": image, "label": 3}, rng(seed))  # type: ignore[operator]
    np.testing.assert_array_equal(image, before)  # no transform writes into what it was given
    assert result["label"] == 3
    return result["image"]


@pytest.mark.parametrize("channels", [1, 3])
def test_resize_is_pillows(channels: int) -> None:
    image = noise(9, 14, channels)
    resized = apply(images.Resize((6, 20), "bilinear"), image)
    assert resized.shape == (6, 20, channels)
    first = Image.fromarray(image[..., 0]).resize((20, 6), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resized[..., 0], np.asarray(first))


@pytest.mark.parametrize(("height", "width"), [(40, 64), (64, 40)])
def test_center_crop_keeps_the_middle(height: int, width: int) -> None:
    ramp = np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None], (height, width, 1))
    cropped = apply(images.CenterCrop(35, crop=0.875), np.ascontiguousarray(ramp))
    # The short side is 40 = 35 / 0.875 already, so nothing is scaled: the middle 35 of each side remain.
    left = round((width - 35) / 2)
    assert cropped.shape == (35, 35, 1)
    np.testing.assert_array_equal(cropped[0, :, 0], np.arange(left, left + 35))


def test_center_crop_scales_the_short_side() -> None:
    assert apply(images.CenterCrop(224), noise(300, 500)).shape == (224, 224, 3)
    whole = apply(images.CenterCrop(16, crop=1.0), noise(32, 32))
    np.testing.assert_array_equal(whole, apply(images.Resize((16, 16)), noise(32, 32)))


def test_the_random_crop_draws_area_and_ratio_from_its_bounds() -> None:
    crop = images.RandomResizedCrop(8, scale=(0.1, 0.5))
    generator = rng()
    boxes = np.array([crop.box(200, 300, generator) for _ in range(2000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (top + height <= 200).all()
    assert (left + width <= 300).all()
    share, ratio = height * width / 60_000, width / height
    assert 0.095 < share.min() < 0.11
    assert 0.47 < share.max() < 0.51
    assert abs(share.mean() - 0.3) < 0.01
    assert 0.73 < ratio.min() < 0.77
    assert 1.30 < ratio.max() < 1.36
    assert abs(np.log(ratio).mean()) < 0.02
    assert apply(crop, noise(20, 30)).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("shape", "box"),
    [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((100, 100), (0, 0, 100, 100))],
)
def test_a_crop_that_never_fits_falls_back_to_the_middle(shape: tuple, box: tuple) -> None:
    crop = images.RandomResizedCrop(8, scale=(2.0, 3.0))
    assert crop.box(*shape, rng()) == box


def test_a_crop_of_everything_is_a_resize() -> None:
    image = noise(16, 16)
    crop = images.RandomResizedCrop(8, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_array_equal(apply(crop, image), apply(images.Resize((8, 8)), image))


def test_flip_mirrors_half_of_the_images() -> None:
    image = noise(3, 4)
    np.testing.assert_array_equal(apply(images.RandomFlip(1.0), image), image[:, ::-1])
    assert apply(images.RandomFlip(0.0), image) is image
    flipped = [not np.array_equal(apply(images.RandomFlip(), image, seed), image) for seed in range(400)]
    assert 160 < sum(flipped) < 240


def test_shift_moves_and_fills_with_zeros() -> None:
    image = np.arange(1, 26, dtype=np.uint8).reshape(5, 5, 1)
    seen = set()
    for seed in range(200):
        moved = apply(images.RandomShift(2), image, seed)[..., 0]
        (down, right) = np.argwhere(moved == 13)[0] - 2  # 13 stands in the middle and never leaves
        seen.add((int(down), int(right)))
        padded = np.pad(image[..., 0], 2)
        np.testing.assert_array_equal(moved, padded[2 - down : 7 - down, 2 - right : 7 - right])
    assert seen == {(d, r) for d in range(-2, 3) for r in range(-2, 3)}


def test_normalize_standardises() -> None:
    image = noise(4, 4)
    result = apply(images.Normalize(), image)
    assert result.dtype == np.float32
    expected = (image / 255 - np.array(images.ImageNetMean)) / np.array(images.ImageNetStd)
    np.testing.assert_allclose(result, expected, atol=1e-6)
    one = apply(images.Normalize((0.5,), (0.25,)), image)
    np.testing.assert_allclose(one, (image / 255 - 0.5) / 0.25, atol=1e-6)


def test_to_float_spans_minus_one_to_one() -> None:
    result = apply(images.ToFloat(), np.array([0, 255], np.uint8).reshape(1, 2, 1))
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result.ravel(), [-1.0, 1.0])


@pytest.mark.parametrize(
    ("transform", "image", "message"),
    [
        (images.Normalize(), noise(2, 2, 1), "3 values in mean for images of 1 channels"),
        (images.Normalize((0.5,), (1.0, 1.0)), noise(2, 2), "2 values in std for images of 3 channels"),
        (images.Normalize(), np.zeros((2, 2, 3), np.float32), "normalize takes uint8 images, not float32"),
        (images.ToFloat(), np.zeros((2, 2, 3), np.float32), "to_float takes uint8 images"),
        (images.RandomErasing(), noise(2, 2), "put it after normalize"),
    ],
)
def test_transforms_in_the_wrong_place_say_so(transform: object, image: np.ndarray, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        apply(transform, image)


def test_erasing_replaces_a_rectangle_by_normal_noise() -> None:
    image = np.full((40, 50, 3), 9.0, np.float32)
    shares, aspects, values, untouched = [], [], [], 0
    for seed in range(800):
        result = apply(images.RandomErasing(), image, seed)
        changed = (result != 9.0).all(-1)
        if not changed.any():
            untouched += 1
            continue
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        height, width = rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]
        assert changed.sum() == height * width
        shares.append(height * width / 2000)
        aspects.append(height / width)
        values.append(result[changed].ravel())
    assert 0.70 < untouched / 800 < 0.80
    assert 0.015 < min(shares) < 0.05
    assert 0.28 < max(shares) < 0.36
    assert min(aspects) < 0.5
    assert max(aspects) > 2.0
    drawn = np.concatenate(values)
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.std() - 1.0) < 0.02


def test_every_kind_is_built_from_a_config() -> None:
    needed = {"resize": dict(size=(4, 4)), "center_crop": dict(size=4), "random_resized_crop": dict(size=4)}
    for kind in images.KINDS:
        built = build_kind(images.KINDS, dict(kind=kind) | needed.get(kind, {}), "config.data.transforms[0]")
        image = noise(6, 6)
        if kind == "random_erasing":
            image = image.astype(np.float32)
        assert apply(built, image).ndim == 3

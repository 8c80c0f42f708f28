import numpy as np
import pytest
from PIL import Image, ImageOps

from effjax.data.augment import OPERATIONS, Canvas, RandAugment

CANVAS = Canvas(Image.Resampling.BILINEAR, (124, 116, 104))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def noise(*shape: int) -> np.ndarray:
    return rng(7).integers(0, 256, shape, dtype=np.uint8)


def apply(name: str, image: np.ndarray, strength: float) -> np.ndarray:
    return np.asarray(OPERATIONS[name](Image.fromarray(image), strength, CANVAS))


@pytest.mark.parametrize(
    "name", sorted(set(OPERATIONS) - {"auto_contrast", "equalize", "invert", "posterize"})
)
def test_no_strength_changes_nothing(name: str) -> None:
    image = noise(12, 10, 3)
    # Solarising from 256 on, adding nothing, enhancing by a factor of 1 and moving by nothing.
    np.testing.assert_array_equal(apply(name, image, 0.0), image)


@pytest.mark.parametrize("strength", [-0.9, -0.5, 0.5, 0.9, 1.0])
def test_colour_operations_have_their_published_scale(strength: float) -> None:
    image = noise(12, 10, 3)
    wide = image.astype(int)
    size = abs(strength)
    np.testing.assert_array_equal(apply("invert", image, strength), 255 - image)
    threshold = 256 - int(256 * size)
    np.testing.assert_array_equal(
        apply("solarize", image, strength), np.where(image < threshold, image, 255 - image)
    )
    added = np.minimum(wide + int(110 * size), 255)
    np.testing.assert_array_equal(apply("solarize_add", image, strength), np.where(image < 128, added, image))
    step = 2 ** (4 + int(4 * size))
    np.testing.assert_array_equal(apply("posterize", image, strength), wide // step * step)
    # A factor above 1 may be cut at 255, and below 0.1 is never reached.
    factor = max(0.1, 1.0 + 0.9 * strength)
    brightness = apply("brightness", image, strength).astype(float)
    np.testing.assert_allclose(brightness, np.clip(image * factor, 0, 255), atol=1.0)


def test_moving_operations_have_their_published_scale() -> None:
    image = noise(20, 40, 3)
    moved = apply("translate_x", image, 1.0)
    np.testing.assert_array_equal(moved[:, :22], image[:, 18:])
    assert (moved[:, 23:] == CANVAS.fill).all()
    np.testing.assert_array_equal(apply("translate_y", image, -1.0)[9:], image[:11])
    turned = OPERATIONS["rotate"](Image.fromarray(image), 0.5, CANVAS)
    expected = Image.fromarray(image).rotate(15.0, Image.Resampling.BILINEAR, fillcolor=CANVAS.fill)
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(expected))
    # A shear by 0.3 moves row y by 0.3 y, so row 10 by 3 columns.
    np.testing.assert_allclose(apply("shear_x", image, 1.0)[10, :30].astype(int), image[10, 3:33], atol=40)
    sheared = apply("shear_y", image, -1.0)
    assert (sheared[0, 20:] == CANVAS.fill).all()


def test_the_rest_is_pillows() -> None:
    image = Image.fromarray(noise(12, 10, 3) // 2)
    for name, expected in (("auto_contrast", ImageOps.autocontrast), ("equalize", ImageOps.equalize)):
        np.testing.assert_array_equal(
            np.asarray(OPERATIONS[name](image, 0.3, CANVAS)), np.asarray(expected(image))
        )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_every_operation_takes_both_modes(name: str, channels: int) -> None:
    image = noise(9, 11, 3) if channels == 3 else noise(9, 11)
    for strength in (-1.0, 1.0):
        assert apply(name, image, strength).shape == image.shape


def test_images_are_augmented_by_the_generator_alone() -> None:
    image = noise(16, 16, 3)
    results = [RandAugment()({"image": image}, rng(seed))["image"] for seed in (1, 1, 2, 3, 4)]
    np.testing.assert_array_equal(results[0], results[1])
    assert len({result.tobytes() for result in results}) >= 3
    assert all(result.shape == image.shape and result.dtype == np.uint8 for result in results)


def test_operations_are_drawn_evenly_and_half_are_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, float]] = []

    def recorder(name: str):
        def record(image: Image.Image, strength: float, canvas: Canvas) -> Image.Image:
            drawn.append((name, strength))
            return image

        return record

    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, recorder(name))
    augment, generator, image = RandAugment(), rng(), noise(4, 4, 3)
    for _ in range(3000):
        augment({"image": image}, generator)
    names, strengths = zip(*drawn, strict=True)
    assert abs(len(drawn) - 3000) < 150  # 3000 images, two operations each, one half applied
    counts = [names.count(name) for name in OPERATIONS]
    assert min(counts) > 140
    assert max(counts) < 265
    sizes = np.abs(strengths)
    assert sizes.max() == 1.0  # 9 + normal(0, 0.5), cut at 10
    assert abs(np.median(sizes) - 0.9) < 0.005
    assert abs(sizes.std() - 0.05) < 0.01
    assert abs(np.mean(np.sign(strengths))) < 0.06


def test_nothing_is_applied_with_probability_zero() -> None:
    image = noise(16, 16, 3)
    result = RandAugment(count=4, probability=0.0)({"image": image}, rng())["image"]
    np.testing.assert_array_equal(result, image)

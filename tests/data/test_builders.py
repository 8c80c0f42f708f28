import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from effjax.data import builders
from effjax.data.builders import digits, pydocs, scenes
from effjax.data.sources import Tfds
from effjax.errors import RunError, UsageError


def run_python(code: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_digits_are_all_there_split_by_class(data_dir: str) -> None:
    train, test = (Tfds("digits", split, data_dir).open() for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    examples = [source[i] for source in (train, test) for i in range(len(source))]
    images, labels = digits.load()

    def in_some_order(pixels: list[np.ndarray], classes: list[int]) -> list[tuple[int, bytes]]:
        return sorted((int(c), p.tobytes()) for p, c in zip(pixels, classes, strict=True))

    # Together the splits are scikit-learn's digits, each once; so they are also disjoint.
    read = in_some_order([e["image"] for e in examples], [e["label"] for e in examples])
    assert read == in_some_order(list(images), list(labels))
    assert examples[0]["image"].shape == (8, 8, 1)
    assert examples[0]["image"].dtype == np.uint8
    assert images.max() == 255
    held_out = np.bincount([e["label"] for e in examples[1437:]], minlength=10)
    assert np.abs(held_out - np.bincount(labels) * 0.2).max() <= 1


def test_pydocs_is_english_and_holds_documents_out_by_their_text(data_dir: str) -> None:
    train, test = (Tfds("pydocs", split, data_dir).open() for split in ("train", "test"))
    texts = [[source[i]["text"] for i in range(len(source))] for source in (train, test)]
    names = {train[i]["name"].decode() for i in range(len(train))}
    assert len(set(texts[0] + texts[1])) == len(texts[0]) + len(texts[1])
    assert 0.03 < len(texts[1]) / len(texts[0]) < 0.07
    assert not any(pydocs.in_test(text.decode()) for text in texts[0])
    assert all(pydocs.in_test(text.decode()) for text in texts[1])
    assert sum(map(len, texts[0])) > 1_000_000
    everything = b" ".join(texts[0]).lower().split()
    assert everything.count(b"the") / len(everything) > 0.02
    assert "json" in {name.split(".")[0] for name in names}
    assert not {name for name in names if name.split(".")[0] in ("test", "idlelib", "site-packages")}


def test_a_scene_is_exact_to_the_pixel() -> None:
    hidden = 0
    for number in range(40):
        scene = scenes.draw(number)
        same = scenes.draw(number)
        assert all(np.array_equal(scene[name], same[name]) for name in scene)
        instances, image = scene["instances"][..., 0], scene["image"]
        count = int(instances.max())
        assert (scene["classes"] > 0).sum() == count >= 1
        assert np.array_equal(scene["video"][0], image)
        depths = [10.0]
        for i in range(count):
            mask = instances == i + 1
            rows, columns = np.nonzero(mask)
            tight = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]) / scenes.SIZE
            np.testing.assert_array_equal(scene["boxes"][i], tight.astype(np.float32))
            assert set(scene["segmentation"][mask].ravel()) == {scene["classes"][i]}
            assert np.all(scene["flow"][mask] == scene["velocity"][i])
            depth = np.unique(scene["depth"][mask])
            assert depth.size == 1
            depths.append(float(depth[0]))
            hidden += _hidden_by_nearer(scene, mask, depth[0])
        # Far to near is the numbering, so every next one is nearer.
        assert depths == sorted(depths, reverse=True)
        # The nearest object hides everything: what is its colour has moved by its flow in frame 1.
        nearest = np.argwhere(instances == count)
        moved = nearest + scene["velocity"][count - 1].astype(int)
        seen = ((moved >= 0) & (moved < scenes.SIZE)).all(1)
        before, after = image[tuple(nearest[seen].T)], scene["video"][1][tuple(moved[seen].T)]
        np.testing.assert_array_equal(before, after)
    assert hidden > 0


def _hidden_by_nearer(scene: dict[str, np.ndarray], mask: np.ndarray, depth: float) -> bool:
    """Whether a nearer object lies within the box of this one."""
    rows, columns = np.nonzero(mask)
    box = scene["depth"][rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return bool((box < depth).any())


def test_scenes_survive_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "SPLITS", {"train": range(0, 3), "test": range(3, 5)})
    source = Tfds("scenes", "test", str(tmp_path)).open()
    drawn = {scenes.draw(n)["video"].tobytes(): scenes.draw(n) for n in (3, 4)}
    for i in range(2):
        example = source[i]
        expected = drawn.pop(example["video"].tobytes())
        assert set(example) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(example[name], value)
            assert example[name].dtype == value.dtype


def test_a_preparation_that_fails_leaves_nothing_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, rows: np.ndarray) -> object:
        yield from list(whole(self, rows))[:10]
        raise OSError(28, "No space left on device")

    whole = digits.Digits._generate_examples
    monkeypatch.setattr(digits.Digits, "_generate_examples", broken)
    with pytest.raises(RunError, match=r"'digits' could not be written to .*No space left"):
        builders.prepare("digits", tmp_path)
    assert not list(tmp_path.glob("digits/*"))

    monkeypatch.undo()
    assert builders.prepare("digits", tmp_path) == tmp_path / "digits" / "1.0.0"
    assert len(Tfds("digits", "train", str(tmp_path)).open()) == 1437


def test_the_loser_of_a_race_takes_the_winners_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finishes while ours is half way."""

    def overtaken(self: object, rows: np.ndarray) -> object:
        monkeypatch.undo()
        builders.prepare("digits", tmp_path)
        yield from whole(self, rows)

    whole = digits.Digits._generate_examples
    monkeypatch.setattr(digits.Digits, "_generate_examples", overtaken)
    builders.prepare("digits", tmp_path)
    assert [path.name for path in tmp_path.glob("digits/*")] == ["1.0.0"]
    assert len(Tfds("digits", "test", str(tmp_path)).open()) == 360


def test_two_processes_prepare_and_read_without_tensorflow(tmp_path: Path) -> None:
    """TensorFlow is installed here, so to say, and does not survive being imported."""
    (tmp_path / "packages" / "tensorflow").mkdir(parents=True)
    (tmp_path / "packages" / "tensorflow" / "__init__.py").write_text("raise SystemExit('imported')")
    code = """
import sys
from effjax.data import Data
from effjax.data.sources import Tfds
data = Data(batch_size=8, source=Tfds("digits", "train[:10%]")).open()
assert next(data.train())["image"].shape == (8, 8, 8, 1)
assert "tensorflow" not in sys.modules
print(sum(int(batch["mask"].sum()) for batch in data.evaluate()))
"""
    path = os.pathsep.join([str(tmp_path / "packages"), os.getcwd()])
    both = [run_python(code, TFDS_DATA_DIR=str(tmp_path / "data"), PYTHONPATH=path) for _ in range(2)]
    outcomes = [(*process.communicate(timeout=60), process.returncode) for process in both]
    for out, err, status in outcomes:
        assert (status, out.strip()) == (0, "144"), err
    assert [path.name for path in tmp_path.glob("data/digits/*")] == ["1.0.0"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(RunError, match=r"'digits' could not be written to .*/file"):
        builders.prepare("digits", tmp_path / "file")


def test_only_embedded_names_are_prepared(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'digits'\?"):
        builders.prepare("digit", tmp_path)

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from effjax.data.records import BadRecord, Metadata
from effjax.data.sources import ImageFolder, JsonLines, Tfds
from effjax.errors import UsageError


def test_a_split_may_be_sliced(data_dir: str) -> None:
    whole, half = Tfds("digits", "test", data_dir).open(), Tfds("digits", "test[50%:]", data_dir).open()
    assert len(half) == 180
    for i in (0, 179):
        np.testing.assert_array_equal(half[i]["image"], whole[180 + i]["image"])
    assert half.metadata == Metadata(tuple("0123456789"), (8, 8, 1))
    assert half.metadata.num_classes == 10


def test_only_the_named_fields_are_read(data_dir: str) -> None:
    assert set(Tfds("digits", "test", data_dir, fields=("label",)).open()[0]) == {"label"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (dict(fields=("labels",)), r"no field 'labels'\. Did you mean 'label'"),
        (
            dict(split="validation"),
            r"digits/1\.0\.0 has no split 'validation'.*Its splits.*: (test, train|train, test)",
        ),
        (dict(split="train[:0]"), r"no split 'train\[:0\]', or nothing in it"),
    ],
)
def test_what_a_data_set_lacks_is_named(source: dict, message: str, data_dir: str) -> None:
    with pytest.raises(UsageError, match=message):
        Tfds("digits", data_dir=data_dir, **source).open()


def test_a_data_set_that_is_not_prepared_says_how_to(tmp_path: Path, data_dir: str) -> None:
    Tfds("digits", data_dir=data_dir).open()
    with pytest.raises(UsageError) as raised:
        Tfds("imagenet2012", data_dir=data_dir).open()
    message = str(raised.value)
    assert f"tfds build imagenet2012 --file_format=array_record --data_dir={data_dir}" in message
    assert "Prepared there: digits" in message
    with pytest.raises(UsageError, match=r"Prepared there: none.*Did you mean 'pydocs'\?"):
        Tfds("pydoc", data_dir=str(tmp_path)).open()


def test_another_prepared_name_is_read_like_the_embedded(tmp_path: Path, data_dir: str) -> None:
    """A data set whose builder is unknown here, with a configuration in its name."""
    Tfds("digits", data_dir=data_dir).open()
    other = tmp_path / "letters" / "small" / "2.0.0"
    shutil.copytree(Path(data_dir) / "digits" / "1.0.0", other)
    for path in list(other.glob("digits-*")):
        path.rename(other / path.name.replace("digits-", "letters-"))
    info = json.loads((other / "dataset_info.json").read_text())
    info |= {"name": "letters", "configName": "small", "version": "2.0.0"}
    (other / "dataset_info.json").write_text(json.dumps(info))
    assert len(Tfds("letters/small", "test", str(tmp_path)).open()) == 360

    (other / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(UsageError, match=r"prepared as tfrecord.*--file_format=array_record"):
        Tfds("letters/small", "test", str(tmp_path)).open()


def test_an_image_folder_has_sorted_classes(picture_folder: Path) -> None:
    (picture_folder / "ant" / "notes.txt").write_text("not a picture")
    source = ImageFolder(str(picture_folder)).open()
    assert source.metadata.class_names == ("ant", "cat")
    read = [(int(source[i]["image"][0, 0, 0]), source[i]["label"]) for i in range(len(source))]
    assert read == [(40, 0), (50, 0), (10, 1), (20, 1), (30, 1)]
    assert source[0]["image"].shape == (6, 5, 3)
    assert ImageFolder(str(picture_folder), mode="L").open()[0]["image"].shape == (6, 5, 1)


def test_a_broken_picture_is_named(picture_folder: Path) -> None:
    whole = (picture_folder / "cat" / "20.png").read_bytes()
    (picture_folder / "cat" / "20.png").write_bytes(whole[: len(whole) // 2])
    (picture_folder / "cat" / "10.png").write_bytes(b"")
    (picture_folder / "cat" / "30.png").unlink()
    source = ImageFolder(str(picture_folder)).open()
    for i, name in ((2, "10.png"), (3, "20.png")):
        with pytest.raises(BadRecord, match=f"cat/{name}: "):
            source[i]


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        ImageFolder(str(tmp_path / "nowhere")).open()
    with pytest.raises(UsageError, match=r"no sub-folders.*<class>/\*\.\{jpeg,jpg,png,webp\}"):
        ImageFolder(str(tmp_path)).open()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"class folder .*/empty has no pictures"):
        ImageFolder(str(tmp_path)).open()


def test_json_lines_are_read_by_number(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    lines = ['{"text": "one"}', "", '{"text": "zw\\u00f6lf"}', '{"text": 3}', "[1]", "{", '{"text": "last"}']
    path.write_text("\n".join(lines))
    source = JsonLines(str(path)).open()
    assert len(source) == 6
    assert [source[i]["text"].decode() for i in (5, 1, 0)] == ["last", "zwölf", "one"]
    for i, line in ((2, 4), (3, 5), (4, 6)):
        with pytest.raises(BadRecord, match=rf"text\.jsonl, line {line}: "):
            source[i]
    with pytest.raises(BadRecord, match="no text under the key 'body'"):
        JsonLines(str(path), key="body").open()[0]


def test_json_lines_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        JsonLines(str(tmp_path / "nowhere.jsonl")).open()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(UsageError, match="has no lines"):
        JsonLines(str(tmp_path / "blank.jsonl")).open()

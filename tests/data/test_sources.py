import json
import re

import numpy as np
import pytest
from PIL import Image

from effjax.data import builders
from effjax.data.records import Metadata, Readable
from effjax.data.sources import ImageFolder, JsonLines, Tfds, decode_image
from effjax.errors import RunError, UsageError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    builders.prepare("digits", folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path):
    """Two classes of three pictures each; the number of the picture is its brightness."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i, suffix in enumerate(("png", "jpg", "PNG")):
            value = 40 * (3 * label + i)
            pixels = np.full((4 + i, 6, 3), value, np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.{suffix}")
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    return tmp_path


# Prepared TFDS data sets


def test_not_prepared_says_how(data_dir):
    command = re.escape(f"`tfds build imagenet2012 --file_format=array_record --data_dir={data_dir}`")
    with pytest.raises(UsageError, match=rf"'imagenet2012' is not prepared.*{command}.*there: digits"):
        Tfds("imagenet2012", data_dir=data_dir).open()


@pytest.mark.parametrize("name", ["not a name!", "digits:9.0.0", "glue/cola"])
def test_strange_names_say_the_same(data_dir, name):
    with pytest.raises(UsageError, match="is not prepared"):
        Tfds(name, data_dir=data_dir).open()


def test_unknown_split_and_field(data_dir):
    with pytest.raises(UsageError, match=r"no split 'tset'.*Its splits.*: train, test"):
        Tfds("digits", split="tset", data_dir=data_dir).open()
    with pytest.raises(UsageError, match=r"no split 'train\[:200%\]'"):
        Tfds("digits", split="train[:200%]", data_dir=data_dir).open()
    with pytest.raises(UsageError, match=r"no field 'labels'.*Did you mean 'label'"):
        Tfds("digits", data_dir=data_dir, fields=("labels",)).open()
    with pytest.raises(UsageError, match="is empty"):
        Tfds("digits", split="train[5:5]", data_dir=data_dir).open()


def test_slices_and_fields(data_dir):
    whole, part = (Tfds("digits", split=s, data_dir=data_dir).open() for s in ("test", "test[100:110]"))
    assert len(part) == 10
    np.testing.assert_array_equal(part[3]["image"], whole[103]["image"])
    only = Tfds("digits", split="test", data_dir=data_dir, fields=("label",)).open()
    assert only[103] == {"label": whole[103]["label"]}


def test_a_format_without_random_access(data_dir, tmp_path):
    copy = tmp_path / "mine" / "1.0.0"
    copy.mkdir(parents=True)
    for file in (builders.prepare("digits", data_dir)).iterdir():
        text = file.read_bytes()
        if file.name == "dataset_info.json":
            text = text.replace(b'"array_record"', b'"tfrecord"').replace(b'"digits"', b'"mine"')
        (copy / file.name).write_bytes(text)
    with pytest.raises(UsageError, match=r"tfrecord, which has no random access.*tfds build mine"):
        Tfds("mine", data_dir=str(tmp_path)).open()


def test_grey_and_coloured_files_decode_to_the_same_channels(tmp_path):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    data = (tmp_path / "grey.png").read_bytes()
    np.testing.assert_array_equal(decode_image(data, "RGB"), np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(decode_image(data, "L"), grey[..., None])
    assert decode_image(data, "RGBA").shape == (3, 4, 4)


# Image folders


def test_image_folder(pictures):
    reader = ImageFolder(str(pictures)).open()
    assert len(reader) == 6
    assert reader.metadata == Metadata(("cat", "dog"))
    for i, example in enumerate(reader[n] for n in range(6)):
        # Upper case sorts first within a class only if the stem does: the stems here are 0, 1, 2.
        assert example["label"] == i // 3
        assert example["image"].dtype == np.uint8
        assert example["image"].shape == (4 + i % 3, 6, 3)
        np.testing.assert_allclose(example["image"], 40 * i, atol=2)
    assert ImageFolder(str(pictures), mode="L").open()[0]["image"].shape == (4, 6, 1)


def test_folders_that_cannot_do(tmp_path, pictures):
    with pytest.raises(UsageError, match="nowhere does not exist"):
        ImageFolder(str(tmp_path / "nowhere")).open()
    (pictures / "empty").mkdir()
    with pytest.raises(UsageError, match=r"class folder .*empty has no pictures. It needs .*<class>"):
        ImageFolder(str(pictures)).open()
    with pytest.raises(UsageError, match="no sub-folders, so there are no classes"):
        ImageFolder(str(pictures / "empty")).open()


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "header"])
def test_a_broken_picture_is_counted_and_replaced(pictures, damage):
    path = pictures / "cat" / "1.jpg"
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "text": b"hello", "empty": b"", "header": whole[:20]}[damage]
    )
    for _ in range(2):  # a second reader replaces in the same way
        readable = Readable(ImageFolder(str(pictures)).open(), max_bad_share=0.5)
        np.testing.assert_array_equal(readable[1]["image"], readable[2]["image"])
        assert readable[1]["image"].shape == (6, 6, 3)
        assert list(readable.bad) == [1]
        assert str(path) in readable.bad[1]


def test_too_many_broken_pictures_end_the_run(pictures):
    for name in ("0.png", "2.PNG"):
        (pictures / "dog" / name).write_bytes(b"junk")
    readable = Readable(ImageFolder(str(pictures)).open(), max_bad_share=0.2)
    assert readable[3]["label"] == 1
    for _ in range(2):  # and stays ended
        with pytest.raises(RunError, match=r"2 of 6 records are broken(.|\n)*dog/0.png(.|\n)*dog/2.PNG"):
            readable[5]


# JSON lines


def test_json_lines(tmp_path):
    path = tmp_path / "documents.jsonl"
    documents = ["first", "", "zweite Zeile: ä", "line\nbreak"]
    path.write_text("\n\n".join(json.dumps({"text": t, "id": i}) for i, t in enumerate(documents)) + "\n")
    reader = JsonLines(str(path)).open()
    assert [reader[i]["text"].decode() for i in range(len(reader))] == documents
    before = reader.metadata.identity
    path.write_text(path.read_text() + json.dumps({"text": "more"}))
    assert JsonLines(str(path)).open().metadata.identity != before


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"text": "cut', "line 3: Unterminated string"),
        ('{"txt": "x"}', "line 3: no text under the key 'text'"),
        ('{"text": 5}', "line 3: no text under the key 'text'"),
        ('["text"]', "line 3: no text under the key 'text'"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, fault):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "a"}\n\n' + line + '\n{"text": "b"}\n')
    readable = Readable(JsonLines(str(path)).open(), max_bad_share=0.4)
    assert readable[1] == {"text": b"b"}
    assert fault in readable.bad[1]


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    readable = Readable(JsonLines(str(path)).open(), max_bad_share=1.0)
    assert readable[1] == {"text": b"a"}
    assert "line 2" in readable.bad[1]


def test_files_that_cannot_do(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        JsonLines(str(tmp_path / "none.jsonl")).open()
    (tmp_path / "blank.jsonl").write_text("\n  \n")
    with pytest.raises(UsageError, match="has no lines"):
        JsonLines(str(tmp_path / "blank.jsonl")).open()

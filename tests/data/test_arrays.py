import contextlib
import json

import numpy as np
import pytest

from effjax.data import Data
from effjax.data.arrays import Arrays, ArrayWriter
from effjax.errors import UsageError

ORIGIN = {"run": "runs/flow", "seed": 0}


def rows(first, count):
    number = np.arange(first, first + count)
    return {"noise": np.ones((count, 2, 3), np.float32) * np.float32(number)[:, None, None], "label": number}


def test_what_was_written_is_read_row_by_row(tmp_path):
    folder = tmp_path / "pairs"
    with ArrayWriter(folder, 10, ORIGIN) as writer:
        for first in (0, 4, 8):
            assert not folder.exists()
            writer.write(first, rows(first, 4))  # the last two rows are too many
    reader = Arrays(str(folder)).open()
    assert len(reader) == 10
    assert reader[7]["label"] == 7
    np.testing.assert_array_equal(reader[9]["noise"], np.full((2, 3), 9.0))
    assert reader[0]["noise"].dtype == np.float32
    assert not list(tmp_path.glob("*.partial"))
    assert json.loads((folder / "origin.json").read_text()) == ORIGIN


def test_a_writer_that_was_stopped_goes_on(tmp_path):
    folder = tmp_path / "pairs"
    with contextlib.suppress(KeyboardInterrupt), ArrayWriter(folder, 6, ORIGIN) as writer:
        writer.write(0, rows(0, 4))
        raise KeyboardInterrupt
    with pytest.raises(UsageError, match=r"pairs\.partial is not finished"):
        Arrays(str(folder)).open()
    with pytest.raises(UsageError, match="beginning of 6 rows, and 7 were asked for"):
        ArrayWriter(folder, 7, ORIGIN)
    with pytest.raises(UsageError, match="begun with seed=0, and this is seed=1"):
        ArrayWriter(folder, 6, {**ORIGIN, "seed": 1})
    with pytest.raises(UsageError, match="begun with seed=0, and this is seed=None"):
        ArrayWriter(folder, 6, {"run": "runs/flow"})
    with ArrayWriter(folder, 6, ORIGIN) as writer:
        assert writer.done == 4
        writer.write(4, rows(4, 4))
    assert [Arrays(str(folder)).open()[i]["label"] for i in range(6)] == list(range(6))
    with pytest.raises(UsageError, match="exists: name another folder"):
        ArrayWriter(folder, 6, ORIGIN)


def test_training_reads_them_like_any_source(tmp_path):
    with ArrayWriter(tmp_path / "pairs", 8, ORIGIN) as writer:
        writer.write(0, rows(0, 8))
    data = Data(source=Arrays(str(tmp_path / "pairs")), batch_size=4, threads=0).open()
    first = next(data.train())
    assert first["noise"].shape == (4, 2, 3)
    np.testing.assert_array_equal(first["noise"][:, 0, 0], first["label"])
    again = Data(source=Arrays(str(tmp_path / "pairs")), batch_size=4, threads=0).open()
    assert again.metadata.identity == data.metadata.identity != ""


def test_folders_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        Arrays(str(tmp_path / "none")).open()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no FIELD\.npy files"):
        Arrays(str(tmp_path / "empty")).open()
    (tmp_path / "uneven").mkdir()
    np.save(tmp_path / "uneven" / "a.npy", np.zeros((3, 2)))
    np.save(tmp_path / "uneven" / "b.npy", np.zeros((4, 2)))
    with pytest.raises(UsageError, match=r"all as many: a\.npy \(3, 2\), b\.npy \(4, 2\)"):
        Arrays(str(tmp_path / "uneven")).open()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.npy").write_bytes(b"\x93NUMPY nothing")
    with pytest.raises(UsageError, match=r"a\.npy is no array that can be read"):
        Arrays(str(tmp_path / "broken")).open()
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "objects.npy").rename(tmp_path / "pickled" / "objects.npy")
    with pytest.raises(UsageError, match="no array that can be read"):
        Arrays(str(tmp_path / "pickled")).open()


def test_the_count_never_runs_ahead_of_the_rows(tmp_path):
    writer = ArrayWriter(tmp_path / "pairs", 6, ORIGIN)
    writer.write(0, rows(0, 3))
    said = json.loads((tmp_path / "pairs.partial" / "rows.json").read_text())
    assert said == {"done": 3, "of": 6}
    np.testing.assert_array_equal(np.load(tmp_path / "pairs.partial" / "label.npy")[:3], [0, 1, 2])

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from effjax.errors import RunError, UsageError
from effjax.interop.weights import Spec, closing, open_weights
from effjax.interop.write import new_folder, write_weights

TENSORS = {
    "odd": np.arange(3, dtype=np.float32).astype(ml_dtypes.bfloat16),
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "scalar": np.array(1.5, np.float32),
    "empty": np.zeros((0, 4), np.float16),
    "wide": np.arange(5, dtype=np.float64),
}
SPECS = {name: Spec(array.shape, array.dtype) for name, array in TENSORS.items()}


def test_the_library_reads_what_is_written(tmp_path):
    [path] = write_weights(tmp_path, "model", SPECS, reversed(list(TENSORS.items())))
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}


def test_numbers_stand_at_multiples_of_their_size(tmp_path):
    [path] = write_weights(tmp_path, "model", SPECS, TENSORS.items())
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    for name, spec in SPECS.items():
        assert header[name]["data_offsets"][0] % np.dtype(spec.dtype).itemsize == 0


def test_shards_have_an_index_that_is_read_back(tmp_path):
    files = write_weights(tmp_path, "model", SPECS, TENSORS.items(), shard_bytes=32)
    assert [file.name for file in files] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in TENSORS.values())
    with closing(open_weights(tmp_path)) as source:
        for name, array in TENSORS.items():
            out = np.empty(array.shape, array.dtype)
            source.read(name, out)
            np.testing.assert_array_equal(out, array)


def test_a_writer_that_is_lied_to_says_so(tmp_path):
    with pytest.raises(RunError, match=r"'odd' is .*announced"):
        write_weights(tmp_path, "model", SPECS, [("odd", np.ones(4, np.float32))])
    with pytest.raises(RunError, match="4 tensors were announced"):
        write_weights(tmp_path, "model", SPECS, [("odd", TENSORS["odd"])])


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fail():
        with new_folder(tmp_path / "out") as hidden:
            (hidden / "half").write_text("x")
            raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "deep" / "out") as hidden:
        (hidden / "all").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert [path.name for path in (tmp_path / "deep" / "out").iterdir()] == ["all"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as hidden:  # an empty folder may be filled
        (hidden / "all").write_text("x")
    with pytest.raises(UsageError, match="exists already"), new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "all").read_text() == "x"

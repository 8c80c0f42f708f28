import json
import struct
import time

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from effjax.errors import RunError, UsageError
from effjax.interop.weights import DTYPES, Renamed, closing, open_weights

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16),
    "c": np.array(2.5, np.float16),
    "none": np.zeros((0, 7), np.float32),
}


def read_all(weights):
    with closing(open_weights(weights)) as source:
        read = {name: np.empty(spec.shape, spec.dtype) for name, spec in source.specs.items()}
        for name, array in read.items():
            source.read(name, array)
    return read


def same(read, tensors):
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype
        assert read[name].tobytes() == array.tobytes()


def header(path, entries, data=b""):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_a_file_that_the_library_wrote(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    same(read_all(tmp_path / "x.safetensors"), TENSORS)
    same(read_all(tmp_path), TENSORS)


def test_shards_are_read_by_their_index(tmp_path):
    places = {
        "a.weight": "one.safetensors",
        "b": "two.safetensors",
        "c": "one.safetensors",
        "none": "one.safetensors",
    }
    for shard in set(places.values()):
        save_file({n: t for n, t in TENSORS.items() if places[n] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    same(read_all(tmp_path), TENSORS)


def test_a_mapping_of_arrays_also_from_other_machines():
    same(read_all(TENSORS), TENSORS)
    swapped = {"a": np.arange(3, dtype=">f4")}
    assert read_all(swapped)["a"].tolist() == [0, 1, 2]


def test_every_dtype_of_the_format_that_numpy_has(tmp_path):
    for code, dtype in DTYPES.items():
        path = header(
            tmp_path / "d.safetensors",
            {"x": entry([2], 0, 2 * dtype.itemsize, code)},
            b"\1" * 2 * dtype.itemsize,
        )
        assert read_all(path)["x"].dtype == dtype


def test_pickles_are_refused_with_the_recipe(tmp_path):
    for name in ("pytorch_model.bin", "x.pt", "x.pth", "x.ckpt"):
        with pytest.raises(UsageError, match=r"save_file\(.*model\.safetensors|x\.safetensors"):
            open_weights(tmp_path / name)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match=r"torch\.load"):
        open_weights(tmp_path)
    disguised = tmp_path / "z.safetensors"
    disguised.write_bytes(b"\x80\x02}q\x00.......")
    with pytest.raises(UsageError, match="is a pickle"):
        open_weights(disguised)


@pytest.mark.parametrize(
    ("weights", "said"),
    [({"x": [1.0]}, "is a list, not a numpy array"), ({"x": np.array(["s"])}, "holds no weights")],
)
def test_a_mapping_of_something_else(weights, said):
    with pytest.raises(UsageError, match=said):
        open_weights(weights)


def test_what_is_not_there_or_ambiguous(tmp_path):
    with pytest.raises(UsageError, match="is not there"):
        open_weights(tmp_path / "no.safetensors")
    with pytest.raises(UsageError, match=r"holds no \.safetensors"):
        open_weights(tmp_path)
    save_file(TENSORS, tmp_path / "x.safetensors")
    save_file(TENSORS, tmp_path / "y.safetensors")
    with pytest.raises(UsageError, match=r"'x\.safetensors', 'y\.safetensors': name one"):
        open_weights(tmp_path)
    save_file(TENSORS, tmp_path / "model.safetensors")
    same(read_all(tmp_path), TENSORS)


ONE = entry([2], 0, 8)
LIES = {
    "no header": (b"", b"", "no sound safetensors"),
    "offsets beyond the end": ({"x": entry([4], 0, 16)}, b"\0" * 8, "no sound safetensors"),
    "data that nobody claims": ({"x": ONE}, b"\0" * 12, "no sound safetensors"),
    "size against shape": ({"x": entry([3], 0, 8)}, b"\0" * 8, "no sound safetensors"),
    "overlap": ({"x": ONE, "y": ONE}, b"\0" * 8, "no sound safetensors"),
    "hole": ({"x": ONE, "y": entry([2], 12, 20)}, b"\0" * 20, "no sound safetensors"),
    "negative": ({"x": entry([-2], 0, 8)}, b"\0" * 8, "no sound safetensors"),
    "overflow": ({"x": entry([2**40, 2**40], 0, 8)}, b"\0" * 8, "no sound safetensors"),
    "unknown dtype": ({"x": entry([2], 0, 8, "F128")}, b"\0" * 8, "no sound safetensors"),
    "deep": (b'{"a":' * 5000 + b"1" + b"}" * 5000, b"", "no sound safetensors"),
    "not UTF-8": (b'{"\xff": 1}', b"", "no sound safetensors"),
    "not an object": (b"[]", b"", "no sound safetensors"),
    "too many axes": ({"x": entry([1] * 65, 0, 4)}, b"\0" * 4, "'x' has 65 axes"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_by_the_file_s_name(tmp_path, lie):
    entries, data, said = LIES[lie]
    with pytest.raises(RunError, match=said) as error:
        open_weights(header(tmp_path / "liar.safetensors", entries, data))
    assert "liar.safetensors" in str(error.value)


def test_names_twice_in_a_header(tmp_path):
    one = json.dumps(ONE)
    text = f'{{"x": {one}, "x": {one}}}'.encode()
    with pytest.raises(RunError, match="'x' twice"):
        open_weights(header(tmp_path / "t.safetensors", text, b"\0" * 8))


@pytest.mark.slow
def test_fifty_thousand_names_are_no_matter(tmp_path):
    many = {f"layers.{i}.w": entry([0], 0, 0) for i in range(50_000)}
    path = header(tmp_path / "t.safetensors", many)
    began = time.perf_counter()
    with closing(open_weights(path)) as source:
        assert len(source.specs) == 50_000
    text = path.read_bytes()[8:-1] + b', "layers.7.w": ' + json.dumps(entry([0], 0, 0)).encode() + b"}"
    with pytest.raises(RunError, match=r"'layers\.7\.w' twice"):
        open_weights(header(path, text))
    assert time.perf_counter() - began < 15  # what is quadratic in the names takes longer


@pytest.mark.parametrize("length", [9, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_allocates_nothing(tmp_path, length):
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}      ")
    with pytest.raises(RunError, match=f"its header claims {length}"):
        open_weights(path)


def test_a_huge_header_is_not_parsed(tmp_path):
    path = tmp_path / "t.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**30 + 8)  # a hole: it takes no room on the disk
    with pytest.raises(RunError, match="the limit here"):
        open_weights(path)


def test_types_that_numpy_does_not_have(tmp_path):
    path = header(tmp_path / "t.safetensors", {"x": entry([4], 0, 2, "F4")}, b"\0" * 2)
    with pytest.raises(UsageError, match="'x' is of type F4"):
        open_weights(path)


def test_a_file_cut_after_it_was_opened(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": np.ones(1000, np.float32)}, path)
    with closing(open_weights(path)) as source:
        with path.open("r+b") as file:
            file.truncate(500)
        with pytest.raises(RunError, match="ended while 'x' was read"):
            source.read("x", np.empty(1000, np.float32))


INDICES = {
    "not JSON": (b"{", "no index of shards"),
    "no map": (b'{"weight_map": {}}', "no index of shards"),
    "numbers": (b'{"weight_map": {"a": 3}}', "no index of shards"),
    "another folder": (b'{"weight_map": {"a": "../x.safetensors"}}', "no .safetensors of this folder"),
    "an absolute path": (b'{"weight_map": {"a": "/x.safetensors"}}', "no .safetensors of this folder"),
    "a pickle": (b'{"weight_map": {"a": "x.bin"}}', "no .safetensors of this folder"),
    "a shard that is not there": (
        b'{"weight_map": {"a": "gone.safetensors"}}',
        "'gone.safetensors', which is not",
    ),
    "a tensor that is not there": (
        b'{"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}',
        "'b' is in",
    ),
    "a tensor it keeps silent about": (b'{"weight_map": {"b": "x.safetensors"}}', "says is nowhere"),
}


@pytest.mark.parametrize("kind", INDICES)
def test_an_index_that_lies(tmp_path, kind):
    text, said = INDICES[kind]
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises((RunError, UsageError), match=said) as error:
        open_weights(tmp_path)
    assert "model.safetensors.index.json" in str(error.value)


def test_renames_bring_spellings_together():
    renamed = Renamed(
        open_weights({"module.h.gamma": np.ones(2, np.float32)}), ((r"^module\.", ""), ("gamma$", "weight"))
    )
    out = np.empty(2, np.float32)
    renamed.read("h.weight", out)
    assert out.tolist() == [1, 1]
    both = open_weights({"x": np.ones(1, np.float32), "module.x": np.ones(1, np.float32)})
    with pytest.raises(UsageError, match="one tensor twice"):
        Renamed(both, ((r"^module\.", ""),))

"""Breaks real safetensors files in every way and reads them: `python -m tests.interop.fuzz --files=2000`.

A broken file may be read (the damage was harmless) or refused with one of our errors that names it; anything
else, another exception, a crash, a slow read, much memory, is a finding.
"""

import argparse
import collections
import json
import struct
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from effjax.errors import EffjaxError
from effjax.interop.load import fill
from effjax.interop.match import compare
from effjax.interop.names import Name, resolve
from effjax.interop.resize import Request
from effjax.interop.weights import Spec, closing, open_weights
from effjax.interop.write import write_weights

TENSORS = {
    "embed.weight": np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6),
    "blocks.0.w": np.linspace(0, 1, 20, dtype=np.float16).reshape(5, 4),
    "blocks.1.w": np.linspace(1, 2, 20, dtype=np.float16).reshape(5, 4),
    "norm": np.ones(6, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(3.0, np.float32),
}
ROWS = [Name("blocks.{layer}.w", "w", "o i -> i o"), *(Name(n, n) for n in TENSORS if "blocks" not in n)]
LEAVES = {
    "w": Spec((2, 4, 5), np.float32),
    **{name: Spec(array.shape, np.float32) for name, array in TENSORS.items() if "blocks" not in name},
}
ENTRIES, _ = resolve(ROWS, LEAVES)
MEMORY_LIMIT = 8 * 2**20  # bytes for a file of under 1 kB of numbers
SECONDS_LIMIT = 5.0

NASTY = [
    0, 1, 2, 3, -1, -(2**63), 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30,
    1e308, 1.5, True, None, "8", [], {}, [[1]],
]  # fmt: skip
DTYPES = [
    "F32",
    "F64",
    "F16",
    "BF16",
    "I8",
    "U64",
    "BOOL",
    "C64",
    "F4",
    "F6_E2M3",
    "F8_E4M3",
    "f32",
    "",
    "object",
]


def real_files(folder):
    """A file, and a folder of shards."""
    specs = {name: Spec(array.shape, array.dtype) for name, array in TENSORS.items()}
    one, several = folder / "one", folder / "several"
    for place, limit in ((one, 10**9), (several, 100)):
        place.mkdir()
        write_weights(place, "model", specs, TENSORS.items(), limit)
    return one / "model.safetensors", several


def parts_of(data):
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def flip_bytes(rng, data):
    changed = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        changed[rng.integers(len(changed))] = rng.integers(256)
    return bytes(changed)


def flip_header(rng, data):
    length = struct.unpack("<Q", data[:8])[0]
    return data[:8] + flip_bytes(rng, data[8 : 8 + length]) + data[8 + length :]


def lie_about_length(rng, data):
    values = [0, 1, 7, 8, len(data) - 8, len(data), 2**20, 2**31, 2**40, 2**63, 2**64 - 1]
    return struct.pack("<Q", values[rng.integers(len(values))]) + data[8:]


def truncate(rng, data):
    return data[: rng.integers(len(data))]


def extend(rng, data):
    return data + bytes(int(rng.integers(1, 100)))


def drop_middle(rng, data):
    start, end = sorted(rng.integers(len(data), size=2))
    return data[:start] + data[end:]


def change_entry(rng, data):
    header, body = parts_of(data)
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    kind = rng.integers(6)
    nasty = NASTY[rng.integers(len(NASTY))]
    if kind == 0:
        entry["dtype"] = DTYPES[rng.integers(len(DTYPES))] if rng.random() < 0.8 else nasty
    elif kind == 1:
        entry["shape"] = [nasty if rng.random() < 0.5 else 0 for _ in range(rng.integers(5))]
    elif kind == 2:
        entry["shape"] = [1] * int(rng.choice([33, 65, 10_000]))
    elif kind == 3:
        entry["data_offsets"][rng.integers(2)] = nasty
    elif kind == 4:
        header[str(rng.choice(list(header)))] = nasty
    else:
        del entry[str(rng.choice(list(entry)))]
    return joined(header, body)


def move_ranges(rng, data):
    header, body = parts_of(data)
    names = [key for key in header if key != "__metadata__"]
    one, other = rng.choice(names, 2)
    if rng.random() < 0.5:
        header[one]["data_offsets"] = list(header[other]["data_offsets"])
    else:
        shift = int(rng.integers(-40, 40))
        header[one]["data_offsets"] = [offset + shift for offset in header[one]["data_offsets"]]
    return joined(header, body)


def change_names(rng, data):
    header, body = parts_of(data)
    names = list(header)
    old = names[rng.integers(len(names))]
    new = [names[0], "", "\x1b[31m\n", "../../x", "n" * 10_000, "__metadata__", "\u202e", "a.0.1.2.3"]
    text = json.dumps(header).encode()
    return joined(text.replace(json.dumps(old).encode(), json.dumps(str(rng.choice(new))).encode(), 1), body)


def repeat_entry(rng, data):
    header, body = parts_of(data)
    text = json.dumps(header)
    name = str(rng.choice(list(header)))
    return joined((text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}" + "}").encode(), body)


def odd_json(rng, data):
    _, body = parts_of(data)
    depth = int(rng.choice([10, 127, 200, 5000]))
    headers = [
        b'{"a":' * depth + b"1" + b"}" * depth,
        b"[" * depth + b"]" * depth,
        b"{}",
        b"[]",
        b"",
        b"null",
    ]
    headers += [
        b'{"\xff\xfe":1}',
        b'{"\\ud800":1}',
        b'{"a":NaN}',
        b"{" + b" " * 10_000 + b"}",
        b'"' + b"x" * 999,
    ]
    return joined(headers[rng.integers(len(headers))], body)


def put_nan(rng, data):
    length = struct.unpack("<Q", data[:8])[0]
    changed = bytearray(data)
    at = 8 + length + 4 * int(rng.integers(20))
    changed[at : at + 4] = b"\xff\xff\xff\xff"
    return bytes(changed)


def pretend(rng, data):
    return [b"PK\x03\x04", b"\x80\x02}q\x00", b"\x80\x04", b"GGUF", b"\x89HDF", b""][rng.integers(6)] + data[
        8:
    ]


MUTATIONS = [
    flip_bytes, flip_header, lie_about_length, truncate, extend, drop_middle, change_entry, move_ranges,
    change_names, repeat_entry, odd_json, put_nan, pretend,
]  # fmt: skip


def change_index(rng, text):
    """Breaks the index of a folder of shards."""
    index = json.loads(text)
    places = index["weight_map"]
    name = str(rng.choice(list(places)))
    files = sorted(set(places.values()))
    nasty = [
        "../one/model.safetensors",
        "/etc/passwd",
        "",
        ".",
        "nowhere.safetensors",
        "model.bin",
        3,
        None,
        *files,
    ]
    kind = rng.integers(5)
    if kind == 0:
        places[name] = nasty[rng.integers(len(nasty))]
    elif kind == 1:
        del places[name]
    elif kind == 2:
        places["another"] = files[0]
    elif kind == 3:
        index["weight_map"] = [{}, [], None, "x", 3][rng.integers(5)]
    else:
        return flip_bytes(rng, text.encode())
    return json.dumps(index).encode()


def read(path):
    """What a user's load does, without the model."""
    with closing(open_weights(path)) as source:
        plan = compare(source.where, source.specs, ROWS, ENTRIES, (), request=Request(), replace=False)
        return fill(plan, source, None, False, None)


def outcome(path):
    """`read`, or the kind of error; raises AssertionError for a finding."""
    tracemalloc.start()
    began = time.perf_counter()
    try:
        leaves = read(path)
    except EffjaxError as error:
        result, message = type(error).__name__, str(error)
    else:
        assert {key: leaf.shape for key, leaf in leaves.items()} == {k: s.shape for k, s in LEAVES.items()}
        assert not any(np.isnan(leaf.astype(np.float32)).any() for leaf in leaves.values())
        result, message = "read", path.name
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert path.name in message, f"the message does not name {path.name}: {message}"
    assert len(message) < 20_000, "the message is endless"
    assert peak < MEMORY_LIMIT, f"{peak} bytes were allocated"
    assert time.perf_counter() - began < SECONDS_LIMIT, "it took too long"
    return result


def fuzz(count, seed, folder):
    """Reads `count` broken files; returns outcomes by mutation, and the findings."""
    file, shards = real_files(folder)
    assert outcome(file) == outcome(shards) == "read"
    data = file.read_bytes()
    index = next(shards.glob("*.json"))
    text = index.read_text()
    outcomes, findings = collections.Counter(), []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        if number % 10 == 9:
            mutate, path = change_index, shards
            index.write_bytes(change_index(rng, text))
        else:
            mutate, path = MUTATIONS[rng.integers(len(MUTATIONS))], folder / "broken.safetensors"
            path.write_bytes(mutate(rng, data))
        try:
            outcomes[mutate.__name__, outcome(path)] += 1
        except Exception as error:
            findings.append((number, mutate.__name__, repr(error)))
    return outcomes, findings


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        outcomes, findings = fuzz(arguments.files, arguments.seed, Path(place))
    for (mutation, result), times in sorted(outcomes.items()):
        print(f"{mutation:<18} {result:<12} {times}")
    for finding in findings:
        print("FOUND", *finding)
    print(f"{arguments.files} files, {len(findings)} findings")
    sys.exit(bool(findings))

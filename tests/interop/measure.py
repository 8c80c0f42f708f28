"""Time and memory of loading one large file, as JSON: `python -m tests.interop.measure DEPTH [DTYPE]`.

The file is timm's vit_large with DEPTH blocks of 50 MB, random float32; DTYPE is what it is loaded as.
"""

import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from effjax.interop import load_pretrained
from effjax.interop.load import family_of, leaf_specs
from effjax.interop.names import resolve
from effjax.interop.weights import Spec
from effjax.interop.write import write_weights
from effjax.matching import named_leaves

SOURCE = "timm:vit_large_patch16_224"


def write(folder, depth):
    """Writes the file; returns the bytes of its largest tensor."""
    family = family_of(SOURCE)
    config = {**family.defaults, "depth": depth}
    model = family.build(config)
    entries, _ = resolve(family.names(model), named_leaves(leaf_specs(model, family.inputs(model, config))))
    specs = {
        name: Spec(shape, np.float32)
        for entry in entries
        for index in entry.indices()
        for name, shape in zip(entry.names(index), entry.shapes, strict=True)
    }
    rng = np.random.default_rng(0)
    write_weights(
        folder,
        "model",
        specs,
        ((n, rng.standard_normal(s.shape, np.float32)) for n, s in specs.items()),
        10**12,
    )
    return max(int(np.prod(spec.shape)) * 4 for spec in specs.values())


def best(call, times=3):
    """The shortest of some times, in seconds."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - began)
        del result
    return min(seconds)


def _peak():
    """The most memory this program took; `ru_maxrss` would count that of the process it was started from."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))


def measure(depth, dtype=None):
    """Loads the file in this process; returns what it took."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        largest = write(Path(folder), depth)
        config = {"depth": depth}

        def load():
            return load_pretrained(SOURCE, path, config, dtype=dtype)

        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        _, params = load()
        peak = _peak()
        result = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        del params
        return {
            "file": path.stat().st_size,
            "result": result,
            "largest": largest,
            "grown": peak - before,
            "read": best(path.read_bytes),
            "load": best(load),
        }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), *sys.argv[2:])))

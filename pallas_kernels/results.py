"""What compilers said of kernels, kept as data: what has not changed since is not compiled again.

`results.json` is a list of `{"kernel", "shape", "target", "digest", "found"}`. The digest is of a kernel's
files and of the compilers' versions.
"""

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import KERNELS, versions

STORE = Path(__file__).with_name("results.json")
HERE = Path(__file__).parent
# What every kernel is made with. How it is chosen and proved has no part in what is compiled.
SHARED = ("blocks.json", "blocks.py", "padding.py", "shape.py", "versions.py")
Place = tuple[str, str, str]


def read() -> dict[Place, dict[str, Any]]:
    """The entries by kernel, shape and target."""
    entries = json.loads(STORE.read_text()) if STORE.exists() else []
    return {(entry["kernel"], entry["shape"], entry["target"]): entry for entry in entries}


def kept(entries: dict[Place, dict[str, Any]], place: Place, found: dict[str, Any]) -> None:
    """Adds what was found, and writes all entries."""
    kernel, shape, target = place
    entries[place] = dict(kernel=kernel, shape=shape, target=target, digest=digest(kernel), found=found)
    text = ",\n".join(json.dumps(entries[place]) for place in sorted(entries))
    whole = STORE.with_suffix(".new")  # a stop on the way leaves what there was
    whole.write_text(f"[\n{text}\n]\n")
    whole.replace(STORE)


@functools.cache
def digest(kernel: str) -> str:
    """A text that a kernel has as it is, by these compilers."""
    made = hashlib.sha256(json.dumps({"jax": jax.__version__, **versions.compilers()}).encode())
    for file in files(kernel):
        made.update(file.relative_to(HERE).as_posix().encode() + file.read_bytes())
    return made.hexdigest()[:16]


def files(kernel: str) -> list[Path]:
    """What a kernel is made of: its folder, and those of the kernels that it borrows from."""
    folders, waiting = set[str](), [kernel]
    while waiting:
        name = waiting.pop()
        if name in folders:
            continue
        folders.add(name)
        for file in (HERE / name).glob("*.py"):
            told = re.findall(r"pallas_kernels\.(\w+)", file.read_text())
            waiting += [other for other in told if other in KERNELS]
    own = [file for name in sorted(folders) for file in sorted((HERE / name).glob("*.py"))]
    return own + [HERE / name for name in SHARED]

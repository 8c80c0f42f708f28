"""The folder of a run: whose it is, what made it, and that only one process writes there.

<workdir>/config.json        the config, the command and where the config came from
<workdir>/environment.json   versions, devices, git revision, date; earlier starts under "earlier"
<workdir>/lock               held while a run is alive
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from effjax.errors import RunError, UsageError
from experiments.run.files import jsonable, naming, sweep, to_json, write_atomic

__all__ = ["Workdir", "differences", "environment", "write_atomic"]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml-collections", "grain", "numpy")


class Workdir:
    """A locked run folder. Make one by `Workdir.create_or_resume`; close it, or use it in a `with`."""

    def __init__(self, path: Path, lock: int, resumed: bool) -> None:
        self.path = path
        self.resumed = resumed
        self._lock: int | None = lock

    @classmethod
    def create_or_resume(
        cls,
        path: str | os.PathLike[str],
        config: Any,
        *,
        command: str,
        config_file: str,
        devices: Sequence[str] = (),
        allowed: Collection[str] = (),
    ) -> "Workdir":
        """Opens a new or empty folder, or the folder of an earlier start of the same config.

        In a run of several processes, only the first one calls this.

        Args:
          path: the folder; made where it is missing.
          config: a ConfigDict or dict of plain values.
          command: what a person types to start this run again.
          config_file: what was given as `--config`.
          devices: the accelerators in words, for the record.
          allowed: keys, or prefixes of keys, that may change on resuming: `("config.mesh", "config.steps")`.

        Raises:
          UsageError: if the folder belongs to another config, to a live process, or is no run folder.
          RunError: if it cannot be written.
        """
        path = Path(path)
        config = _plain(config)
        if path.exists() and not path.is_dir():
            raise UsageError(f"--workdir='{path}' is a file. Give a folder.")
        with naming(path):
            path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        try:
            earlier = _earlier_config(path)
            if earlier is not None:
                _refuse_another_config(path, earlier, config, allowed)
            for folder in (path, path / "plots"):
                sweep(folder)
            record = {"command": command, "config_file": config_file, "config": config}
            write_atomic(path / "environment.json", _environment_record(path, command, devices))
            # Last, because its presence is what makes the folder a run.
            write_atomic(path / "config.json", to_json(record, indent=2) + "\n")
        except BaseException:
            os.close(lock)
            raise
        return cls(path, lock, resumed=earlier is not None)

    def write(self, name: str, data: bytes | str) -> Path:
        """Writes an artefact atomically; returns where it lies."""
        write_atomic(self.path / name, data)
        return self.path / name

    def close(self) -> None:
        """Lets other runs in. The end of the process does the same, however it ends."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def differences(before: Any, after: Any, path: str = "config") -> dict[str, tuple[Any, Any]]:
    """Returns `{key: (old, new)}` for every leaf that differs; an absent side is the word "absent"."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*before, *(k for k in after if k not in before)]:
            old, new = before.get(key, _ABSENT), after.get(key, _ABSENT)
            found |= differences(old, new, f"{path}.{key}")
        return found
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        found = {}
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            found |= differences(old, new, f"{path}[{index}]")
        return found
    # 1 and 1.0 and True are equal to Python, and are three different configs.
    same = type(before) is type(after) and before == after
    return {} if same else {path: (before, after)}


def environment(devices: Sequence[str] = ()) -> dict[str, Any]:
    """Returns what a result may depend on besides the config: versions, devices, source revision."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "devices": list(devices),
        "git": _git_revision(),
    }


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _plain(config: Any) -> dict[str, Any]:
    """The config as JSON gives it back, so that it compares equal to the one on disk."""
    try:
        return jsonable(config, "config")
    except TypeError as error:
        raise UsageError(f"{error}. A config holds numbers, strings, tuples and sections only.") from None


def _lock(path: Path) -> int:
    """Takes the lock of the folder; returns the descriptor that holds it."""
    lock_path = path / "lock"
    with naming(lock_path):
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode() or "unknown"
            os.close(descriptor)
            raise UsageError(
                f"Process {owner.strip()} is running in '{path}'. "
                f"Wait for it, stop it, or give --workdir={_fresh(path)}."
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        # A lock may be refused while its owner writes its number: truncate after writing, never before.
        text = f"{os.getpid()}\n".encode()
        os.pwrite(descriptor, text, 0)
        os.ftruncate(descriptor, len(text))
    return descriptor


def _earlier_config(path: Path) -> dict[str, Any] | None:
    """The config of the run that lives here; None in a folder that holds no run."""
    file = path / "config.json"
    if not file.exists():
        ours = {"lock", "environment.json"}  # what a start that was killed half-way leaves
        others = sorted(p.name for p in path.iterdir() if p.name not in ours and not p.name.endswith(".tmp"))
        if others:
            raise UsageError(
                f"--workdir='{path}' holds no run but is not empty ('{others[0]}' lies there). "
                f"Give a new folder: --workdir={path / 'run'}."
            )
        return None
    with naming(file):
        text = file.read_text()
    try:
        return json.loads(text)["config"]
    except (ValueError, KeyError, TypeError):
        raise RunError(
            f"'{file}' is damaged: it is no record of a run. Give --workdir={_fresh(path)}."
        ) from None


def _refuse_another_config(path: Path, old: Any, new: Any, allowed: Collection[str]) -> None:
    def may_change(key: str) -> bool:
        return any(key == a or key.startswith((f"{a}.", f"{a}[")) for a in allowed)

    changed = {key: pair for key, pair in differences(old, new).items() if not may_change(key)}
    if not changed:
        return
    shown = [f"{key}: {before!r} -> {after!r}" for key, (before, after) in list(changed.items())[:8]]
    if len(changed) > len(shown):
        shown.append(f"and {len(changed) - len(shown)} more")
    raise UsageError(
        f"'{path}' holds a run of another config ({'; '.join(shown)}). "
        f"Start anew with --workdir={_fresh(path)}, or go back to the old values to resume."
    )


def _fresh(path: Path) -> Path:
    """The first free name after `path`: runs/vit-2 for runs/vit."""
    number = 2
    while (candidate := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return candidate


def _environment_record(path: Path, command: str, devices: Sequence[str]) -> str:
    """This start, with the earlier ones beneath it."""
    file = path / "environment.json"
    earlier: list[Any] = []
    if file.exists():
        try:
            before = json.loads(file.read_text())
            earlier = [*before.pop("earlier"), before]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise RunError(
                f"'{file}' is damaged. Remove it to go on; it only tells how the run was made."
            ) from None
    record = {**environment(devices), "command": command, "earlier": earlier}
    return to_json(record, indent=2) + "\n"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The commit of the source tree, with "-dirty" where files differ from it; None outside a repository."""
    root = Path(__file__).resolve().parents[2]
    found = _git(root, "rev-parse", "--show-toplevel", "HEAD")
    if found is None:
        return None
    top, revision = found.split("\n")
    if Path(top).resolve() != root:  # installed into the environment of some other repository
        return None
    return revision + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()

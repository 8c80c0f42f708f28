"""Checkpoints: one atomic folder a step, verified when it is read.

    <directory>/<step>/state/        the arrays, written by orbax
    <directory>/<step>/manifest/     JSON: each array's shape, dtype and fingerprint, library versions, the
                                     run's own record (`extra`), and a digest of all that

Orbax writes into a temporary folder and commits it by a rename, so a step is there whole or not at all. What
can still happen to it afterwards, a torn or flipped file, is found by comparing what was read with the
manifest: the array fingerprints do not depend on the sharding, so a state saved on 8 devices verifies on one.
A step that fails is said aloud, set aside as `<step>.corrupt`, and the one before it is used.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

import effjax
from effjax.errors import RunError, UsageError
from effjax.matching import named_leaves
from effjax.train.fingerprint import fingerprints
from effjax.train.patience import patience

_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
_CORRUPT, _REPLACED, _TEMPORARY = ".corrupt", ".replaced", ".orbax-checkpoint-tmp"


class _Damaged(Exception):
    """A step that is not what was saved; the message says in what way."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpoints.restore` read.

    Attributes:
      state: of the structure, shardings and dtypes of the target.
      extra: the record given to `save`.
      step: the step it came from.
      skipped: `(step, reason)` of the newer ones that were damaged, newest first.
    """

    state: Any
    extra: dict[str, Any]
    step: int
    skipped: tuple[tuple[int, str], ...]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: made when missing, unless `read_only`.
      keep: how many of the newest steps stay; with two or more, a damaged one leaves another.
      keep_period: steps that are a multiple of this stay for good.
      async_: whether `save` returns when the arrays are copied, and the writing goes on behind.
      read_only: for an evaluator beside a living run: nothing is cleaned, renamed or made.
      report: told, in a sentence, what a person should know.

    An error of a write behind surfaces at the next `save`, `wait` or `close`. Not thread-safe.
    """

    def __init__(
        self,
        directory: str | Path,
        keep: int = 3,
        keep_period: int | None = None,
        async_: bool = True,
        read_only: bool = False,
        report: Callable[[str], None] = print,
    ) -> None:
        if keep < 1 or (keep_period is not None and keep_period < 1):
            raise UsageError(f"keep ({keep}) and keep_period ({keep_period}) must be 1 or more.")
        self.directory = Path(directory).absolute()
        self._report = report
        self._read_only = read_only
        self._async = async_
        self._writing: int | None = None
        self._patience = contextlib.ExitStack()  # entered while a write goes on behind
        if not read_only:
            self._clean()
        newest = policies.LatestN(keep)
        periodic = [policies.EveryNSteps(keep_period)] if keep_period is not None else []
        try:
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policies.AnyPreservationPolicy([newest, *periodic]),
                    enable_async_checkpointing=async_,
                    read_only=read_only,
                    create=not read_only,
                ),
            )
        except OSError as error:
            raise RunError(f"{self.directory} cannot hold checkpoints: {error}.") from error

    def steps(self) -> list[int]:
        """The steps that were saved whole, oldest first; one still being written is not among them."""
        return [step for step in sorted(self._manager.all_steps()) if step != self._writing]

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Saves a state; a step saved before is replaced once the new one is whole.

        The arrays are on the host when this returns, so the caller may donate them at once.

        Args:
          step: not below the newest one saved.
          state: a pytree of jax arrays.
          extra: what else the run needs to go on, as JSON: config digest, seed, place in the metric file.

        Raises:
          UsageError: if newer steps exist; they belong to a run that went on from here.
          RunError: if this write, or the last one behind, failed. The steps before are intact.
        """
        self.wait()
        newer = [known for known in self.steps() if known > step]
        if newer:
            raise UsageError(
                f"{self.directory} already holds the later steps {newer}, so step {step} cannot be added. "
                "Move them away, or give the run another workdir."
            )
        leaves = named_leaves(state)
        manifest = _manifest(leaves, extra)
        if step in self.steps():
            self._rename(step, _REPLACED)
        self._writing = step
        self._patience.enter_context(patience())
        try:
            self._manager.save(
                step,
                # Orbax refuses arrays without elements; the manifest alone brings them back.
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave({path: x for path, x in leaves.items() if x.size}),
                    manifest=ocp.args.JsonSave(manifest),
                ),
                force=True,
            )
        except Exception as error:
            raise self._failed(error) from error
        if not self._async:
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is on disk; raises its RunError otherwise."""
        if self._writing is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._writing = None
        self._patience.close()
        self._clean()

    def close(self) -> None:
        """Waits for the last save and frees orbax's threads, also where that save failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore(self, target: Any, step: int | None = None, partial: bool = False) -> Restored:
        """Reads the newest sound step, or one that is asked for.

        Args:
          target: a pytree of `ShapeDtypeStruct` or arrays, whose shardings say where the result goes; they
            may differ from those of the run that saved. A leaf without one goes to the first device.
          step: one step, without falling back on another; None for the newest that is sound.
          partial: whether the checkpoint may hold more than the target, such as the optimiser state that an
            evaluation does not read. What is not read is not verified.

        Raises:
          UsageError: if there is no such step, or if the target's paths, shapes or dtypes are not those of
            the checkpoint; one message lists every path.
          RunError: if no step is sound; it lists what is wrong with each. All are left where they are.
        """
        self.wait()
        self._manager.reload()
        known = self.steps()
        if not known or (step is not None and step not in known):
            wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            there = f"It has the steps {known}." if known else "Train first, or name another workdir."
            raise UsageError(f"{self.directory} holds {wanted}. {there}")
        skipped: list[tuple[int, str]] = []
        for candidate in [step] if step is not None else reversed(known):
            try:
                state, extra = self._read(candidate, target, partial)
            except _Damaged as damage:
                self._report(f"The checkpoint of step {candidate} is damaged: {damage}.")
                skipped.append((candidate, str(damage)))
                continue
            # Only now, with a sound step in hand: a folder without any would look like a run not yet begun.
            for bad, _ in skipped:
                self._set_aside(bad)
            if skipped:
                self._report(f"Using the checkpoint of step {candidate} instead.")
            return Restored(state, extra, candidate, tuple(skipped))
        listed = "; ".join(f"step {bad}: {reason}" for bad, reason in skipped)
        raise RunError(f"{self.directory} holds no sound checkpoint ({listed}).")

    def _read(self, step: int, target: Any, partial: bool) -> tuple[Any, dict[str, Any]]:
        manifest = _checked(self._load(step, manifest=ocp.args.JsonRestore())["manifest"])
        wanted = {path: _abstract(leaf) for path, leaf in named_leaves(target).items()}
        _compare(wanted, manifest["leaves"], partial, f"{self.directory}/{step}")
        stored = {path: leaf for path, leaf in wanted.items() if leaf.size}
        arguments = ocp.args.PyTreeRestore(
            item=stored,
            restore_args=ocp.checkpoint_utils.construct_restore_args(stored),
            partial_restore=partial,
        )
        found = dict(self._load(step, state=arguments)["state"])
        for path, leaf in wanted.items():
            if not leaf.size:
                found[path] = jax.device_put(jax.numpy.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        altered = [
            path
            for path, value in fingerprints(found).items()
            if value != manifest["leaves"][path]["fingerprint"]
        ]
        if altered:
            more = f" and {len(altered) - 4} more" if len(altered) > 4 else ""
            raise _Damaged(f"the contents of {', '.join(altered[:4])}{more} are not what was saved")
        state = jax.tree.unflatten(jax.tree.structure(target), [found[path] for path in wanted])
        return state, manifest["extra"]

    def _load(self, step: int, **arguments: Any) -> Any:
        try:
            with patience():
                return self._manager.restore(step, args=ocp.args.Composite(**arguments))
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # the machine's fault, not the file's: it must not cost the run a step
        except Exception as error:  # orbax and tensorstore answer a broken file with nearly any class
            raise _Damaged(f"it cannot be read ({_first_line(error)})") from error

    def _failed(self, error: Exception) -> RunError:
        """Puts things back as they were before the save that failed, and says what happened."""
        step, self._writing = self._writing, None
        self._patience.close()
        self._clean()
        self._manager.reload()
        return RunError(
            f"The checkpoint of step {step} could not be written to {self.directory}: {_first_line(error)}. "
            f"The checkpoints of the steps {self.steps()} are intact; free some space and resume."
        )

    def _clean(self) -> None:
        """Removes what a killed or failed save left, and settles replacements that were under way."""
        if jax.process_index() == 0:
            for unfinished in self.directory.glob(f"*{_TEMPORARY}*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            for aside in self.directory.glob(f"*{_REPLACED}"):
                committed = aside.with_suffix("")
                if committed.exists():
                    shutil.rmtree(aside)
                else:
                    aside.rename(committed)
        ocp.multihost.sync_global_processes("effjax:clean")

    def _set_aside(self, step: int) -> None:
        if self._read_only:
            return
        taken = sorted(self.directory.glob(f"{step}{_CORRUPT}*"))
        name = self._rename(step, _CORRUPT + (f"-{len(taken) + 1}" if taken else ""))
        self._report(f"The damaged checkpoint of step {step} is kept as {name}.")

    def _rename(self, step: int, suffix: str) -> str:
        name = f"{step}{suffix}"
        if jax.process_index() == 0:
            (self.directory / str(step)).rename(self.directory / name)
        ocp.multihost.sync_global_processes(f"effjax:rename:{name}")
        self._manager.reload()
        return name


def _manifest(leaves: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    marks = fingerprints(leaves)
    manifest = {
        "leaves": {
            path: {"shape": list(x.shape), "dtype": str(x.dtype), "fingerprint": marks[path]}
            for path, x in leaves.items()
        },
        "versions": {"effjax": effjax.__version__, **{name: metadata.version(name) for name in _LIBRARIES}},
        # As it will be read back: JSON makes tuples lists and keys strings, and the digest must not notice.
        "extra": json.loads(json.dumps(extra)),
    }
    return {**manifest, "digest": _digest(manifest)}


def _digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checked(manifest: Any) -> dict[str, Any]:
    if not isinstance(manifest, dict) or manifest.get("digest") != _digest(manifest):
        raise _Damaged("its manifest does not match its own digest")
    return manifest


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _compare(wanted: dict[str, Any], held: dict[str, Any], partial: bool, where: str) -> None:
    """Raises one UsageError that lists every path in which a target and a manifest differ."""
    ours = {path: f"{x.dtype}{list(x.shape)}" for path, x in wanted.items()}
    theirs = {path: f"{row['dtype']}{row['shape']}" for path, row in held.items()}
    paths = ours if partial else ours | theirs
    lines = [
        f"  {path}: expected {ours.get(path, 'nothing')}, found {theirs.get(path, 'nothing')}"
        for path in paths
        if ours.get(path) != theirs.get(path)
    ]
    if lines:
        raise UsageError(
            f"{where} was saved by another model or optimiser; {len(lines)} arrays differ:\n"
            + "\n".join(lines)
            + "\nUse the config the checkpoint was made with, or another workdir."
        )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:300]

"""Weights in and out on behalf of `experiments.convert`."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from effjax.compress.storage.trees import weights_in
from effjax.errors import UsageError
from effjax.interop import export_to, load_converted_variables, load_variables, save_converted
from effjax.interop.load import config_of, parse_config
from effjax.layers.stored import Stored
from experiments.run.formatting import count
from experiments.run.restore import load_run

_DTYPES = ("float32", "bfloat16", "float16")


def inwards(
    source: str,
    weights: str,
    out: str,
    *,
    library_config: str | None,
    classes: str,
    dtype: str | None,
    allow_nan: bool,
    shard_bytes: int,
    quantised: str | None = None,
) -> int:
    """Loads another library's weights and writes them as ours; returns the exit code."""
    if dtype is not None and dtype not in _DTYPES:
        raise UsageError(f"--dtype is {dtype!r}; it can be {', '.join(_DTYPES)}.")
    config = config_of(weights) if library_config is None else read_config(library_config)
    console = Console(highlight=False)
    with bar("reading", console) as progress:
        model, variables = load_variables(
            source,
            weights,
            config,
            classes=classes,
            dtype=dtype,
            allow_nan=allow_nan,
            quantised=quantised or "codes",
            report=lambda line: console.print(line, markup=False, soft_wrap=True),
            progress=progress,
        )
    with bar("writing", console) as progress:
        save_converted(out, model, variables, source, config, shard_bytes=shard_bytes, progress=progress)
    console.print(f"{_size(variables)} of {source} are in {out}", markup=False, soft_wrap=True)
    return 0


@dataclasses.dataclass(frozen=True)
class Packing:
    """What is asked for kernels in codes on the way out.

    Attributes:
      quantised: their format, or `whole`; None where there are none.
      library_config: the other library's configuration, JSON or a file with it; None takes the one they came
        with, or what the model says.
    """

    quantised: str | None = None
    library_config: str | None = None


def outwards(
    target: str, folder: str, out: str, shard_bytes: int, allow_nan: bool, packing: Packing = Packing()
) -> int:
    """Writes converted parameters as another library's weights; returns the exit code."""
    console = Console(highlight=False)
    with bar("reading", console) as progress:
        model, variables, _ = load_converted_variables(folder, allow_nan=allow_nan, progress=progress)
    if packing.library_config is None:
        held = parse_config((Path(folder) / "config.json").read_bytes(), f"'{folder}'")
        known = held["library_config"] if held["source"] == target else None
        packing = dataclasses.replace(packing, library_config=json.dumps(known) if known else None)
    return _write_theirs(console, model, variables, target, out, shard_bytes, packing)


def outwards_from_run(
    target: str, workdir: str, out: str, shard_bytes: int, step: int | None, packing: Packing = Packing()
) -> int:
    """Writes the newest weights of a training run as another library's; returns the exit code."""
    program, variables = load_run(workdir, step)
    model = program.task.model
    return _write_theirs(Console(highlight=False), model, variables, target, out, shard_bytes, packing)


def _write_theirs(
    console: Console,
    model: Any,
    variables: Any,
    target: str,
    out: str,
    shard_bytes: int,
    packing: Packing,
) -> int:
    config = None if packing.library_config is None else read_config(packing.library_config)
    with bar("writing", console) as progress:
        files = export_to(
            out,
            model,
            variables,
            target,
            quantised=packing.quantised,
            config=config,
            shard_bytes=shard_bytes,
            progress=progress,
        )
    console.print(
        f"{_size(variables)} for {target} are in {out}: {', '.join(files)}", markup=False, soft_wrap=True
    )
    return 0


def read_config(given: str) -> dict[str, Any]:
    """Reads `--library_config`: a JSON file, or the JSON itself."""
    if given.lstrip().startswith("{"):
        return parse_config(given, "--library_config")
    if not Path(given).is_file():
        raise UsageError(f"--library_config='{given}' is neither a file nor JSON like '{{...}}'.")
    return parse_config(Path(given).read_bytes(), f"'{given}'")


@contextlib.contextmanager
def bar(label: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in bytes on a terminal, nothing elsewhere; gives what is to be called with the state."""
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(label)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _size(variables: Any) -> str:
    params = variables["params"]
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Stored))
    return f"{count(weights_in(params))} parameters in {len(leaves)} leaves"

"""The evidence of a bad step, and repeating it.

<workdir>/replay/step_120/record.json    the step, the first offender, the norms of all arrays
<workdir>/replay/step_120/batch.npz      the batch; the state before the step is checkpoint 119
"""

import io
import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from effjax.errors import UsageError
from effjax.parallel.sharding import to_global
from effjax.train.nonfinite import Diagnosis, diagnose
from experiments.run.files import naming, to_json, write_atomic
from experiments.run.restore import load_state


def keep(workdir: Path, diagnosis: Diagnosis, batch: Mapping[str, np.ndarray]) -> str:
    """Writes the evidence beside the checkpoints; returns the command that repeats the step."""
    folder = workdir / "replay" / f"step_{diagnosis.step}"
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **batch)
    write_atomic(folder / "batch.npz", packed.getvalue())
    record = {
        "step": diagnosis.step,
        "leaf": diagnosis.leaf,
        "detail": diagnosis.detail,
        "norms": diagnosis.norms,
    }
    write_atomic(folder / "record.json", to_json(record, indent=2) + "\n")
    return f"python -m experiments.train --replay={shlex.quote(str(folder))}"


def run(folder: str) -> int:
    """Repeats a kept step and prints the size of every array; returns 1 if it is bad again."""
    path = Path(folder)
    if not (path / "record.json").is_file() or not (path / "batch.npz").is_file():
        raise UsageError(f"--replay='{path}' holds no bad step. Give the folder that the failed run named.")
    with naming(path):
        record = json.loads((path / "record.json").read_text())
        with np.load(path / "batch.npz") as packed:
            batch = dict(packed)
    program, state = load_state(path.parents[1], step=record["step"] - 1)
    diagnosis = diagnose(program, state, to_global(batch, program.batch_sharding))
    table = Table("array", "root mean square", title=f"step {diagnosis.step}")
    for name, norm in diagnosis.norms.items():
        table.add_row(name, f"{norm:.4g}", style="bold red" if name == diagnosis.leaf else None)
    Console().print(table)
    found = diagnosis.leaf in diagnosis.norms
    print(
        f"first offender: {diagnosis.leaf} ({diagnosis.detail})"
        if found
        else "this time every array is finite"
    )
    return 1 if found else 0

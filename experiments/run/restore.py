"""From a run folder back to a model with its weights."""

import contextlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from effjax.errors import RunError, UsageError
from effjax.experiment import resolve
from effjax.interop.converted import check_variables, read_variables
from effjax.interop.load import parse_config
from effjax.train.checkpoint import Checkpoints
from effjax.train.program import Program, build_program
from effjax.train.state import TrainState
from experiments.run.files import naming


def load_config_of(workdir: str | Path) -> ConfigDict:
    """The config that a run was started with."""
    file = Path(workdir) / "config.json"
    if not file.is_file():
        raise UsageError(f"--workdir='{workdir}' holds no run. Train one first: python -m experiments.train.")
    with naming(file):
        text = file.read_text()
    try:
        return ConfigDict(json.loads(text)["config"])
    except (ValueError, KeyError) as error:
        raise RunError(f"'{file}' is damaged ({error}).") from None


def storage_of(folder: str | Path) -> dict[str, Any]:
    """How a run, or a folder that `experiments.convert` wrote, stores kernels that are no arrays, by path."""
    if (Path(folder) / "checkpoints").is_dir():
        return dict(load_config_of(folder).get("storage", {}))
    file = Path(folder) / "config.json"
    if not file.is_file():
        return {}
    told = parse_config(file.read_bytes(), f"'{file}'").get("storage", {})
    return dict(told)


def stored_as_started(config: Any) -> Any:
    """The config; one that starts from what a recipe left has its model, and stores kernels as it does."""
    start = config.train.get("start")
    if start is None:
        return config
    changed: dict[str, Any] = {}
    if (Path(start) / "recipe.json").is_file():
        changed["model"] = load_config_of(start).model.to_dict()
    if not config.get("storage") and (storage := storage_of(start)):
        changed["storage"] = storage
    return ConfigDict(config.to_dict() | changed) if changed else config


def load_program(workdir: str | Path) -> Program:
    """The program of a run, on the devices that are here."""
    experiment = resolve(load_config_of(workdir))
    return build_program(experiment, experiment.data.open())


def load_state(workdir: str | Path, step: int | None = None) -> tuple[Program, TrainState]:
    """The program of a run and its state at a step, by default the newest."""
    program = load_program(workdir)
    with contextlib.closing(Checkpoints(Path(workdir) / "checkpoints", read_only=True)) as checkpoints:
        return program, checkpoints.restore(program.shapes, step).state


def load_run(
    workdir: str | Path, step: int | None = None, ema: bool | None = None
) -> tuple[Program, dict[str, Any]]:
    """The program of a run and the weights to use it with.

    Args:
      workdir: the run folder.
      step: None for the newest.
      ema: whether to take the averaged weights; None takes them where the run keeps them.
    """
    program, state = load_state(workdir, step)
    return program, program.variables(state, state.ema is not None if ema is None else ema)


def read_weights(folder: str | Path, shapes: Any, of: str) -> dict[str, Any]:
    """Variables in float32, from a folder that `experiments.convert` wrote or from a training run.

    Args:
      folder: of a run the newest checkpoint is taken, with the averaged weights where it keeps them.
      shapes: shapes and dtypes of the variables, by collection.
      of: what they belong to, for messages.

    Raises:
      UsageError: where they are not the same, in one message with every path, its expected and found shape.
    """
    if not (Path(folder) / "checkpoints").is_dir():
        return read_variables(folder, shapes, of, dtype=jnp.float32)
    _, variables = load_run(folder)
    check_variables(variables, shapes, f"the run '{folder}' for {of}")
    return jax.tree.map(np.asarray, variables)  # on the host: the run to come may lie on other devices

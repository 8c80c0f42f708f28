"""What a recipe leaves: a run folder, and until all steps are taken one for each, from which it goes on."""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from effjax import models
from effjax.compress.storage import kinds as storage
from effjax.compress.storage.trees import stored_in
from effjax.compress.subject import Subject
from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.interop.converted import section
from effjax.train import tasks
from effjax.train.checkpoint import Checkpoints
from effjax.train.fingerprint import fingerprints
from effjax.train.program import Program, build_program
from effjax.train.state import TrainState, examples_seen
from experiments import cli
from experiments.run.config_file import LoadedConfig
from experiments.run.files import naming, to_json
from experiments.run.restore import load_config_of, load_run
from experiments.run.workdir import Workdir

RECORD = "recipe.json"


@dataclasses.dataclass(frozen=True)
class Origin:
    """The run that is made smaller.

    Attributes:
      workdir: its folder.
      program: of it.
      state: of the checkpoint that was taken.
      averaged: whether its averaged weights were.
      digest: of the weights: a folder may hold another run by the time that a recipe goes on.
    """

    workdir: str
    program: Program
    state: TrainState
    averaged: bool
    digest: str


@dataclasses.dataclass(frozen=True)
class Stages:
    """The folders of a recipe: `out` for what all steps left, `out.steps/N` for what the first N did.

    Attributes:
      out: the run to leave.
      origin: the run it comes from.
      recipe: as it was asked for.
    """

    out: Path
    origin: Origin
    recipe: LoadedConfig

    def complete(self) -> bool:
        """Whether `out` holds what this recipe leaves of this run.

        Raises:
          UsageError: where it holds another run.
        """
        if not (self.out / "config.json").is_file():
            return False
        if _record(self.out) != self._asked(self._number):
            raise UsageError(f"--out='{self.out}' holds a run already. Name another folder.")
        return _has_checkpoint(self.out)

    def newest(self) -> tuple[int, Subject] | None:
        """How many steps are taken, and what they left; None before the first."""
        for number in range(self._number - 1, 0, -1):
            folder = self._folder(number)
            if _record(folder) == self._asked(number) and _has_checkpoint(folder):
                print(f"going on behind step {number} of {self._number}, which lies in {folder}", flush=True)
                program, variables = load_run(folder)
                return number, Subject(program.task, variables, program.data.example_batch(1))
        return None

    def keep(self, number: int, subject: Subject) -> None:
        """Writes what the first steps left.

        Raises:
          UsageError: where another run lies there.
        """
        folder = self._folder(number)
        if folder != self.out:
            _remove(folder)
        config = _config_of(self.origin, subject)
        try:
            program = build_program(resolve(config), self.origin.program.data)
        except UsageError as error:
            raise UsageError(
                f"what step {number} left cannot be built as the run is: {error} Pruning keeps multiples of "
                f"least.head_step heads and of least.hidden_step hidden units."
            ) from None
        command = cli.command_line()
        with Workdir.create_or_resume(
            folder, config, command=command, config_file=self.recipe.name
        ) as workdir:
            if workdir.resumed and _record(folder) != self._asked(number):
                raise UsageError(f"--out='{folder}' holds a run already. Name another folder.")
            # First of all: it says whose the folder is. The checkpoint says that it is whole.
            workdir.write(RECORD, to_json(self._asked(number), indent=2))
            made = _state_of(program, self.origin.state, subject)
            with contextlib.closing(Checkpoints(folder / "checkpoints", keep=1)) as saved:
                saved.save(int(made.step), made, {"examples": examples_seen(made)})

    def clear(self) -> None:
        """Removes the folders of the steps, and nothing that is not one."""
        for number in range(1, self._number):
            _remove(self._folder(number))
        if self._steps.is_dir() and not any(self._steps.iterdir()):
            self._steps.rmdir()

    @property
    def _number(self) -> int:
        return len(self.recipe.config.steps)

    @property
    def _steps(self) -> Path:
        return self.out.with_name(f"{self.out.name}.steps")

    def _folder(self, number: int) -> Path:
        return self.out if number == self._number else self._steps / str(number)

    def _asked(self, number: int) -> dict[str, Any]:
        """What the first steps depend on, as it is read back."""
        recipe = self.recipe.config.to_dict()
        recipe["steps"] = recipe["steps"][:number]
        origin = {
            "from": self.origin.workdir,
            "step": int(self.origin.state.step),
            "averaged": self.origin.averaged,
            "digest": self.origin.digest,
        }
        asked: dict[str, Any] = json.loads(to_json({**origin, "recipe": recipe}))
        return asked


def digest_of(params: Any) -> str:
    """A text that weights have alone, however they lie."""
    return hashlib.sha256(json.dumps(fingerprints(params), sort_keys=True).encode()).hexdigest()


def _remove(folder: Path) -> None:
    """Removes what an earlier start left of a step; what is no step stays, and is refused by who writes."""
    if (folder / RECORD).is_file():
        with naming(folder):
            shutil.rmtree(folder)


def _record(folder: Path) -> Any:
    file = folder / RECORD
    return json.loads(file.read_text()) if file.is_file() else None


def _has_checkpoint(folder: Path) -> bool:
    with contextlib.closing(Checkpoints(folder / "checkpoints", read_only=True)) as checkpoints:
        return bool(checkpoints.steps())


def _config_of(origin: Origin, subject: Subject) -> ConfigDict:
    """The config of what is left."""
    config = ConfigDict(load_config_of(origin.workdir).to_dict())
    if subject.model != origin.program.task.model:
        config.model = ConfigDict(section(subject.model, models.KINDS))
    if type(subject.task) is not type(origin.program.task):  # the member of a family that was trained
        config.task = ConfigDict(section(subject.task, tasks.KINDS))
        del config.task.model
    layouts = {path: leaf.layout for path, leaf in stored_in(subject.params).items()}  # type: ignore[attr-defined]
    config.storage = {path: section(layout, storage.KINDS) for path, layout in layouts.items()}
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(subject.params)):
        config.optimizer = ConfigDict(dict(kind="still"))  # what is stored in codes does not train
    # There is no average beside what a recipe leaves.
    config.train.start, config.train.ema = None, None
    for evaluator in config.get("evaluators", {}).values():
        evaluator.ema = False
    return config


def _state_of(program: Program, state: TrainState, subject: Subject) -> TrainState:
    made = TrainState.create(
        params=subject.params,
        opt_state=program.optimizer.init(subject.params),
        key=jax.random.key(0),
        collections={name: value for name, value in subject.variables.items() if name != "params"},
    )
    made = dataclasses.replace(made, step=state.step, key=state.key, examples=state.examples)
    return jax.device_put(made, program.shardings)

"""A config, resolved: what a run is, as frozen dataclasses and Linen modules."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from effjax import models
from effjax.compress.storage import kinds as storage
from effjax.compress.structure.nested import Nested
from effjax.config import build, build_kind, part
from effjax.data import Data
from effjax.errors import UsageError
from effjax.parallel.mesh import MeshShape
from effjax.train import arithmetic, evaluators, optimizers, tasks
from effjax.train.ema import Ema
from effjax.train.step import Precision


@dataclasses.dataclass(frozen=True)
class Train:
    """How long, how exact, and how often the loop looks up. Durations are such as `"90 epochs"`.

    Attributes:
      steps: the length of the run.
      start: folder of weights from which the run starts, of another run or written by `experiments.convert`;
        None draws them.
      fresh: regexps of parameters that the folder does not hold, and that are drawn nevertheless.
      seed: of parameters, dropout and everything else random on device.
      precision: of the forward and backward pass.
      arithmetic: of products with kernels in the training step, where it has fewer bits than `precision`.
      nested: smaller networks inside the model, which are trained in its place; None trains the model.
      accumulate: micro-batches a step.
      ema: moving average of the parameters; None keeps none.
      log_every: how often training metrics are written.
      checkpoint_every: how often the state is saved.
      keep: how many checkpoints stay.
    """

    steps: str
    start: str | None = None
    fresh: tuple[str, ...] = ()
    seed: int = 0
    precision: Precision = dataclasses.field(default_factory=Precision)
    arithmetic: Any | None = part(arithmetic.KINDS, default=None)
    nested: Nested | None = None
    accumulate: int = 1
    ema: Ema | None = None
    log_every: str = "50 steps"
    checkpoint_every: str = "10%"
    keep: int = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything a config says.

    Attributes:
      model: the network.
      task: what it is trained to do; holds the model.
      data: training data.
      optimizer: update rule, learning rate, and rules by parameter name.
      train: length, precision, and the intervals of the loop.
      evaluators: what is measured while training, by name.
      mesh: devices along each axis.
      sharding: logical axis names mapped otherwise than by default.
      storage: layouts of kernels that are not stored as arrays, by path; `experiments.compress` writes them.
      imports: modules of your own, which put their kinds into the tables of the library, as
        `effjax.mixers.KINDS["mean"] = Mean`. Every program that takes up the run imports them again.
    """

    model: nn.Module = part(models.KINDS)
    task: Any = part(tasks.KINDS)
    data: Data
    optimizer: Any = part(optimizers.KINDS)
    train: Train
    evaluators: Mapping[str, Any] = dataclasses.field(
        default_factory=dict, metadata={"kinds": evaluators.KINDS}
    )
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    sharding: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    storage: Mapping[str, Any] = dataclasses.field(default_factory=dict, metadata={"kinds": storage.KINDS})
    imports: tuple[str, ...] = ()


def resolve(config: Any) -> Experiment:
    """Turns a config into an experiment, or says what is wrong with it.

    Raises:
      UsageError: naming the full path of the first key that is unknown, missing or of the wrong type.
    """
    section = {key: config[key] for key in config}
    for name in section.get("imports", ()):
        _import(name)
    model = build_kind(models.KINDS, section.pop("model", None), "config.model")
    task = build_kind(tasks.KINDS, section.pop("task", None), "config.task", given={"model": model})
    return build(Experiment, section, "config", given={"model": model, "task": task})


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and misses another
        raise UsageError(
            f"config.imports: there is no module '{name}'. Run this in the folder that holds it, or add that "
            "folder to PYTHONPATH."
        ) from None

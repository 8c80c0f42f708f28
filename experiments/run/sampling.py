"""From a diffusion run to a PNG grid."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from effjax.diffusion import samplers
from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.examples import example_keys
from effjax.diffusion.generate import Sampling, sample_classes
from effjax.diffusion.process import kind_of
from effjax.errors import UsageError, did_you_mean
from effjax.parallel.sharding import activate, batch_parts
from effjax.train.program import Program
from effjax.train.tasks.diffusion import Diffusion
from experiments.run.files import write_atomic
from experiments.run.plots import image_grid
from experiments.run.restore import load_run

DEFAULT_SAMPLERS = {"ddpm": "ddim", "rectified_flow": "euler"}


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
      classes: one row each; None means the first ten.
      per_class: pictures in a row.
      guidance: scale of classifier-free guidance; 1 is none.
      interval: the share of the process that is guided, from 0, the picture, to 1, noise.
      sampler: a name in `effjax.diffusion.samplers.KINDS`; None means the usual one for the process.
      steps: of the sampler; None means its own number.
      seed: decides all noise.
      batch: pictures at a time.
    """

    classes: Sequence[int] | None = None
    per_class: int = 8
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    sampler: str | None = None
    steps: int | None = None
    seed: int = 0
    batch: int = 64

    def __post_init__(self) -> None:
        if self.per_class < 1:
            raise UsageError(f"--per_class={self.per_class} must be at least 1.")
        if self.classes is not None and not self.classes:
            raise UsageError("--classes is empty: name at least one class, as in --classes=0,1,2.")


def class_numbers(words: Sequence[str]) -> list[int]:
    """Reads the words of `--classes`."""
    try:
        return [int(word) for word in words]
    except ValueError:
        raise UsageError(f"--classes={','.join(words)} must be numbers, as in --classes=0,1,2.") from None


def shares(words: Sequence[str]) -> tuple[float, float]:
    """Reads the words of `--interval`."""
    try:
        least, greatest = (float(word) for word in words)
    except ValueError:
        raise UsageError(
            f"--interval={','.join(words)} must be two shares, as in --interval=0.2,0.8."
        ) from None
    return least, greatest


def build_sampler(task: Diffusion, name: str | None, steps: int | None) -> samplers.Sampler:
    """The sampler by name, or the usual one for the task's process."""
    name = DEFAULT_SAMPLERS[kind_of(task.process)] if name is None else name
    if name not in samplers.KINDS:
        raise UsageError(f"--sampler={name} is no sampler. {did_you_mean(name, samplers.KINDS)}")
    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    if isinstance(task.process, DDPM) and name in ("ddpm", "ddim", "dpm_solver"):
        options["clip"] = 1.0  # pictures lie in [-1, 1]
    return samplers.KINDS[name](**options)


def run(workdir: str, out: str, request: Request, step: int | None = None, ema: bool | None = None) -> int:
    """Writes the grid of a request to `out`; returns the exit code.

    Raises:
      UsageError: for a run of something else than pictures by diffusion, or what `Sampling.check` refuses.
    """
    program, variables = load_run(workdir, step, ema)
    if not isinstance(program.task, Diffusion):
        kind = type(program.task).__name__.lower()
        raise UsageError(f"--workdir='{workdir}' holds a {kind} run, and sampling needs a diffusion run.")
    pictures, columns = draw(program, variables, request)
    write_atomic(out, image_grid(pictures, columns))
    print(f"{out}: {len(pictures) // columns} classes x {columns} pictures")
    return 0


def prepared(program: Program, request: Request) -> tuple[Sampling, Sequence[int], tuple[int, ...]]:
    """How to draw, which classes, and the shape of one picture.

    Raises:
      UsageError: for what `Sampling.check` refuses, or a run that makes latents.
    """
    task = program.task
    sampler = build_sampler(task, request.sampler, request.steps)
    classes = request.classes if request.classes is not None else range(min(task.model.classes, 10))
    how = Sampling(sampler, request.guidance, request.interval)
    how.check(task, classes)
    shape = program.data.example_batch(1)[task.content].shape[1:]
    if shape[-1] not in (1, 3):
        raise UsageError(
            f"the run makes latents of {shape[-1]} channels, and a picture has 1 or 3: decode them first."
        )
    return how, classes, shape


def draw(program: Program, variables: Any, request: Request) -> tuple[UInt8[np.ndarray, "n h w c"], int]:
    """The pictures of a request, class by class, and how many each class has."""
    task = program.task
    how, classes, shape = prepared(program, request)
    variables = program.experiment.train.precision.cast(variables)
    labels = np.repeat(np.asarray(classes, np.int32), request.per_class)

    @jax.jit
    def sample(variables: Any, label: Any, index: Any) -> Any:
        keys = example_keys(jax.random.key(request.seed), index)
        return sample_classes(task, variables, label, shape, how, keys)

    parts = batch_parts(program.mesh, program.rules)
    size = -(-min(request.batch, len(labels)) // parts) * parts  # one compiled size, which divides
    pictures = []
    with activate(program.mesh, program.rules):
        for start in range(0, len(labels), size):
            index = np.arange(start, start + size)
            label = labels[np.minimum(index, len(labels) - 1)]  # the last batch is filled up
            laid_out = jax.device_put((jnp.asarray(label), jnp.asarray(index)), program.batch_sharding)
            pictures.append(np.asarray(sample(variables, *laid_out)))
    return to_bytes(np.concatenate(pictures)[: len(labels)]), request.per_class


def to_bytes(pictures: Float[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n h w c"]:
    """From [-1, 1] to 0 .. 255."""
    return np.clip(np.round((pictures + 1.0) * 127.5), 0, 255).astype(np.uint8)

"""From a diffusion run to a grid of pictures in a PNG, or of videos in a GIF."""

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
from effjax.diffusion.known import Known
from effjax.diffusion.masks import Mask
from effjax.diffusion.process import kind_of
from effjax.errors import UsageError, did_you_mean
from effjax.parallel.sharding import activate, batch_parts
from effjax.train.program import Program
from effjax.train.tasks.diffusion import Diffusion
from experiments.run.clips import Clips, held_out
from experiments.run.files import write_atomic
from experiments.run.plots import image_grid, moving_grid
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
      given: what of held-out clips is given, of which the rest is drawn; None draws whole pictures.
    """

    classes: Sequence[int] | None = None
    per_class: int = 8
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    sampler: str | None = None
    steps: int | None = None
    seed: int = 0
    batch: int = 64
    given: Mask | None = None

    def __post_init__(self) -> None:
        if self.per_class < 1:
            raise UsageError(f"--per_class={self.per_class} must be at least 1.")
        if self.classes is not None and not self.classes:
            raise UsageError("--classes is empty: name at least one class, as in --classes=0,1,2.")
        if self.classes is not None and self.given is not None:
            raise UsageError("--classes and --given exclude each other: held-out clips have their classes.")


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

    Where parts of clips are given, a row of the real clips stands above one of those drawn.

    Raises:
      UsageError: for a run of something else than pictures or videos by diffusion, a file of the wrong kind,
        or what `Sampling.check` refuses.
    """
    program, variables = load_run(workdir, step, ema)
    if not isinstance(program.task, Diffusion):
        kind = type(program.task).__name__.lower()
        raise UsageError(f"--workdir='{workdir}' holds a {kind} run, and sampling needs a diffusion run.")
    moving = len(shape_of(program)) == 4
    if moving != out.endswith(".gif"):
        what, ending = ("videos", "gif") if moving else ("pictures", "png")
        raise UsageError(f"--out='{out}': the run makes {what}, which are written as --out=NAME.{ending}.")
    if not moving:
        pictures, columns = draw(program, variables, request)
        write_atomic(out, image_grid(pictures, columns))
        print(f"{out}: {len(pictures) // columns} classes x {columns} pictures")
    elif request.given is None:
        videos, columns = draw(program, variables, request)
        write_atomic(out, moving_grid(videos, columns))
        print(f"{out}: {len(videos) // columns} classes x {columns} videos")
    else:
        clips = held_out(program, request.given, request.per_class, request.seed)
        videos, columns = draw(program, variables, request, clips)
        write_atomic(out, moving_grid(np.concatenate([to_bytes(clips.content), videos]), columns))
        print(f"{out}: {columns} clips; mean squared error of what was not given, in [-1, 1]:")
        print(f"  drawn                        {clips.error(from_bytes(videos)):.4g}")
        print(f"  the last given value copied  {clips.error(clips.copied()):.4g}")
    return 0


def shape_of(program: Program) -> tuple[int, ...]:
    """Of one picture `(H, W, C)`, or of one video `(F, H, W, C)`."""
    task = program.task
    shape: tuple[int, ...] = task.shape(program.data.example_batch(1)[task.content].shape[1:])
    return shape


def prepared(program: Program, request: Request) -> tuple[Sampling, Sequence[int], tuple[int, ...]]:
    """How to draw, which classes, and the shape of one picture or video.

    Raises:
      UsageError: for what `Sampling.check` refuses, or a run that makes latents.
    """
    task = program.task
    sampler = build_sampler(task, request.sampler, request.steps)
    classes = request.classes if request.classes is not None else range(min(task.model.classes, 10))
    how = Sampling(sampler, request.guidance, request.interval)
    how.check(task, classes)
    shape = shape_of(program)
    if len(shape) == 3 and request.given is not None:
        raise UsageError("--given is for runs that make videos, and this one makes pictures: leave it out.")
    if task.latents is None and shape[-1] not in (1, 3):
        raise UsageError(
            f"the run makes latents of {shape[-1]} channels, and a picture has 1 or 3: name the autoencoder "
            f"that decodes them, as in --config.task.latents.weights=runs/vae of its config."
        )
    if task.latents is not None and request.given is not None:
        raise UsageError("--given is for runs on pixels, and this one makes latents: leave it out.")
    return how, classes, shape


def draw(
    program: Program, variables: Any, request: Request, clips: Clips | None = None
) -> tuple[UInt8[np.ndarray, "n *shape"], int]:
    """The pictures or videos of a request, class by class, and how many each class has.

    Of `clips`, where there are any, each is drawn as far as it is not given.
    """
    task = program.task
    how, classes, shape = prepared(program, request)
    variables = program.experiment.train.precision.cast(variables)
    labels, columns = np.repeat(np.asarray(classes, np.int32), request.per_class), request.per_class
    known = None
    if clips is not None:
        labels, columns, known = clips.labels, len(clips.labels), Known(clips.content, clips.known)

    @jax.jit
    def sample(variables: Any, label: Any, index: Any, known: Any) -> Any:
        keys = example_keys(jax.random.key(request.seed), index)
        drawn = sample_classes(task, variables, label, shape, how, keys, known)
        return task.pictures(variables, drawn)

    parts = batch_parts(program.mesh, program.rules)
    size = -(-min(request.batch, len(labels)) // parts) * parts  # one compiled size, which divides
    pictures = []
    with activate(program.mesh, program.rules):
        for start in range(0, len(labels), size):
            index = np.arange(start, start + size)
            row = np.minimum(index, len(labels) - 1)  # the last batch is filled up
            rows = labels[row], index, jax.tree.map(lambda leaf: leaf[row], known)  # noqa: B023
            laid_out = jax.device_put(jax.tree.map(jnp.asarray, rows), program.batch_sharding)
            pictures.append(np.asarray(sample(variables, *laid_out)))
    return to_bytes(np.concatenate(pictures)[: len(labels)]), columns


def to_bytes(pictures: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """From [-1, 1] to 0 .. 255."""
    return np.clip(np.round((pictures + 1.0) * 127.5), 0, 255).astype(np.uint8)


def from_bytes(pictures: UInt8[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """From 0 .. 255 to [-1, 1]."""
    return pictures.astype(np.float32) / 127.5 - 1.0

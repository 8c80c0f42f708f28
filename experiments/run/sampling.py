"""From a diffusion run to a grid of pictures in a PNG, or of videos in a GIF."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from effjax.config import build_kind
from effjax.diffusion import caches, samplers
from effjax.diffusion.caches import StepCache
from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.examples import example_keys
from effjax.diffusion.generate import Sampling, calibrated, sample_classes, walk_classes
from effjax.diffusion.known import Known
from effjax.diffusion.masks import Mask
from effjax.diffusion.process import kind_of
from effjax.errors import UsageError, did_you_mean
from effjax.parallel.sharding import activate, batch_parts
from effjax.train.program import Program
from effjax.train.tasks.diffusion import Diffusion
from experiments.run import kind_spec
from experiments.run.clips import Clips, held_out_clips
from experiments.run.files import write_atomic
from experiments.run.plots import image_grid, moving_grid
from experiments.run.restore import load_run
from experiments.run.told import conditions

DEFAULT_SAMPLERS = {"ddpm": "ddim", "rectified_flow": "euler"}
# Pictures that a cache which plans ahead is calibrated on.
FEW = 8


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
      classes: one row each; None means the first ten.
      examples: held-out examples, of what each of which shows there is a row, instead of classes.
      per_class: pictures in a row.
      guidance: scale of classifier-free guidance; 1 is none.
      interval: the share of the process that is guided, from 0, the picture, to 1, noise.
      sampler: a name in `effjax.diffusion.samplers.KINDS`; None means the usual one for the process.
      steps: of the sampler; None means its own number.
      seed: decides all noise.
      batch: pictures at a time.
      given: what of held-out clips is given, of which the rest is drawn; None draws whole pictures.
      cache: what is not computed again at every step.
      trajectory: shows so many states on the way from noise to one picture, instead of a row of pictures.
    """

    classes: Sequence[int] | None = None
    examples: Sequence[int] | None = None
    per_class: int = 8
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    sampler: str | None = None
    steps: int | None = None
    seed: int = 0
    batch: int = 64
    given: Mask | None = None
    cache: StepCache | None = None
    trajectory: int | None = None

    def __post_init__(self) -> None:
        if self.per_class < 1:
            raise UsageError(f"--per_class={self.per_class} must be at least 1.")
        if self.trajectory is not None and self.trajectory < 2:
            raise UsageError(f"--trajectory={self.trajectory} must be at least 2: noise and picture.")
        for name in ("classes", "examples"):
            numbers = getattr(self, name)
            if numbers is not None and not numbers:
                raise UsageError(f"--{name} is empty: name at least one, as in --{name}=0,1,2.")
            if numbers is not None and self.given is not None:
                raise UsageError(f"--{name} and --given exclude each other: held-out clips have their own.")
        if self.classes is not None and self.examples is not None:
            raise UsageError("--classes and --examples exclude each other.")
        if self.trajectory is not None and self.given is not None:
            raise UsageError("--trajectory and --given exclude each other.")


def numbers_of(flag: str, words: Sequence[str]) -> list[int]:
    """Reads the words of `--classes` or `--examples`."""
    try:
        return [int(word) for word in words]
    except ValueError:
        raise UsageError(f"--{flag}={','.join(words)} must be numbers, as in --{flag}=0,1,2.") from None


def parse_cache(spec: str) -> StepCache:
    """Reads `--cache`: `KIND` or `KIND:FIELD=VALUE,FIELD=VALUE`, a kind in `effjax.diffusion.caches`.

    Raises:
      UsageError: for what cannot be read, an unknown kind or field, or a value that the cache refuses.
    """
    kind, fields = kind_spec.read("cache", spec, "cg_taylor:threshold=0.1")
    cache: StepCache = build_kind(caches.KINDS, {"kind": kind, **fields}, f"--cache={spec}")
    return cache


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
    grid, what = (moving_grid, "videos") if moving else (image_grid, "pictures")
    if request.given is not None and moving:
        clips = held_out_clips(program, request.given, request.per_class, request.seed)
        videos, columns = draw(program, variables, request, clips)
        write_atomic(out, grid(np.concatenate([to_bytes(clips.content), videos]), columns))
        print(f"{out}: {columns} clips; mean squared error of what was not given, in [-1, 1]:")
        print(f"  drawn                        {clips.error(from_bytes(videos)):.4g}")
        print(f"  the last given value copied  {clips.error(clips.copied()):.4g}")
        return 0
    drawn, columns = draw(program, variables, request)
    write_atomic(out, grid(drawn, columns))
    across = what if request.trajectory is None else "states from noise to one of the " + what
    print(f"{out}: {len(drawn) // columns} {rows_of(program, request)} x {columns} {across}")
    return 0


def rows_of(program: Program, request: Request) -> str:
    """What the rows of a grid are, in a word."""
    knows = getattr(program.task.model, "classes", 0) > 0
    return "classes" if request.examples is None and knows else "held-out examples"


def shape_of(program: Program) -> tuple[int, ...]:
    """Of one picture `(H, W, C)`, or of one video `(F, H, W, C)`."""
    task = program.task
    shape: tuple[int, ...] = task.shape(program.data.example_batch(1)[task.content].shape[1:])
    return shape


def prepared(program: Program, request: Request) -> tuple[Sampling, np.ndarray, tuple[int, ...]]:
    """How to draw, what each row is told, and the shape of one picture or video.

    Raises:
      UsageError: for what `Sampling.check` refuses, or a run that makes latents.
    """
    task = program.task
    sampler = build_sampler(task, request.sampler, request.steps)
    how = Sampling(sampler, request.guidance, request.interval, request.cache)
    rows = conditions(program, request.classes, request.examples)
    how.check(task, () if request.classes is None else request.classes)
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
    if request.trajectory is not None and request.trajectory > sampler.steps:
        raise UsageError(f"--trajectory={request.trajectory}: the sampler takes {sampler.steps} steps.")
    return how, rows, shape


def draw(
    program: Program, variables: Any, request: Request, clips: Clips | None = None
) -> tuple[UInt8[np.ndarray, "n *shape"], int]:
    """The pictures or videos of a request, row by row, and how many there are in a row.

    Of `clips`, where there are any, each is drawn as far as it is not given.
    """
    task = program.task
    how, rows, shape = prepared(program, request)
    variables = program.experiment.train.precision.cast(variables)
    columns = request.per_class if request.trajectory is None else 1
    told, known = np.repeat(rows, columns, axis=0), None
    if clips is not None:
        told, columns, known = clips.told, len(clips.told), Known(clips.content, clips.known)
    few = np.arange(min(len(told), FEW))
    with activate(program.mesh, program.rules):
        keys = example_keys(jax.random.key(request.seed), jnp.asarray(few))
        how = calibrated(task, variables, jnp.asarray(told[few]), shape, how, keys)

    @jax.jit
    def sample(variables: Any, told: Any, index: Any, known: Any) -> Any:
        keys = example_keys(jax.random.key(request.seed), index)
        if request.trajectory is None:
            drawn = sample_classes(task, variables, told, shape, how, keys, known)
            return task.pictures(variables, drawn)
        states = walk_classes(task, variables, told, shape, how, keys, lambda state: state.x)[1]
        chosen = np.linspace(0, len(states) - 1, request.trajectory).round().astype(int)
        shown = [task.pictures(variables, states[at]) for at in chosen]  # each [B, ...]
        return jnp.stack(shown, axis=1)

    parts = batch_parts(program.mesh, program.rules)
    size = -(-min(request.batch, len(told)) // parts) * parts  # one compiled size, which divides
    pictures = []
    with activate(program.mesh, program.rules):
        for start in range(0, len(told), size):
            index = np.arange(start, start + size)
            row = np.minimum(index, len(told) - 1)  # the last batch is filled up
            inputs = told[row], index, jax.tree.map(lambda leaf: leaf[row], known)  # noqa: B023
            laid_out = jax.device_put(jax.tree.map(jnp.asarray, inputs), program.batch_sharding)
            pictures.append(np.asarray(sample(variables, *laid_out)))
    drawn = to_bytes(np.concatenate(pictures)[: len(told)])
    if request.trajectory is None:
        return drawn, columns
    return drawn.reshape(-1, *drawn.shape[2:]), request.trajectory


def to_bytes(pictures: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """From [-1, 1] to 0 .. 255."""
    return np.clip(np.round((pictures + 1.0) * 127.5), 0, 255).astype(np.uint8)


def from_bytes(pictures: UInt8[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """From 0 .. 255 to [-1, 1]."""
    return pictures.astype(np.float32) / 127.5 - 1.0

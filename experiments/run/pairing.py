"""From a diffusion run to a folder of pairs of noise and picture."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from effjax.data.arrays import ArrayWriter
from effjax.diffusion.coupling import pairs, straightness
from effjax.diffusion.examples import example_keys
from effjax.diffusion.generate import Sampling
from effjax.diffusion.rectified_flow import RectifiedFlow
from effjax.errors import UsageError
from effjax.parallel.sharding import activate, batch_parts
from effjax.train.program import Program
from effjax.train.tasks.diffusion import Diffusion
from experiments.run.formatting import measurement
from experiments.run.progress import Progress
from experiments.run.restore import load_state
from experiments.run.sampling import Request, build_sampler


def run(workdir: str, out: str, request: Request, count: int | None, step: int | None = None) -> int:
    """Writes the folder; returns the exit code.

    Raises:
      UsageError: for a run of something else than pictures by diffusion, what `Sampling.check` refuses, or a
        folder that exists.
    """
    program, state = load_state(workdir, step)
    rows = checked(program, workdir, count)
    variables = program.variables(state, ema=state.ema is not None)
    with ArrayWriter(out, rows, origin_of(workdir, int(state.step), request)) as writer:
        straight = write(program, variables, request, writer)
    print(f"{out}: {rows} pairs" + ("" if straight is None else f", straightness {measurement(straight)}"))
    return 0


def checked(program: Program, workdir: str, count: int | None) -> int:
    """How many pairs to draw of a run.

    Raises:
      UsageError: for a run of something else than diffusion, or no pairs.
    """
    if not isinstance(program.task, Diffusion):
        kind = type(program.task).__name__.lower()
        raise UsageError(f"--workdir='{workdir}' holds a {kind} run, and pairs need a diffusion run.")
    rows: int = program.data.num_examples if count is None else count
    if rows < 1:
        raise UsageError(f"--count={rows} must be at least 1.")
    return rows


def origin_of(workdir: str, step: int, request: Request) -> dict[str, Any]:
    """What decides the values of all pairs; how many are drawn at a time does not."""
    asked = {name: getattr(request, name) for name in ("seed", "guidance", "sampler", "steps")}
    return {"run": str(Path(workdir).resolve()), "step": step, **asked}


def write(program: Program, variables: Any, request: Request, writer: ArrayWriter) -> float | None:
    """Draws what is not written yet; returns how straight the paths of flows are, a mean over those drawn.

    The conditions are those of the training examples, in order and over again.
    """
    task, size = program.task, _batch_size(program, request)
    how = Sampling(build_sampler(task, request.sampler, request.steps), request.guidance)
    how.check(task, ())
    variables = program.experiment.train.precision.cast(variables)
    shape = task.shape(program.data.example_batch(1)[task.content].shape[1:])
    everywhere = NamedSharding(program.mesh, PartitionSpec())

    def draw(variables: Any, condition: Any, first: Any) -> Any:
        keys = example_keys(jax.random.key(request.seed), first + jnp.arange(len(condition)))
        noise, pictures = pairs(task, variables, condition, shape, how, keys)
        bent = None
        if isinstance(task.process, RectifiedFlow):
            bent = straightness(task.denoiser(variables), task.process, noise, pictures, condition)
        return noise, pictures, bent

    drawing = jax.jit(draw, out_shardings=everywhere)
    progress = Progress(writer.rows, start=writer.done, units_per_step=1, unit="pairs")
    bends = []
    with progress, activate(program.mesh, program.rules):
        for first, condition in _conditions(program, size, writer.done, writer.rows):
            laid_out = jax.device_put(condition, program.batch_sharding)
            noise, pictures, bent = drawing(variables, laid_out, jnp.asarray(first))
            if jax.process_index() == 0:
                told = {} if task.condition is None else {task.condition: condition}
                writer.write(first, {"noise": noise, task.content: pictures, **told})
            if bent is not None:
                bends.append(np.asarray(bent)[: writer.rows - first])
            progress.update(min(first + size, writer.rows), {})
    return float(np.concatenate(bends).mean()) if bends else None


def _batch_size(program: Program, request: Request) -> int:
    """Of the request, made divisible by the devices."""
    parts = batch_parts(program.mesh, program.rules)
    return -(-request.batch // parts) * parts


def _conditions(program: Program, size: int, first: int, last: int) -> Iterator[tuple[int, np.ndarray]]:
    """Number of the first row and conditions of `size` rows, as often as it takes."""

    def rows() -> Iterator[np.ndarray]:
        while True:
            for batch in program.data.evaluate():
                yield from np.asarray(program.task.told(batch))[batch["mask"] > 0]

    endless = itertools.islice(rows(), first, None)
    for start in range(first, last, size):
        yield start, np.stack(list(itertools.islice(endless, size)))

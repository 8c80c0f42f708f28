"""What a run does over and over: a training step, an evaluation, a sampler's walk, a token of each sequence.

Each is a pure function with shapes and shardings for its arguments, ready to be compiled and counted.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from effjax.diffusion.examples import example_keys
from effjax.diffusion.generate import Sampling, sample_classes
from effjax.diffusion.samplers import Sampler
from effjax.errors import UsageError, did_you_mean
from effjax.layers.stored import Stored
from effjax.parallel.sharding import activate, batch_parts
from effjax.train.program import Program
from effjax.train.tasks.diffusion import Diffusion
from effjax.train.tasks.language import Language


@dataclasses.dataclass(frozen=True)
class Step:
    """One function of a run.

    Attributes:
      kind: a name in `KINDS`.
      function: pure.
      arguments: shapes, dtypes and shardings; the first holds the parameters.
      out_shardings: None leaves them to the compiler.
      donated: arguments whose memory the results may take.
      unit: what it makes or reads.
      units: how many of these a call.
    """

    kind: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    out_shardings: Any
    donated: tuple[int, ...]
    unit: str
    units: int

    def trace(self, program: Program) -> Any:
        """Traced with all shardings, for any platform."""
        in_shardings = jax.tree.map(lambda leaf: leaf.sharding, self.arguments)
        jitted = jax.jit(
            self.function,
            in_shardings=in_shardings,
            out_shardings=self.out_shardings,
            donate_argnums=self.donated,
        )
        with activate(program.mesh, program.rules):
            return jitted.trace(*self.arguments)


@dataclasses.dataclass(frozen=True)
class Serving:
    """What is asked of a trained model.

    Attributes:
      batch: pictures, or sequences, at a time; None takes the batch of training.
      context: tokens of a sequence; None takes the length of a training row.
      sampler: of a diffusion model; None where none is sampled.
      guidance: scale of classifier-free guidance; other than 1 it doubles the network's work.
    """

    batch: int | None = None
    context: int | None = None
    sampler: Sampler | None = None
    guidance: float = 1.0


def train(program: Program, serving: Serving) -> Step:
    """Forward, backward, optimiser: what `experiments.train` runs."""
    replicated = NamedSharding(program.mesh, PartitionSpec())
    return Step(
        kind="train",
        function=program.step_function,
        arguments=(program.shapes, program.batch_shapes()),
        out_shardings=(program.shardings, replicated),
        donated=(0,),
        unit=program.task.unit,
        units=_rows(program),
    )


def _rows(program: Program) -> int:
    """What a batch of training holds of the task's unit."""
    data = program.experiment.data
    return data.batch_size * (data.packing.length if data.packing else 1)


def evaluate(program: Program, serving: Serving) -> Step:
    """The task's metrics on one batch of the training data's shape."""
    batch = program.batch_shapes()
    size = jax.tree.leaves(batch)[0].shape[0]
    batch["mask"] = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=program.batch_sharding)
    precision, task = program.experiment.train.precision, program.task
    return Step(
        kind="evaluate",
        function=lambda variables, batch: task.metrics(precision.cast(variables), batch),
        arguments=(_variables(program), batch),
        out_shardings=None,
        donated=(),
        unit=program.task.unit,
        units=_rows(program),
    )


def sample(program: Program, serving: Serving) -> Step:
    """All steps of a sampler, from noise to pictures (or latents).

    Raises:
      UsageError: for a task that is no diffusion, or what `Sampling.check` refuses.
    """
    task = program.task
    if not isinstance(task, Diffusion) or serving.sampler is None:
        raise UsageError(f"--step=sample needs a diffusion config, and this one is {_kind(task)}.")
    sampling = Sampling(serving.sampler, serving.guidance)
    sampling.check(task, ())
    example = program.data.example_batch(1)
    batch, shape = _batch(program, serving), task.shape(example[task.content].shape[1:])
    one = jax.eval_shape(task.told, jax.tree.map(jnp.asarray, dict(example)))  # [1, ...]
    told = jax.ShapeDtypeStruct((batch, *one.shape[1:]), one.dtype, sharding=program.batch_sharding)
    numbers = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=program.batch_sharding)

    def pictures(variables: Any, told: Any, index: Any) -> Any:
        keys = example_keys(jax.random.key(0), index)
        return sample_classes(task, variables, told, shape, sampling, keys)

    return Step(
        kind="sample",
        function=pictures,
        arguments=(_stored(program), told, numbers),
        out_shardings=program.batch_sharding,
        donated=(),
        unit="images",
        units=batch,
    )


def prefill(program: Program, serving: Serving) -> Step:
    """Reads a whole context into empty caches; nobody needs the logits of a prompt."""
    batch, context = _batch(program, serving), _context(program, serving)
    model = program.task.model
    shapes = _caches(program, batch, context)
    tokens = jax.ShapeDtypeStruct((batch, context), jnp.int32, sharding=program.batch_sharding)

    def read(variables: Any, caches: Any, tokens: Any) -> Any:
        return model.apply(variables, tokens, caches, method="step")[1]

    return Step(
        kind="prefill",
        function=read,
        arguments=(_stored(program), shapes, tokens),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes),
        donated=(1,),
        unit="tokens",
        units=batch * context,
    )


def decode(program: Program, serving: Serving) -> Step:
    """One more token of every sequence, after a context that its cache holds; the likeliest is taken."""
    batch, context = _batch(program, serving), _context(program, serving)
    model = program.task.model
    shapes = _caches(program, batch, context)
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=program.batch_sharding)

    def write(variables: Any, caches: Any, tokens: Any, positions: Any) -> Any:
        logits, caches = model.apply(variables, tokens, caches, positions, method="step")
        return jnp.argmax(logits, axis=-1), caches

    return Step(
        kind="decode",
        function=write,
        arguments=(_stored(program), shapes, tokens, tokens),
        out_shardings=(program.batch_sharding, jax.tree.map(lambda leaf: leaf.sharding, shapes)),
        donated=(1,),
        unit="tokens",
        units=batch,
    )


KINDS: dict[str, Callable[[Program, Serving], Step]] = {
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "prefill": prefill,
    "decode": decode,
}


def build(kind: str, program: Program, serving: Serving) -> Step:
    """The step of a program by name.

    Raises:
      UsageError: for an unknown name, or a step that the program's task does not have.
    """
    if kind not in KINDS:
        raise UsageError(f"--step={kind} is no step. {did_you_mean(kind, KINDS)}")
    return KINDS[kind](program, serving)


def _kind(task: Any) -> str:
    return type(task).__name__.lower()


def _variables(program: Program) -> dict[str, Any]:
    """The master weights and the other collections, as training holds them."""
    return {"params": program.shapes.params, **program.shapes.collections}


def _stored(program: Program) -> dict[str, Any]:
    """The weights as a server keeps them: in the compute dtype, or as they are stored otherwise."""
    dtype = jnp.dtype(program.experiment.train.precision.compute)

    def cast(leaf: Any) -> Any:
        if isinstance(leaf, Stored):
            return leaf
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(leaf.shape, dtype if floating else leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(cast, _variables(program), is_leaf=lambda leaf: isinstance(leaf, Stored))


def _batch(program: Program, serving: Serving) -> int:
    batch = program.experiment.data.batch_size if serving.batch is None else serving.batch
    parts = batch_parts(program.mesh, program.rules)
    if batch < 1 or batch % parts:
        raise UsageError(
            f"--batch={batch} does not divide into {parts} parts (data={program.mesh.shape['data']} x "
            f"fsdp={program.mesh.shape['fsdp']}): choose a multiple of {parts}, or cut tensor or sequence "
            f"instead."
        )
    return batch


def _context(program: Program, serving: Serving) -> int:
    if not isinstance(program.task, Language):
        raise UsageError(f"decoding needs a language config, and this one is {_kind(program.task)}.")
    packing = program.experiment.data.packing
    context = serving.context or (packing.length if packing else 0)
    if context < 1:
        raise UsageError("--context is missing: say how many tokens a sequence has.")
    return context


def _caches(program: Program, batch: int, slots: int) -> Any:
    """Shapes and shardings of all layers' caches, depth in front."""
    dtype = jnp.dtype(program.experiment.train.precision.compute)
    shapes = jax.eval_shape(lambda: program.task.model.init_cache(batch, slots, dtype))

    def lay_out(leaf: Any, axes: tuple[str, ...]) -> Any:
        spec = nn.logical_to_mesh_axes(("layers", *axes), program.rules) or PartitionSpec()
        sharding = NamedSharding(program.mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(lay_out, shapes, program.task.model.cache_axes())

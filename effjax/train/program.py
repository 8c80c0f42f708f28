"""The compiled side of a run: how the state lies on the mesh, how it is made, and the functions that move it.

A plan, a benchmark, an evaluation and the training loop all start from the same program.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from effjax.compress.storage.trees import boxed_like, stored_in, with_beside
from effjax.compress.structure.nested import NestedTask
from effjax.data import Described
from effjax.data.text import check_vocabulary
from effjax.errors import UsageError
from effjax.experiment import Experiment
from effjax.parallel.mesh import make_mesh
from effjax.parallel.sharding import (
    AxisRules,
    activate,
    batch_parts,
    batch_sharding,
    like_parameters,
    merge_rules,
    parameter_shardings,
)
from effjax.train.arithmetic import within
from effjax.train.durations import Budget
from effjax.train.state import TrainState
from effjax.train.step import Precision, make_step
from effjax.train.tasks import served
from effjax.train.tasks.mean import Means


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Everything about a run that follows from its config and the devices.

    Attributes:
      experiment: the resolved config.
      data: the training data: open, or only described where nothing will be read.
      budget: the length of the run in steps.
      mesh: the devices.
      rules: logical axis names to mesh axes.
      optimizer: the optax transformation.
      learning_rate: the schedule, for the log.
      shapes: a `TrainState` of shapes, dtypes and shardings: what a checkpoint is restored onto.
      batch_sharding: how input batches lie.
      precision: what the training step computes in, its arithmetic included; evaluation casts by
        `experiment.train.precision`, as whoever takes up the weights will.
    """

    experiment: Experiment
    data: Any
    budget: Budget
    mesh: Mesh
    rules: AxisRules
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    shapes: TrainState
    batch_sharding: NamedSharding
    precision: Precision

    @property
    def task(self) -> Any:
        """The task of the experiment."""
        return self.experiment.task

    @property
    def shardings(self) -> TrainState:
        """Where each array of the state lies."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.shapes)

    def init(self, variables: Any = None) -> TrainState:
        """The state before the first step, made where it will lie.

        Args:
          variables: what the run starts from, trees like `shapes.params` and those of `shapes.collections`
            by name; what is missing in them, or all of it, is drawn.
        """
        with activate(self.mesh, self.rules):
            shardings = self.shardings
            if variables is None:
                return jax.jit(self._make_state, out_shardings=shardings)({})
            at = flatten_dict({"params": shardings.params, **shardings.collections})
            given = {path: jax.device_put(leaf, at[path]) for path, leaf in flatten_dict(variables).items()}
            return jax.jit(self._make_state, out_shardings=shardings)(given)

    def _make_state(self, given: dict[tuple[str, ...], Array]) -> TrainState:
        drawn = flatten_dict(meta.unbox(_init_variables(self.experiment, self.data)))
        variables = unflatten_dict({path: given.get(path, leaf) for path, leaf in drawn.items()})
        return _state(self.experiment, self.optimizer, variables)

    @functools.cached_property
    def step_function(self) -> Any:
        """`(state, batch) -> (state, metrics)` as a plain function.

        Raises:
          UsageError: for kernels that are stored as whole numbers.
        """
        check_trainable(self.shapes.params)
        train = self.experiment.train
        return make_step(
            self.task if train.nested is None else NestedTask(self.task, train.nested),
            self.optimizer,
            precision=self.precision,
            accumulate=train.accumulate,
            ema=train.ema,
            halves=self.experiment.optimizer.agvm is not None,
        )

    @functools.cached_property
    def step(self) -> Any:
        """The step, compiled for this state and batch; the state is donated."""
        with activate(self.mesh, self.rules):
            return self.trace().lower().compile()

    def trace(self) -> Any:
        """The step as it will be compiled, traced with all shardings."""
        replicated = NamedSharding(self.mesh, PartitionSpec())
        jitted = jax.jit(
            self.step_function,
            in_shardings=(self.shardings, self.batch_sharding),
            out_shardings=(self.shardings, replicated),
            donate_argnums=0,
        )
        with activate(self.mesh, self.rules):
            return jitted.trace(self.shapes, self.batch_shapes())

    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of one global batch."""
        size = self.experiment.data.batch_size

        def shape(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype, sharding=self.batch_sharding)

        return jax.tree.map(shape, dict(self.data.example_batch(1)))

    def metrics(self, variables: Any, batch: Mapping[str, Array]) -> Means:
        """The task's metrics in evaluation, in the compute dtype of the run."""
        with activate(self.mesh, self.rules):
            return self._metrics(variables, batch)

    @functools.cached_property
    def _metrics(self) -> Any:
        precision = self.experiment.train.precision

        def metrics(variables: Any, batch: Mapping[str, Array]) -> Means:
            # Running averages and counters are no weights: they keep their dtypes.
            variables = {**variables, "params": precision.cast(variables["params"])}
            return self.task.metrics(variables, batch)

        return jax.jit(metrics)

    def variables(self, state: TrainState, ema: bool) -> dict[str, Any]:
        """The weights to evaluate: the averaged ones where asked and kept, with the other collections."""
        if ema and state.ema is None:
            raise UsageError("averaged weights were asked for and the run keeps none: set config.train.ema.")
        held = {"params": state.ema if ema else state.params, **state.collections}
        return served(self.task, self.task.tuned(held) if hasattr(self.task, "tuned") else held)


def check_trainable(params: Any) -> None:
    """Refuses parameters that have no gradient.

    Raises:
      UsageError: for kernels in codes, naming what is trained in their place.
    """
    fixed = [
        path
        for path, leaf in stored_in(params).items()
        if not all(jnp.issubdtype(part.dtype, jnp.floating) for part in jax.tree.leaves(leaf))
    ]
    if fixed:
        raise UsageError(
            f"config.storage: {len(fixed)} kernels, {fixed[0]} among them, are stored as codes, which do not "
            f"train. Train the run that they were made from, or through rounding: configs/compress/qat.py."
        )


def _init_variables(experiment: Experiment, data: Described) -> Any:
    """Freshly initialised variables, with their axis names."""
    batch = jax.tree.map(jnp.asarray, dict(data.example_batch(1)))
    variables = experiment.task.init(jax.random.key(experiment.train.seed), batch)
    if experiment.storage:
        stored = boxed_like(variables["params"], experiment.storage)
        variables = with_beside({**variables, "params": stored})
    return variables


def _state(experiment: Experiment, optimizer: optax.GradientTransformation, variables: Any) -> TrainState:
    params = variables["params"]
    ema = experiment.train.ema
    return TrainState.create(
        params=params,
        opt_state=optimizer.init(params),
        # The run's key is apart from the one that initialised the parameters.
        key=jax.random.fold_in(jax.random.key(experiment.train.seed), 1),
        ema=None if ema is None else ema.init(params),
        collections={name: value for name, value in variables.items() if name != "params"},
    )


def build_program(
    experiment: Experiment, data: Described, devices: Sequence[jax.Device] | None = None
) -> Program:
    """Lays an experiment out on devices; compiles nothing yet.

    Raises:
      UsageError: where the mesh does not fit the devices, the batch does not divide, a parameter cannot be
        cut, a rule matches no parameter, no product runs in the arithmetic that was asked for, or the
        tokenizer has tokens that the model does not have.
    """
    train, batch_size = experiment.train, experiment.data.batch_size
    tokenizer = getattr(data, "tokenizer", None)  # of data that are open
    vocabulary = getattr(experiment.model, "vocab", None)
    if tokenizer is not None and vocabulary is not None:
        check_vocabulary(tokenizer, vocabulary)
    mesh = make_mesh(experiment.mesh, devices)
    rules = merge_rules(experiment.sharding)
    parts = batch_parts(mesh, rules) * train.accumulate
    if batch_size % parts:
        raise UsageError(
            f"config.data.batch_size is {batch_size}, which does not divide into {parts} parts "
            f"(data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} x accumulate={train.accumulate}): "
            f"choose a multiple of {parts}."
        )
    budget = Budget.of(train.steps, batch_size, data.num_examples)
    boxed = jax.eval_shape(lambda: _init_variables(experiment, data))
    variables = meta.unbox(boxed)
    precision = train.precision
    if train.arithmetic is not None:
        precision = within(train.arithmetic, precision, boxed["params"])
    optimizer = experiment.optimizer.transformation(variables["params"], budget)
    # From the shapes of the variables: the model is not traced a second time.
    shapes = jax.eval_shape(functools.partial(_state, experiment, optimizer), variables)
    laid_out = parameter_shardings(boxed, mesh, rules)
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda _: replicated, shapes).replace(
        params=laid_out["params"],
        ema=None if shapes.ema is None else laid_out["params"],
        collections={name: laid_out[name] for name in shapes.collections},
        opt_state=like_parameters(shapes.opt_state, variables["params"], laid_out["params"], mesh),
    )
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    return Program(
        experiment=experiment,
        data=data,
        budget=budget,
        mesh=mesh,
        rules=rules,
        optimizer=optimizer,
        learning_rate=experiment.optimizer.learning_rates(budget),
        shapes=placed,
        batch_sharding=batch_sharding(mesh, rules),
        precision=precision,
    )

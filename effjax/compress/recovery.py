"""A short training of a compressed network on the run's own data, taught by the network it was made from.

    loss = (1 - s) L(student) + s tau^2 KL(teacher / tau || student / tau)          s = `share`

Of a denoiser, whose outputs are no logits, the second part is the mean squared difference. Any task trains
so: what a network puts out is taken down where the task asks it, from teacher and student with the same
batch and the same random numbers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from effjax.compress.blocks import evaluated
from effjax.compress.subject import Batch, Calibration, Subject
from effjax.errors import UsageError
from effjax.train.tasks.diffusion import Diffusion
from effjax.train.tasks.distillation import divergence


@dataclasses.dataclass(frozen=True)
class Recovery:
    """How a network is trained.

    Attributes:
      steps: batches, one a step.
      lr: at its highest; it rises over the first tenth and falls along a cosine.
      weight_decay: of AdamW.
      clip: of the norm of the gradient.
      share: of the loss that the teacher gives; 0 asks none.
      temperature: tau.
    """

    steps: int = 500
    lr: float = 5e-4
    weight_decay: float = 0.0
    clip: float = 1.0
    share: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 0 or not 0 <= self.share <= 1:
            raise UsageError(f"steps={self.steps} is not negative, and share={self.share} between 0 and 1.")

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW along the schedule."""
        warm = max(1, self.steps // 10)
        schedule = optax.warmup_cosine_decay_schedule(0.0, self.lr, warm, max(self.steps, warm + 1))
        adam = optax.adamw(schedule, b2=0.95, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip), adam)


def recovered(
    subject: Subject,
    teacher: Subject | None,
    calibration: Calibration,
    how: Recovery,
) -> Subject:
    """Trains the parameters of a network.

    Args:
      subject: the network.
      teacher: the one it was made from; None has none.
      calibration: the training data.
      how: how long, and how.

    Raises:
      UsageError: for kernels in codes, which do not train, or a loss that is not finite.
    """
    if not how.steps:
        return subject
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(subject.params)):
        raise UsageError("kernels in codes do not train: recover before they are stored.")
    optimizer, share = how.optimizer(), how.share if teacher is not None else 0.0
    beside = {name: tree for name, tree in subject.variables.items() if name != "params"}

    @functools.partial(jax.jit, donate_argnums=(0,))
    def step(state: Any, taught: Any, batch: Batch, key: Array) -> tuple[Any, Float[Array, ""]]:
        params, held, beside = state

        def loss(params: Any) -> tuple[Float[Array, ""], Any]:
            variables = {**beside, "params": params}
            (means, changed), output = watched(subject, variables, batch, key)
            own = means["loss"].value()
            if share:
                assert teacher is not None
                _, goal = watched(teacher, taught, batch, key)
                weights = batch.get("weights")
                far = apart(subject, output, goal, how.temperature, weights)
                own = (1 - share) * own + share * far
            return own, changed

        (value, changed), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, held = optimizer.update(gradients, held, params)
        params = optax.apply_updates(params, updates)
        beside = {name: changed.get(name, tree) for name, tree in beside.items()}
        return (params, held, beside), value

    params = jax.tree.map(jnp.array, subject.params)  # a copy: the step takes what it is given
    state: Any = (params, optimizer.init(params), jax.tree.map(jnp.array, beside))
    taught = {} if teacher is None else teacher.variables
    losses: list[float] = []
    for number, batch in zip(range(how.steps), calibration.batches(), strict=False):
        keys = jax.random.split(jax.random.fold_in(calibration.key, number))
        prepared = subject.task.prepare(evaluated(batch), keys[0])
        state, value = step(state, taught, prepared, keys[1])
        losses.append(value)
        if (number + 1) % math.ceil(how.steps / 4) == 0 or number + 1 == how.steps:
            mean = float(jnp.mean(jnp.stack(losses)))
            if not math.isfinite(mean):
                raise UsageError(f"the loss is not finite by step {number + 1}: lower lr={how.lr}.")
            calibration.report(f"step {number + 1} of {how.steps}: loss {mean:.4f}.")
            losses = []
    return dataclasses.replace(subject, variables={**state[2], "params": state[0]})


def watched(
    subject: Subject, variables: Mapping[str, Any], batch: Batch, key: Array
) -> tuple[tuple[Any, Any], Any]:
    """The task's loss, and what its network put out on the way."""
    return _heard(subject, lambda: subject.task.loss(variables, batch, key))


def evaluated_output(subject: Subject, variables: Mapping[str, Any], batch: Batch) -> Array:
    """What a network puts out in evaluation."""
    output: Array = _heard(subject, lambda: subject.task.metrics(variables, evaluated(batch)))[1]
    return output


def _heard(subject: Subject, ask: Callable[[], Any]) -> tuple[Any, Any]:
    """What was answered, and what the network put out last."""
    outputs: list[Any] = []

    def take(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        made = call(*args, **kwargs)
        if context.module.path == () and context.method_name == "__call__":
            outputs.append(made)
        return made

    with nn.intercept_methods(take):
        told = ask()
    if not outputs:
        raise UsageError(f"{type(subject.task).__name__} asks its network in a way nobody can listen to.")
    return told, outputs[-1]


def apart(
    subject: Subject, output: Array, goal: Array, temperature: float, weights: Array | None
) -> Float[Array, ""]:
    """How far what a network puts out is from what its teacher does.

    Args:
      subject: the network.
      output: what it put out.
      goal: what its teacher did.
      temperature: of logits.
      weights: of the rows of logits; None counts all.
    """
    goal = jax.lax.stop_gradient(goal).astype(jnp.float32)
    output = output.astype(jnp.float32)
    if isinstance(subject.task, Diffusion):
        return jnp.mean(jnp.square(output - goal))
    rows = output.reshape(-1, output.shape[-1]), goal.reshape(-1, goal.shape[-1])
    each = divergence(rows[1], rows[0], temperature)  # [R]
    if weights is None or weights.size != each.size:
        return jnp.mean(each)
    return jnp.sum(each * weights.ravel()) / jnp.maximum(jnp.sum(weights), 1)

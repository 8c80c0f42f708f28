"""EfficientQAT: blocks trained one by one with all that is in them, then step sizes alone end to end.

    Block-AP    min_{W, s, z}  | block_i( Q(W, s, z), x^_i )  -  block_i( W_0, x_i ) |^2       i = 1, 2, ..
    E2E-QP      min_s  loss( s (c - z) )                            codes c and zeros z stay as they are

x_i enters block i of the trained network and x^_i that of the compressed one, whose blocks before i are done.
Q rounds straight through (`effjax.compress.rounding`) and begins as rounding to the nearest on the grid of
the smallest and largest weight. All parameters of a block are trained: kernels, norms, biases.

Bits a weight are those of the layout: N + (N + 16) / g, such as 2.28 of 2 bits in groups of 64.

Source: Chen et al., "EfficientQAT: Efficient Quantization-Aware Training for Large Language Models", ACL
2025, arXiv:2407.11062, sections 3.2 and 3.3, and the published code: Adam without weight decay, both learning
rates of Block-AP on a cosine to 1/20; in E2E-QP gradients cut to a norm of 0.3.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from effjax.compress.blocks import Blocks, difference, evaluated, stack_by_stack
from effjax.compress.rounding import SMALLEST, fake
from effjax.compress.storage.matrices import flat, unflat
from effjax.compress.storage.trees import replaced, stored_in
from effjax.compress.storage.uniform import QTensor, Uniform
from effjax.compress.subject import Calibration, Subject, chosen, leaf_at
from effjax.errors import UsageError
from effjax.layers.stored import Place, Stored
from effjax.matching import path_of

Trained = dict[str, dict[str, Any]]
Places = Mapping[str, Place]


@dataclasses.dataclass(frozen=True)
class EfficientQAT:
    """Trains the kernels of every stack of blocks into a layout.

    The defaults are the published ones for 2 bits and thousands of long texts; a small network wants larger
    learning rates and more epochs.

    Attributes:
      layout: of the codes.
      kernels: regexps of whole paths; only those inside a stack of blocks are taken.
      leave: regexps of kernels that stay arrays, whatever `kernels` says.
      batches: how many of training data the blocks are taught on; all lie in memory as they enter a block.
      epochs: how often each is seen by every block; 0 leaves rounding to the nearest.
      weight_lr: learning rate of kernels and all other parameters of a block; 0 leaves them.
      grid_lr: of scales and zeros.
      end_to_end: steps of the second phase, a batch each.
      end_to_end_lr: its learning rate.
      clip: of the norm of its gradients.
    """

    layout: Uniform = dataclasses.field(default_factory=lambda: Uniform(2, 64, False))
    kernels: tuple[str, ...] = (".*",)
    leave: tuple[str, ...] = ()
    batches: int = 128
    epochs: int = 2
    weight_lr: float = 2e-5
    grid_lr: float = 1e-4
    end_to_end: int = 128
    end_to_end_lr: float = 2e-5
    clip: float = 0.3

    def __post_init__(self) -> None:
        if self.batches < 1 or self.epochs < 0 or self.end_to_end < 0:
            raise UsageError("batches has to be at least 1, epochs and end_to_end at least 0.")

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Trains.

        Raises:
          UsageError: where no kernel stands in a stack of blocks, a group does not divide one, or what
            enters the blocks is not finite.
        """
        places = chosen(subject, self.kernels, self.leave)
        batches = calibration.first(self.batches)
        steps = self.epochs * len(batches)

        def compress(blocks: Blocks, own: Places) -> Any:
            return self._taught(blocks, own, steps, calibration.report)

        small = stack_by_stack(subject, places, batches, self.layout, compress)
        return end_to_end(small, calibration, self.end_to_end, self.end_to_end_lr, self.clip)

    def _taught(
        self, blocks: Blocks, places: Places, steps: int, report: Callable[[str], None]
    ) -> Callable[..., Any]:
        """What Block-AP makes of one block."""
        teach = jax.jit(lambda *given: self._trained(blocks, places, steps, *given))

        def compress(
            layer: int, variables: Any, before: Any, x: Any, goal: Any, each: Any, shared: Any
        ) -> Any:
            start = self._start(variables["params"], places)
            trained, losses = teach(start, variables, x, goal, each, shared)
            if steps:
                report(
                    f"{blocks.path} {layer + 1} of {blocks.stack.depth}: squared error "
                    f"{float(losses[0]):.3g} at first, {float(losses[-1]):.3g} at last."
                )
            return replaced(variables["params"], self._held(trained, places))

        return compress

    def _start(self, params: Any, places: Places) -> Trained:
        """What is trained in a block, as it is before."""
        matrices = {path: flat(leaf_at(params, path), place) for path, place in places.items()}
        grids = {path: self.layout.fit(matrix, path) for path, matrix in matrices.items()}
        flat_params, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_stored)
        rest = {path_of(key_path): leaf for key_path, leaf in flat_params if not _is_stored(leaf)}
        return {
            "matrix": matrices,
            "rest": {path: leaf for path, leaf in rest.items() if path not in places},
            "scale": {path: scale for path, (scale, _) in grids.items()},
            "zero": {path: zero for path, (_, zero) in grids.items()},
        }

    def _trained(
        self,
        blocks: Blocks,
        places: Places,
        steps: int,
        trained: Trained,
        variables: Mapping[str, Any],
        x: Any,
        goal: Any,
        each: Any,
        shared: Any,
    ) -> tuple[Trained, Float[Array, " steps"]]:
        """Trains one block; batches are taken in turn."""
        count = len(jax.tree.leaves(x)[0])
        optimizer = optax.partition(
            {
                "matrix": _adam(self.weight_lr, steps),
                "rest": _adam(self.weight_lr, steps),
                "scale": _adam(self.grid_lr, steps),
                "zero": _adam(0.0 if self.layout.symmetric else self.grid_lr, steps),
            },
            dict(zip(trained, trained, strict=True)),
        )

        def loss(trained: Trained, at: Array) -> Float[Array, ""]:
            one = jax.tree.map(lambda leaf: leaf[at], (x, each, shared))
            params = replaced(variables["params"], {**trained["rest"], **self._faked(trained, places)})
            y = blocks.run({**variables, "params": params}, *one)
            return difference(y, jax.tree.map(lambda leaf: leaf[at], goal))

        def step(state: Any, number: Array) -> tuple[Any, Float[Array, ""]]:
            trained, held = state
            value, gradients = jax.value_and_grad(loss)(trained, number % count)
            updates, held = optimizer.update(gradients, held, trained)
            return (optax.apply_updates(trained, updates), held), value

        (trained, _), losses = jax.lax.scan(step, (trained, optimizer.init(trained)), jnp.arange(steps))
        return trained, losses

    def _faked(self, trained: Trained, places: Places) -> dict[str, Array]:
        made = {}
        for path, place in places.items():
            grid = trained["scale"][path], trained["zero"][path]
            matrix = fake(self.layout, trained["matrix"][path].astype(jnp.float32), *grid)
            made[path] = unflat(matrix, place.ins, place.outs, place.turned)
        return made

    def _held(self, trained: Trained, places: Places) -> dict[str, Any]:
        """The parameters of a block with its kernels in codes."""
        made = dict(trained["rest"])
        for path, place in places.items():
            # Codes are taken on the scales that are stored.
            scale = jnp.maximum(trained["scale"][path], SMALLEST).astype(self.layout.scale)
            scale = scale.astype(jnp.float32)
            zero = jnp.clip(jnp.round(trained["zero"][path]), 0, self.layout.levels)
            made[path] = self.layout.encode(trained["matrix"][path], place, scale, zero)
        return made


def end_to_end(subject: Subject, calibration: Calibration, steps: int, lr: float, clip: float) -> Subject:
    """E2E-QP: trains the scales of all codes on the task's own loss.

    Args:
      subject: a network with kernels in codes.
      calibration: the training data.
      steps: a batch each; 0 trains nothing.
      lr: at the start; it falls to 0 along a cosine.
      clip: of the norm of the gradients.
    """
    if not steps:
        return subject
    stored = {path: leaf for path, leaf in stored_in(subject.params).items() if isinstance(leaf, QTensor)}
    scales = {path: leaf.scale.astype(jnp.float32) for path, leaf in stored.items()}
    schedule = optax.cosine_decay_schedule(lr, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.adam(schedule))

    @jax.jit
    def step(scales: Any, held: Any, variables: Any, batch: Any, key: Any) -> tuple[Any, Any, Any]:
        def loss(scales: Any) -> Any:
            made = {path: dataclasses.replace(leaf, scale=scales[path]) for path, leaf in stored.items()}
            params = replaced(variables["params"], made)
            means, _ = subject.task.loss({**variables, "params": params}, batch, key)
            return means["loss"].value()

        value, gradients = jax.value_and_grad(loss)(scales)
        updates, held = optimizer.update(gradients, held, scales)
        return optax.apply_updates(scales, updates), held, value

    held, losses = optimizer.init(scales), []
    for number, batch in enumerate(calibration.first(steps)):
        keys = jax.random.split(jax.random.fold_in(calibration.key, number))
        prepared = subject.task.prepare(evaluated(batch), keys[0])
        scales, held, value = step(scales, held, subject.variables, prepared, keys[1])
        losses.append(float(value))
        if (number + 1) % math.ceil(steps / 4) == 0:
            calibration.report(
                f"end to end, step {number + 1} of {steps}: loss {sum(losses) / len(losses):.4f}."
            )
            losses = []
    made = {
        path: dataclasses.replace(leaf, scale=scales[path].astype(leaf.scale.dtype))
        for path, leaf in stored.items()
    }
    return subject.with_params(replaced(subject.params, made))


def _adam(lr: float, steps: int) -> optax.GradientTransformation:
    if not lr:
        return optax.set_to_zero()
    return optax.adam(optax.cosine_decay_schedule(lr, max(steps, 1), alpha=1 / 20))


def _is_stored(leaf: Any) -> bool:
    return isinstance(leaf, Stored)

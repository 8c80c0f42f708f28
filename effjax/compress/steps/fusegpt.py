"""FuseGPT: layers are taken out, and their neighbours take up what they held, by learned coefficients.

    influence   MI_i = 1 - cos(H, H without layer i), the mean over tokens      H leaves the last layer
    fusion      W_j' = W_j + (A_j B_j) * W_p + C_j D_j          * by element, W_p frozen, of layer p, gone
    training    min  | group without p, fused  -  group as it was |^2          B and D are zero at the start

The layer of least influence goes; the others of its group, its neighbours in the stack, are fused and trained
on what enters the group, all other parameters of them with it. Then every W' is folded into one matrix, and
influence is measured again. What is left is an ordinary network of fewer layers.

Layers that are gone are masked, so that all trials of all rounds are one compiled program. 1 - cos is taken
as half the squared distance of the unit vectors: exactly 0 where a layer changes nothing.

Source: Pei et al., "FuseGPT: Learnable Layers Fusion of Generative Pre-trained Transformers", 2024,
arXiv:2411.14507, and the published code: A and C uniform within 1 / sqrt(inputs), Adam without weight decay
along a cosine to zero. Its groups of 8 count the layer that goes. Where the paper takes the squared error,
the code trains on a KL divergence of softmaxes over the axis of the batch; there coefficients of earlier
rounds are trained on, and not folded before the end.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from effjax.compress.blocks import Blocks, Entered, difference, found_in, within
from effjax.compress.storage.matrices import flat, unflat
from effjax.compress.storage.trees import leaves_of, replaced, stored_in
from effjax.compress.structure.layers import put_together, take_apart
from effjax.compress.subject import Calibration, Subject, leaf_at
from effjax.errors import UsageError
from effjax.layers.stored import Place
from effjax.models.pyramid import Pyramid

Places = Mapping[str, Place]


@dataclasses.dataclass(frozen=True)
class FuseGPT:
    """Takes layers out one by one, and fuses each into its neighbours.

    The defaults are the published ones, for billions of parameters and 1024 texts in batches of 8; a small
    network wants a larger learning rate.

    Attributes:
      left: share of the layers that is left; a part of a layer goes whole.
      neighbours: of a layer that goes, which it is fused into; fewer where there are no more.
      rank: of the coefficients A B, or that of the matrix where it is less; 0 has none.
      adapter_rank: of C D, likewise.
      influence_batches: of training data, that influence is measured on.
      batches: that groups are trained on; all lie in memory as they enter a group.
      epochs: how often each is seen in a round; 0 takes layers out and trains nothing.
      coefficient_lr: learning rate of A and B.
      lr: of C, D and what is no kernel.
    """

    left: float = 0.75
    neighbours: int = 7
    rank: int = 128
    adapter_rank: int = 128
    influence_batches: int = 4
    batches: int = 128
    epochs: int = 20
    coefficient_lr: float = 1e-3
    lr: float = 9.65e-6

    def __post_init__(self) -> None:
        if not 0 < self.left <= 1 or min(self.rank, self.adapter_rank, self.epochs) < 0:
            raise UsageError(
                f"left={self.left} is a share above 0 and at most 1; rank, adapter_rank and epochs are not "
                f"negative."
            )
        if min(self.neighbours, self.influence_batches, self.batches) < 1:
            raise UsageError("neighbours, influence_batches and batches are at least 1.")

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Takes layers out.

        Raises:
          UsageError: for a network whose layers are not alike or cannot be taken out, kernels in codes, a
            share that leaves no layer, or what is not finite.
        """
        layers = take_apart(subject)
        kept = self._check(subject, len(layers))
        if kept == len(layers):
            return subject
        # A network whose layers know their place says so before anything is trained.
        put_together(subject, layers[1:])
        batches = calibration.first(max(self.batches, self.influence_batches))
        ((blocks, entered),) = found_in(subject, batches)
        if not isinstance(entered.x, jax.Array):
            raise UsageError("what goes through the layers is no array of tokens, and cannot be compared.")
        variables = {
            name: leaf_at(tree, blocks.path)
            for name, tree in subject.variables.items()
            if blocks.path in tree
        }
        places = within(blocks, subject.places())
        influence = jax.jit(functools.partial(influences, blocks))
        run = jax.jit(functools.partial(all_through, blocks))
        teach = jax.jit(functools.partial(self.taught, blocks, places))
        few, many = (_first(entered, count) for count in (self.influence_batches, self.batches))
        alive = np.ones(len(layers), bool)
        for number in range(len(layers) - kept):
            each = np.asarray(influence(variables, jnp.asarray(alive), few))
            if not np.isfinite(each[alive]).all():
                raise UsageError("what leaves the layers is not finite on the calibration data.")
            gone = int(np.argmin(each))
            told = f"layer {gone} goes, influence {each[gone]:.4g} of up to {each[alive].max():.4g}"
            if self.epochs:
                group = group_of(alive, gone, self.neighbours)
                numbers = np.arange(len(alive))
                ahead = jnp.asarray(alive & (numbers < group[0]))
                x = dataclasses.replace(many, x=run(variables, ahead, many))
                goal = run(variables, jnp.asarray(np.isin(numbers, group)), x)
                stay = jnp.asarray(group[group != gone])
                key = jax.random.fold_in(calibration.key, number)
                variables, first, last = teach(variables, stay, jnp.asarray(gone), x, goal, key)
                if not math.isfinite(float(last)):
                    raise UsageError(f"the squared error is not finite: lower lr={self.lr}, coefficient_lr.")
                told += f"; squared error of its group {float(first):.4g}, trained {float(last):.4g}"
            alive[gone] = False
            calibration.report(f"{told}; {alive.sum()} layers left.")
        made = [
            dataclasses.replace(layers[at], variables=jax.tree.map(lambda leaf: leaf[at], variables))  # noqa: B023
            for at in np.flatnonzero(alive)
        ]
        return put_together(subject, made)

    def _check(self, subject: Subject, depth: int) -> int:
        """How many layers are left."""
        model = subject.model
        if isinstance(model, Pyramid) or model.layer_blocks:
            raise UsageError(
                "layers that differ cannot be fused: take layers out before anything else is changed in them."
            )
        if stored_in(subject.params["blocks"]):
            raise UsageError("kernels in codes cannot be fused: take layers out before they are stored.")
        kept = math.floor(self.left * depth + 1e-9)
        if not kept:
            raise UsageError(f"left={self.left} of {depth} layers leaves none: {1 / depth:.3g} is the least.")
        return kept

    def taught(
        self,
        blocks: Blocks,
        places: Places,
        variables: Any,
        stay: Int[Array, " m"],
        gone: Int[Array, ""],
        entered: Entered,
        goal: Float[Array, "k *stream"],
        key: Array,
    ) -> tuple[Any, Float[Array, ""], Float[Array, ""]]:
        """Fuses a layer into others, and trains them.

        Args:
          blocks: the stack.
          places: kernels by their path in a block.
          variables: of the stack, layers in front.
          stay: numbers of the other layers of the group, in order.
          gone: the layer that goes.
          entered: what enters the group, batches in front.
          goal: what shall leave it.
          key: of the factors that do not start at zero.

        Returns:
          The variables with the fused layers folded, and the mean squared error before and after.
        """
        count = len(goal)
        own = jax.tree.map(lambda leaf: leaf[stay], variables)
        leaves = leaves_of(own["params"])
        removed = {path: leaf[gone] for path, leaf in leaves_of(variables["params"]).items()}
        # What is each layer's own stands behind the batches.
        each = jax.tree.map(lambda leaf: leaf[:, stay], entered.each)
        entered = dataclasses.replace(entered, each=each)

        def folded(trained: Any) -> Any:
            made = dict(trained["rest"])
            for path, place in places.items():
                each = jax.vmap(functools.partial(fused, place=place), in_axes=(0, None, 0, 0))
                factors = trained["coefficients"][path], trained["adapters"][path]
                made[path] = each(leaves[path], removed[path], *factors)
            return {**own, "params": replaced(own["params"], made)}

        def error(trained: Any, at: Array) -> Float[Array, ""]:
            one = jax.tree.map(lambda leaf: leaf[at], entered)
            every = jnp.ones(len(stay), bool)
            return difference(through(blocks, folded(trained), every, one), goal[at])

        def step(state: Any, number: Array) -> tuple[Any, None]:
            trained, held = state
            gradients = jax.grad(error)(trained, number % count)
            updates, held = optimizer.update(gradients, held, trained)
            return (optax.apply_updates(trained, updates), held), None

        trained = self._start(places, leaves, key)
        steps = self.epochs * count
        optimizer = optax.partition(
            {"coefficients": _adam(self.coefficient_lr, steps), "others": _adam(self.lr, steps)},
            {"coefficients": "coefficients", "adapters": "others", "rest": "others"},
        )
        mean = lambda trained: jnp.mean(jax.lax.map(functools.partial(error, trained), jnp.arange(count)))  # noqa: E731
        first = mean(trained)
        (trained, _), _ = jax.lax.scan(step, (trained, optimizer.init(trained)), jnp.arange(steps))
        new = jax.tree.map(lambda leaf, rows: leaf.at[stay].set(rows), variables, folded(trained))
        return new, first, mean(trained)

    def _start(self, places: Places, leaves: Mapping[str, Any], key: Array) -> dict[str, dict[str, Any]]:
        """What is trained, as it is at the start, layers in front."""
        made: dict[str, dict[str, Any]] = {"coefficients": {}, "adapters": {}}
        for path, place in sorted(places.items()):
            for name, rank in (("coefficients", self.rank), ("adapters", self.adapter_rank)):
                key, own = jax.random.split(key)
                made[name][path] = _factors(own, len(leaves[path]), place, rank)
        return {**made, "rest": {path: leaf for path, leaf in leaves.items() if path not in places}}


def group_of(alive: Bool[np.ndarray, " l"], gone: int, neighbours: int) -> Int[np.ndarray, " g"]:
    """The layers of a group, in order: half of the neighbours, or one more, before the one that goes.

    Args:
      alive: which layers there are.
      gone: the one that goes; it is among them.
      neighbours: how many others there are, where there are as many.
    """
    order = np.flatnonzero(alive)
    size = min(neighbours + 1, len(order))
    start = int(np.searchsorted(order, gone)) - size // 2
    start = min(max(start, 0), len(order) - size)
    return order[start : start + size]


def fused(
    kernel: Float[Array, "..."],
    removed: Float[Array, "..."],
    coefficients: tuple[Float[Array, "*front i r"], Float[Array, "*front r o"]],
    adapters: tuple[Float[Array, "*front i s"], Float[Array, "*front s o"]],
    place: Place,
) -> Float[Array, "..."]:
    """W + (A B) * W_p + C D as one kernel.

    Args:
      kernel: W.
      removed: W_p, no gradient goes there.
      coefficients: A and B.
      adapters: C and D.
      place: of the kernel.
    """
    old, frozen = (flat(x, place).astype(jnp.float32) for x in (kernel, removed))  # [..., I, O]
    share = jnp.matmul(*coefficients)  # [..., I, O]
    made = old + share * jax.lax.stop_gradient(frozen) + jnp.matmul(*adapters)  # [..., I, O]
    return unflat(made.astype(kernel.dtype), place.ins, place.outs, place.turned)


def through(blocks: Blocks, variables: Any, mask: Bool[Array, " l"], entered: Entered) -> Any:
    """What leaves a stack of which only some layers are there.

    Args:
      blocks: the stack.
      variables: of all its layers, in front.
      mask: which are there.
      entered: what enters, without batches in front.
    """

    def layer(x: Any, slices: Any) -> tuple[Any, None]:
        own, each, there = slices
        run = lambda x: blocks.run(own, x, each, entered.shared)  # noqa: E731
        return jax.lax.cond(there, run, lambda x: x, x), None

    return jax.lax.scan(layer, entered.x, (variables, entered.each, mask))[0]


def all_through(blocks: Blocks, variables: Any, mask: Bool[Array, " l"], entered: Entered) -> Any:
    """The same, of all batches."""
    return jax.lax.map(functools.partial(through, blocks, variables, mask), entered)


def influences(
    blocks: Blocks, variables: Any, alive: Bool[Array, " l"], entered: Entered
) -> Float[Array, " l"]:
    """Macro Influence of every layer; infinity of those that are gone.

    Args:
      blocks: the stack.
      variables: of all its layers, in front.
      alive: which are there.
      entered: what enters, batches in front.
    """
    numbers = jnp.arange(len(alive))

    def of_batch(one: Entered) -> Float[Array, " l"]:
        leaving = lambda mask: _unit(through(blocks, variables, mask, one))  # noqa: E731
        whole = leaving(alive)  # [..., C]

        def without(number: Array) -> Float[Array, ""]:
            apart = jnp.sum(jnp.square(leaving(alive & (numbers != number)) - whole), axis=-1)  # [...]
            return jnp.mean(apart) / 2

        return jax.lax.map(without, numbers)

    return jnp.where(alive, jnp.mean(jax.lax.map(of_batch, entered), axis=0), jnp.inf)


def _unit(x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def _factors(
    key: Array, layers: int, place: Place, rank: int
) -> tuple[Float[Array, "m *front i r"], Float[Array, "m *front r o"]]:
    """Two factors of every layer whose product is zero."""
    ins, outs = place.matrix
    rank = min(rank, ins, outs)
    bound = ins**-0.5
    left = jax.random.uniform(key, (layers, *place.front, ins, rank), jnp.float32, -bound, bound)
    return left, jnp.zeros((layers, *place.front, rank, outs), jnp.float32)


def _adam(lr: float, steps: int) -> optax.GradientTransformation:
    if not lr or not steps:
        return optax.set_to_zero()
    return optax.adam(optax.cosine_decay_schedule(lr, steps), b2=0.95)


def _first(entered: Entered, count: int) -> Entered:
    """What enters in the first batches."""
    first: Entered = jax.tree.map(lambda leaf: leaf[:count], entered)
    return first

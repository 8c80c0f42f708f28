"""The blocks of a stack, each by itself: what enters the first in a trained network, and any of them alone.

Methods that teach a block to give what it gave before it was compressed need its inputs and everything else
that it is handed (positions, conditions, what is each layer's own). `found_in` runs a network in evaluation
and takes these down where a `Stack` begins; a model knows nothing of it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.compress.storage.trees import replaced
from effjax.compress.subject import Batch, Subject, leaf_at
from effjax.errors import UsageError
from effjax.layers.stack import Stack, layer_of
from effjax.layers.stored import Place, Stored
from effjax.matching import path_of

# What a stack may be told that makes its layers differ in more than their parameters.
_OTHERWISE = ("points", "before", "through", "part", "turns")


@flax.struct.dataclass
class Entered:
    """What a stack is given, for every batch in front.

    Attributes:
      x: what enters the first block.
      each: what every layer has for itself, depth behind the batches.
      shared: what all layers are given.
    """

    x: Any
    each: Any
    shared: Any


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A stack as it stands in a network.

    Attributes:
      path: of its parameters.
      stack: its definition.
      method: of the block.
    """

    path: str
    stack: Stack
    method: str

    def layer(self, variables: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The variables of one block."""
        own = {name: tree for name, tree in variables.items() if _has(tree, self.path)}
        return {name: layer_of(leaf_at(tree, self.path), number) for name, tree in own.items()}

    def run(self, variables: Mapping[str, Any], x: Any, each: Any, shared: Any) -> Any:
        """What one block makes of what enters it, in evaluation."""
        block = self.stack.block.clone(parent=None, name=None)
        y, _ = block.apply(variables, x, each, *shared, method=self.method, train=False)
        return y


def found_in(subject: Subject, batches: Sequence[Batch]) -> list[tuple[Blocks, Entered]]:
    """The stacks of a network in the order in which they run, and what enters them.

    Args:
      subject: the network.
      batches: as it was trained on.

    Raises:
      UsageError: where it has no stack, or one whose blocks cannot be run by themselves.
    """
    told: dict[str, Blocks] = {}

    @jax.jit
    def entered(variables: Any, batch: Batch) -> dict[str, Entered]:
        made: dict[str, Entered] = {}
        inside = False

        def take(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            nonlocal inside
            module = context.module
            # A stack inside a stack belongs to the block that it is part of.
            if inside or not isinstance(module, Stack) or context.method_name != "__call__":
                return call(*args, **kwargs)
            path = "/".join(module.path)
            told[path] = _described(module, path, kwargs)
            made[path] = Entered(args[0], kwargs.get("each"), tuple(args[1:]))
            inside = True
            result = call(*args, **kwargs)
            inside = False
            return result

        with nn.intercept_methods(take):
            subject.task.metrics(variables, batch)
        return made

    made = [entered(subject.variables, evaluated(batch)) for batch in batches]
    if not told:
        raise UsageError(f"{type(subject.model).__name__} has no stack of blocks to teach one by one.")
    return [(told[path], jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one[path] for one in made)))
            for path in told]  # fmt: skip


def stack_by_stack(
    subject: Subject,
    places: Mapping[str, Place],
    batches: Sequence[Batch],
    layout: Any,
    compress: Callable[[Blocks, dict[str, Place]], Callable[..., Any]],
) -> Subject:
    """Compresses the kernels of all stacks of a network, in the order in which these run.

    Args:
      subject: the network as it was trained.
      places: its kernels that are taken.
      batches: of training data.
      layout: that the kernels get, for its groups.
      compress: from a stack, and its kernels by their path in a block, to what `one_by_one` is given.

    Raises:
      UsageError: where no kernel stands in a stack of blocks, a group does not divide one, or what enters or
        leaves a block is not finite.
    """
    small, taken = subject, 0
    for number, (blocks, entered) in enumerate(found_in(subject, batches)):
        own = within(blocks, places)
        for path, place in own.items():
            layout.groups(place.matrix[0], f"{blocks.path}/{path}")
        if not own:
            continue
        # A later stack is entered by what the compressed ones before it made.
        x = found_in(small, batches)[number][1].x if taken else entered.x
        made = one_by_one(blocks, subject.variables, entered, x, compress(blocks, own))
        small, taken = small.with_params(replaced(small.params, made)), taken + len(own)
    if not taken:
        raise UsageError("kernels names none inside the blocks, which alone are taught.")
    return small


def one_by_one(
    blocks: Blocks,
    variables: Mapping[str, Any],
    entered: Entered,
    x: Any,
    compress: Callable[..., Any],
) -> dict[str, Any]:
    """Compresses the blocks of a stack in order, each entered by what the compressed ones before it gave.

    Args:
      blocks: the stack.
      variables: of the whole network as it was trained.
      entered: what entered the stack then.
      x: what enters it now.
      compress: from the number of a block, its variables, what entered it in the trained network, what enters
        it now, what it gave, what is its own and what is shared, all with batches in front, to parameters.

    Returns:
      The parameters of the stack by path, layers in front.

    Raises:
      UsageError: where what a block gives is not finite.
    """

    @jax.jit
    def forward(variables: Any, x: Any, each: Any, shared: Any) -> Any:
        return jax.lax.map(lambda one: blocks.run(variables, *one), (x, each, shared))

    before, layers = entered.x, []
    for layer in range(blocks.stack.depth):
        own = blocks.layer(variables, layer)
        each = jax.tree.map(lambda leaf: leaf[:, layer], entered.each)  # noqa: B023
        goal = forward(own, before, each, entered.shared)
        if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(goal)):
            raise UsageError(
                f"block {layer} of {blocks.path!r} gives what is not finite on the calibration data: look at "
                f"its batches."
            )
        layers.append(compress(layer, own, before, x, goal, each, entered.shared))
        x = forward({**own, "params": layers[-1]}, x, each, entered.shared)
        before = goal
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    leaves, _ = jax.tree_util.tree_flatten_with_path(stacked, is_leaf=lambda leaf: isinstance(leaf, Stored))
    return {f"{blocks.path}/{path_of(key_path)}": leaf for key_path, leaf in leaves}


def within(blocks: Blocks, places: Mapping[str, Place]) -> dict[str, Place]:
    """The kernels of one block of a stack, by path in it."""
    start = f"{blocks.path}/"
    return {
        path.removeprefix(start): dataclasses.replace(place, shape=place.shape[1:], names=place.names[1:])
        for path, place in places.items()
        if path.startswith(start)
    }


def evaluated(batch: Batch) -> dict[str, Array]:
    """A batch of training data as the task's metrics take it: every row counts."""
    rows = len(jax.tree.leaves(batch)[0])
    return {"mask": jnp.ones(rows), **{name: jnp.asarray(value) for name, value in batch.items()}}


def difference(a: Any, b: Any) -> Float[Array, ""]:
    """Mean squared difference of two streams, in float32."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(
        (jnp.mean(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32))) for x, y in pairs),
        start=jnp.zeros(()),
    )


def _described(stack: Stack, path: str, kwargs: Mapping[str, Any]) -> Blocks:
    otherwise = [name for name in _OTHERWISE if kwargs.get(name)]
    otherwise += ["shared parameters"] * bool(stack.shared) + ["a definition each"] * bool(stack.blocks)
    if otherwise:
        raise UsageError(
            f"the blocks of {path!r} are run with {', '.join(otherwise)}, and cannot "
            f"be taught one by one: round them with a step that looks at the weights alone."
        )
    return Blocks(path, stack.clone(parent=None, name=None), kwargs.get("method", "__call__"))


def _has(tree: Any, path: str) -> bool:
    for name in path.split("/"):
        if not isinstance(tree, Mapping) or name not in tree:
            return False
        tree = tree[name]
    return True

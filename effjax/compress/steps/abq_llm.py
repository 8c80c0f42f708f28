"""ABQ-LLM: a block's ranges learned for weights and activations of few bits, with its products in bit planes.

    W^ = Q( s W + a b^T ; clip )          s: equivalent transforms, effjax.compress.equivalent
    clip       a grid from sigma(l) min w to sigma(h) max w
    a b^T      added to the kernels that lead back to the stream, before they are rounded; it costs nothing

    L = - log cos(d^, d) - log cos(d^, d*) + |d^ - d|^2 + |d^ - d*|^2 + KL(A | A^) + KL(A^ | A)

d^ is what the compressed block gives, d what the trained one gives in the trained network, d* what it gives
for what enters it now, and A are maps of attention. Only s, l, h, a and b are trained, block by block.

The default is the paper's W2*A8: five codes, -2 to 2, and eight bits a token.

Source: Zeng et al., "ABQ-LLM: Arbitrary-Bit Quantized Inference Acceleration for Large Language Models", AAAI
2025, arXiv:2408.08554, sections 3.2 and 3.3. The learning rates, scales that begin at act^0.5 / weight^0.5,
squared errors beside the cosines, and vectors in the first three blocks and the last four are the published
code's. That takes the softmax of its maps once more before it compares them; here they are compared as they
are.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, DTypeLike, Float

from effjax.compress.blocks import Blocks, difference, evaluated, stack_by_stack
from effjax.compress.equivalent import Pair, channels, pairs_of, scaled
from effjax.compress.rounding import fake
from effjax.compress.storage.bit_planes import BitPlanes, tokens_coded
from effjax.compress.storage.matrices import flat, unflat
from effjax.compress.storage.trees import replaced
from effjax.compress.subject import Calibration, Subject, chosen
from effjax.compress.watch import watch
from effjax.errors import UsageError
from effjax.layers.stored import Place, Stored
from effjax.matching import path_of
from effjax.mixers.attention import Attention

Places = Mapping[str, Place]
Learned = dict[str, dict[Any, Any]]


@flax.struct.dataclass
class Faked(Stored):
    """A kernel while its block is taught: what enters it is coded and decoded token by token."""

    kernel: Any
    place: Place = flax.struct.field(pytree_node=False)
    activations: int = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(self.kernel.shape)

    def whole(self, dtype: DTypeLike) -> Float[Array, "..."]:
        """The array."""
        return jnp.asarray(self.kernel.astype(dtype))

    def product(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Maps `[..., *ins]` to `[..., *outs]`."""
        lead = x.shape[: x.ndim - len(self.place.ins)]
        rows = x.reshape(-1, self.place.matrix[0])  # [R, K]
        if self.activations:
            codes, scale, zero = tokens_coded(rows, self.activations)
            rows = ((codes - zero) * scale).astype(x.dtype)
        y = rows @ flat(self.kernel, self.place).astype(x.dtype)  # [R, N]
        return y.reshape(*lead, *self.place.outs)


@dataclasses.dataclass(frozen=True)
class ABQ:
    """Learns the ranges of the kernels of every stack of blocks, and stores them in planes.

    Attributes:
      layout: of the codes, and of what enters.
      kernels: regexps of whole paths; only those inside a stack of blocks are taken.
      leave: regexps of kernels that stay arrays, whatever `kernels` says.
      batches: how many of training data the blocks are taught on.
      epochs: how often each is seen by every block; 0 leaves the scales as they begin.
      scale_lr: learning rate of the transforms; 0 leaves them out.
      clip_lr: of the ends of the grids.
      vector_lr: of the compensation vectors; 0 leaves them out.
      ends: blocks with vectors, at the start and at the end of a stack.
      corrected: whether the loss has cosines and maps, or squared errors to the trained network alone.
    """

    layout: BitPlanes = dataclasses.field(default_factory=BitPlanes)
    kernels: tuple[str, ...] = (".*",)
    leave: tuple[str, ...] = ()
    batches: int = 128
    epochs: int = 10
    scale_lr: float = 5e-3
    clip_lr: float = 1e-2
    vector_lr: float = 1e-2
    ends: tuple[int, int] = (3, 4)
    corrected: bool = True

    def __post_init__(self) -> None:
        if self.batches < 1 or self.epochs < 0:
            raise UsageError("batches has to be at least 1, epochs at least 0.")

    def apply(self, subject: Subject, calibration: Calibration) -> Subject:
        """Learns the ranges.

        Raises:
          UsageError: where no kernel stands in a stack of blocks, a group does not divide one, or what
            enters the blocks is not finite.
        """
        places = chosen(subject, self.kernels, self.leave)
        batches = calibration.first(self.batches)
        entering = watch(subject, places, map(evaluated, batches), _tallest, jnp.maximum)

        def compress(blocks: Blocks, own: Places) -> Any:
            seen = {path: entering[f"{blocks.path}/{path}"] for path in own}
            return self._compress(blocks, own, seen, calibration)

        return stack_by_stack(subject, places, batches, self.layout, compress)

    def _compress(
        self, blocks: Blocks, places: Places, seen: Mapping[str, Any], calibration: Calibration
    ) -> Callable[..., Any]:
        """What becomes of one block."""
        teach = jax.jit(lambda pairs, *given: self._taught(blocks, places, pairs, *given), static_argnums=0)
        run = jax.jit(blocks.run)
        found: list[tuple[Pair, ...]] = []

        def compress(
            layer: int, variables: Any, before: Any, x: Any, goal: Any, each: Any, shared: Any
        ) -> Any:
            leaves = _leaves(variables["params"])
            if not found:  # all blocks of a stack have the same
                one = jax.tree.map(lambda leaf: leaf[0], (x, each, shared))
                found.append(pairs_of(
                    variables["params"], leaves, places,
                    lambda params: run({**variables, "params": params}, *one), calibration.key,
                ) if self.scale_lr else ())  # fmt: skip
            entering = {path: jnp.asarray(tops[layer]) for path, tops in seen.items()}
            start = self._start(leaves, places, found[0], entering)
            vectors = layer < self.ends[0] or layer >= blocks.stack.depth - self.ends[1]
            rate = jnp.asarray(self.vector_lr if vectors else 0.0)
            learned, losses = teach(found[0], start, rate, variables, before, x, goal, each, shared)
            if losses.size:
                calibration.report(
                    f"{blocks.path} {layer + 1} of {blocks.stack.depth}: loss {float(losses[0]):.3g} at "
                    f"first, {float(losses[-1]):.3g} at last."
                )
            return replaced(variables["params"], self._held(learned, leaves, places))

        return compress

    def _start(
        self, leaves: Mapping[str, Any], places: Places, pairs: Any, tops: Mapping[str, Any]
    ) -> Learned:
        """What is learned of a block, as it begins."""
        scales: dict[Pair, Any] = {}
        rows = {path: jnp.max(jnp.abs(flat(leaves[path], place)), 1) for path, place in places.items()}
        for pair in pairs:
            count = channels(leaves, places, pair)
            assert count is not None
            act = jnp.max(jnp.stack([_made(tops[path], places[path], count) for path in pair.readers]), 0)
            weight = jnp.max(jnp.stack([_made(rows[path], places[path], count) for path in pair.readers]), 0)
            scales[pair] = 0.5 * jnp.log(jnp.maximum(act, 1e-5)) - 0.5 * jnp.log(jnp.maximum(weight, 1e-5))
        grids = {path: self.layout.fit(flat(leaves[path], place), path)[0] for path, place in places.items()}
        vectors = [path for path in places if path.endswith("/contract/kernel")]
        return {
            "scale": scales,
            "low": {path: jnp.full_like(grid, 4.0) for path, grid in grids.items()},
            "high": {path: jnp.full_like(grid, 4.0) for path, grid in grids.items()},
            "left": {path: jnp.ones((places[path].matrix[0], 1)) for path in vectors},
            "right": {path: jnp.zeros((1, places[path].matrix[1])) for path in vectors},
        }

    def _grids(
        self, learned: Learned, leaves: Mapping[str, Any], places: Places
    ) -> tuple[dict[str, Any], Any]:
        """Parameters of a block with transforms, and its kernels with vectors as matrices with grids."""
        scales = {pair: jnp.exp(scale) for pair, scale in learned["scale"].items()}
        made, found = scaled(leaves, places, scales), {}
        for path, place in places.items():
            matrix = flat(made[path], place).astype(jnp.float32)
            if path in learned["left"]:
                matrix = matrix + learned["left"][path] @ learned["right"][path]
            parts, axes = self.layout.parted(matrix, path)
            low = _at(parts, axes, jnp.argmin) * nn.sigmoid(learned["low"][path])
            high = _at(parts, axes, jnp.argmax) * nn.sigmoid(learned["high"][path])
            found[path] = matrix, *self.layout.grid(low, high)
        return made, found

    def _held(self, learned: Learned, leaves: Mapping[str, Any], places: Places) -> dict[str, Any]:
        made, found = self._grids(learned, leaves, places)
        held = {path: self.layout.encode(grid[0], places[path], *grid[1:]) for path, grid in found.items()}
        return {**made, **held}

    def _taught(
        self,
        blocks: Blocks,
        places: Places,
        pairs: tuple[Pair, ...],
        learned: Learned,
        rate: Array,
        variables: Mapping[str, Any],
        before: Any,
        x: Any,
        goal: Any,
        each: Any,
        shared: Any,
    ) -> tuple[Learned, Float[Array, " steps"]]:
        """Learns the ranges of one block; batches are taken in turn."""
        count = len(jax.tree.leaves(x)[0])
        rates = dict(scale=self.scale_lr, low=self.clip_lr, high=self.clip_lr, left=rate, right=rate)
        optimizer = optax.partition(
            {name: optax.adam(rate) for name, rate in rates.items()}, dict(zip(rates, rates, strict=True))
        )
        leaves = _leaves(variables["params"])

        def loss(learned: Learned, at: Array) -> Float[Array, ""]:
            first, one, given, told = jax.tree.map(lambda leaf: leaf[at], (before, x, goal, (each, shared)))
            made, found = self._grids(learned, leaves, places)
            for path, (matrix, scale, zero) in found.items():
                place = places[path]
                kernel = unflat(fake(self.layout, matrix, scale, zero), place.ins, place.outs, place.turned)
                made[path] = Faked(kernel, place, self.layout.activations)
            params = replaced(variables["params"], made)
            y, maps = _mapped(blocks, {**variables, "params": params}, one, *told)
            if not self.corrected:
                return difference(y, given)
            _, goals = _mapped(blocks, variables, first, *told)
            now = blocks.run(variables, one, *told)
            return corrected(y, given, now) + sum(map(divergence, maps, goals), start=jnp.zeros(()))

        def step(state: Any, number: Array) -> tuple[Any, Float[Array, ""]]:
            learned, held = state
            value, gradients = jax.value_and_grad(loss)(learned, number % count)
            updates, held = optimizer.update(gradients, held, learned)
            return (optax.apply_updates(learned, updates), held), value

        steps = jnp.arange(self.epochs * count)
        (learned, _), losses = jax.lax.scan(step, (learned, optimizer.init(learned)), steps)
        return learned, losses


def _at(x: Array, axes: tuple[int, ...], pick: Callable[..., Array]) -> Array:
    """The number that `pick` finds along neighbouring axes.

    `jnp.min` shares its gradient among the numbers that equal the least. Where XLA computes them twice, with
    and without a fused multiply-add, there may be none, and the gradient is divided by 0.
    """
    kept = x.ndim + axes[0]
    rows = x.reshape(*x.shape[:kept], -1, *x.shape[kept + len(axes) :])
    found = pick(jax.lax.stop_gradient(rows), kept, keepdims=True)
    return jnp.take_along_axis(rows, found, kept).squeeze(kept)


def corrected(y: Any, goal: Any, now: Any) -> Float[Array, ""]:
    """The distribution correction of what a block gives: its loss but for the maps of attention.

    Args:
      y: what the compressed block gives.
      goal: what the trained one gave in the trained network.
      now: what the trained one gives for what enters the compressed one.
    """
    return sum(
        (-jnp.log(_cosine(y, other)) + difference(y, other) for other in (goal, now)), start=jnp.zeros(())
    )


def divergence(a: Float[Array, "b h n m"], b: Float[Array, "b h n m"]) -> Float[Array, ""]:
    """KL(a | b) + KL(b | a) of maps whose rows sum to one, averaged over their entries."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    # What may not be seen has a weight of 0 in both.
    ratio = jnp.log(jnp.maximum(a, 1e-12)) - jnp.log(jnp.maximum(b, 1e-12))
    return jnp.mean((a - b) * ratio)


def _cosine(a: Any, b: Any) -> Float[Array, ""]:
    """Cosine of two streams, averaged over tokens."""
    (x,), (y,) = jax.tree.leaves(a), jax.tree.leaves(b)
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    sizes = jnp.sqrt(jnp.sum(x**2, -1) * jnp.sum(y**2, -1) + 1e-12)
    return jnp.abs(jnp.mean(jnp.sum(x * y, -1) / sizes))


def _mapped(blocks: Blocks, variables: Any, x: Any, each: Any, shared: Any) -> tuple[Any, list[Array]]:
    """What a block gives, and the maps of its attention."""
    maps: list[Array] = []

    def take(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if type(context.module) is not Attention or context.method_name != "__call__":
            return call(*args, **kwargs)
        y, stats = context.module.observe(args[0], args[1], ("attention",))
        maps.append(stats.attention)
        return y

    with nn.intercept_methods(take):
        y = blocks.run(variables, x, each, shared)
    return y, maps


def _leaves(params: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Stored))
    return {path_of(key_path): leaf for key_path, leaf in leaves}


def _tallest(rows: Float[Array, "r k"]) -> Float[Array, " k"]:
    return jnp.max(jnp.abs(rows), 0)


def _made(read: Float[Array, " k"], place: Place, count: int) -> Float[Array, " c"]:
    """The largest of what the readers of every channel read."""
    if read.size == count:
        return jnp.asarray(read)
    size = place.ins[-1]
    return jnp.max(jnp.asarray(read).reshape(count // size, -1, size), 1).reshape(-1)

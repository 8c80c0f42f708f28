"""Grafting: other operators in a trained diffusion transformer, each taught alone what the old one gave.

    stage 1     min_g  E_{t, x_t, c}  L(g(h), f(h))          h what enters the old operator f, in the teacher
    stage 2     the whole network, a short training run as any other

L is |g - f| for mixers and (g - f)^2 for FFNs, whose outliers matter less. A new operator sees the inputs of
the teacher alone, so that all are taught at once and none sees the errors of another. Everything else keeps
the teacher's weights.

Blocks side by side (`halved`) begin with the weights of the blocks that stood one behind the other, and are
taught, by |g - f| too, what both together made of the stream.

    L_k = 1/N sum_{|i - j| <= k} A_ij                            how local an attention matrix A is

Source: Chandrasegaran et al., "Exploring Diffusion Transformer Designs via Grafting", NeurIPS 2025, sections
3, 4.1 and 6. Layers to graft are counted from 0 there: of every two the second, of every four the last three.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from effjax.errors import UsageError
from effjax.layers.stack import streams
from effjax.mixers.context import Context
from effjax.models.blocks.adaln import Layer
from effjax.models.blocks.several import Cycle, Parallel, copied, members
from effjax.models.dit import DiT, Stream

Operator = Literal["mixer", "ffn"]
OPERATORS: tuple[Operator, ...] = ("mixer", "ffn")
Distance = Literal["l1", "l2", "huber"]
Params = Mapping[str, Any]

_DISTANCES: dict[str, Callable[[Array], Array]] = {
    "l1": jnp.abs,
    "l2": jnp.square,
    "huber": lambda error: optax.losses.huber_loss(error, delta=1.0),
}


def grafted(
    model: DiT, *, mixer: nn.Module | None = None, ffn: nn.Module | None = None, every: int = 1, kept: int = 0
) -> DiT:
    """The definition with other operators.

    Args:
      model: a plain DiT.
      mixer: in the place of its mixers; None leaves them.
      ffn: in the place of its FFNs; None leaves them.
      every: length of the pattern, which the depth is a multiple of.
      kept: so many layers at the start of each pattern stay as they are.

    Raises:
      UsageError: for a pattern that does not tile the depth, or grafts nothing.
    """
    changes: dict[str, Any] = {name: new for name, new in (("mixer", mixer), ("ffn", ffn)) if new is not None}
    if not changes or not 0 <= kept < every or model.depth % every:
        raise UsageError(
            f"every={every}, kept={kept} and {sorted(changes) or 'no operators'} make no graft of "
            f"{model.depth} layers: name an operator, keep fewer than all, and tile the depth."
        )
    blocks = [model.block.clone(**({} if i < kept else changes)) for i in range(every)]
    if every == 1:
        return model.clone(block=blocks[0])
    return model.clone(block=Cycle(tuple(map(copied, blocks))), depth=model.depth // every)


def halved(model: DiT) -> DiT:
    """The definition with every two blocks side by side.

    Raises:
      UsageError: for an odd depth.
    """
    if model.depth % 2:
        raise UsageError(f"depth={model.depth} is odd: blocks stand side by side in pairs.")
    return model.clone(block=Parallel((copied(model.block), copied(model.block))), depth=model.depth // 2)


def replaced(student: DiT, teacher: DiT, anew: tuple[Operator, ...] = ()) -> tuple[frozenset[Operator], ...]:
    """Which operators are new, in each member of the student's block.

    Args:
      student: the grafted definition.
      teacher: the definition before.
      anew: operators that are new although they are defined as before: the paper's self-grafting.

    Raises:
      UsageError: where the two are not of as many layers, where layers of one member do not agree, or where
        every block has a condition of its own and several of these are to share one.
    """
    own, given = members(student.block), members(teacher.block)
    layers = len(own) * student.depth
    if layers != len(given) * teacher.depth:
        raise UsageError(
            f"the grafted network has {layers} layers and its teacher {len(given) * teacher.depth}: only "
            f"operators are replaced."
        )
    if "per_block" in (student.condition, teacher.condition) and student.depth != teacher.depth:
        raise UsageError("blocks that are put together share a condition: set condition='shared'.")
    found: list[frozenset[Operator]] = []
    for at, member in enumerate(own):
        each = {
            frozenset(
                name
                for name in OPERATORS
                if name in anew or getattr(member, name) != getattr(given[layer % len(given)], name)
            )
            for layer in range(at, layers, len(own))
        }
        if len(each) > 1:
            raise UsageError(f"member {at} of the block is new in some of its layers only.")
        found.extend(each)
    return tuple(found)


def inherited(student: DiT, teacher: DiT, params: Params, anew: tuple[Operator, ...] = ()) -> dict[str, Any]:
    """The teacher's parameters where the grafted network has them; those of new operators are missing.

    Args:
      student: the grafted definition.
      teacher: the definition before.
      params: of the teacher.
      anew: as in `replaced`.
    """
    layers, count = _layers(teacher.block, params["blocks"]), len(members(student.block))
    blocks = [
        {
            name: jax.tree.map(
                lambda *leaves: jnp.stack(leaves), *(layer[name] for layer in layers[at::count])
            )
            for name in layers[at]
            if name not in new
        }
        for at, new in enumerate(replaced(student, teacher, anew))
    ]
    several = {f"members_{i}": tree for i, tree in enumerate(blocks)}
    return {**params, "blocks": blocks[0] if members(student.block) == (student.block,) else several}


def graft(student: DiT, teacher: DiT, params: Params, fresh: Params) -> dict[str, Any]:
    """Parameters of the grafted network before any training: the teacher's, and `fresh` where it is new."""

    def laid_over(under: Any, over: Any) -> Any:
        if not isinstance(over, Mapping):
            return over
        return {**under, **{name: laid_over(under[name], value) for name, value in over.items()}}

    result: dict[str, Any] = laid_over(fresh, inherited(student, teacher, params))
    return result


class Seen(NamedTuple):
    """What a teacher did, by layer in front.

    Attributes:
      operators: `{"mixer": (h, y), "ffn": (h, y)}`, `[layers, B, N, C]` each: inputs and outputs.
      stream: `[layers + 1, B, N, C]`, what entered every layer, and last what left it; of a block that is
        several layers, what entered the block.
      c: `[B, C]`, the condition.
      grid: rows and columns of tokens.
    """

    operators: Mapping[str, tuple[Array, Array]]
    stream: list[Array]
    c: Array
    grid: tuple[int, int]


def watch(teacher: DiT, variables: Mapping[str, Any], x_t: Array, t: Array, condition: Array) -> Seen:
    """Runs a DiT and keeps what went into its operators and came out."""
    begun = teacher.apply(variables, x_t, t, condition, method="begin")
    assert isinstance(begun, Stream)
    _, sown = teacher.apply(variables, begun, method="layers", mutable=["intermediates"])
    told = sown["intermediates"]["blocks"]
    blocks = {name: tree["operators"][0] for name, tree in told.items() if name.startswith("members_")}
    operators = _by_layer(teacher.block, blocks or told["operators"][0])
    return Seen(operators, streams(told), begun.c, begun.grid)


def regressions(
    student: DiT,
    blocks: Params,
    new: tuple[frozenset[Operator], ...],
    seen: Seen,
    distances: Mapping[str, Distance],
    train: bool = False,
) -> dict[str, tuple[Float[Array, " b"], Float[Array, " b"]]]:
    """How far every new operator is from the old one, on the old one's inputs.

    Args:
      student: the grafted definition.
      blocks: its parameters `blocks`.
      new: what is new in each member; with blocks side by side, these as a whole.
      seen: what the teacher did.
      distances: for "mixer", "ffn" and "block".
      train: passed to the operators.

    Returns:
      by kind of operator, the distance averaged over layers, and the squared error as a share of the squared
      output.
    """
    context = Context(grid=seen.grid)
    found: dict[str, list[tuple[Array, Array]]] = {}
    if isinstance(student.block, Parallel):
        step = (len(seen.stream) - 1) // student.depth  # 1 where the teacher's blocks are as long
        entered = jnp.stack(seen.stream[:-1:step])

        def block(params: Params, x: Array) -> Array:
            y, _ = student.block.apply({"params": params}, x, Layer(), seen.c, context, train=train)
            return jnp.asarray(y)

        goals = jnp.stack(seen.stream[step::step])
        found["block"] = [_compared(jax.vmap(block)(blocks, entered), goals, distances["block"])]
        new = ()
    several = members(student.block)
    held = [blocks] if several == (student.block,) else [blocks[f"members_{i}"] for i in range(len(several))]
    for at, names in enumerate(new):
        for name in sorted(names):
            h, y = (leaf[at :: len(several)] for leaf in seen.operators[name])
            module = getattr(several[at], name)
            extra = (context,) if name == "mixer" else ()

            def operator(params: Params, h: Array, module: Any = module, extra: Any = extra) -> Array:
                return jnp.asarray(module.apply({"params": params}, h, *extra, train=train))

            g = jax.vmap(operator)(held[at][name], h)
            found.setdefault(name, []).append(_compared(g, y, distances[name]))
    return {name: (_mean(d for d, _ in parts), _mean(e for _, e in parts)) for name, parts in found.items()}


def _compared(
    g: Float[Array, "layers b n c"], y: Float[Array, "layers b n c"], distance: Distance
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    error = g.astype(jnp.float32) - y.astype(jnp.float32)
    apart = jnp.mean(_DISTANCES[distance](error), axis=(0, 2, 3))
    share = jnp.sum(error**2, axis=(2, 3)) / jnp.sum(y.astype(jnp.float32) ** 2, axis=(2, 3))
    return apart, jnp.mean(share, axis=0)


def _mean(parts: Any) -> Float[Array, " b"]:
    return jnp.mean(jnp.stack(list(parts)), axis=0)


def _by_layer(block: nn.Module, tree: Any) -> Any:
    """Leaves `[repeats, ...]` of a block, or alike of each of its members, as leaves `[layers, ...]`."""
    if members(block) == (block,):
        return tree
    trees = [tree[f"members_{i}"] for i in range(len(members(block)))]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, 1).reshape(-1, *leaves[0].shape[1:]), *trees)


def _layers(block: nn.Module, tree: Any) -> list[Any]:
    """The parameters of every layer."""
    several = members(block)
    trees = [tree] if several == (block,) else [tree[f"members_{i}"] for i in range(len(several))]
    repeats = len(jax.tree.leaves(tree)[0])
    return [jax.tree.map(lambda leaf: leaf[r], one) for r in range(repeats) for one in trees]  # noqa: B023


def locality(weights: Float[Array, "*heads n n"], reach: int) -> Float[Array, " *heads"]:
    """L_k: the share of attention that stays within `reach` tokens on both sides.

    Args:
      weights: attention matrices, whose rows sum to one.
      reach: k.
    """
    n = weights.shape[-1]
    near: Bool[np.ndarray, "n n"] = np.abs(np.arange(n)[:, None] - np.arange(n)[None]) <= reach
    return (
        jnp.sum(
            weights, axis=(-2, -1), where=jnp.asarray(near).reshape((1,) * (weights.ndim - 2) + near.shape)
        )
        / n
    )

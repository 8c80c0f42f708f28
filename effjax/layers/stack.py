"""Depth as one scan over identical blocks.

The parameters of all layers are stacked: a kernel `[i, o]` of the block stands in the tree as `[depth, i,
o]`, at the path it would have in one block, with the logical axis `layers` in front. A forward pass is
`jax.lax.scan` over these slices, so that compile time does not grow with depth, and rematerialisation is a
policy on the scan's body. Other variables (batch statistics, sown values) are stacked in the same way.

A scan copies each layer's slice out of the stack. Where layers are read once a token that copy is most of the
time, and `apart` lays the layers out one by one: the stack then runs them one by one.

Layers that differ in more than their numbers (a pruned network's, a hybrid's) are given as `blocks`. Theirs
are trees of their own, `layer_0`, `layer_1`, .., and what is compiled grows with the depth.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.core.scope import DenyList, intersect_filters
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from effjax.errors import UsageError, did_you_mean
from effjax.matching import match

# What the backward pass may keep of each layer instead of computing it again.
REMAT: dict[str, Callable[..., Any] | None] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@flax.struct.dataclass
class Layers:
    """What stands in a tree instead of an array with depth in front: the array of every layer.

    Attributes:
      each: arrays of one shape, or of None.
    """

    each: tuple[Any, ...]

    def __getitem__(self, layer: int) -> Any:
        return self.each[layer]


def apart(tree: Any) -> Any:
    """Takes the layers of a tree with depth in front apart: every array becomes `Layers`.

    A `Stack` whose parameters are so runs its layers one by one, in a program that grows with the depth, and
    wants what it is given for `each` layer so; it hands back what the layers return so.
    """
    return jax.tree.map(lambda leaf: Layers(tuple(leaf)), tree)


def layer_of(tree: Any, layer: int) -> Any:
    """One layer's slice of a tree with depth in front, whether in one piece or apart."""
    return jax.tree.map(lambda leaf: leaf[layer], tree, is_leaf=_is_layers)


def layers_of(tree: Any, layers: Sequence[int]) -> Any:
    """A tree with these layers alone, in this order; layers that stand apart are not copied."""

    def taken(leaf: Any) -> Any:
        if _is_layers(leaf):
            return Layers(tuple(leaf[layer] for layer in layers))
        return leaf[jnp.asarray(layers)]

    return jax.tree.map(taken, tree, is_leaf=_is_layers)


def each_layer(function: Callable[..., Any], *trees: Any) -> Any:
    """Does the same to every layer, whether depth is in front or the layers stand apart.

    Args:
      function: of one layer's slices of the trees; not asked of a layer that has nothing.
      *trees: all in one piece, or any of them apart.
    """
    if not is_apart(trees):
        return jax.vmap(function)(*trees)
    found = next(leaf for leaf in jax.tree.leaves(trees, is_leaf=_is_layers) if _is_layers(leaf))
    slices = [[layer_of(tree, i) for tree in trees] for i in range(len(found.each))]
    return beside([function(*own) if jax.tree.leaves(own[0]) else None for own in slices])


def beside(layers: Sequence[Any]) -> Any:
    """One tree of `Layers` from what each layer has; what a layer has not, a leaf or all, is None."""

    def none(leaf: Any) -> bool:
        return leaf is None

    whole = next((tree for tree in layers if tree is not None), None)
    layers = [jax.tree.map(lambda _: None, whole) if tree is None else tree for tree in layers]

    def join(*leaves: Any) -> Any:
        return None if all(map(none, leaves)) else Layers(leaves)

    return jax.tree.map(join, *layers, is_leaf=none)


def is_apart(tree: Any) -> bool:
    """Whether layers stand apart anywhere in a tree."""
    return any(map(_is_layers, jax.tree.leaves(tree, is_leaf=_is_layers)))


def _is_layers(leaf: Any) -> bool:
    return isinstance(leaf, Layers)


class Stack(nn.Module):
    """`depth` copies of `block`, run as a scan.

    A block's method takes `(x, each, *shared, train)` and returns `(x, out)`: `each` is that layer's slice
    of per-layer inputs (drop rates, caches), `shared` is the same for all layers (conditioning, positions),
    `out` is whatever the layer hands back (a new cache, an auxiliary loss, None), stacked over layers by
    the scan. A stack of one is no scan, and its block may change the shape of `x`.

    Where the shape of `x` changes inside the stack, the scan is cut: a layer among `points` runs by itself,
    and what is in `before` runs between two layers. What blocks sow is then in as many pieces.

    Where layers with like parameters do different things in turn, `turns` says what: a scan iteration is a
    round of them, and the layers that fill no round run one by one. The parameters know nothing of it.

    Parameters whose path in the block matches one of the regexps `shared` are the same in all layers, and
    have no axis of depth; their gradient is the sum over layers.

    To whoever asks for `intermediates`, the stack sows its `stream`: see `streams`.

    Attributes:
      block: the definition to repeat; only its fields are used.
      depth: number of layers.
      remat: name of a rematerialisation policy in `REMAT`.
      unroll: layers, or rounds of turns, a scan iteration; `depth` unrolls the loop whole.
      shared: regexps of the parameters that all layers share: `(".*",)` loops over one layer.
      blocks: the definition of every layer, where they differ; empty means `block` for all.
    """

    block: nn.Module
    depth: int
    remat: str = "none"
    unroll: int = 1
    shared: tuple[str, ...] = ()
    blocks: tuple[nn.Module, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks and len(self.blocks) != self.depth:
            raise UsageError(f"depth={self.depth}, and {len(self.blocks)} blocks are given: one a layer.")
        if self.blocks and self.shared:
            raise UsageError("layers that differ share no parameters: leave `shared` out, or the blocks.")

    @nn.compact
    def __call__(
        self,
        x: Any,
        *shared: Any,
        each: Any = None,
        method: str = "__call__",
        train: bool = False,
        points: Mapping[int, Any] | None = None,
        before: Mapping[int, Callable[[Any, bool], Any]] | None = None,
        through: Callable[[Callable[[Any], Any], Any], Any] | None = None,
        part: tuple[int, int] | None = None,
        turns: tuple[Any, ...] = (),
    ) -> tuple[Any, Any]:
        """Runs all layers on `x` and returns `(x, outs)`.

        Args:
          x: what goes through the layers.
          *shared: the same for all layers.
          each: trees whose leaves have a slice for every layer, or are `Layers`.
          method: of the block.
          train: passed to the block.
          points: layers whose block is given a `point`, and may change the shape of `x`. Where there are any,
            `outs` is a mapping from these layers to what each handed back.
          before: functions of `(x, train)` that change `x` before a layer; `depth` means behind the last.
          through: how a part of the stack between two cuts is run, given `run` from `x` to `(x, more)`, and
            `x`: any number of times, on other shapes of the same; None runs it once, as it is.
          part: runs only the layers from the first to before the second, which change no variables; `each`
            and `points` count from the first of all layers.
          turns: layer i is given `turns[i % len(turns)]` as its `point`, unless it is among `points`.
        """
        if self.remat not in REMAT:
            raise UsageError(f"remat is {self.remat!r}. {did_you_mean(self.remat, REMAT)}")
        if self.is_initializing():
            drawn = jax.random.split(self.make_rng("params"), self.depth)

            def init(x, slices, number=0):
                key, each = slices
                block = self.layer_block(number)
                (y, out), made = block.init_with_output({"params": key}, x, each, *shared, method=method)
                return y, (out, made)

            cut = points or before or through or turns or part
            if self.blocks:
                y = x  # layers may be of other widths
                for number, key in enumerate(drawn):
                    y, (_, made) = init(y, (key, layer_of(each, number)), number)
                    self._put_layer(number, made)
            elif not (cut or train or self.shared or is_apart(each)):
                # A layer is traced once, for its parameters and for what it hands on.
                if self.depth == 1:
                    y, made = init(x, layer_of((drawn, each), 0))
                    outs, stacked = jax.tree.map(lambda leaf: leaf[None], made)
                else:
                    y, (outs, stacked) = jax.lax.scan(init, x, (drawn, each))
                _put(self, meta.add_axis(stacked, 0, {nn.PARTITION_NAME: "layers"}))
                return y, outs
            else:
                stacked = jax.vmap(lambda key: init(x, (key, layer_of(each, 0)))[1][1])(drawn)
                own, common = self._split(stacked)
                own = meta.add_axis(own, 0, {nn.PARTITION_NAME: "layers"})
                _put(self, _together(own, jax.tree.map(lambda leaf: leaf[0], common)))

        # What an earlier pass sowed is no layer's.
        variables = {name: meta.unbox(v) for name, v in self.variables.items() if name != "intermediates"}
        variables, common = self._split(variables)
        assert self.scope is not None
        mutable = intersect_filters(self.scope.mutable, DenyList("params")) if part is None else False
        watched = not self.is_initializing() and self.is_mutable_collection("intermediates")
        keys = None
        if train and self.has_rng("dropout"):
            keys = jax.random.split(self.make_rng("dropout"), self.depth)

        def layer(x, slices, point=None, number=0):
            variables, each, key = slices
            block = self.layer_block(number)
            rngs = {} if key is None else {"dropout": key}
            options: dict[str, Any] = dict(train=train, rngs=rngs, method=method, mutable=mutable)
            if point is not None:
                options["point"] = point
            made = block.apply(_together(variables, common), x, each, *shared, **options)
            (y, out), changed = made if mutable is not False else (made, {})
            return y, (out, changed, x if watched else None)

        def checkpointed(layer, alone):
            if self.remat == "none":
                return layer
            # Inside a scan nothing is merged that should be computed again.
            return jax.checkpoint(layer, policy=REMAT[self.remat], prevent_cse=alone)

        def round_of(start):
            """The layers of a scan iteration that begins at layer `start` or a whole round later."""
            if not turns:
                return checkpointed(layer, False)
            told = [turns[(start + i) % len(turns)] for i in range(len(turns))]
            steps = [checkpointed(functools.partial(layer, point=point), False) for point in told]

            def run(x, slices):
                made = []
                for i, step in enumerate(steps):
                    x, one = step(x, slices=jax.tree.map(lambda leaf: leaf[i], slices))  # noqa: B023
                    made.append(one)
                return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)

            return run

        points, before, through = points or {}, before or {}, through or (lambda run, x: run(x))
        slices = variables, each, keys
        parts, seen, outs = [], [], {}
        first, last = (0, self.depth) if part is None else part
        borders, size = {*points, *(layer + 1 for layer in points), *before}, len(turns)
        one_by_one = is_apart(variables) or bool(self.blocks)
        apart_outs = is_apart(each) if self.blocks else one_by_one
        borders = set(range(self.depth)) if one_by_one else borders
        for start, stop in _segments(first, last, borders, size):
            x = before[start](x, train) if start in before else x
            if stop - start == 1:
                told = points.get(start, turns[start % size] if turns else None)
                step = checkpointed(functools.partial(layer, point=told, number=start), True)
                alone = functools.partial(step, slices=self._slices(slices, start))
                x, (outs[start], changed, entered) = through(alone, x)
                entered = jax.tree.map(lambda leaf: leaf[None], entered)
                if self.blocks:
                    self._put_layer(start, {} if self.is_initializing() else changed)
                    changed = {}
                changed = jax.tree.map(lambda leaf: leaf[None], changed)
                if not apart_outs:
                    outs[start] = jax.tree.map(lambda leaf: leaf[None], outs[start])
            else:
                whole = stop - start == self.depth
                cut = slices if whole else jax.tree.map(lambda a: a[start:stop], slices)  # noqa: B023
                body, count = round_of(start), (stop - start) // max(size, 1)
                xs = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), cut) if turns else cut
                scan = functools.partial(
                    jax.lax.scan, body, xs=xs, length=count, unroll=min(self.unroll, count)
                )
                x, made = through(scan, x)
                made = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), made) if turns else made
                outs[start], changed, entered = made
            parts.append(changed)
            seen.append(entered)
        x = before[self.depth](x, train) if self.depth in before and last == self.depth else x
        changed = parts[0] if len(parts) == 1 else jax.tree.map(_joined, *parts)
        if not self.is_initializing():
            _put(self, changed)
        if watched:
            self.sow("intermediates", "stream", (*seen, jax.tree.map(lambda leaf: leaf[None], x)))
        if points or before:
            return x, {layer: outs[layer] if apart_outs else layer_of(outs[layer], 0) for layer in points}
        made = list(outs.values())
        if apart_outs:
            return x, beside(made)
        return x, made[0] if len(made) == 1 else jax.tree.map(_joined, *made)

    @nn.nowrap
    def layer_block(self, number: int) -> nn.Module:
        """The definition of a layer, which is no part of any module."""
        block = self.blocks[number] if self.blocks else self.block
        return block.clone(parent=None, name=None)

    @nn.nowrap
    def layer_variables(self, variables: Mapping[str, Any], number: int) -> dict[str, Any]:
        """The variables of one layer, of those of the stack by collection."""
        if not self.blocks:
            return {name: layer_of(tree, number) for name, tree in variables.items()}
        key = layer_name(number)
        return {name: tree[key] for name, tree in variables.items() if key in tree}

    @nn.nowrap
    def _slices(self, slices: tuple[Any, Any, Any], number: int) -> tuple[Any, Any, Any]:
        variables, each, key = slices
        return self.layer_variables(variables, number), layer_of(each, number), layer_of(key, number)

    @nn.nowrap
    def _put_layer(self, number: int, variables: Mapping[str, Any]) -> None:
        for collection, values in variables.items():
            self.put_variable(collection, layer_name(number), values)

    @nn.nowrap
    def apart(self, params: Any) -> Any:
        """Its parameters with the layers apart; what the layers share stays as it is."""
        if self.blocks:
            return params
        own, common = self._split({"params": params})
        return _together({"params": apart(own["params"])}, common)["params"]

    @nn.nowrap
    def layers_of(self, params: Any, layers: Sequence[int]) -> Any:
        """Its parameters with these layers alone, see `layers_of`; what the layers share stays as it is."""
        if self.blocks:
            return {layer_name(new): params[layer_name(old)] for new, old in enumerate(layers)}
        own, common = self._split({"params": params})
        return _together({"params": layers_of(own["params"], layers)}, common)["params"]

    @nn.nowrap
    def _split(self, variables: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The variables that every layer has for itself, and the parameters that all share."""
        if not self.shared:
            return variables, {}
        boxes = flatten_dict(variables["params"])
        rules = [(pattern, True) for pattern in self.shared]
        paths = unflatten_dict(dict.fromkeys(boxes, 0))
        told = flatten_dict(match(rules, paths, default=False, where="shared"))
        own, common = ({path: boxes[path] for path in boxes if told[path] == one} for one in (False, True))
        return {**variables, "params": unflatten_dict(own)}, {"params": unflatten_dict(common)}


def layer_name(number: int) -> str:
    """Where the variables of a layer stand that has a definition of its own."""
    return f"layer_{number}"


def _together(own: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """The variables of one layer, as its block knows them."""
    if not common:
        return own
    flat = flatten_dict(own["params"]) | flatten_dict(common["params"])
    return {**own, "params": unflatten_dict(flat)}


def _segments(first: int, last: int, borders: Collection[int], turns: int) -> Iterator[tuple[int, int]]:
    """Cuts `range(first, last)` before every border; what fills no round of turns then stands alone."""
    at = sorted({first, last, *(border for border in borders if first < border < last)})
    for start, stop in itertools.pairwise(at):
        rounds = start + (stop - start) // max(turns, 1) * max(turns, 1)
        if rounds > start:
            yield start, rounds
        yield from ((layer, layer + 1) for layer in range(rounds, stop))


def _joined(*parts: Array) -> Array | tuple[Array, ...]:
    """Layers one behind the other; where they differ in shape, as the pieces that they are."""
    alike = len({part.shape[1:] for part in parts}) == 1
    return jnp.concatenate(parts) if alike else parts


def streams(sown: Mapping[str, Any]) -> list[Any]:
    """What entered every layer of a stack, and last what left it: `depth + 1` of them.

    Args:
      sown: what the stack sowed as `intermediates`.
    """
    (pieces,) = sown["stream"]
    return [
        jax.tree.map(lambda leaf: leaf[i], piece)  # noqa: B023
        for piece in pieces
        for i in range(jax.tree.leaves(piece)[0].shape[0])
    ]


def _put(module: nn.Module, variables: Any) -> None:
    """Makes variables those of a module."""
    for collection, values in variables.items():
        for name, value in values.items():
            module.put_variable(collection, name, value)

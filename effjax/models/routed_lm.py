"""A frozen language model whose blocks each ask a router how often they shall run for a sequence.

    c_l = argmax softmax(r_l(x[read])) + margin [0, 1, 0]          once, from the prompt
    x <- B_l(x), c_l times             0 skips, 1 executes, 2 repeats

`RoutedLM` has the parameters of `LM` and of its routers, and is called and decoded as `LM` is. What a layer
decided stands in its part of the caches (`Route`): it is taken with the first tokens that a step is given,
which in decoding is the prompt but for its last token, and kept for the tokens that follow.

A repeated block attends in its second run to what its second runs wrote: each run has keys and values of its
own. Where a sequence skips a block, its slots there are marked as holding nothing.

Time is saved where a branch is not computed. Sequences are taken in groups of `group` (None: the whole batch,
1: each alone), and a group computes a block when any of its rows wants it; for its other rows the result is
dropped. Without caches rows are sorted by their decision first, so that those that run a block stand
together. Caches are not moved about: there it pays to order requests by their decisions, see `alike`. What
a branch hands out is only the tokens' own keys and values: a whole cache handed through `cond` is copied.

Decisions can also be given (`along`), as data: one compiled function runs every plan.

Source: Heakl et al., "Dr.LLM: Dynamic Layer Routing in LLMs", ICLR 2026, arXiv:2510.12773.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.core import meta
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from effjax.decoding.cache import Cache
from effjax.decoding.layer_router import ACTIONS, EXECUTE, LayerRouter
from effjax.errors import UsageError
from effjax.mixers.context import Context
from effjax.models.lm import LM, DecoderBlock

UNDECIDED = -1


@flax.struct.dataclass
class Route:
    """What one layer decided for each sequence, and what it keeps for it; of all layers with depth in front.

    The fields are annotated `Any` because the same class also carries their shapes and shardings.

    Attributes:
      counts: `[B]` int, how often the block runs; `UNDECIDED` before the first tokens. None asks the router.
      first: the mixer's cache of first runs; None where sequences are whole.
      second: of second runs.
      reads: `[B]` int, how many first tokens the router reads; None reads all.
      logits: `[B, 3]`, what the router said; None in decoding.
    """

    counts: Any = None
    first: Any = None
    second: Any = None
    reads: Any = None
    logits: Any = None

    @property
    def written(self) -> Any:
        """Slots in use; 0 of a whole sequence."""
        return jnp.zeros(1, jnp.int32) if self.first is None else self.first.written


class RoutedBlock(DecoderBlock):
    """`DecoderBlock` that runs as often as its router says.

    Attributes:
      windows: of the router.
      bottleneck: of the router.
      margin: how much likelier than executing another action must be: with 0 the likeliest is taken, from 1
        on all blocks execute. A clone with another value keeps the parameters.
      group: rows that compute a block together, when any of them wants it; None means the whole batch.
    """

    windows: int = 8
    bottleneck: int = 128
    margin: float = 0.0
    group: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.margin < 0:
            raise UsageError(f"margin={self.margin} must be 0 or more.")
        if self.group is not None and self.group < 1:
            raise UsageError(f"group={self.group}: take at least one row together.")

    @nn.compact
    def step(
        self, x: Float[Array, "b n c"], each: Any, context: Context, train: bool = False
    ) -> tuple[Float[Array, "b n c"], Route]:
        """Returns `(x, route)` for the next tokens or, without caches, for whole sequences."""
        route, own = each
        router = LayerRouter(self.windows, self.bottleneck, name="router")
        if self.is_initializing():
            told = dataclasses.replace(context, **own)
            x, _ = self.residual(x, None, told, train)
            return x, Route(logits=router(x, self._read(x, context, None)))
        whole = route.first is None
        logits = None
        if route.counts is None or whole:
            logits = router(x, self._read(x, context, route.reads))  # [B, 3]
            counts = self._action(logits) if route.counts is None else route.counts  # [B]
        else:

            def decide(router: LayerRouter, held: Array) -> Array:
                found = self._action(router(x, self._read(x, context, None)))
                return jnp.where(held == UNDECIDED, found.astype(held.dtype), held)

            missing = jnp.any(route.counts == UNDECIDED)
            counts = nn.cond(missing, decide, lambda _, held: held, router, route.counts)  # [B]
        counts = counts.astype(jnp.int32)
        run = self._pure(own, train)
        x, first = self._some(run, x, route.first, context, counts >= 1)  # [B, N, C]
        x, second = self._some(run, x, route.second, context, counts >= 2)  # [B, N, C]
        return x, Route(counts, first, second, route.reads, logits)

    @nn.nowrap
    def _action(self, logits: Float[Array, "b 3"]) -> Int[Array, " b"]:
        """How often the block runs, by what its router says."""
        prefers = self.margin * jax.nn.one_hot(EXECUTE, len(ACTIONS))
        return jnp.argmax(jax.nn.softmax(logits) + prefers[None], axis=-1)

    @nn.nowrap
    def _read(self, x: Float[Array, "b n c"], context: Context, reads: Any) -> Bool[Array, "b n"]:
        """The tokens that a router may read: no padding, and no more than it is told."""
        valid = jnp.ones(x.shape[:2], bool)
        if context.positions is not None:
            valid = valid & (context.positions >= 0)
        if context.segments is not None:
            valid = valid & (context.segments > 0)
        return valid if reads is None else valid & (jnp.cumsum(valid, axis=1) <= reads[:, None])

    @nn.nowrap
    def _pure(self, own: dict[str, Any], train: bool) -> Callable[[Array, Any, Context], tuple[Array, Any]]:
        """One run of the block, as a function of arrays."""
        params = {name: leaf for name, leaf in self.variables["params"].items() if name != "router"}
        block = self.clone(parent=None, name=None)

        def run(x: Array, cache: Any, context: Context) -> tuple[Array, Any]:
            told = dataclasses.replace(context, **own)
            return block.apply({"params": params}, x, cache, told, train, method="residual")

        return run

    @nn.nowrap
    def _some(
        self,
        run: Callable[[Array, Any, Context], tuple[Array, Any]],
        x: Float[Array, "b n c"],
        cache: Any,
        context: Context,
        wants: Bool[Array, " b"],
    ) -> tuple[Float[Array, "b n c"], Any]:
        """Runs the block for the rows that want it, in groups, and computes no group that does not."""
        batch, tokens = x.shape[:2]
        if isinstance(cache, Cache) and context.positions is None:
            positions = jnp.broadcast_to((jnp.arange(tokens) + cache.written)[None], (batch, tokens))
            context = dataclasses.replace(context, positions=positions)

        def rows_of(tree: Any, rows: Array | None) -> Any:
            if rows is None:
                return tree
            return jax.tree.map(lambda leaf: leaf if leaf.ndim == 0 else jnp.take(leaf, rows, axis=0), tree)

        def group(rows: Array | None) -> tuple[Array, Any]:
            """What a group of rows becomes, and the new part of its cache."""
            mine = rows_of((x, wants), rows)
            held, told = rows_of(cache, rows), _context_rows(context, lambda leaf: rows_of(leaf, rows))

            def compute() -> tuple[Array, Any]:
                y, grown = run(mine[0], held, told)
                return jnp.where(mine[1][:, None, None], y, mine[0]), _new_part(held, grown, tokens)

            def leave() -> tuple[Array, Any]:
                return mine[0], jax.tree.map(jnp.zeros_like, jax.eval_shape(compute)[1])

            return jax.lax.cond(jnp.any(mine[1]), compute, leave)

        size = batch if self.group is None else min(self.group, batch)
        if size == batch:
            x, part = group(None)
            return x, _joined(cache, part, context, wants)
        if batch % size:
            raise UsageError(f"group={size} does not divide a batch of {batch}: choose a divisor.")
        if not (cache is None or isinstance(cache, Cache)):
            raise UsageError(
                f"groups share keys and values, and this mixer keeps {type(cache).__name__}: set group=None."
            )
        # Rows of a cache stay where they are; what has none is put together.
        order = jnp.arange(batch) if cache is not None else jnp.argsort(~wants, stable=True)
        x, part = jax.lax.map(group, order.reshape(-1, size))
        back = jnp.argsort(order)
        x, part = jax.tree.map(lambda leaf: leaf.reshape(batch, *leaf.shape[2:])[back], (x, part))
        return x, _joined(cache, part, context, wants)


def _context_rows(context: Context, rows: Callable[[Any], Any]) -> Context:
    """Positions and segments of some rows."""
    given = {name: getattr(context, name) for name in ("positions", "segments")}
    return dataclasses.replace(
        context, **{name: rows(leaf) for name, leaf in given.items() if leaf is not None}
    )


def _new_part(held: Any, grown: Any, tokens: int) -> Any:
    """What a step added: keys and values of its tokens, or a state as a whole."""
    if not isinstance(held, Cache):
        return grown
    if held.written.ndim:
        raise UsageError("a routed model keeps as many slots for all sequences: it takes no ragged caches.")

    def cut(leaf: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(leaf, held.written, tokens, axis=1)

    return cut(grown.keys), cut(grown.values)


def _joined(cache: Any, part: Any, context: Context, wants: Bool[Array, " b"]) -> Any:
    """The cache with what was added; of rows that skipped, with slots that hold nothing."""
    if cache is None:
        return None
    if isinstance(cache, Cache):
        keys, values = part
        marked = jnp.where(wants[:, None], context.positions, -1)  # [B, N]

        def put(leaf: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(leaf, new.astype(leaf.dtype), cache.written, axis=1)

        return Cache(
            put(cache.keys, keys),
            put(cache.values, values),
            put(cache.positions, marked),
            cache.written + marked.shape[1],
        )

    def chosen(old: Array, new: Array) -> Array:
        # What has no rows counts tokens.
        mine = wants.reshape(-1, *(1,) * (old.ndim - 1)) if old.ndim else jnp.any(wants)
        return jnp.where(mine, new, old)

    return jax.tree.map(chosen, cache, part)


class RoutedLM(LM):
    """`LM` whose blocks are skipped, executed or repeated for each sequence.

    Attributes:
      block: the block that the stack repeats, with what its router needs.
    """

    block: RoutedBlock

    def __call__(
        self,
        tokens: Int[Array, "b n"],
        positions: Int[Array, "b n"] | None = None,
        segments: Int[Array, "b n"] | None = None,
        train: bool = False,
    ) -> Float[Array, "b n vocab"]:
        """Returns float32 logits of the token after each place, as `LM` does.

        Routers read the whole rows: what a sequence decides at an early place depends on later ones. Give
        `along` how many tokens are the prompt where that matters.
        """
        logits, _ = self.along(tokens, positions=positions, segments=segments, train=train)
        return logits

    def along(
        self,
        tokens: Int[Array, "b n"],
        counts: Int[Array, "b depth"] | None = None,
        reads: Int[Array, " b"] | None = None,
        positions: Int[Array, "b n"] | None = None,
        segments: Int[Array, "b n"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b n vocab"], Route]:
        """Returns the logits of whole sequences, and what every layer decided and its router said.

        Args:
          tokens: as in `LM`.
          counts: how often each block runs for each sequence, 0, 1 or 2; None asks the routers.
          reads: how many first tokens of each row routers read; None reads all.
          positions: as in `LM`.
          segments: as in `LM`.
          train: handed to the parts.

        Raises:
          UsageError: for rows longer than `max_length`.
        """
        self.check_length(tokens.shape[1])
        batch = tokens.shape[0]
        over = None if reads is None else jnp.broadcast_to(reads[None], (self.depth, batch))
        route = Route(counts=None if counts is None else counts.T, reads=over)
        context = Context(positions=positions, segments=segments)
        return self.forward(tokens, context, route, train)

    @nn.nowrap
    def init_cache(self, batch: int, slots: int, dtype: DTypeLike = jnp.float32) -> Route:
        """Makes empty caches, two for each layer, in which nothing is decided.

        Raises:
          UsageError: for more slots than `max_length`, or a policy for the caches.
        """
        if self.cache is not None:
            raise UsageError("a routed model keeps all tokens: leave the policy of its caches out.")
        first = super().init_cache(batch, slots, dtype)
        undecided = jnp.full((self.depth, batch), UNDECIDED, jnp.int32)
        return Route(counts=undecided, first=first, second=jax.tree.map(jnp.copy, first))

    @nn.nowrap
    def cache_axes(self) -> Route:
        """Names of the axes of one layer's caches; depth comes in front of them."""
        axes = super().cache_axes()
        return Route(counts=("batch",), first=axes, second=axes)


def routed(model: LM, windows: int = 8, bottleneck: int = 128, group: int | None = None) -> RoutedLM:
    """The routed definition of a language model; its parameters are those and the routers'.

    Raises:
      UsageError: for a model of blocks that are not `DecoderBlock`.
    """
    if type(model) is not LM or type(model.block) is not DecoderBlock:
        raise UsageError(f"routers stand before the blocks of an LM, and this is a {type(model).__name__}.")
    own = {field.name: getattr(model.block, field.name) for field in _fields(DecoderBlock)}
    block = RoutedBlock(**own, windows=windows, bottleneck=bottleneck, group=group)
    outer = {field.name: getattr(model, field.name) for field in _fields(LM) if field.name != "block"}
    return RoutedLM(block=block, **outer)


def with_routers(model: RoutedLM, variables: Any, key: Any) -> dict[str, Any]:
    """The variables of a language model with freshly drawn routers.

    Args:
      model: the routed definition.
      variables: of the plain one.
      key: draws the routers.
    """
    x, reads = jnp.zeros((1, 1, model.dim)), jnp.ones((1, 1), bool)
    router = LayerRouter(model.block.windows, model.block.bottleneck)
    made = jax.vmap(lambda one: meta.unbox(router.init(one, x, reads))["params"])(
        jax.random.split(key, model.depth)
    )
    params = variables["params"]
    return {**variables, "params": {**params, "blocks": {**params["blocks"], "router": made}}}


def alike(counts: Int[Array, "b depth"]) -> Int[Array, " b"]:
    """An order of the rows in which those of like decisions stand together: for groups that agree."""
    return jnp.lexsort(tuple(counts[:, layer] for layer in reversed(range(counts.shape[1]))))


def _fields(kind: type) -> list[dataclasses.Field]:
    """The fields of a module that define it."""
    return [
        field for field in dataclasses.fields(kind) if field.init and field.name not in ("parent", "name")
    ]

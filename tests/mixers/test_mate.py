"""MATE: orders of tokens and their inverses, both directions, windows, review tokens."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.mixers import BidirectionalMamba2, Mamba2, Mate, ShiftedVolume
from effjax.mixers.context import Context
from effjax.mixers.mate import PERIOD, averaged
from effjax.mixers.scan_orders import ORDERS, in_line, in_place

GRID = 3, 4, 5
TOY = dict(state=5, head=4, groups=2)


def drawn(module, *inputs):
    """Random parameters throughout."""
    shapes = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs))
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape) * 0.4), shapes)


def numbered(grid=GRID):
    return jnp.arange(np.prod(grid), dtype=jnp.float32).reshape(1, *grid, 1)


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_is_a_permutation_and_has_an_inverse(order):
    line = in_line(numbered(), order)
    np.testing.assert_array_equal(np.sort(line.ravel()), np.arange(60))
    np.testing.assert_array_equal(in_place(line, GRID, order), numbered())
    x = jax.random.normal(jax.random.key(0), (2, *GRID, 3))
    np.testing.assert_array_equal(in_place(in_line(x, order), GRID, order), x)


def test_orders_run_along_the_axis_of_their_name():
    first = {order: in_line(numbered(), order)[0, :6, 0].astype(int).tolist() for order in ORDERS}
    assert first == {  # frames are 20 apart, rows 5
        "spatial_row": [0, 1, 2, 3, 4, 5],
        "spatial_column": [0, 5, 10, 15, 1, 6],
        "temporal_row": [0, 20, 40, 1, 21, 41],
        "temporal_column": [0, 20, 40, 5, 25, 45],
    }


def test_all_neighbours_follow_each_other_in_some_order_of_a_rotation():
    followed = {order: set() for order in ORDERS}
    for order in ORDERS:
        line = in_line(numbered(), order)[0, :, 0].astype(int).tolist()
        followed[order] = {frozenset(pair) for pair in itertools.pairwise(line)}
    place = np.arange(60).reshape(GRID)
    counts = []
    for axis in range(3):
        ahead = np.moveaxis(place, axis, 0)
        pairs = {frozenset(p) for p in zip(ahead[:-1].ravel(), ahead[1:].ravel(), strict=True)}
        assert pairs <= set().union(*followed.values())
        counts.append([len(pairs & followed[order]) for order in ORDERS])
    # Frames, rows and columns: pairs kept together by each order. All are in one of them, and in no single.
    pairs = [2 * 4 * 5, 3 * 3 * 5, 3 * 4 * 4]
    assert [max(kept) for kept in counts] == pairs
    assert all(sum(kept) < sum(pairs) for kept in zip(*counts, strict=True))


def test_one_direction_equals_mamba2_and_they_add_up_before_the_norm():
    """With the same parameters both ways a palindrome is read alike from both ends."""
    both, one = BidirectionalMamba2(**TOY), Mamba2(**TOY)
    half = jax.random.normal(jax.random.key(1), (2, 4, 8))
    x = jnp.concatenate([half, half[:, ::-1]], axis=1)
    held = drawn(both, x, Context())["params"]
    ways = held.pop("directions")
    silent = {name: np.stack([leaf[0], 0 * leaf[0]]) for name, leaf in ways.items()}
    mine = jax.jit(both.apply)({"params": {**held, "directions": silent}}, x, Context())
    alone = {"params": {**held, **{name: leaf[0] for name, leaf in ways.items()}}}
    # A convolution of zeros leaves x = B = C = silu(0) = 0: the backward way is silent.
    np.testing.assert_allclose(mine, jax.jit(one.apply)(alone, x, Context()), rtol=1e-4, atol=1e-5)


def shared_ways(params):
    ways = params["params"]["directions"]
    same = {name: np.stack([leaf[0], leaf[0]]) for name, leaf in ways.items()}
    return {"params": {**params["params"], "directions": same}}


@pytest.mark.parametrize("reviewed", [0, 3])
def test_the_reverse_of_a_sequence_is_mixed_to_the_reverse(reviewed):
    mixer = BidirectionalMamba2(**TOY, chunk=4)
    x = jax.random.normal(jax.random.key(2), (2, 9, 8))
    seen = jax.random.normal(jax.random.key(3), (2, reviewed, 8)) if reviewed else None
    back = None if seen is None else seen[:, ::-1]
    params = drawn(mixer, x, Context())
    run = jax.jit(lambda p, x, seen: mixer.apply(p, x, Context(), overview=seen))
    same = shared_ways(params)
    np.testing.assert_allclose(run(same, x[:, ::-1], back)[:, ::-1], run(same, x, seen), rtol=1e-4, atol=1e-5)
    assert np.abs(run(params, x[:, ::-1], back)[:, ::-1] - run(params, x, seen)).max() > 1e-2


def test_every_token_reaches_every_other_and_the_overview_reaches_all():
    mixer = BidirectionalMamba2(**TOY, chunk=4)
    x, seen = jax.random.normal(jax.random.key(2), (1, 9, 8)), jnp.ones((1, 2, 8))
    params = drawn(mixer, x, Context())

    def total(x, seen, at):
        return jnp.sum(jnp.sin(mixer.apply(params, x, Context(), overview=seen)[0, at]))

    slopes = jax.jit(jax.vmap(jax.grad(total, argnums=(0, 1)), (None, None, 0)))(x, seen, jnp.arange(9))
    assert (np.abs(slopes[0]).max(-1) > 1e-7).all()
    assert (np.abs(slopes[1]).max(-1) > 1e-7).all()


def test_review_tokens_are_means_of_what_is_there():
    x = np.random.default_rng(5).normal(size=(1, 3, 4, 5, 2)).astype(np.float32)
    got = averaged(jnp.asarray(x), (2, 2, 2))
    assert got.shape == (1, 2, 2, 3, 2)
    for f, i, j in np.ndindex(2, 2, 3):
        block = x[0, 2 * f : 2 * f + 2, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        np.testing.assert_allclose(got[0, f, i, j], block.reshape(-1, 2).mean(0), rtol=1e-5, atol=1e-6)


def windows_by_hand(p, x, window, shift):
    """Attention of every place to those of its own window, in float64; windows begin at the shift."""
    where = np.stack(np.meshgrid(*map(np.arange, x.shape[:3]), indexing="ij"), -1).reshape(-1, 3)
    own = (where - np.array(shift)) // np.array(window)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p["params"])
    flat = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    q, k, v = (
        np.einsum("nc,chd->nhd", flat, p[n]["kernel"]) + p[n]["bias"] for n in ("query", "key", "value")
    )
    out = np.empty_like(q)
    for place in range(len(flat)):
        seen = (own == own[place]).all(-1)
        weights = np.exp(np.einsum("hd,nhd->hn", q[place], k[seen]) / np.sqrt(q.shape[-1]))
        out[place] = np.einsum("hn,nhd->hd", weights / weights.sum(-1, keepdims=True), v[seen])
    y = np.einsum("nhd,hdc->nc", out, p["output"]["kernel"]) + p["output"]["bias"]
    return y.reshape(x.shape)


@pytest.mark.parametrize(("grid", "window"), [((4, 4, 6), (2, 2, 3)), ((3, 4, 5), (2, 2, 2))])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_local_branch_is_attention_in_windows(grid, window, shifted):
    mixer = ShiftedVolume(2, window)
    x = jax.random.normal(jax.random.key(4), (1, *grid, 8))
    params = drawn(mixer, x, Context())
    got = jax.jit(lambda p, x: mixer.apply(p, x, Context(), shifted=shifted))(params, x)
    shift = [m // 2 if shifted and n > m else 0 for n, m in zip(grid, window, strict=True)]
    np.testing.assert_allclose(got[0], windows_by_hand(params, x[0], window, shift), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("turn", range(PERIOD))
def test_the_branches_add_up_and_rotate_with_the_layer(turn):
    mate = Mate(ShiftedVolume(2, (2, 2, 2)), BidirectionalMamba2(**TOY), review=(3, 2, 5))
    x = jax.random.normal(jax.random.key(6), (2, *GRID, 8))
    params = drawn(mate, x, Context())

    @jax.jit
    def apart(params, x):
        order, inside = ORDERS[turn], params["params"]
        review = jnp.stack([x[:, :, :2].mean((1, 2, 3)), x[:, :, 2:].mean((1, 2, 3))], axis=1)
        line = in_line(x, order)
        far = mate.scan.apply({"params": inside["scan"]}, line, Context(), overview=review)
        near = mate.local.apply({"params": inside["local"]}, x, Context(), shifted=turn in (1, 3))
        return in_place(far, GRID, order) + near

    got = jax.jit(mate.apply)(params, x, Context(turn=turn))
    np.testing.assert_allclose(got, apart(params, x), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_finite_differences():
    mate = Mate(ShiftedVolume(2, (2, 2, 2)), BidirectionalMamba2(**TOY, chunk=8))
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(7).normal(size=(1, 2, 3, 4, 8)))
        held = jax.tree.map(lambda leaf: leaf.astype(np.float64), drawn(mate, x, Context()))
        held["params"]["scan"]["directions"]["A_log"] -= 1.0
        draw = np.random.default_rng(8)
        along = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape), held)
        loss = lambda step: jnp.sum(
            jnp.sin(mate.apply(jax.tree.map(lambda p, d: p + step * d, held, along), x, Context(turn=3)))
        )
        slope, step = jax.jit(jax.grad(loss))(0.0), 1e-4  # windows weigh in float32
        values = jax.jit(jax.vmap(loss))(jnp.array([step, -step]))
        np.testing.assert_allclose(slope, (values[0] - values[1]) / (2 * step), rtol=1e-4)


def test_what_it_cannot_know_is_refused():
    x = jnp.zeros((1, 4, 8))
    context = Context(positions=jnp.zeros((1, 4), jnp.int32))
    with pytest.raises(UsageError, match="by their order alone"):
        jax.eval_shape(BidirectionalMamba2(**TOY).init, jax.random.key(0), x, context)
    with pytest.raises(UsageError, match="heads=3 does not divide the width 8"):
        jax.eval_shape(ShiftedVolume(3).init, jax.random.key(0), numbered().repeat(8, -1), Context())

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.mixers.neighborhood import Neighborhood, neighborhood_attention, tiles


def made(shape, heads=2, channels=8, **fields):
    """A mixer with parameters that are random throughout, and a map."""
    mixer = Neighborhood(heads=heads, **fields)
    x = jax.random.normal(jax.random.key(0), (2, *shape, channels))
    shapes = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x, Context()))
    draw = np.random.default_rng(1)
    return mixer, jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape) * 0.5), shapes), x


def run(mixer, params, x):
    return jax.jit(mixer.apply)(params, x, Context())


def neighbours(i, side, kernel, dilation):
    """Places along one axis that place `i` attends to, as the paper says it."""
    grid = list(range(i % dilation, side, dilation))
    at = grid.index(i)
    first = min(max(at - kernel // 2, 0), len(grid) - kernel)
    return grid[first : first + kernel]


def by_hand(params, x, heads, kernel, dilation):
    """Attention among all places with a mask of neighbours, in float64."""
    p = jax.tree.map(np.float64, params["params"])
    batch, height, width, channels = x.shape
    tall, wide = max(height, kernel * dilation), max(width, kernel * dilation)
    padded = np.zeros((batch, tall, wide, channels))
    padded[:, :height, :width] = x
    flat = padded.reshape(batch, tall * wide, channels)
    q, k, v = (
        np.einsum("bnc,chd->bnhd", flat, p[n]["kernel"]) + p[n]["bias"] for n in ("query", "key", "value")
    )
    mask = np.zeros((tall, wide, tall, wide), bool)
    bias = np.zeros((tall, wide, tall, wide, heads))
    for i, j in np.ndindex(tall, wide):
        for s in neighbours(i, tall, kernel, dilation):
            for t in neighbours(j, wide, kernel, dilation):
                mask[i, j, s, t] = True
                offset = (s - i) // dilation + kernel - 1, (t - j) // dilation + kernel - 1
                bias[i, j, s, t] = p["bias"][offset]
    assert (mask.sum((2, 3)) == kernel**2).all()
    mask, bias = mask.reshape(tall * wide, -1), bias.reshape(tall * wide, tall * wide, heads)
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1]) + bias.transpose(2, 0, 1)
    weights = np.exp(logits) * mask
    y = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    y = y.reshape(batch, tall, wide, heads, -1)[:, :height, :width]
    return np.einsum("bijhd,hdc->bijc", y, p["output"]["kernel"]) + p["output"]["bias"]


@pytest.mark.parametrize(
    ("shape", "kernel", "dilation"),
    [
        ((5, 7), 3, 1),  # one tile and several
        ((13, 8), 3, 1),  # a last tile that is not full
        ((9, 11), 5, 1),
        ((8, 12), 3, 2),  # even sub-grids
        ((7, 11), 3, 2),  # uneven ones
        ((9, 17), 3, 3),  # even along one side alone; tiles of sub-grids
        ((4, 9), 3, 2),  # padded to six places
        ((3, 3), 7, 1),
    ],
)
def test_equals_full_attention_with_a_mask_of_neighbours(shape, kernel, dilation):
    mixer, params, x = made(shape, kernel=kernel, dilation=dilation)
    wanted = by_hand(params, np.asarray(x), 2, kernel, dilation)
    np.testing.assert_allclose(run(mixer, params, x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("side", "kernel", "dilation"), [(20, 3, 1), (56, 7, 1), (56, 7, 8), (29, 5, 2), (96, 7, 13)]
)
def test_every_query_sees_its_neighbours_and_no_other_key(side, kernel, dilation):
    cut = tiles(side, kernel, dilation)
    for i in range(side):
        grid, place = i % dilation % len(cut.allowed), i // dilation
        tile, row = divmod(place, cut.tile)
        seen = cut.starts[tile] + np.flatnonzero(cut.allowed[grid, tile, row])
        assert (seen * dilation + i % dilation).tolist() == neighbours(i, side, kernel, dilation)
        held = cut.offsets[grid, tile, row][cut.allowed[grid, tile, row]]
        np.testing.assert_array_equal(held, seen - place)
    assert cut.span <= cut.tile + kernel - 1
    assert cut.tile <= 2 * kernel


def test_a_neighbourhood_as_large_as_the_map_is_attention_to_all():
    mixer, params, x = made((5, 5), kernel=5)
    p = dict(params["params"])
    p.pop("bias")
    plain = Attention(heads=2)
    wanted = plain.apply({"params": p}, x.reshape(2, 25, 8), Context()).reshape(x.shape)
    zero = {"params": {**p, "bias": np.zeros((9, 9, 2), np.float32)}}
    np.testing.assert_allclose(run(mixer, zero, x), wanted, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 10), (7, 9)])
def test_dilation_is_the_same_on_every_sub_grid(shape):
    mixer, params, x = made(shape, kernel=3, dilation=2)
    dense = mixer.clone(dilation=1)
    whole = run(mixer, params, x)
    for r, s in np.ndindex(2, 2):
        np.testing.assert_allclose(whole[:, r::2, s::2], run(dense, params, x[:, r::2, s::2]), atol=1e-5)


def test_inner_places_move_with_the_picture():
    """Away from the edges the same neighbourhood gives the same output wherever it stands."""
    mixer, params, x = made((12, 12), kernel=3)
    moved = run(mixer, params, jnp.roll(x, (2, 1), (1, 2)))
    np.testing.assert_allclose(moved[:, 3:-1, 2:-1], run(mixer, params, x)[:, 1:-3, 1:-2], atol=1e-5)


def test_memory_is_a_fraction_of_that_of_gathered_neighbours():
    q = jax.ShapeDtypeStruct((2, 28, 28, 2, 16), jnp.float32)

    def loss(q, k, v):
        return neighborhood_attention(q, k, v, kernel=7).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, q, q).compile()
    gathered = 49 * q.size * 4  # one copy of keys for every query, in bytes
    assert compiled.memory_analysis().temp_size_in_bytes < gathered


def test_gradients_are_those_of_finite_differences():
    mixer, params, x = made((7, 5), kernel=3, dilation=2)
    with jax.enable_x64(True):
        params, x = jax.tree.map(np.float64, params), jnp.asarray(np.float64(x))
        target = np.random.default_rng(2).normal(size=x.shape)
        loss = jax.jit(lambda params: jnp.sum(mixer.apply(params, x, Context()) * target))
        draw = np.random.default_rng(3)
        ahead = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape), params)
        gradient = jax.grad(loss)(params)
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float(jnp.vdot(g, d)), gradient, ahead)))
        step = 1e-3  # logits are float32 inside

        def at(t):
            return float(loss(jax.tree.map(lambda p, d: p + t * d, params, ahead)))

        assert (at(step) - at(-step)) / (2 * step) == pytest.approx(slope, rel=2e-3)


def test_what_does_not_fit_is_refused():
    x = jnp.ones((1, 8, 8, 8))
    with pytest.raises(UsageError, match="heads=3 does not divide the width 8"):
        Neighborhood(heads=3, kernel=3).init(jax.random.key(0), x, Context())
    with pytest.raises(UsageError, match="4 x 4 places, 1 apart, must have an odd side"):
        Neighborhood(heads=2, kernel=4).init(jax.random.key(0), x, Context())
    with pytest.raises(UsageError, match="fit on the map of 8 x 8"):
        neighborhood_attention(*[x.reshape(1, 8, 8, 2, 4)] * 3, kernel=5, dilation=2)

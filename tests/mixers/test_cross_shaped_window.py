import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.mixers.context import Context
from effjax.mixers.cross_shaped_window import CrossShapedWindow


def made(shape, heads=4, channels=8, **fields):
    """A mixer with parameters that are random throughout, and a map."""
    mixer = CrossShapedWindow(heads=heads, **fields)
    x = jax.random.normal(jax.random.key(0), (2, *shape, channels))
    shapes = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x, Context()))
    draw = np.random.default_rng(1)
    return mixer, jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape) * 0.5), shapes), x


def run(mixer, params, x):
    return jax.jit(mixer.apply)(params, x, Context())


def by_hand(params, x, heads, stripe):
    """Attention among all places with a mask that says who shares a stripe, in float64; zeros around."""
    p = jax.tree.map(np.float64, params["params"])
    batch, height, width, channels = x.shape
    q, k, v = (
        np.einsum("bijc,chd->bijhd", x, p[n]["kernel"]) + p[n]["bias"] for n in ("query", "key", "value")
    )
    dims = channels // heads
    mixed = np.zeros((batch, height, width, heads, dims))
    for h in range(heads):
        columns = h < heads // 2
        side = width if columns else height
        wide = min(stripe, side)
        before = (-side % wide) // 2

        def stripe_of(i, j, columns=columns, wide=wide, before=before):
            return ((j if columns else i) + before) // wide

        total = side + -side % wide
        lepe = p["lepe_columns" if columns else "lepe_rows"]
        kernel = lepe["kernel"][..., (h % (heads // 2)) * dims :][..., :dims]
        shift = lepe["bias"][(h % (heads // 2)) * dims :][:dims]
        for b, i, j in np.ndindex(batch, height, width):
            mine = stripe_of(i, j)
            keys = [(s, t) for s in range(height) for t in range(width) if stripe_of(s, t) == mine]
            inside = sum(mine * wide <= c + before < mine * wide + wide for c in range(side))
            zeros = (wide - inside) * (height if columns else width)  # padding attends as zero keys
            assert total % wide == 0
            logits = np.array([q[b, i, j, h] @ k[b, s, t, h] for s, t in keys] + [0.0] * zeros) / np.sqrt(
                dims
            )
            weights = np.exp(logits) / np.exp(logits).sum()
            mixed[b, i, j, h] = weights[: len(keys)] @ np.stack([v[b, s, t, h] for s, t in keys]) + shift
            for s, t in keys:
                if abs(s - i) <= 1 and abs(t - j) <= 1:
                    mixed[b, i, j, h] += kernel[s - i + 1, t - j + 1] * v[b, s, t, h]
    return mixed.reshape(x.shape) @ p["output"]["kernel"] + p["output"]["bias"]


@pytest.mark.parametrize(
    ("shape", "stripe"),
    [((4, 6), 1), ((4, 6), 2), ((5, 7), 3), ((3, 4), 7)],
    ids=["1", "2", "padded", "whole"],
)
def test_equals_attention_among_the_places_of_a_stripe(shape, stripe):
    mixer, params, x = made(shape, stripe=stripe)
    wanted = by_hand(params, np.asarray(x), 4, stripe)
    np.testing.assert_allclose(run(mixer, params, x), wanted, rtol=1e-4, atol=1e-5)


def test_a_transposed_map_swaps_the_halves_of_the_heads():
    """With the same weights for both halves, rows and columns change places exactly."""
    mixer, params, x = made((6, 6), stripe=2)
    p = params["params"]
    swapped = {}
    for name in ("query", "key", "value"):
        swapped[name] = {leaf: np.roll(value, 2, axis=-2) for leaf, value in p[name].items()}
    for name, other in (("lepe_columns", "lepe_rows"), ("lepe_rows", "lepe_columns")):
        swapped[name] = {"kernel": np.swapaxes(p[other]["kernel"], 0, 1), "bias": p[other]["bias"]}
    swapped["output"] = {"kernel": np.roll(p["output"]["kernel"], 4, axis=0), "bias": p["output"]["bias"]}
    turned = run(mixer, {"params": swapped}, jnp.swapaxes(x, 1, 2))
    np.testing.assert_allclose(jnp.swapaxes(turned, 1, 2), run(mixer, params, x), atol=1e-5)
    assert float(jnp.abs(run(mixer, params, jnp.swapaxes(x, 1, 2)).swapaxes(1, 2) - turned).max()) > 1e-2


def test_one_stripe_is_attention_to_the_whole_map():
    """Two branches whose stripes cover the map are the one branch of the last stage."""
    mixer, params, x = made((4, 4), stripe=4)
    p = dict(params["params"])
    columns, rows = p.pop("lepe_columns"), p.pop("lepe_rows")
    p["lepe"] = {leaf: np.concatenate([columns[leaf], rows[leaf]], axis=-1) for leaf in columns}
    whole = mixer.clone(stripe=None)
    np.testing.assert_allclose(run(whole, {"params": p}, x), run(mixer, params, x), atol=1e-5)


def test_a_cross_reaches_rows_and_columns_and_two_reach_everything():
    mixer, params, x = made((6, 6), stripe=1)

    def reach(times):
        def centre(x):
            for _ in range(times):
                x = mixer.apply(params, x, Context())
            return x[0, 2, 3].sum()

        return np.abs(np.asarray(jax.jit(jax.grad(centre))(x[:1])))[0].max(-1) > 1e-9

    cross = np.zeros((6, 6), bool)
    cross[2], cross[:, 3] = True, True
    np.testing.assert_array_equal(reach(1), cross)
    assert reach(2).all()


def test_gradients_are_those_of_finite_differences():
    mixer, params, x = made((3, 5), stripe=2)
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


@pytest.mark.parametrize(
    ("heads", "message"), [(3, "heads=3 does not divide the width 8"), (1, "heads=1 is odd")]
)
def test_heads_that_do_not_fit_are_refused(heads, message):
    with pytest.raises(UsageError, match=message):
        CrossShapedWindow(heads=heads, stripe=2).init(jax.random.key(0), jnp.ones((1, 4, 4, 8)), Context())

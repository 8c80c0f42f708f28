import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.mixers.context import Context
from effjax.mixers.position_bias import LogSpacedContinuous
from effjax.mixers.shifted_window import ShiftedWindow, unit


def made(shape, heads=2, **fields):
    """A mixer with parameters that are random throughout, and a map."""
    mixer = ShiftedWindow(heads=heads, **fields)
    x = jax.random.normal(jax.random.key(0), (2, *shape, 8))
    shapes = meta.unbox(jax.eval_shape(mixer.init, jax.random.key(0), x, Context()))
    draw = np.random.default_rng(1)
    return mixer, jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape) * 0.5), shapes), x


def run(mixer, params, x):
    return jax.jit(mixer.apply)(params, x, Context())


def by_hand(mixer, params, x):
    """Loops over the places of the padded map, in float64: who shares a window, and with what bias."""
    p = jax.tree.map(np.float64, params["params"])
    batch, height, width, channels = x.shape
    m, n = min(mixer.window, height), min(mixer.window, width)
    down = m // 2 if mixer.shifted and height > m else 0
    right = n // 2 if mixer.shifted and width > n else 0
    tall, wide = height + -height % m, width + -width % n
    padded = np.zeros((batch, tall, wide, channels))
    padded[:, :height, :width] = x
    q, k, v = (np.einsum("bijc,chd->bijhd", padded, p[name]["kernel"]) for name in ("query", "key", "value"))
    q, k, v = (
        a + p[name].get("bias", 0) for a, name in zip((q, k, v), ("query", "key", "value"), strict=True)
    )
    if mixer.similarity == "cosine":
        q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
        factor = np.exp(np.minimum(p["logit_scale"], np.log(100)))
    else:
        factor = np.full(mixer.heads, q.shape[-1] ** -0.5)
    table = p["bias"]["table"].reshape(2 * mixer.window - 1, 2 * mixer.window - 1, mixer.heads)

    def window_of(i, j):
        """Windows of the shifted map begin at the shift; those before it are apart from those at the end."""
        return (i - down) // m, (j - right) // n

    y = np.zeros((batch, height, width, mixer.heads, q.shape[-1]))
    for b, i, j, h in np.ndindex(batch, height, width, mixer.heads):
        keys = [(s, t) for s in range(tall) for t in range(wide) if window_of(s, t) == window_of(i, j)]
        place = mixer.window - 1
        logits = np.array(
            [
                factor[h] * (q[b, i, j, h] @ k[b, s, t, h]) + table[place + i - s, place + j - t, h]
                for s, t in keys
            ]
        )
        weights = np.exp(logits - logits.max())
        y[b, i, j, h] = weights @ np.stack([v[b, s, t, h] for s, t in keys]) / weights.sum()
    return np.einsum("bijhd,hdc->bijc", y, p["output"]["kernel"]) + p["output"]["bias"]


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize(
    ("shape", "window", "shifted"),
    [
        ((6, 9), 3, False),
        ((6, 9), 3, True),
        ((7, 8), 3, True),  # padded on both sides
        ((4, 10), 5, True),  # the window is taller than the map, which shifts to the right alone
        ((3, 3), 7, True),  # one window, the middle of the table
        ((5, 5), 4, False),
    ],
)
def test_equals_attention_among_the_places_of_a_window(shape, window, shifted, similarity):
    mixer, params, x = made(shape, window=window, shifted=shifted, similarity=similarity)
    wanted = by_hand(mixer, params, np.asarray(x))
    np.testing.assert_allclose(run(mixer, params, x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
def test_a_place_changes_its_window_and_nothing_else(shifted):
    mixer, params, x = made((8, 8), window=4, shifted=shifted)
    before = run(mixer, params, x[:1])
    for i, j in [(0, 0), (1, 5), (3, 3), (7, 7), (6, 2)]:
        changed = np.abs(run(mixer, params, x[:1].at[0, i, j].add(1.0)) - before).max(axis=(0, 3)) > 1e-6
        shift = 2 if shifted else 0
        rows, columns = ((np.arange(8) - shift) // 4 for _ in range(2))
        same = (rows[:, None] == rows[i]) & (columns[None, :] == columns[j])
        np.testing.assert_array_equal(
            changed, same
        )  # opposite edges share a window and do not see each other


def test_padding_before_or_after_the_shift_differs_only_where_there_is_some():
    mixer, params, x = made((6, 6), window=3, shifted=True)
    after = mixer.clone(pad="after_shift")
    np.testing.assert_array_equal(run(mixer, params, x), run(after, params, x))
    mixer, params, x = made((7, 7), window=3, shifted=True)
    after = mixer.clone(pad="after_shift")
    assert float(jnp.abs(run(mixer, params, x) - run(after, params, x)).max()) > 1e-2
    # Zeros behind the rolled map: its own last rows come first below it, the zeros after those.
    rolled = jnp.roll(x, (-1, -1), (1, 2))
    plain = mixer.clone(shifted=False)
    inner = run(plain, params, rolled)[:, :6, :6]  # windows without an edge inside
    np.testing.assert_allclose(run(after, params, x)[:, 1:7, 1:7], inner, atol=1e-5)


def test_cosine_attention_knows_directions_alone():
    mixer, params, x = made((4, 4), window=4, similarity="cosine", key_bias=False)
    assert "bias" not in params["params"]["key"]
    grown = {**params["params"]}
    grown["query"] = {name: 7.0 * leaf for name, leaf in grown["query"].items()}
    grown["key"] = {"kernel": 0.1 * grown["key"]["kernel"]}
    np.testing.assert_allclose(run(mixer, {"params": grown}, x), run(mixer, params, x), atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(unit(x), axis=-1), 1, rtol=1e-5)
    assert not jnp.any(unit(jnp.zeros((2, 3))))
    assert jnp.isfinite(jax.grad(lambda z: unit(z).sum())(jnp.zeros((2, 3)))).all()


def test_the_temperature_starts_at_ten_and_stops_at_a_hundred():
    mixer, params, x = made((4, 4), window=4, similarity="cosine")
    started = meta.unbox(mixer.init(jax.random.key(0), x, Context()))["params"]["logit_scale"]
    np.testing.assert_allclose(np.exp(started), 10.0, rtol=1e-6)
    outputs = []
    for scale in (np.log(100.0), 9.0):
        params["params"]["logit_scale"] = jnp.full(2, scale, jnp.float32)
        outputs.append(run(mixer, params, x))
    np.testing.assert_allclose(*outputs, atol=1e-5)


def test_gradients_are_those_of_finite_differences():
    bias = LogSpacedContinuous(hidden=8)
    mixer, params, x = made((5, 4), window=3, shifted=True, similarity="cosine", bias=bias)
    with jax.enable_x64(True):
        params, x = jax.tree.map(np.float64, params), jnp.asarray(np.float64(x))
        target = np.random.default_rng(2).normal(size=x.shape)

        @jax.jit
        def loss(params):
            return jnp.sum(mixer.apply(params, x, Context()) * target)

        gradient = jax.grad(loss)(params)
        draw = np.random.default_rng(3)
        ahead = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape), params)
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float(jnp.vdot(g, d)), gradient, ahead)))
        step = 1e-3  # logits are float32 inside

        def at(t):
            return float(loss(jax.tree.map(lambda p, d: p + t * d, params, ahead)))

        assert (at(step) - at(-step)) / (2 * step) == pytest.approx(slope, rel=2e-3)


def test_heads_must_divide_the_channels():
    with pytest.raises(UsageError, match="heads=3 does not divide the width 8"):
        ShiftedWindow(heads=3).init(jax.random.key(0), jnp.ones((1, 4, 4, 8)), Context())

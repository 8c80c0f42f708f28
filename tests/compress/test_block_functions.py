import jax
import jax.numpy as jnp
import numpy as np

from effjax.compress.block_functions import gelu, layer_norm, reciprocal_root, softmax
from effjax.compress.storage.shift import Shift, blocked
from effjax.layers.stored import Place


def test_gelu_by_table_is_within_half_a_step_of_the_function(draw):
    x = blocked(jnp.asarray(draw.normal(size=(4, 32)) * 3, jnp.float32), 8, 8)
    y = jax.jit(gelu)(x)
    steps = np.ldexp(1.0, np.repeat(np.asarray(y.shift), 8, -1))
    exact = np.asarray(jax.nn.gelu(x.numbers(), approximate=False), np.float64)
    assert np.all(np.abs(np.asarray(y.numbers()) - exact) <= 0.5 * steps + 1e-6)
    assert jnp.all(gelu(blocked(jnp.zeros((1, 8)), 8, 8)).numbers() == 0)


def test_softmax_is_a_distribution_near_the_exact_one(draw):
    x = blocked(jnp.asarray(draw.normal(size=(6, 32)) * 2, jnp.float32), 8, 8)
    p = np.asarray(jax.jit(softmax)(x).numbers())
    exact = np.asarray(jax.nn.softmax(x.numbers()))
    np.testing.assert_allclose(p.sum(-1), 1, atol=0.02)
    # Half a step of the differences is 1/32, half a step of a block 1/127 of its largest.
    assert np.abs(p - exact).max() < (1 / 32 + 1 / 127) * exact.max()
    shifted = softmax(blocked(x.numbers() + 4.0, 8, 8)).numbers()
    assert np.abs(shifted - exact).max() < 0.06 * exact.max()


def test_a_root_is_within_its_table(draw):
    x = np.concatenate([draw.lognormal(0, 8, 500), 2.0 ** np.arange(-20, 21)]).astype(np.float32)
    y = np.asarray(jax.jit(reciprocal_root)(jnp.asarray(x)), np.float64)
    assert np.abs(y * np.sqrt(x.astype(np.float64)) - 1).max() < 1 / 1000


def test_layer_norm_is_near_the_exact_one(draw):
    x = blocked(jnp.asarray(draw.normal(size=(5, 32)) * 3 + 1, jnp.float32), 8, 8)
    scale, bias = (jnp.asarray(draw.normal(size=32), jnp.float32) for _ in range(2))
    exact = np.asarray(x.numbers(), np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    exact = exact * np.asarray(scale) + np.asarray(bias)
    y = np.asarray(jax.jit(layer_norm)(x, scale, bias).numbers())
    assert np.abs(y - exact).max() < 0.012 * np.abs(exact).max()


def test_a_transformer_block_of_8_bits_is_near_the_float_one(draw):
    """Every operator on blocks: norms, all products, softmax, gelu and the stream itself."""
    width, heads, size = 32, 4, 8
    x = jnp.asarray(draw.normal(size=(6, width)), jnp.float32)
    shapes = dict(qkv=(width, 3 * width), out=(width, width), up=(width, 4 * width), down=(4 * width, width))
    weights = {
        name: jnp.asarray(draw.normal(size=s) / s[0] ** 0.5, jnp.float32) for name, s in shapes.items()
    }
    scale, bias = (jnp.asarray(draw.normal(size=width) * 0.2 + mean, jnp.float32) for mean in (1.0, 0.0))
    layout = Shift(8, size, size, inputs=8)
    held = {
        name: jax.jit(layout.store, static_argnums=1)(
            w, Place(w.shape, (None, None), w.shape[:1], w.shape[1:], False)
        )
        for name, w in weights.items()
    }

    def again(y):
        return blocked(y, size, 8).numbers()

    def exact_norm(y):
        y = y - y.mean(-1, keepdims=True)
        y = y / jnp.sqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6)
        return y * scale[None] + bias[None]

    def block(x, rounds):
        def product(name, y):
            return again(held[name].product(y)) if rounds else y @ weights[name]

        def norm(y):
            return layer_norm(blocked(y, size, 8), scale, bias).numbers() if rounds else exact_norm(y)

        keep = again if rounds else lambda y: y
        x = keep(x)
        q, k, v = product("qkv", norm(x)).reshape(6, 3, heads, -1).transpose(1, 2, 0, 3)  # [H, N, D]
        logits = jnp.einsum("hnd,hsd->hns", q, k) / q.shape[-1] ** 0.5
        p = softmax(blocked(logits, 6, 8)).numbers() if rounds else jax.nn.softmax(logits)
        y = keep(jnp.einsum("hns,hsd->nhd", p, v).reshape(6, width))
        x = keep(x + product("out", y))
        h = product("up", norm(x))
        h = gelu(blocked(h, size, 8)).numbers() if rounds else jax.nn.gelu(h, approximate=False)
        return keep(x + product("down", h))

    rounded, exact = (jax.jit(block, static_argnums=1)(x, rounds) for rounds in (True, False))
    assert float(jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)) < 0.03

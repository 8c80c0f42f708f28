import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax import models
from effjax.config import build_kind
from effjax.data.in_context import Regression
from effjax.errors import UsageError
from effjax.ffn import MLP
from effjax.layers.dense import Dense
from effjax.mixers import Attention
from effjax.models.algoformer import AlgoFormer, Trunk
from effjax.models.lm import DecoderBlock
from tests.models.official import recording, translated

BLOCK = DecoderBlock(Attention(2, causal=True), MLP(ratio=2.0), norm="layer")


def small(**fields):
    return AlgoFormer(BLOCK, dim=8, **{"iterations": 4, "window": 2, "position_table": 9} | fields)


@pytest.fixture(scope="module")
def prompt():
    return jax.random.normal(jax.random.key(0), (2, 7, 3))


@pytest.fixture(scope="module")
def params(prompt):
    shapes = meta.unbox(jax.eval_shape(small().init, jax.random.key(1), prompt))["params"]
    draw = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape) * 0.5), shapes)


@functools.partial(jax.jit, static_argnames="model")
def predict(model, params, prompt):
    return model.apply({"params": params}, prompt)


@jax.jit
def trunk(params, x):
    return Trunk(BLOCK, 1).apply({"params": params}, x)


def by_hand(params, prompt, iterations, window, truncate):
    """The same, unrolled."""

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"][None, None]

    given = trunk(params["pre"], dense("read_in", prompt) + params["positions"][None, :7])
    state, predictions = jnp.zeros_like(given), []
    for t in range(1, iterations + 1):
        state = trunk(params["loop"], state + given)
        if t == iterations - window and truncate:
            state = jax.lax.stop_gradient(state)
        if t > iterations - window:
            predictions.append(dense("read_out", trunk(params["post"], state)))
    return jnp.stack(predictions)


def test_one_iteration_is_three_parts_one_behind_the_other(params, prompt):
    found = predict(small(iterations=1, window=1), params, prompt)
    start = params["read_in"]["bias"][None] + params["positions"][:7]
    x = prompt @ params["read_in"]["kernel"] + start[None]
    for part in ("pre", "loop", "post"):
        x = trunk(params[part], x)
    wanted = x @ params["read_out"]["kernel"] + params["read_out"]["bias"][None, None]
    np.testing.assert_allclose(found, wanted[None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("truncate", [True, False])
def test_the_scan_equals_the_unrolled_loop_and_so_does_its_gradient(params, prompt, truncate):
    model = small(truncate=truncate)
    unrolled = functools.partial(by_hand, iterations=4, window=2, truncate=truncate)
    np.testing.assert_allclose(
        predict(model, params, prompt), jax.jit(unrolled)(params, prompt), rtol=1e-4, atol=1e-5
    )

    def squares(run, params):
        return jnp.sum(jnp.square(run(params, prompt)))

    found, wanted = (
        jax.jit(jax.grad(functools.partial(squares, run)))(params)
        for run in (lambda params, prompt: model.apply({"params": params}, prompt), unrolled)
    )
    # Some are zero but for rounding: a bias of the keys changes no weight of the attention.
    largest = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    for near, leaf in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(near, leaf, rtol=1e-3, atol=1e-5 * largest)


def test_the_gradient_ends_where_the_window_begins(params, prompt):
    def loss(params, truncate):
        return jnp.sum(jnp.square(small(truncate=truncate).apply({"params": params}, prompt)))

    short, whole = (jax.jit(jax.grad(functools.partial(loss, truncate=t)))(params) for t in (True, False))
    near = [np.allclose(a, b, rtol=1e-3) for a, b in zip(*map(jax.tree.leaves, (short, whole)), strict=True)]
    assert not all(near)
    # What stands behind the loop sees the same iterates.
    np.testing.assert_allclose(short["read_out"]["kernel"], whole["read_out"]["kernel"], rtol=1e-5)


def test_iterations_and_window_change_no_parameters(params, prompt):
    long = predict(small(iterations=9, window=9), params, prompt)
    np.testing.assert_allclose(long[2:4], predict(small(), params, prompt), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(predict(small(iterations=9, window=1), params, prompt)[0], long[-1], rtol=1e-4)


def test_a_place_does_not_see_those_behind_it(params, prompt):
    changed = prompt.at[:, 4:].add(1.0)
    found, other = predict(small(), params, prompt), predict(small(), params, changed)
    np.testing.assert_allclose(found[:, :, :4], other[:, :, :4], rtol=1e-5, atol=1e-5)
    assert not np.allclose(found[:, :, 4:], other[:, :, 4:])


def test_parts_may_be_left_out(prompt):
    def shapes(**fields):
        tree = meta.unbox(jax.eval_shape(small(**fields).init, jax.random.key(0), prompt))["params"]
        return {*tree}, sum(leaf.size for leaf in jax.tree.leaves(tree))

    outside = {"read_in", "read_out", "positions"}
    three = [shapes(), shapes(pre=0, loop=3, post=0), shapes(pre=3, loop=0, post=0)]
    assert [names - outside for names, _ in three] == [{"pre", "loop", "post"}, {"loop"}, {"pre"}]
    # The same but for two norms of 8 scales and biases.
    assert three[1][1] == three[2][1] == three[0][1] - 32
    standard = small(pre=3, loop=0, post=0)
    variables = jax.jit(standard.init)(jax.random.key(0), prompt)
    assert predict(standard, meta.unbox(variables)["params"], prompt).shape == (1, 2, 7, 1)


LOOPED = (
    ("_read_in.weight", "read_in/kernel", "o i -> i o"),
    ("_read_in.bias", "read_in/bias", ""),
    ("_read_out.weight", "read_out/kernel", "o i -> i o"),
    ("_read_out.bias", "read_out/bias", ""),
    ("_backbone.transformer.wpe.weight", "positions", ""),
    ("_backbone.transformer.ln_f.weight", "loop/norm/scale", ""),
    ("_backbone.transformer.ln_f.bias", "loop/norm/bias", ""),
    ("_backbone.transformer.h.{}.ln_1.weight", "loop/blocks/mixer_norm/scale", ""),
    ("_backbone.transformer.h.{}.ln_1.bias", "loop/blocks/mixer_norm/bias", ""),
    ("_backbone.transformer.h.{}.ln_2.weight", "loop/blocks/ffn_norm/scale", ""),
    ("_backbone.transformer.h.{}.ln_2.bias", "loop/blocks/ffn_norm/bias", ""),
    (
        "_backbone.transformer.h.{}.attn.c_attn.weight",
        tuple(f"loop/blocks/mixer/{name}/kernel" for name in ("query", "key", "value")),
        "(h d) c -> c h d",
    ),
    (
        "_backbone.transformer.h.{}.attn.c_attn.bias",
        tuple(f"loop/blocks/mixer/{name}/bias" for name in ("query", "key", "value")),
        "(h d) -> h d",
    ),
    (
        "_backbone.transformer.h.{}.attn.c_proj.weight",
        "loop/blocks/mixer/output/kernel",
        "c (h d) -> h d c",
    ),
    ("_backbone.transformer.h.{}.attn.c_proj.bias", "loop/blocks/mixer/output/bias", ""),
    ("_backbone.transformer.h.{}.mlp.c_fc.weight", "loop/blocks/ffn/expand/kernel", "o c -> c o"),
    ("_backbone.transformer.h.{}.mlp.c_fc.bias", "loop/blocks/ffn/expand/bias", ""),
    ("_backbone.transformer.h.{}.mlp.c_proj.weight", "loop/blocks/ffn/contract/kernel", "o c -> c o"),
    ("_backbone.transformer.h.{}.mlp.c_proj.bias", "loop/blocks/ffn/contract/bias", ""),
)


def test_the_loop_alone_is_the_published_looped_transformer():
    """Predictions of the last three of four iterates, and how they change with what reads the prompt in."""
    tensors, prompt, wanted = recording("looped")
    slope = tensors.pop("__gradient")
    params, prompt = translated(tensors, LOOPED, h=2), jnp.asarray(prompt)
    block = DecoderBlock(Attention(2, causal=True), MLP(activation="gelu_tanh"), norm="layer")
    model = AlgoFormer(
        block, dim=8, pre=0, loop=2, post=0, iterations=4, window=3, position_table=len(params["positions"])
    )

    def loss(params):
        found = model.apply({"params": params}, prompt)[:, :, ::2, 0]
        return jnp.mean(jnp.square(found)), found

    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        gradient["read_in"]["kernel"].T, slope, rtol=1e-3, atol=1e-5 * np.abs(slope).max()
    )


class LinearAttention(nn.Module):
    """y_j = sum_i (q_j . k_i) v_i / n."""

    @nn.compact
    def __call__(self, x, context, train=False):
        q, k, v = (
            Dense(x.shape[-1], ("embed", "mlp"), use_bias=False, name=name)(x)
            for name in ("query", "key", "value")
        )
        return jnp.einsum("bic,bjc,bjd->bid", q, k, v) / x.shape[1]


def test_constructed_weights_are_gradient_descent():
    """As von Oswald et al. 2023, with the prompt that comes in again at each iteration taken out again.

    Channels: x, x where the answer is known, the answer, and s = w_t . x. Attention adds to s_j the sum of
    (y_i - s_i) x_i . x_j over the known; the FFN, gelu(h) - gelu(-h) = h, takes away what is not s.
    """
    dims, known, asked, steps, rate = 3, 8, 2, 6, 0.4
    size, n = 2 * dims + 2, known + asked
    draw = np.random.default_rng(0)
    x = draw.normal(size=(n, dims))
    y = np.where(np.arange(n) < known, x @ draw.normal(size=dims), 0.0)
    prompt = np.concatenate([x, x * (np.arange(n) < known)[:, None], y[:, None]], axis=1)

    first, second = np.arange(dims), np.arange(dims, 2 * dims)
    query, key, value = np.zeros((3, 1, size, size))
    query[0, first, first] = key[0, second, first] = 1.0
    value[0, 2 * dims, -1], value[0, 2 * dims + 1, -1] = rate, -rate
    identity, taken = np.eye(size), np.diag(1.0 * (np.arange(size) < size - 1))
    params = {
        "read_in": {"kernel": np.eye(size - 1, size), "bias": np.zeros(size)},
        "loop": {
            "blocks": {
                "mixer": {name: {"kernel": w} for name, w in dict(query=query, key=key, value=value).items()},
                "ffn": {
                    "expand": {"kernel": np.concatenate([identity, -identity], axis=1)[None]},
                    "contract": {"kernel": np.concatenate([-taken, taken])[None]},
                },
            }
        },
        "read_out": {"kernel": np.eye(size)[:, -1:], "bias": np.zeros(1)},
    }
    block = DecoderBlock(LinearAttention(), MLP(ratio=2.0, use_bias=False), norm="none")
    model = AlgoFormer(block, dim=size, pre=0, post=0, iterations=steps, window=steps)
    params = jax.tree.map(jnp.float32, params)
    found = predict(model, params, jnp.float32(prompt)[None])[:, 0, :, 0]

    w = np.zeros(dims)
    for t in range(steps):
        slope = np.zeros(dims)
        for i in range(known):
            slope += (y[i] - w @ x[i]) * x[i]
        w = w + rate / n * slope
        np.testing.assert_allclose(found[t], x @ w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(window=6), "window=6 of iterations=4"),
        (dict(window=0), "window=0"),
        (dict(pre=0, loop=0, post=0), "there must be a block"),
        (dict(position_table=6), "a prompt of 7 places is longer than the 6 of position_table"),
    ],
)
def test_bad_requests_are_named(prompt, fields, message):
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(small(**fields).init, jax.random.key(0), prompt)


def test_a_config_builds_the_size_of_the_paper():
    from configs.language.algoformer import get_config

    config = get_config("regression-d20")
    model = build_kind(models.KINDS, config.model, "config.model")
    prompt = jnp.asarray(Regression(layers=0).open()[0]["prompt"])[None]
    assert prompt.shape == (1, 81, 20)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), prompt))["params"]
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in shapes.items()}
    block = 4 * 256 * 257 + 2 * 4 * 256 * 256 + 5 * 256 + 2 * 2 * 256
    assert sizes["pre"] == sizes["loop"] == sizes["post"] == block + 2 * 256  # 0.79M each, however many loops

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.mixers.context import Context
from effjax.models import KINDS


def vit(**changes):
    section = dict(
        kind="vit",
        patch=2,
        dim=24,
        depth=3,
        classes=5,
        block=dict(mixer=dict(kind="attention", heads=3), ffn=dict(kind="mlp")),
    )
    return build_kind(KINDS, section | changes, "config.model")


IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 6, 3))


def params_of(model, images=IMAGES):
    params = meta.unbox(jax.jit(model.init)(jax.random.key(1), images))
    # The head starts at zero; give it weights so that outputs mean something.
    head = params["params"].get("head")
    if head is not None:
        head["kernel"] = jax.random.normal(jax.random.key(2), head["kernel"].shape)
    return params


def reference(params, images, heads=3, patch=2):
    """The equations of the paper, layer by layer, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    b, height, width, c = images.shape
    x = np.asarray(images, np.float64).reshape(b, height // patch, patch, width // patch, patch, c)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)
    x = x @ p["embed"]["projection"]["kernel"] + p["embed"]["projection"]["bias"]
    x = np.concatenate([np.broadcast_to(p["class_token"], (b, 1, x.shape[-1])), x], 1) + p["positions"]

    def norm(x, scale, bias):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-6) * scale + bias

    def gelu(x):
        from scipy.special import erf

        return 0.5 * x * (1 + erf(x / np.sqrt(2)))

    for i in range(3):
        blk = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
        h = norm(x, **blk["mixer_norm"])
        q, k, v = (
            np.einsum("bnc,chd->bhnd", h, blk["mixer"][n]["kernel"]) + blk["mixer"][n]["bias"][:, None]
            for n in ("query", "key", "value")
        )
        logits = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("bhnd,hdc->bnc", weights @ v, blk["mixer"]["output"]["kernel"])
        x = x + out + blk["mixer"]["output"]["bias"]
        h = norm(x, **blk["ffn_norm"])
        h = gelu(h @ blk["ffn"]["expand"]["kernel"] + blk["ffn"]["expand"]["bias"])
        x = x + h @ blk["ffn"]["contract"]["kernel"] + blk["ffn"]["contract"]["bias"]
    return norm(x, **p["norm"])[:, 0] @ p["head"]["kernel"] + p["head"]["bias"]


def test_equals_the_equations_in_float64():
    model = vit()
    params = params_of(model)
    # Move everything off its initial value, so that no bias is zero and no scale one.
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), params)
    expected = reference(params, IMAGES)
    np.testing.assert_allclose(model.apply(params, IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_mean_pooling_has_no_class_token():
    model = vit(pool="mean")
    params = params_of(model)
    assert "class_token" not in params["params"]
    assert params["params"]["positions"].shape == (12, 24)


def test_without_classes_it_returns_features():
    model = vit(classes=0)
    assert model.apply(params_of(model), IMAGES).shape == (2, 24)


def test_training_draws_and_evaluation_does_not():
    model = vit(drop_path=0.9, block=dict(mixer=dict(kind="attention", heads=3), ffn=dict(kind="mlp")))
    params = params_of(model)
    run = lambda key: model.apply(params, IMAGES, train=True, rngs={"dropout": jax.random.key(key)})
    assert not np.allclose(run(0), run(1))
    still = vit()
    np.testing.assert_array_equal(model.apply(params, IMAGES), still.apply(params, IMAGES))


def test_layer_scale_at_zero_silences_the_blocks():
    block = dict(mixer=dict(kind="attention", heads=3), ffn=dict(kind="mlp"), layer_scale=0.0)
    model = vit(block=block)
    params = params_of(model)
    shallow = vit(block=block, depth=1)
    one = params["params"] | {"blocks": jax.tree.map(lambda p: p[:1], params["params"]["blocks"])}
    np.testing.assert_allclose(
        model.apply(params, IMAGES), shallow.apply({"params": one}, IMAGES), rtol=1e-6, atol=1e-6
    )


def test_gradient_equals_finite_differences():
    model = vit(depth=1, dim=12)
    leaves, structure = jax.tree.flatten(params_of(model))
    rng = np.random.default_rng(0)
    direction = [rng.normal(size=x.shape) / 10 for x in leaves]
    with jax.enable_x64(True):
        leaves = [x.astype(jnp.float64) for x in leaves]

        @jax.jit
        def loss(shift):
            moved = [x + shift * d for x, d in zip(leaves, direction, strict=True)]
            logits = model.apply(structure.unflatten(moved), IMAGES.astype(jnp.float64))
            return jnp.mean(jnp.sin(logits))

        # The softmax is in float32 whatever its input, so the shift is not the smallest possible.
        numeric = (loss(1e-3) - loss(-1e-3)) / 2e-3
        analytic = jax.jit(jax.grad(loss))(0.0)
    np.testing.assert_allclose(analytic, numeric, rtol=1e-3)


def test_bfloat16_stays_near_float32():
    model = vit()
    params = params_of(model)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    full, low = model.apply(params, IMAGES), model.apply(half, IMAGES.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), full, atol=2e-2 * float(jnp.abs(full).max()))


def test_another_picture_size_is_refused_by_name():
    model = vit()
    params = params_of(model)
    with pytest.raises(UsageError, match="table holds 13 tokens and this picture makes 17"):
        model.apply(params, jnp.zeros((1, 8, 8, 3)))
    with pytest.raises(UsageError, match=r"heads=5 does not divide the width 24"):
        params_of(vit(block=dict(mixer=dict(kind="attention", heads=5), ffn=dict(kind="mlp"))))


def randomised(model, images=IMAGES):
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images))["params"]
    draw = np.random.default_rng(9)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), s.dtype), shapes)


def apply(model, params, **options):
    return jax.jit(lambda p: model.apply({"params": p}, IMAGES, **options))(params)


def test_two_heads_are_averaged():
    model = vit(distillation=True)
    params = randomised(model)
    assert params["positions"].shape == (14, 24)

    def logits(scale, other):
        heads = {name: jax.tree.map(lambda a, s=s: s * a, params[name]) for name, s in (scale, other)}
        return apply(model, {**params, **heads})

    first = logits(("head", 1.0), ("distillation_head", 0.0))
    second = logits(("head", 0.0), ("distillation_head", 1.0))
    assert np.abs(first - second).max() > 1e-2
    np.testing.assert_allclose(
        logits(("head", 1.0), ("distillation_head", 1.0)), first + second, rtol=1e-4, atol=1e-5
    )
    alone = {k: v for k, v in params.items() if k not in ("distillation_head", "distillation_token")}
    alone["registers"] = params["distillation_token"]  # a token that is mixed and not read
    plain = apply(vit(registers=1), alone)
    np.testing.assert_allclose(2 * first, plain, rtol=1e-4, atol=1e-5)


def test_registers_without_a_place_are_tokens_without_positions():
    everywhere, elsewhere = vit(registers=2), vit(registers=2, positioned="class_and_patches")
    params = randomised(everywhere)
    places = params["positions"]
    assert places.shape == (15, 24)
    without = {**params, "positions": jnp.delete(places, jnp.array([1, 2]), axis=0)}
    with_zeros = {**params, "positions": places.at[1:3].set(0.0)}
    np.testing.assert_allclose(apply(elsewhere, without), apply(everywhere, with_zeros), rtol=1e-5, atol=1e-6)
    patches = vit(registers=2, positioned="patches")
    only = {**params, "positions": places[3:]}
    np.testing.assert_allclose(
        apply(patches, only),
        apply(everywhere, {**params, "positions": places.at[:3].set(0.0)}),
        rtol=1e-5,
        atol=1e-6,
    )
    nowhere = {name: leaf for name, leaf in params.items() if name != "positions"}
    np.testing.assert_allclose(
        apply(vit(registers=2, positioned="none"), nowhere),
        apply(everywhere, {**params, "positions": 0 * places}),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("pool", ["mean", "max", "mean_max", "token_mean"])
@pytest.mark.parametrize("pool_all", [False, True])
def test_pools_are_functions_of_the_tokens(pool, pool_all):
    options = dict(class_token=True, registers=1, classes=0)
    tokens = vit(pool="none", **options)
    params = randomised(tokens)
    x = apply(tokens, params)
    assert x.shape == (2, 14, 24)
    seen = x if pool_all else x[:, 2:]
    expected = {
        "mean": seen.mean(1),
        "max": seen.max(1),
        "mean_max": (seen.mean(1) + seen.max(1)) / 2,
        "token_mean": jnp.concatenate([x[:, 0], seen.mean(1)], axis=1),
    }[pool]
    got = apply(vit(pool=pool, pool_all=pool_all, **options), params)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_the_last_norm_after_the_pool_or_nowhere():
    bare = vit(pool="mean", final_norm="none", classes=0)
    params = randomised(vit(pool="mean", classes=0))
    rest = {name: leaf for name, leaf in params.items() if name != "norm"}
    x = np.asarray(apply(bare, rest), np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    expected = x * params["norm"]["scale"][None] + params["norm"]["bias"][None]
    after = apply(vit(pool="mean", final_norm="after_pool", classes=0), params)
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(apply(vit(pool="mean", classes=0), params) - after).max() > 1e-2


def test_masked_patches_are_hidden():
    model = vit(mask_token=True)
    params = randomised(model)
    masked = jnp.zeros((2, 12), bool).at[:, 3].set(True)
    run = jax.jit(lambda images, masked: model.apply({"params": params}, images, masked=masked))
    # The fourth patch is in the second row of three, at its left.
    changed = IMAGES.at[:, 2:4, 0:2].add(5.0)
    np.testing.assert_array_equal(run(IMAGES, masked), run(changed, masked))
    assert np.abs(run(IMAGES, ~masked) - run(changed, ~masked)).max() > 1e-3


def test_attention_pooling_asks_with_one_vector():
    pool = dict(kind="attention", heads=3, ffn=dict(kind="mlp"))
    model = vit(pool=pool, classes=0)
    params = randomised(model)
    x = np.asarray(apply(vit(pool="none", class_token=False, classes=0), params), np.float64)  # same trunk
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["attention_pool"])
    q = np.einsum("c,chd->hd", p["query_token"][0], p["query"]["kernel"]) + p["query"]["bias"]
    k, v = (np.einsum("bnc,chd->bnhd", x, p[n]["kernel"]) + p[n]["bias"] for n in ("key", "value"))
    weights = np.exp(np.einsum("hd,bnhd->bhn", q, k) / np.sqrt(8))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bhn,bnhd,hdc->bc", weights, v, p["output"]["kernel"]) + p["output"]["bias"]
    h = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    h = h * p["ffn_norm"]["scale"] + p["ffn_norm"]["bias"]
    h = h @ p["ffn"]["expand"]["kernel"] + p["ffn"]["expand"]["bias"]
    h = np.asarray(jax.nn.gelu(jnp.asarray(h, jnp.float32), approximate=False), np.float64)
    expected = y + h @ p["ffn"]["contract"]["kernel"] + p["ffn"]["contract"]["bias"]
    np.testing.assert_allclose(apply(model, params), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["res_post_norm", "parallel"])
def test_orders_of_a_block(order):
    block = vit(depth=1).block.clone(order=order, layer_scale=1.0)
    x, context = jax.random.normal(jax.random.key(3), (2, 5, 24)), Context()
    params = meta.unbox(block.init(jax.random.key(4), x, jnp.float32(0), context)["params"])
    got, _ = block.apply({"params": params}, x, jnp.float32(0), context)

    def part(name, x):
        module, own = getattr(block, name), {"params": params[name]}
        return module.apply(own, x, context) if name == "mixer" else module.apply(own, x)

    def norm(x):  # fresh norms: scale one, bias zero
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)

    if order == "parallel":
        assert params.keys() == {"norm", "mixer", "ffn", "scale"}
        expected = x + part("mixer", norm(x)) + part("ffn", norm(x))
    else:
        h = x + norm(part("mixer", x))
        expected = h + norm(part("ffn", h))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_pools_that_contradict_themselves_are_refused():
    with pytest.raises(UsageError, match="reads a class token"):
        vit(class_token=False)
    with pytest.raises(UsageError, match="distillation reads two tokens"):
        vit(distillation=True, pool="mean")
    with pytest.raises(UsageError, match=r"pool is 'meen'.*mean"):
        vit(pool="meen")
    with pytest.raises(UsageError, match=r"pool\.kind is 'gem'.*ggem"):
        vit(pool=dict(kind="gem"))

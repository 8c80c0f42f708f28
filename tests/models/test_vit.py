import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.config import build_kind
from effjax.errors import UsageError
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

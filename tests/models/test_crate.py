import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.vision.crate import crate
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.ffn import ISTA
from effjax.measure import coding_rate, density, subspace_coding_rate
from effjax.mixers import SubspaceAttention
from effjax.mixers.context import Context
from effjax.models import KINDS
from effjax.models.blocks import KINDS as BLOCKS
from tests.models import official

# Whole networks: the whole suite has time for them.
pytestmark = pytest.mark.slow

ROWS = (
    ("to_patch_embedding.1.weight", "embed/norm/scale", ""),
    ("to_patch_embedding.1.bias", "embed/norm/bias", ""),
    ("to_patch_embedding.2.weight", "embed/projection/kernel", "o i -> i o"),
    ("to_patch_embedding.2.bias", "embed/projection/bias", ""),
    ("to_patch_embedding.3.weight", "patch_norm/scale", ""),
    ("to_patch_embedding.3.bias", "patch_norm/bias", ""),
    ("cls_token", "class_token", "1 n c -> n c"),
    ("pos_embedding", "positions", "1 n c -> n c"),
    ("transformer.layers.{}.0.norm.weight", "blocks/mixer_norm/scale", ""),
    ("transformer.layers.{}.0.norm.bias", "blocks/mixer_norm/bias", ""),
    ("transformer.layers.{}.0.fn.qkv.weight", "blocks/mixer/subspaces/kernel", "(h d) i -> i h d"),
    ("transformer.layers.{}.0.fn.to_out.0.weight", "blocks/mixer/output/kernel", "o (h d) -> h d o"),
    ("transformer.layers.{}.0.fn.to_out.0.bias", "blocks/mixer/output/bias", ""),
    ("transformer.layers.{}.1.norm.weight", "blocks/ffn_norm/scale", ""),
    ("transformer.layers.{}.1.norm.bias", "blocks/ffn_norm/bias", ""),
    ("transformer.layers.{}.1.fn.weight", "blocks/ffn/kernel", "o i -> i o"),
    ("mlp_head.0.weight", "norm/scale", ""),
    ("mlp_head.0.bias", "norm/bias", ""),
    ("mlp_head.1.weight", "head/kernel", "o i -> i o"),
    ("mlp_head.1.bias", "head/bias", ""),
)


def test_equals_the_published_code():
    tensors, pictures, expected = official.recording("crate")
    model = build_kind(KINDS, crate(24, 3, 3, patch=2, classes=5), "config.model")
    official.check(model, {"params": official.translated(tensors, ROWS, h=3)}, pictures, expected)


def test_subspace_attention_is_one_projection_used_three_times():
    draw = np.random.default_rng(0)
    x, u, w = (draw.normal(size=s) for s in ((2, 5, 6), (6, 2, 4), (2, 4, 6)))
    y = np.zeros_like(x)
    for b in range(2):
        for k in range(2):
            z = x[b] @ u[:, k]  # [N, p]
            for n in range(5):
                weights = np.exp(z @ z[n] / 2)
                y[b, n] += (weights / weights.sum()) @ z @ w[k]
    params = {"subspaces": {"kernel": u}, "output": {"kernel": w, "bias": np.ones(6)}}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    got = SubspaceAttention(heads=2, head_dim=4).apply({"params": params}, jnp.float32(x), Context())
    np.testing.assert_allclose(got, y + 1, rtol=1e-4, atol=1e-5)


def test_ista_is_a_proximal_gradient_step():
    """Against the gradient of 1/2 |x - D a|^2 at a = x, taken by jax."""
    x, d = jax.random.normal(jax.random.key(0), (7, 6)), jax.random.normal(jax.random.key(1), (6, 6)) / 3
    smooth = lambda a: 0.5 * jnp.sum((x - a @ d.T) ** 2)
    expected = jnp.maximum(x - 0.2 * jax.grad(smooth)(x) - 0.2 * 0.3, 0)
    got = ISTA(step=0.2, threshold=0.3).apply({"params": {"kernel": d.T}}, x)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_with_an_orthogonal_dictionary_a_whole_step_is_the_closed_form():
    """max(D^T x - lambda, 0) minimises 1/2 |x - D a|^2 + lambda |a|_1 over a >= 0."""
    d = jnp.linalg.qr(jax.random.normal(jax.random.key(2), (6, 6)))[0]
    x = jax.random.normal(jax.random.key(3), (50, 6))
    a = ISTA(step=1.0, threshold=0.3).apply({"params": {"kernel": d.T}}, x)
    np.testing.assert_allclose(a, jnp.maximum(x @ d - 0.3, 0), atol=1e-5)
    slope = jax.vmap(jax.grad(lambda a, x: 0.5 * jnp.sum((x - d @ a) ** 2) + 0.3 * jnp.sum(a)))(a, x)
    assert jnp.abs(jnp.where(a > 0, slope, 0)).max() < 1e-5
    assert slope.min() > -1e-5


def mixture(n=240, d=24, k=3, p=4):
    """Vectors in one of k orthogonal subspaces each, with noise, and the bases."""
    draw = np.random.default_rng(1)
    bases = np.linalg.qr(draw.normal(size=(d, k * p)))[0].reshape(d, k, p)
    which = draw.integers(k, size=n)
    z = np.stack([bases[:, i] @ draw.normal(size=p) for i in which]) + 0.3 * draw.normal(size=(n, d))
    return jnp.float32(z), jnp.float32(bases)


def test_a_step_of_subspace_attention_compresses_what_lies_in_its_subspaces():
    z, bases = mixture()
    params = {
        "subspaces": {"kernel": bases},
        "output": {"kernel": jnp.moveaxis(bases, 0, -1), "bias": jnp.zeros(24)},
    }
    mixer = SubspaceAttention(heads=3, head_dim=4)
    step = mixer.apply({"params": params}, z[None], Context())[0]
    rates = [float(subspace_coding_rate((1 - a) * z + a * step, bases)) for a in (0.0, 0.1, 0.3, 0.5)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.8 * rates[0]


def test_coding_rates_have_the_closed_form():
    z = np.zeros((8, 3))
    z[:, 0], z[:, 1] = 2.0, np.tile([1.0, -1.0], 4)  # orthogonal columns of squared length 32 and 8
    alpha = 3 / (8 * 0.25)
    expected = 0.5 * (np.log1p(alpha * 32) + np.log1p(alpha * 8))
    np.testing.assert_allclose(coding_rate(jnp.float32(z)), expected, rtol=1e-5)
    np.testing.assert_allclose(coding_rate(jnp.float32(z[:2])), coding_rate(jnp.float32(z[:4])), rtol=1e-5)
    axes = jnp.eye(3)[:, :, None]  # each axis a subspace
    parts = 0.5 * (np.log1p(4 * 32 / 8) + np.log1p(4 * 8 / 8))
    np.testing.assert_allclose(subspace_coding_rate(jnp.float32(z), axes), parts, rtol=1e-5)
    assert density(jnp.array([[0.0, 1.0], [2.0, 0.0]])) == 0.5


def test_the_block_has_no_residual_around_its_second_step():
    block = build_kind(BLOCKS, {"kind": "metaformer", **crate(6, 1, 2, 1, 1)["block"]}, "block")
    x = jax.random.normal(jax.random.key(0), (1, 5, 6))
    held = block.init(jax.random.key(1), x, jnp.float32(0), Context())
    y, _ = block.apply(held, x, jnp.float32(0), Context())
    assert (y >= 0).all()
    assert (y == 0).any()


def test_heads_that_do_not_divide_are_refused():
    mixer = SubspaceAttention(heads=4)
    with pytest.raises(UsageError, match="heads=4 does not divide the width 6"):
        mixer.init(jax.random.key(0), jnp.zeros((1, 3, 6)), Context())

"""Merging before each mixer of a diffusion transformer and restoring behind it."""

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.measure.cost import count
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.models import KINDS
from effjax.tokens import PiToMe, RandomDrop, ToMe
from effjax.tokens.around import around
from tests.tokens.toy import difference

SECTION = dict(
    kind="dit",
    patch=2,
    dim=24,
    depth=3,
    classes=5,
    block=dict(kind="adaln_zero", mixer=dict(kind="attention", heads=3), ffn=dict(kind="mlp")),
)
MODEL = build_kind(KINDS, SECTION, "config.model")
INPUTS = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.array([3.0, 700.0]), jnp.array([1, 4])


@pytest.fixture(scope="module")
def params():
    drawn = meta.unbox(jax.jit(MODEL.init)(jax.random.key(1), *INPUTS))
    leaves, tree = jax.tree.flatten(drawn)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    # Gates start at zero: as they are, nothing of a mixer would be seen.
    return jax.tree.unflatten(
        tree, [x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def run(model, params, inputs=INPUTS):
    return jax.jit(model.apply)(params, *inputs)


def test_keeping_all_changes_nothing(params):
    whole = run(MODEL, params)
    for method in (ToMe(keep=1.0, metric="features"), PiToMe(keep=1.0, metric="features")):
        assert difference(run(MODEL.clone(reduce=method), params), whole) <= 1e-6


def test_fewer_tokens_mix_and_every_one_comes_out(params):
    fast = MODEL.clone(reduce=ToMe(keep=0.5, metric="features"))
    whole, got = run(MODEL, params), run(fast, params)
    assert got.shape == whole.shape
    assert 1e-3 < difference(got, whole) < 2.0
    macs = lambda n: 3 * (4 * n * 24**2 + 2 * n * n * 24)
    matching = 3 * 8 * 8 * 24 + 3 * 8 * 8 * (24 + 1)  # similarities; sums of rows and sizes
    one = tuple(x[:1] for x in INPUTS)
    saved = count(MODEL.apply, params, *one).macs - count(fast.apply, params, *one).macs
    assert saved == macs(16) - macs(8) - matching
    assert str(jax.make_jaxpr(fast.apply)(params, *INPUTS)).count("length=3") >= 1


def test_equal_tokens_merge_without_loss():
    """Every token stands twice, side by side: half of them, counted twice, are enough."""
    h = jax.random.normal(jax.random.key(3), (2, 4, 24)).repeat(2, axis=1)
    attention = Attention(3)
    held = meta.unbox(attention.init(jax.random.key(4), h, Context()))
    mix = lambda h, context: attention.apply(held, h, context)
    got = around(ToMe(remove=4, metric="features"), h, mix, Context())
    assert difference(got, mix(h, Context())) <= 1e-5


def test_what_cannot_be_restored_or_is_not_known_yet_is_refused(params):
    for method, message in (
        (ToMe(keep=0.5), "set metric='features'"),
        (RandomDrop(keep=0.5), "cannot be restored"),
    ):
        with pytest.raises(UsageError) as refusal:
            jax.eval_shape(MODEL.clone(reduce=method).apply, params, *INPUTS)
        assert message in str(refusal.value)

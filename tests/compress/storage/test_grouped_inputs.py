import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.storage.grouped_inputs import Grouped, Groups, grouped_product
from effjax.compress.storage.inputs import Range, Static
from effjax.compress.storage.uniform import QTensor, Uniform
from effjax.errors import UsageError
from effjax.layers.stored import Place

PLACE = Place((32, 12), ("embed", "mlp"), (32,), (12,), False)


def groups(draw, members):
    low = -draw.uniform(0.5, 3, 3)
    return Groups(*(jnp.asarray(a, jnp.float32) for a in (low, draw.uniform(0.5, 3, 3))),
                  jnp.asarray(draw.integers(0, 3, members), jnp.uint8))  # fmt: skip


@pytest.mark.parametrize("kind", [Grouped(6, "channels", 3), Grouped(6, "places", 3, 5)])
def test_every_member_lies_on_the_grid_of_its_group(kind, draw):
    x = jnp.asarray(draw.normal(size=(2, 5, 32)), jnp.float32)
    known = groups(draw, 32 if kind.axis == "channels" else 5)
    rounded = jax.jit(kind.rounded)(x, known)
    for j in range(3):
        there = np.asarray(known.member) == j
        there = (slice(None), slice(None), there) if kind.axis == "channels" else (slice(None), there)
        alone = Static(6).rounded(x, Range(known.low[j], known.high[j]))
        np.testing.assert_allclose(rounded[there], alone[there], atol=1e-6)
    layout = Uniform(8, 0, inputs=kind)
    kernel = jnp.asarray(draw.normal(size=(32, 12)), jnp.float32)
    held = layout.store(kernel, PLACE).replace(inputs=known)
    np.testing.assert_allclose(
        jax.jit(QTensor.product)(held, x), rounded @ held.whole(jnp.float32), atol=2e-5
    )
    assert layout.names(PLACE).inputs.member == (None,)


def test_one_group_is_one_range(draw):
    x = jnp.asarray(draw.normal(size=(4, 32)), jnp.float32)
    low, high = x.min(), x.max()
    known = Groups(low[None], high[None], jnp.zeros(32, jnp.uint8))
    one = Static(4).rounded(x, Range(low, high))
    np.testing.assert_array_equal(Grouped(4, groups=1).rounded(x, known), one)


@pytest.mark.parametrize("of_weights", [1, 4])
def test_integers_by_group_and_scaled_are_the_product_of_what_they_stand_for(of_weights, draw):
    a, member = draw.integers(-128, 128, (6, 32)), draw.integers(0, 3, 32)
    a_zero, a_scale = draw.integers(-128, 128, 3), draw.uniform(0.01, 1, 3)
    codes, zero = draw.integers(0, 16, (32, 5)), draw.integers(0, 16, (of_weights, 5))
    exact = jax.jit(grouped_product, static_argnums=5)(
        jnp.asarray(a, jnp.int8), jnp.asarray(a_zero), jnp.asarray(member), jnp.asarray(codes, jnp.uint8),
        jnp.asarray(zero), 4,
    )  # fmt: skip
    scale = draw.uniform(0.01, 1, (of_weights, 5))
    ours = np.einsum("jgrn,j,gn->rn", np.asarray(exact, np.float64), a_scale, scale)
    weights = (codes.reshape(of_weights, -1, 5) - zero[:, None]) * scale[:, None]
    floats = ((a - a_zero[member]) * a_scale[member]) @ weights.reshape(32, 5)
    np.testing.assert_allclose(ours, floats, rtol=1e-12)


def test_other_places_than_those_calibrated_are_refused(draw):
    with pytest.raises(UsageError, match="7 places"):
        Grouped(6, "places", 3, 7).rounded(jnp.ones((2, 5, 32)), groups(draw, 7))
    with pytest.raises(UsageError, match="places=0"):
        Grouped(6, "places", 3)
    with pytest.raises(UsageError, match="groups=0"):
        Grouped(groups=0)

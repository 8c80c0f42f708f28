import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.storage.inputs import LONGEST, Range, Static, Tensor, Token, integer_product
from effjax.compress.storage.uniform import FEW, QTensor, Uniform
from effjax.errors import UsageError
from effjax.layers.stored import Place

PLACE = Place((32, 3, 4), ("embed", "heads", "head_dim"), (32,), (3, 4), False)
KNOWN = Range(jnp.asarray(-1.5), jnp.asarray(2.25))


def grid(x, kind):
    """Scale and zero of the module's docstring in float64."""
    if isinstance(kind, Static):
        s = (2.25 + 1.5) / (2**kind.bits - 1)
        return np.float64(np.float32(s)), np.round(1.5 / s), 0, 2**kind.bits - 1
    axis = -1 if isinstance(kind, Token) else None
    s = np.abs(x).max(axis, keepdims=True) / (2 ** (kind.bits - 1) - 1)
    return s, 0, -(2 ** (kind.bits - 1)), 2 ** (kind.bits - 1) - 1


@pytest.mark.parametrize("kind", [Token(8), Tensor(4), Static(8), Static(3)])
def test_what_enters_lies_on_its_grid(kind, draw):
    x = draw.normal(size=(2, 5, 32)).astype(np.float32)
    s, z, lowest, most = grid(x.astype(np.float64), kind)
    expected = (np.clip(np.round(x / s) + z, lowest, most) - z) * s
    ours = jax.jit(kind.rounded)(jnp.asarray(x), KNOWN)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert kind.rounded(jnp.zeros((1, 4)), KNOWN).max() == 0


PAIRS = (
    Uniform(8, 0, inputs=Token(8)),
    Uniform(4, 8, False, inputs=Static(8)),
    Uniform(3, -1, inputs=Tensor(6)),
)


@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("rows", [FEW, FEW + 3])
def test_the_product_of_codes_is_that_of_what_they_stand_for(layout, rows, draw):
    kind = layout.inputs
    kernel = jnp.asarray(draw.normal(size=PLACE.shape), jnp.float32)
    held = layout.store(kernel, PLACE).replace(inputs=KNOWN if isinstance(kind, Static) else None)
    x = jnp.asarray(draw.normal(size=(rows, 32)), jnp.float32)
    rounded = np.asarray(kind.rounded(x, KNOWN), np.float64)
    expected = np.einsum("rk,kab->rab", rounded, np.asarray(held.whole(jnp.float32), np.float64))
    np.testing.assert_allclose(jax.jit(QTensor.product)(held, x), expected, atol=2e-5)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bits", [2, 8])
def test_sums_of_integers_are_exact(groups, bits, draw):
    a, a_zero = draw.integers(-128, 128, (6, 64)), draw.integers(-128, 128, (6, 1))
    codes, zero = draw.integers(0, 2**bits, (64, 5)), draw.integers(0, 2**bits, (groups, 5))
    ours = jax.jit(integer_product, static_argnums=4)(
        jnp.asarray(a, jnp.int8), jnp.asarray(a_zero), jnp.asarray(codes, jnp.uint8), jnp.asarray(zero), bits
    )
    weights = codes.reshape(groups, -1, 5) - zero[:, None]
    np.testing.assert_array_equal(
        ours, np.einsum("rgk,gkn->grn", (a - a_zero).reshape(6, groups, -1), weights)
    )
    assert ours.dtype == jnp.int32


def test_scales_that_are_powers_of_two_leave_no_rounding(draw):
    """Integer and float product agree in every bit where float32 holds every sum."""
    layout = Uniform(8, 0, scale="float32", inputs=Static(8))
    kernel = jnp.asarray(draw.integers(-127, 128, PLACE.shape), jnp.float32).at[0].set(127.0) / 64
    held = layout.store(kernel, PLACE).replace(inputs=Range(jnp.asarray(-4.0), jnp.asarray(3.96875)))
    x = jnp.asarray(draw.normal(size=(9, 32)), jnp.float32)
    floats = jnp.einsum("rk,kab->rab", layout.inputs.rounded(x, held.inputs), held.whole(jnp.float32))
    np.testing.assert_array_equal(jax.jit(QTensor.product)(held, x), floats)


def test_what_was_not_calibrated_is_nan(draw):
    held = Uniform(8, 0, inputs=Static()).store(jnp.ones(PLACE.shape), PLACE)
    assert jnp.all(jnp.isnan(held.product(jnp.ones((9, 32)))))


def test_shapes_and_names_follow_from_the_layout():
    layout = Uniform(4, 8, inputs=Static())
    place = Place((2, *PLACE.shape), ("layers", *PLACE.names), PLACE.ins, PLACE.outs, False)
    held = jax.eval_shape(lambda: layout.store(jnp.zeros(place.shape), place))
    assert held.inputs.low.shape == (2,)
    assert layout.names(place).inputs.low == ("layers",)
    assert held.shape == place.shape


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="bits=9"):
        Token(9)
    rows = LONGEST + 1
    place = Place((rows, 1), (None, None), (rows,), (1,), False)
    held = Uniform(8, 0, inputs=Token()).store(jnp.ones(place.shape), place)
    with pytest.raises(UsageError, match="32 bits"):
        jax.eval_shape(QTensor.product, held, jnp.zeros((9, rows)))

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.experimental.pallas import tpu as pltpu

from effjax.errors import UsageError
from effjax.layers.depthwise import DepthwiseConv, convolved, depthwise_conv, shifted
from effjax.measure import count

# stride, dilation, padding, kernel, sides of the map
CASES = [
    (1, 1, None, (3, 3), (7, 6)),
    (2, 1, None, (3, 3), (7, 6)),
    (2, 1, 0, (2, 2), (8, 7)),
    (1, 3, None, (3, 3), (9, 8)),
    (2, 2, 3, (5, 3), (11, 10)),
    (3, 1, 2, (4, 4), (9, 10)),
    (1, 1, None, (13, 13), (5, 4)),
    (1, 1, None, (1, 7), (4, 9)),
    (2, 2, None, (3, 3), (5, 121)),
]


def drawn(shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


def by_hand(x, kernel, stride, dilation, padding):
    """The sum as the docstring has it, in float64."""
    extents = [dilation * (n - 1) + 1 for n in kernel.shape[:2]]
    sides = [e // 2 if padding is None else padding for e in extents]
    padded = np.pad(x, ((0, 0), (sides[0],) * 2, (sides[1],) * 2, (0, 0)))
    rows, columns = ((n - e) // stride + 1 for n, e in zip(padded.shape[1:3], extents, strict=True))
    y = np.zeros((x.shape[0], rows, columns, x.shape[3]))
    for i, j, u, v in np.ndindex(rows, columns, *kernel.shape[:2]):
        y[:, i, j] += padded[:, stride * i + dilation * u, stride * j + dilation * v] * kernel[u, v]
    return y


@pytest.mark.parametrize(("stride", "dilation", "padding", "kernel", "sides"), CASES)
def test_the_sum_and_its_gradients(stride, dilation, padding, kernel, sides):
    x, k = drawn((2, *sides, 3), 0), drawn((*kernel, 3), 1)
    expected = by_hand(x, k, stride, dilation, padding)
    g = drawn(expected.shape, 2)

    def run(x, k):
        return depthwise_conv(x, k, stride, dilation, padding)

    y, pull = jax.vjp(run, jnp.float32(x), jnp.float32(k))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    # A linear map in each argument: its gradient gives the product with any direction back.
    for got, argument, place in zip(pull(jnp.float32(g)), (x, k), (0, 1), strict=True):
        direction = drawn(argument.shape, 3)
        moved = by_hand(
            *(direction if i == place else a for i, a in enumerate((x, k))), stride, dilation, padding
        )
        np.testing.assert_allclose(np.sum(np.float64(got) * direction), np.sum(g * moved), rtol=1e-4)


@pytest.mark.parametrize(("stride", "dilation", "padding", "kernel", "sides"), CASES[:5])
def test_both_ways_to_write_it_agree(stride, dilation, padding, kernel, sides):
    x, k = jnp.float32(drawn((1, *sides, 4), 0)), jnp.float32(drawn((*kernel, 4), 1))
    sizes = [dilation * (n - 1) + 1 for n in kernel]
    edges = tuple((e // 2 if padding is None else padding,) * 2 for e in sizes)
    options = dict(stride=stride, dilation=dilation, edges=edges)
    np.testing.assert_allclose(shifted(x, k, **options), convolved(x, k, **options), rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_bfloat16_and_near():
    x, k = jnp.float32(drawn((1, 8, 8, 4), 0)), jnp.float32(drawn((7, 7, 4), 1))
    y = depthwise_conv(x.astype(jnp.bfloat16), k.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    expected = depthwise_conv(x, k)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=2e-2 * float(jnp.abs(expected).max()))


def test_its_multiplications_are_counted_once():
    x, k = jax.ShapeDtypeStruct((2, 14, 14, 8), jnp.float32), jax.ShapeDtypeStruct((3, 3, 8), jnp.float32)
    assert count(depthwise_conv, x, k).macs == 2 * 14 * 14 * 8 * 9


def test_each_platform_has_its_own_form():
    x, k = jax.ShapeDtypeStruct((2, 14, 14, 8), jnp.float32), jax.ShapeDtypeStruct((3, 3, 8), jnp.float32)
    texts = {
        platform: jax.jit(depthwise_conv).trace(x, k).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu", "cuda")
    }
    assert {p: "stablehlo.convolution" in text for p, text in texts.items()} == {
        "cpu": False,
        "tpu": True,
        "cuda": True,
    }


def test_a_kernel_that_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="kernel of 7 x 7 places does not fit on a map of 4 x 9"):
        depthwise_conv(jnp.zeros((1, 4, 9, 2)), jnp.zeros((7, 7, 2)), padding=0)


def test_the_module_adds_a_bias():
    x = jnp.float32(drawn((1, 5, 5, 2), 0))
    module = DepthwiseConv(3)
    params = jax.tree.map(lambda leaf: leaf + 1.0, meta.unbox(module.init(jax.random.key(0), x)))
    without = depthwise_conv(x, params["params"]["kernel"])
    np.testing.assert_allclose(module.apply(params, x), without + 1.0, rtol=1e-6)


def gradients(layer, params, x):
    def loss(params, x):
        return jnp.sum(jnp.sin(layer.apply(params, x)))

    with pltpu.force_tpu_interpret_mode():
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)


@pytest.mark.parametrize("implementation", ["kernel", "reference", "tpu"])
def test_a_layer_is_the_same_by_every_implementation(implementation):
    x = jnp.float32(drawn((2, 7, 6, 5), 0))
    params = meta.unbox(DepthwiseConv((5, 3)).init(jax.random.key(0), x))
    params["params"]["bias"] = jnp.arange(5.0)
    expected = gradients(DepthwiseConv((5, 3)), params, x)
    found = gradients(DepthwiseConv((5, 3), implementation=implementation), params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


@pytest.mark.parametrize("options", [dict(stride=2), dict(dilation=2), dict(padding=0), dict(kernel=(4, 3))])
def test_what_no_kernel_does_is_refused(options):
    layer = DepthwiseConv(**{"kernel": 3, "implementation": "kernel", **options})
    with pytest.raises(UsageError, match="implementation='plain' takes all"):
        layer.init(jax.random.key(0), jnp.ones((1, 6, 6, 2)))

"""Multiply-accumulates of single operations, against counts made by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl

from effjax.measure import count

f32 = jnp.float32


def shape(*sizes, dtype=f32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def macs(function, *arguments):
    cost = count(function, *arguments, parameters=None)
    assert cost.unknown == ()
    return cost.macs


@pytest.mark.parametrize(
    ("spec", "lhs", "rhs", "expected"),
    [
        ("mk,kn->mn", (3, 5), (5, 7), 3 * 5 * 7),
        ("k,k->", (11,), (11,), 11),
        ("m,n->mn", (3,), (7,), 21),
        ("bhqd,bhkd->bhqk", (2, 3, 4, 5), (2, 3, 6, 5), 2 * 3 * 4 * 6 * 5),
        ("bnc,chd->bnhd", (2, 4, 6), (6, 3, 5), 2 * 4 * 6 * 3 * 5),
        ("abcd,dcbe->ae", (2, 3, 4, 5), (5, 4, 3, 7), 2 * 3 * 4 * 5 * 7),
    ],
)
def test_dot_counts_outputs_times_contracted(spec, lhs, rhs, expected):
    assert macs(lambda x, y: jnp.einsum(spec, x, y), shape(*lhs), shape(*rhs)) == expected


def convolve(x, kernel, strides=(1, 1), padding="VALID", **options):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


@pytest.mark.parametrize(
    ("image", "kernel", "options", "expected"),
    [
        # 6x6 outputs of a 3x3 kernel over an 8x8 picture.
        ((2, 8, 8, 4), (3, 3, 4, 5), {}, 2 * 36 * 9 * 4 * 5),
        # With padding: 64 outputs, the border counted as data.
        ((2, 8, 8, 4), (3, 3, 4, 5), {"padding": "SAME"}, 2 * 64 * 9 * 4 * 5),
        # A patch embedding: 16 positions, each pixel read once.
        ((1, 16, 16, 3), (4, 4, 3, 10), {"strides": (4, 4)}, 16 * 16 * 3 * 10),
        # Two groups: each output channel sees half of the inputs.
        ((1, 8, 8, 4), (3, 3, 2, 6), {"feature_group_count": 2}, 36 * 9 * 2 * 6),
        # Depthwise.
        ((1, 8, 8, 4), (3, 3, 1, 4), {"feature_group_count": 4}, 36 * 9 * 4),
        # A dilated kernel spans 5x5, has 9 weights and 4x4 places to stand.
        ((1, 8, 8, 4), (3, 3, 4, 5), {"rhs_dilation": (2, 2)}, 16 * 9 * 4 * 5),
        # Unequal sides and strides: 3 rows, 7 columns.
        ((1, 7, 9, 2), (3, 3, 2, 4), {"strides": (2, 1)}, 3 * 7 * 9 * 2 * 4),
    ],
)
def test_convolution(image, kernel, options, expected):
    assert macs(lambda x, w: convolve(x, w, **options), shape(*image), shape(*kernel)) == expected


def test_a_transposed_convolution_counts_inputs_not_inserted_zeros():
    def upsample(x, w):
        return lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert macs(upsample, shape(1, 8, 8, 4), shape(3, 3, 4, 5)) == 64 * 9 * 4 * 5


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3, 4, 8), {}),
        ((2, 2, 4, 8), {"strides": (2, 2)}),
        ((3, 3, 4, 8), {"padding": "SAME"}),
        ((3, 3, 1, 4), {"feature_group_count": 4}),
        ((3, 3, 2, 8), {"feature_group_count": 2, "strides": (1, 1)}),
        ((3, 3, 4, 8), {"rhs_dilation": (2, 2)}),
    ],
)
def test_each_gradient_of_a_convolution_costs_what_the_convolution_does(kernel, options):
    image, weights = shape(2, 8, 8, 4), shape(*kernel)

    def loss(x, w):
        return jnp.square(convolve(x, w, **options)).sum()

    forward = macs(loss, image, weights)
    assert macs(jax.value_and_grad(loss, argnums=0), image, weights) == 2 * forward
    assert macs(jax.value_and_grad(loss, argnums=1), image, weights) == 2 * forward


def test_ragged_dot_and_its_gradients_meet_each_row_once():
    rows, experts, sizes = shape(12, 5), shape(4, 5, 7), shape(4, dtype=jnp.int32)

    def loss(x, w, group_sizes):
        return jnp.square(lax.ragged_dot(x, w, group_sizes)).sum()

    assert macs(loss, rows, experts, sizes) == 12 * 5 * 7
    assert macs(jax.value_and_grad(loss, argnums=(0, 1)), rows, experts, sizes) == 3 * 12 * 5 * 7


def test_ffts_sorts_and_elementwise_work_count_none():
    def function(x):
        return jnp.sort(jnp.abs(jnp.fft.fft(jnp.exp(x))))

    assert macs(function, shape(4, 16)) == 0


@pytest.mark.parametrize("function", [jnp.linalg.cholesky, jnp.linalg.inv, jnp.linalg.svd])
def test_factorisations_are_named_as_not_counted(function):
    assert count(function, shape(4, 4), parameters=None).unknown


def multiply(cost_estimate):
    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    return lambda x, y: pl.pallas_call(
        kernel, out_shape=shape(8, 8), name="multiply", interpret=True, cost_estimate=cost_estimate
    )(x, y)


def test_a_kernel_costs_what_it_declares():
    declared = pl.CostEstimate(flops=2 * 8 * 8 * 8, transcendentals=0, bytes_accessed=768)
    cost = count(multiply(declared), shape(8, 8), shape(8, 8), parameters=None)
    assert cost.macs_by_kind == {"kernel": 512}
    batched = count(jax.vmap(multiply(declared)), shape(3, 8, 8), shape(3, 8, 8), parameters=None)
    assert batched.macs == 3 * 512


def test_a_kernel_that_declares_nothing_is_named_as_not_counted():
    cost = count(multiply(None), shape(8, 8), shape(8, 8), parameters=None)
    assert cost.macs == 0
    assert cost.unknown == ("pallas_call multiply at multiply: it declares no cost_estimate",)

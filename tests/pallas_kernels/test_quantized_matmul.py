"""Products with codes and with planes of signs: the matrix they stand for, in every implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from effjax.compress.storage.binary_coding import BinaryCoding
from effjax.compress.storage.packing import pack
from effjax.compress.storage.uniform import Uniform
from effjax.layers.stored import Place
from pallas_kernels.binary_coded_matmul import binary_coded_matmul
from pallas_kernels.op import Unsupported
from pallas_kernels.quantized_matmul import quantized_matmul
from tests.pallas_kernels.cases.quantized_matmul import numbers, zeros

WAYS = {
    "reference": dict(implementation="reference"),
    "gpu": dict(implementation="gpu", interpret=True),
    "tpu": dict(implementation="tpu", interpret=pltpu.InterpretParams()),
}


def multiplied(way, x, scale, *planes, **options):
    call = functools.partial(quantized_matmul, **WAYS[way], **options)
    return np.asarray(jax.jit(call)(x, scale, *planes), np.float32)


def brute(x, codes, scale, zero):
    """In float64, weight by weight."""
    each = len(codes) // len(scale)
    weights = scale.repeat(each, 0).astype(np.float64) * (codes - zero.repeat(each, 0).astype(np.float64))
    return np.asarray(x, np.float64) @ weights


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_is_the_product_with_the_weights_of_the_codes(way, bits, draw):
    """Codes as they are packed elsewhere; float16 has every number that is drawn here."""
    codes = draw.integers(0, 2**bits, (512, 72)).astype(np.uint8)
    zero = draw.integers(0, 2**bits, (4, 72)).astype(np.uint8)
    scale = draw.uniform(0.01, 0.1, (4, 72)).astype(np.float16)
    x = draw.integers(-8, 9, (3, 512)).astype(np.float16)
    found = multiplied(way, x, scale, *pack(jnp.asarray(codes), bits), bits=bits, zero=zero)
    wanted = brute(x, codes, scale, zero)
    # The reference multiplies by weights that are rounded.
    error = 2e-3 if way == "reference" else 1e-3
    np.testing.assert_allclose(found, wanted, atol=error * np.abs(wanted).max())


def test_whole_numbers_are_exact(draw):
    """Of float32 all bits enter a TPU's products, as three numbers of 8 bits."""
    codes = draw.integers(0, 16, (256, 128)).astype(np.uint8)
    x = draw.integers(-(2**15), 2**15, (2, 256)).astype(np.float32)
    found = multiplied("tpu", x, np.ones((2, 128), np.float32), *pack(jnp.asarray(codes), 4), bits=4)
    exact = brute(x, codes, np.ones((2, 128)), np.full((2, 128), 8))
    np.testing.assert_allclose(found, exact, atol=2e-6 * 256 * 2**15)


@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_tpus_products_take_several_groups(group, bits):
    arrays = numbers(2, 512, 128, bits, group)
    options = dict(bits=bits, zero=zeros(512 // group, 128, bits))
    found, wanted = (multiplied(way, *arrays, **options) for way in ("tpu", "reference"))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("way", ["gpu", "tpu"])
def test_a_prompt_is_cut_into_tiles_of_rows(way):
    x, *rest = numbers(333, 256, 64, 4, 128)
    x = x.astype(jnp.bfloat16)
    found = multiplied(way, x, *rest, bits=4)
    wanted = multiplied("reference", x.astype(np.float32), *rest, bits=4)
    np.testing.assert_allclose(found, wanted, atol=1e-2 * np.abs(wanted).max())
    alone = multiplied(way, x[330:], *rest, bits=4)
    np.testing.assert_array_equal(found[330:], alone)


@pytest.mark.parametrize("way", ["gpu", "tpu"])
def test_derivatives_are_those_of_the_specification(way):
    x, *rest = numbers(3, 256, 64, 4, 128)
    x = x.astype(jnp.bfloat16)
    total = lambda way: lambda x: jnp.sum(quantized_matmul(x, *rest, bits=4, **WAYS[way]) ** 2)
    found, wanted = (jax.jit(jax.grad(total(one)))(x) for one in (way, "reference"))
    off = jnp.abs((found - wanted).astype(jnp.float32)).max()
    assert float(off) < 2e-2 * float(jnp.abs(wanted).max())


@pytest.mark.parametrize("way", WAYS)
def test_planes_of_signs_are_those_that_are_stored(way, draw):
    kernel = jnp.asarray(draw.normal(size=(512, 24)), jnp.float32)
    held = BinaryCoding(2, 128, rounds=1).store(kernel, Place((512, 24), (None, None), (512,), (24,), False))
    x = draw.integers(-8, 9, (3, 512)).astype(np.float16)
    call = functools.partial(binary_coded_matmul, **WAYS[way])
    found = jax.jit(call)(x, held.alpha, held.offset, held.signs)
    wanted = x.astype(np.float64) @ np.asarray(held.matrix(), np.float64)
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=2e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("way", WAYS)
def test_codes_are_those_that_are_stored(way, draw):
    kernel = jnp.asarray(draw.normal(size=(512, 24)), jnp.float32)
    held = Uniform(3, 128).store(kernel, Place((512, 24), (None, None), (512,), (24,), False))
    x = draw.integers(-8, 9, (3, 512)).astype(np.float16)
    found = multiplied(way, x, held.scale, *held.codes, bits=3)
    wanted = x.astype(np.float64) @ np.asarray(held.matrix(), np.float64)
    np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())


def shape(dtype, *sides):
    return jax.ShapeDtypeStruct(sides, dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(bits=8), "takes codes of 2, 3, 4 bits, not 8"),
        (dict(x=shape(jnp.int8, 2, 512)), "x is int8: give float32, bfloat16, float16"),
        (dict(scale=shape(jnp.float8_e4m3fn, 4, 64)), "scale is float8_e4m3fn: give"),
        (dict(x=shape(jnp.bfloat16, 2, 3, 512)), r"takes x \[R, K\] and scale \[G, N\]"),
        (dict(scale=shape(jnp.float16, 5, 64)), "5 groups do not divide the 512 inputs"),
        (
            dict(bits=3),
            r"3 bits of 512 x 64 weights are uint8\[128, 64\], uint8\[64, 64\], not uint8\[256, 64\]",
        ),
        (dict(zero=shape(jnp.uint8, 4, 32)), r"zero uint8\[4, 32\] must be uint8\[4, 64\]"),
        (dict(implementation="gpu", x=shape(jnp.float32, 2, 512)), "bfloat16 or float16, not float32"),
        (dict(implementation="gpu", scale=shape(jnp.float16, 32, 64)), "groups of 32 weights at 4 bits"),
        (dict(implementation="tpu", scale=shape(jnp.float16, 64, 64)), "16 times a power of two, not 8"),
        (
            dict(
                implementation="gpu",
                x=shape(jnp.bfloat16, 2, 192),
                scale=shape(jnp.float16, 3, 64),
                planes=[shape(jnp.uint8, 96, 64)],
            ),
            "a multiple of 128 inputs at 4 bits, not 192",
        ),
        (
            dict(
                implementation="tpu",
                x=shape(jnp.bfloat16, 2, 192),
                scale=shape(jnp.float16, 3, 64),
                planes=[shape(jnp.uint8, 96, 64)],
            ),
            "a multiple of 128 inputs at 4 bits, not 192",
        ),
    ],
)
def test_bad_arguments(change, message):
    given = dict(
        x=shape(jnp.bfloat16, 2, 512), scale=shape(jnp.float16, 4, 64), planes=[shape(jnp.uint8, 256, 64)]
    )
    options = dict(bits=4) | change
    x, scale, planes = (options.pop(name, array) for name, array in given.items())
    zero = options.pop("zero", None)
    with pytest.raises(Unsupported, match=message):
        jax.eval_shape(
            lambda *arrays, zero: quantized_matmul(*arrays, zero=zero, **options),
            *(x, scale, *planes),
            zero=zero,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=shape(jnp.int32, 2, 512)), "x is int32: give float32, bfloat16, float16"),
        (dict(alpha=shape(jnp.float16, 4, 64)), r"alpha \[q, G, N\]"),
        (dict(offset=shape(jnp.float16, 2, 64)), r"offset \(2, 64\) must be \(4, 64\)"),
        (dict(x=shape(jnp.bfloat16, 2, 514)), "4 groups do not divide the 514 inputs"),
        (dict(signs=shape(jnp.uint8, 2, 32, 64)), r"signs uint8\[2, 32, 64\] must be uint8\[2, 64, 64\]"),
        (dict(implementation="gpu", x=shape(jnp.float32, 2, 512)), "binary_coded_matmul on GPU takes"),
    ],
)
def test_bad_planes(change, message):
    given = dict(
        x=shape(jnp.bfloat16, 2, 512),
        alpha=shape(jnp.float16, 2, 4, 64),
        offset=shape(jnp.float16, 4, 64),
        signs=shape(jnp.uint8, 2, 64, 64),
    )
    options = dict(change)
    arrays = [options.pop(name, array) for name, array in given.items()]
    with pytest.raises(Unsupported, match=message):
        jax.eval_shape(functools.partial(binary_coded_matmul, **options), *arrays)

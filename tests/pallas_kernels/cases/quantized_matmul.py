"""One row and many, all widths of codes, groups of less than a product, columns that no block divides."""

import hypothesis.strategies as st
import numpy as np

from pallas_kernels.quantized_matmul import quantized_matmul
from tests.pallas_kernels.cases import Case


def packed(codes, width):
    """Pieces of a width, `[K, N]`, in bytes along K, from the lowest bit on."""
    each = 8 // width
    codes = np.pad(codes, ((0, -len(codes) % each), (0, 0))).reshape(-1, each, codes.shape[1])
    return (codes << (np.arange(each) * width)[None, :, None]).sum(1).astype(np.uint8)


def numbers(rows, inputs, columns, bits, group, magnitude=1.0):
    """x, scales and planes of drawn codes."""
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 2**bits, (inputs, columns))
    planes = [packed(codes & 3, 2), packed(codes >> 2, 1)] if bits == 3 else [packed(codes, bits)]
    x = magnitude * draw.normal(size=(rows, inputs))
    scale = draw.uniform(0.01, 0.1, (inputs // group, columns))
    return x.astype(np.float32), scale.astype(np.float32), *planes


def zeros(groups, columns, bits):
    return np.random.default_rng(1).integers(0, 2**bits, (groups, columns)).astype(np.uint8)


@st.composite
def arguments(draw):
    bits, rows = draw(st.sampled_from([2, 3, 4])), draw(st.sampled_from([1, 5, 17]))
    inputs, group = draw(st.sampled_from([(512, 128), (512, 256), (1024, 1024)]))
    columns = draw(st.sampled_from([64, 128, 200]))
    arrays = numbers(rows, inputs, columns, bits, group, draw(st.sampled_from([1e-3, 1.0, 30.0])))
    options = dict(zero=zeros(inputs // group, columns, bits)) if draw(st.booleans()) else {}
    return arrays, options | dict(bits=bits)


def one_sign():
    """All products of a group have the sign of x: what is subtracted is as large as what is left."""
    x, scale, *planes = numbers(3, 512, 128, 4, 128)
    return (np.abs(x) + 1, scale, *planes), dict(bits=4, zero=zeros(4, 128, 4))


def tiny_scales():
    """Of float16 some are below its least normal number, and one is 0."""
    x, scale, *planes = numbers(2, 256, 128, 2, 128)
    scale = (scale * np.float32(2e-3)).astype(np.float16)
    scale[0, 3] = 0
    return (x, scale, *planes), dict(bits=2)


CASE = Case(
    function=quantized_matmul,
    arguments=arguments(),
    dtypes=dict(tpu=("float32", "bfloat16", "float16"), gpu=("bfloat16", "float16")),
    # Nobody differentiates by scales; test_quantized_matmul.py shows that one can by x.
    differentiated=1,
    fixed=dict(
        one_sign=one_sign,
        tiny_scales=tiny_scales,
        three_bits=lambda: (numbers(2, 512, 136, 3, 128), dict(bits=3, zero=zeros(4, 136, 3))),
        many_rows=lambda: (numbers(300, 256, 128, 4, 64), dict(bits=4)),
        many_steps=lambda: (numbers(4, 3072, 128, 2, 128), dict(bits=2)),
    ),
)

"""Packed layers, read bit by bit from the definition of each format."""

import numpy as np
import pytest

from effjax.errors import RunError, UsageError
from effjax.interop.packed import BITS, FORMATS, Linear, codes_of, measures, pack, specs, unpack, words
from effjax.interop.weights import Spec

KINDS = [(form, bits) for form in FORMATS for bits in BITS[form]]
# Outputs of a word of awq, the lowest bits first.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def layer(draw, bits, ins=64, outs=32, size=16, lowest=1):
    return Linear(
        bits,
        draw.integers(0, 2**bits, (ins, outs)).astype(np.uint8),
        draw.random((ins // size, outs)).astype(np.float16),
        draw.integers(lowest, 2**bits, (ins // size, outs)).astype(np.uint8),
        np.arange(ins) // size,
    )


def piece(stream, number, bits):
    """Code `number` of a list of words: bits `number bits` and on of one long whole number."""
    long = sum(int(word) % 2**32 << (32 * at) for at, word in enumerate(stream))
    return (long >> (number * bits)) & (2**bits - 1)


def read(tensors, form, bits):
    """The weights `[i, o]` in float64, one at a time."""
    scales = tensors["scales"].astype(np.float64)
    outs = scales.shape[1]
    ins = tensors["qweight"].shape[0] * (1 if form == "awq" else 32 // bits if 32 % bits == 0 else 1)
    ins = ins if 32 % bits == 0 else tensors["qweight"].shape[0] * 32 // bits
    size = ins // scales.shape[0]
    weights = np.zeros((ins, outs))
    for i in range(ins):
        group = tensors["g_idx"][i] if "g_idx" in tensors else i // size
        for o in range(outs):
            if form == "awq":
                word, at = o // 8, ORDER.index(o % 8)
                code = piece(tensors["qweight"][i, word : word + 1], at, 4)
                zero = piece(tensors["qzeros"][group, word : word + 1], at, 4)
            else:
                code = piece(tensors["qweight"][:, o], i, bits)
                zero = piece(tensors["qzeros"][group], o, bits) + (form == "gptq")
            weights[i, o] = scales[group, o] * (code - zero)
    return weights


@pytest.mark.parametrize(("form", "bits"), KINDS)
def test_what_is_packed_is_what_the_definition_reads(form, bits, draw):
    made = layer(draw, bits, lowest=1 if form == "gptq" else 0)
    tensors = pack(made, form, "x")
    wanted = made.scale().astype(np.float64) * (made.codes.astype(np.float64) - made.zero())
    np.testing.assert_array_equal(read(tensors, form, bits), wanted)
    np.testing.assert_allclose(made.weights(), wanted, rtol=1e-6)
    told = specs("x", (64, 32, 4, bits), np.dtype(np.float16), form)
    assert told == {f"x.{part}": Spec(array.shape, array.dtype) for part, array in tensors.items()}


@pytest.mark.parametrize(("form", "bits"), KINDS)
def test_there_and_back(form, bits, draw):
    made = layer(draw, bits, lowest=1 if form == "gptq" else 0)
    back = unpack(pack(made, form, "x"), form)
    for name in ("codes", "scales", "zeros", "groups"):
        np.testing.assert_array_equal(getattr(back, name), getattr(made, name))
    assert back.bits == bits


def test_words_of_known_codes():
    """1 to 8 in 4 bits; 3 bits cross two words; the highest bit is the sign of int32."""
    assert words(np.arange(1, 9, dtype=np.uint8), 4).tolist() == [0x87654321 - 2**32]
    three = np.zeros(32, np.uint8)
    three[10], three[21] = 0b101, 0b110  # two bits below the border and one above; one and two
    first, second, third = (int(word) % 2**32 for word in words(three, 3))
    assert (first, second, third) == (0b01 << 30, 0b1, 0b11)
    np.testing.assert_array_equal(codes_of(words(three, 3), 3), three)
    packed = pack(
        Linear(
            4,
            np.arange(8, dtype=np.uint8)[None],
            np.ones((1, 8), np.float16),
            np.full((1, 8), 8, np.uint8),
            np.zeros(1, int),
        ),
        "awq",
        "x",
    )
    assert packed["qweight"].tolist() == [[0x75316420]]


def test_a_symmetric_grid_of_gptq_is_the_constant_that_everybody_knows(draw):
    made = layer(draw, 4)
    middle = Linear(4, made.codes, made.scales, np.full_like(made.zeros, 8), made.groups)
    assert set(pack(middle, "gptq", "x")["qzeros"].reshape(-1).tolist()) == {0x77777777}
    assert set(pack(middle, "gptq_v2", "x")["qzeros"].reshape(-1).tolist()) == {0x88888888 - 2**32}


def test_groups_in_any_order_are_read(draw):
    made = layer(draw, 4)
    tensors = pack(made, "gptq", "x")
    tensors["g_idx"] = draw.permutation(tensors["g_idx"])
    np.testing.assert_allclose(unpack(tensors, "gptq").weights(), read(tensors, "gptq", 4), rtol=1e-6)


def test_what_a_format_cannot_hold_is_refused(draw):
    with pytest.raises(UsageError, match=r"awq has codes of \(4,\) bits, not of 3.*--quantised=whole"):
        pack(layer(draw, 3), "awq", "x")
    with pytest.raises(UsageError, match="48 inputs and 32 outputs do not fill the words of gptq"):
        pack(layer(draw, 4, ins=48), "gptq", "x")
    made = layer(draw, 4)
    wide = Linear(4, made.codes, made.scales.astype(np.float32), made.zeros, made.groups)
    with pytest.raises(UsageError, match="scales of float32 would be rounded"):
        pack(wide, "gptq", "x")
    made.zeros[1, 2] = 0
    with pytest.raises(UsageError, match="Give --quantised=gptq_v2"):
        pack(made, "gptq", "blocks.1")
    with pytest.raises(RunError, match="not those of a layer of awq"):
        measures((64, 4), (4, 8), (4, 32), "awq")
    with pytest.raises(RunError, match="are not of one layer"):
        measures((8, 24), (4, 4), (4, 32), "gptq")

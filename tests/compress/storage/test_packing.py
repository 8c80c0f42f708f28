import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.storage.packing import pack, packed_size, unpack, widths
from effjax.errors import UsageError


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("axis", [-2, -1])
def test_codes_come_back(bits, axis, draw):
    codes = jnp.asarray(draw.integers(0, 2**bits, (3, 13, 5)), jnp.uint8)
    planes = jax.jit(pack, static_argnums=(1, 2))(codes, bits, axis)
    count = codes.shape[axis]
    assert [plane.shape[axis] for plane in planes] == [packed_size(count, width) for width in widths(bits)]
    back = jax.jit(unpack, static_argnums=(1, 2, 3))(planes, bits, count, axis)
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_code_takes_its_bits(bits):
    planes = pack(jnp.zeros((64, 7), jnp.uint8), bits)
    assert sum(plane.nbytes for plane in planes) * 8 == 64 * 7 * bits


def test_neighbours_share_a_byte_from_the_lowest_bit_on():
    codes = jnp.asarray([[1], [2], [15], [0]], jnp.uint8)
    (plane,) = pack(codes, 4)
    np.testing.assert_array_equal(plane, [[1 + 16 * 2], [15]])


def test_nine_bits_are_refused():
    with pytest.raises(UsageError, match="bits=9"):
        widths(9)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.layers.patches import PatchEmbed, sincos_table, unpatch


def test_equals_a_strided_convolution():
    images = jax.random.normal(jax.random.key(0), (2, 6, 9, 4))
    embed = PatchEmbed(patch=3, dim=5)
    params = meta.unbox(embed.init(jax.random.key(1), images))
    kernel = params["params"]["projection"]["kernel"].reshape(3, 3, 4, 5)
    expected = jax.lax.conv_general_dilated(
        images, kernel, (3, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(embed.apply(params, images), expected, atol=1e-5)


def test_unpatch_undoes_the_cut():
    images = jax.random.normal(jax.random.key(0), (2, 6, 9, 4))
    embed = PatchEmbed(patch=3, dim=36)
    identity = {"params": {"projection": {"kernel": jnp.eye(36), "bias": jnp.zeros(36)}}}
    tokens = embed.apply(identity, images).reshape(2, -1, 36)
    np.testing.assert_array_equal(unpatch(tokens, (2, 3), 3), images)


@pytest.mark.parametrize("shape", [(1, 10, 16, 3), (1, 16, 10, 3), (1, 0, 16, 3)])
def test_a_picture_that_patches_do_not_tile_is_refused(shape):
    with pytest.raises(UsageError, match=f"{shape[1]} x {shape[2]} cannot be cut into patches of 16 x 16"):
        PatchEmbed(16, 8).init(jax.random.key(0), jnp.zeros(shape))


def test_sincos_table_separates_every_position_and_is_of_equal_length():
    table = sincos_table((5, 7), 32)
    assert table.shape == (35, 32)
    np.testing.assert_allclose(np.sum(table**2, axis=1), 16.0, rtol=1e-5)
    distances = np.linalg.norm(table[:, None] - table[None], axis=-1) + np.eye(35) * 9
    assert distances.min() > 0.1
    # The column is coded in the first half, the row in the second.
    np.testing.assert_array_equal(table[0, 16:], table[6, 16:])
    np.testing.assert_array_equal(table[0, :16], table[7, :16])
    with pytest.raises(UsageError, match="multiple of 4"):
        sincos_table((2, 2), 6)


def test_sincos_table_may_be_stretched():
    np.testing.assert_array_equal(sincos_table((4, 4), 16, span=4), sincos_table((4, 4), 16))
    wide = sincos_table((8, 8), 16, span=4).reshape(8, 8, 16)
    np.testing.assert_allclose(wide[::2, ::2], sincos_table((4, 4), 16).reshape(4, 4, 16), atol=1e-6)

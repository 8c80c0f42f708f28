import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.mixers.position_bias import LogSpacedContinuous, RelativeTable, coordinates
from effjax.mixers.windows import offsets


def params_of(module, window, span, heads=3, scale=0.3):
    shapes = meta.unbox(jax.eval_shape(lambda key: module.init(key, window, span, heads), jax.random.key(0)))
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.float32(draw.normal(size=leaf.shape) * scale), shapes)


def test_the_table_is_read_at_the_offset_of_query_and_key():
    params = params_of(RelativeTable(), (2, 3), (4, 5))
    table = params["params"]["table"]
    assert table.shape == (7 * 9, 3)
    bias = RelativeTable().apply(params, (2, 3), (4, 5), 3)  # a map smaller than the window
    middle = table.reshape(7, 9, 3)
    for q, k in np.ndindex(6, 6):
        row, column = q // 3 - k // 3, q % 3 - k % 3
        np.testing.assert_array_equal(bias[:, q, k], middle[3 + row, 4 + column])


def test_coordinates_are_logarithms_of_the_share_of_the_window():
    points = coordinates((3, 2), (3, 2)).reshape(5, 3, 2)
    np.testing.assert_allclose(
        points[:, 1, 0] * 3, [-np.log2(9), -np.log2(5), 0, np.log2(5), np.log2(9)], rtol=1e-6
    )
    np.testing.assert_allclose(points[2, :, 1] * 3, [-np.log2(9), 0, np.log2(9)], rtol=1e-6)
    # A window of 16 in terms of one of 8: further out by a quarter, not by twice.
    far = coordinates((16, 16), (8, 8)).max()
    assert far == pytest.approx(np.log2(1 + 8 * 15 / 7) / 3, rel=1e-6)
    assert np.isfinite(coordinates((1, 1), (1, 1))).all()


def test_the_network_evaluated_offset_by_offset():
    params = params_of(LogSpacedContinuous(hidden=16), (3, 4), (3, 4))
    bias = LogSpacedContinuous(hidden=16).apply(params, (3, 4), (3, 4), 3)
    p = jax.tree.map(lambda leaf: np.float64(leaf), params["params"])
    for q, k in np.ndindex(12, 12):
        x = np.array([(q // 4 - k // 4) / 2, (q % 4 - k % 4) / 3])
        z = np.sign(x) * np.log2(1 + 8 * np.abs(x)) / np.log2(8)
        hidden = np.maximum(z @ p["expand"]["kernel"] + p["expand"]["bias"], 0)
        np.testing.assert_allclose(
            bias[:, q, k], 16 / (1 + np.exp(-hidden @ p["contract"]["kernel"])), rtol=1e-5, atol=1e-5
        )


def test_a_bias_goes_from_one_window_to_a_larger_one():
    """With the window of training given, common offsets keep their bias exactly, and others lie near."""
    params = params_of(LogSpacedContinuous(), (8, 8), (8, 8))
    trained = LogSpacedContinuous(trained=8)
    small = trained.apply(params, (8, 8), (8, 8), 3)
    np.testing.assert_array_equal(small, LogSpacedContinuous().apply(params, (8, 8), (8, 8), 3))
    large = trained.apply(params, (16, 16), (16, 16), 3)

    def by_offset(bias, side):
        table = {}
        for (q, k), offset in zip(
            np.ndindex(side**2, side**2), offsets((side, side)).reshape(-1, 2), strict=True
        ):
            table[tuple(offset.tolist())] = np.asarray(bias)[:, q, k]
        return table

    near, far = by_offset(small, 8), by_offset(large, 16)
    np.testing.assert_allclose([far[offset] for offset in near], list(near.values()), atol=1e-5)
    # Smooth: from one offset to the next beyond the trained ones it moves less than within them.
    along = np.array([far[(0, i)] for i in range(16)])
    steps = np.abs(np.diff(along, axis=0)).max(axis=1)
    assert steps[7:].max() < steps[:7].max()
    # By its own window, the same weights give other values: offsets are shares of the window.
    own = by_offset(LogSpacedContinuous().apply(params, (16, 16), (16, 16), 3), 16)
    assert max(np.abs(own[offset] - near[offset]).max() for offset in near) > 0.1
    assert jnp.all((large > 0) & (large < 16))

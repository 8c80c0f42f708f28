import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.layers.padding import pad_same
from effjax.layers.transposed import ConvTransposed


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(4, 2, 1), (3, 1, 1), (2, 2, 0), (6, 3, 0)])
@pytest.mark.parametrize("features", [None, 5])
def test_every_place_paints_its_kernel(kernel, stride, padding, features):
    module = ConvTransposed(features, kernel, stride, padding)
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 2))
    held = meta.unbox(module.init(jax.random.key(1), x))
    held["params"]["bias"] = jax.random.normal(jax.random.key(2), held["params"]["bias"].shape)
    k, bias = (np.asarray(held["params"][name], np.float64) for name in ("kernel", "bias"))
    whole = np.zeros((2, 2 * stride + kernel, 3 * stride + kernel, len(bias)))
    for i in range(3):
        for j in range(4):
            for u in range(kernel):
                for v in range(kernel):
                    one = np.asarray(x[:, i, j], np.float64)
                    painted = one * k[u, v] if features is None else one @ k[u, v]
                    whole[:, stride * i + u, stride * j + v] += painted
    height, width = whole.shape[1:3]
    expected = whole[:, padding : height - padding, padding : width - padding] + bias
    np.testing.assert_allclose(jax.jit(module.apply)(held, x), expected, atol=1e-5)


def test_a_stride_that_does_not_divide_the_kernel():
    with pytest.raises(UsageError, match="stride=2 must divide kernel=3"):
        ConvTransposed(None, 3, 2).init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))


@pytest.mark.parametrize(
    ("side", "kernel", "stride"), [(8, 3, 2), (9, 3, 2), (8, 3, 1), (7, 2, 2), (10, 5, 4)]
)
def test_the_odd_zero_stands_below_and_to_the_right(side, kernel, stride):
    padded = pad_same(jnp.ones((1, side, side, 1)), kernel, stride)
    places = (padded.shape[1] - kernel) // stride + 1
    assert places == -(-side // stride)
    zeros = np.asarray(padded[0, :, side // 2, 0]) == 0
    above, below = int(np.argmin(zeros)), int(np.argmin(zeros[::-1]))
    assert above <= below <= above + 1
    assert padded.shape[1] == side + above + below

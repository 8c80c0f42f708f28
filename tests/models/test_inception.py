import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.errors import UsageError
from effjax.interop.families.timm_inception import names
from effjax.interop.names import resolve
from effjax.matching import named_leaves
from effjax.models.inception import Inception, pooled


def shapes(model, side=75):
    return meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3))))


def test_has_the_published_parameters():
    """Those of torchvision, 27,161,264, without the 3,326,696 of the auxiliary head."""
    leaves = jax.tree.leaves(shapes(Inception())["params"])
    assert sum(leaf.size for leaf in leaves) == 27_161_264 - 3_326_696


def test_maps_shrink_to_eight_places_as_in_the_paper():
    model = Inception(classes=0, width=0.1)
    variables = shapes(model, 299)
    assert variables["params"]["Mixed_7c_branch1x1_conv"]["kernel"].shape[3] == 32
    # 32 + 2 x 38 + 2 x 38 + 19 channels where the whole network has 2048.
    features = jax.eval_shape(model.apply, variables, jnp.zeros((2, 299, 299, 3)))
    assert features.shape == (2, 203)
    with pytest.raises(UsageError, match="pictures of 64 x 80 are too small, take at least 75 x 75"):
        model.init(jax.random.key(0), jnp.zeros((1, 64, 80, 3)))


def test_pools():
    x = np.random.default_rng(0).normal(size=(1, 4, 5, 2)).astype(np.float32)
    for i, j in ((0, 0), (0, 2), (2, 3), (3, 4)):
        window = x[0, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].reshape(-1, 2)
        for kind, expected in (
            ("max", window.max(0)),
            ("average", window.sum(0) / 9),
            ("average_inside", window.mean(0)),
        ):
            np.testing.assert_allclose(pooled(jnp.asarray(x), kind)[0, i, j], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_fid_changes_pools_and_no_parameters():
    plain, fid = Inception(classes=0, width=0.05), Inception(classes=0, width=0.05, fid=True)
    assert jax.tree.map(jnp.shape, shapes(plain)) == jax.tree.map(jnp.shape, shapes(fid))
    draw = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(draw.uniform(0.1, 0.5, leaf.shape), leaf.dtype), shapes(plain)
    )
    x = jnp.asarray(draw.normal(size=(1, 75, 75, 3)), jnp.float32)
    one, other = (jax.jit(model.apply)(variables, x) for model in (plain, fid))
    assert np.isfinite(one).all()
    assert np.abs(one - other).max() > 1e-3 * np.abs(one).max()


def test_every_parameter_has_a_name():
    leaves = shapes(Inception())
    flat = {**named_leaves(leaves["params"])}
    flat |= {f"batch_stats:{path}": leaf for path, leaf in named_leaves(leaves["batch_stats"]).items()}
    entries, absent = resolve(names(Inception()), flat)
    assert not absent
    assert len(entries) == len(flat)

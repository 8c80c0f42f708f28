import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.compress.stitching import Pair, as_stitch, fitted, map_of, paths
from effjax.compress.subject import Subject
from effjax.config import build_kind
from effjax.models import KINDS
from effjax.train.tasks.classification import Classification
from tests.compress.steps.test_stitch import output
from tests.compress.structure.networks import subject

# Parameters of the published paths between DeiT-Ti and DeiT-S, and then DeiT-S and DeiT-B, in their order.
TO_S = (22345960, 20571496, 22790824, 21016360, 19241896, 21461224, 19686760, 17912296, 20131624, 18357160)
TO_B = (88190440, 81102568, 89964904)
SIZES = {"ti": (192, 3), "s": (384, 6), "b": (768, 12)}


def deit(name):
    """Shapes of a published network."""
    dim, heads = SIZES[name]
    block = dict(mixer=dict(kind="attention", heads=heads), ffn=dict(kind="mlp"))
    config = dict(kind="vit", patch=16, dim=dim, depth=12, classes=1000, block=block)
    task = Classification(model=build_kind(KINDS, config, "config.model"))
    batch = {"image": jnp.zeros((1, 224, 224, 3)), "label": jnp.zeros(1, jnp.int32)}
    return Subject(task, meta.unbox(jax.eval_shape(task.init, jax.random.key(0), batch)), batch)


def test_a_network_stitched_to_itself_is_itself():
    network, at = subject("vit"), 1
    width = network.model.dim
    same = Pair.of(network, network).path(at, at, as_stitch(np.eye(width), np.zeros(width)))
    np.testing.assert_allclose(output(same), output(network), rtol=1e-5, atol=1e-5)
    assert same.model.depth == network.model.depth


def test_the_map_is_that_of_least_squares(draw):
    x, z = draw.normal(size=(200, 5)) + 3, draw.normal(size=(200, 4))
    kernel, bias = fitted(x, z)
    ones = np.concatenate([x, np.ones((200, 1))], 1)
    expected = np.linalg.pinv(ones) @ z
    np.testing.assert_allclose(kernel, expected[:-1], atol=1e-10)
    np.testing.assert_allclose(bias, expected[-1], atol=1e-10)
    np.testing.assert_allclose(ones.T @ (x @ kernel + bias - z), 0, atol=1e-9)
    exact = x @ draw.normal(size=(5, 4)) + 2
    kernel, bias = fitted(x, exact)
    np.testing.assert_allclose(x @ kernel + bias, exact, atol=1e-10)
    few, _ = fitted(x[:3], z[:3], ridge=1e-3)
    assert np.isfinite(few).all()


@pytest.mark.parametrize(("small", "large", "counts"), [("ti", "s", TO_S), ("s", "b", TO_B)])
def test_parameters_are_those_of_the_published_family(small, large, counts):
    networks = deit(small), deit(large)

    def params(at, to, *given):
        whole = [network.with_params(own) for network, own in zip(networks, given, strict=True)]
        return Pair.of(*whole).path(at, to).params

    published = paths(12, 12)
    assert len(published) == 34
    assert published[:5] == ((1, 0), (1, 1), (2, 0), (2, 1), (2, 2))
    for (at, to), count in zip(published, counts, strict=False):
        held = (network.params for network in networks)
        made = jax.eval_shape(functools.partial(params, at, to), *held)
        total = sum(leaf.size for leaf in jax.tree.leaves(made))
        # The published figures count neither class token nor positions.
        assert total - sum(made[name].size for name in ("class_token", "positions")) == count


def test_neighbours_share_a_map():
    """Windows of two layers slide over both networks: four paths in the first, three new in the others."""
    shared = [map_of(12, 12, at, to) for at, to in paths(12, 12)]
    assert shared[:7] == [0, 0, 0, 0, 1, 1, 1]
    assert sorted(set(shared)) == list(range(11))
    assert [shared.count(i) for i in range(11)] == [4] + [3] * 10
    assert {map_of(2, 4, at, to) for at, to in paths(2, 4)} == {0, 1}  # of other depths: one a layer

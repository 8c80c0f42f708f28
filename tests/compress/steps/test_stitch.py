import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.compress.recovery import evaluated_output
from effjax.compress.steps.stitch import Stitch, fitted, paths, stitched, with_map
from effjax.compress.structure.layers import take_apart
from effjax.compress.subject import Calibration, Subject
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.models import KINDS
from effjax.train.tasks.classification import Classification
from tests.compress.structure.networks import noisy, subject

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


def narrow(network, dim=8):
    """A network like another, of another width and depth."""
    model = network.model.clone(dim=dim, depth=2, unroll=1)
    small = dataclasses.replace(network, task=dataclasses.replace(network.task, model=model))
    variables = meta.unbox(jax.jit(small.task.init)(jax.random.key(7), network.example))
    small = dataclasses.replace(small, variables=variables)
    return small.with_params(noisy(small.params))


def calibration(network, small, told):
    batches = lambda: iter([network.example] * 3)
    return Calibration(batches, jax.random.key(0), told.append, network, lambda folder: small)


def output(network):
    return np.asarray(jax.jit(lambda v: evaluated_output(network, v, network.example))(network.variables))


def test_a_network_stitched_to_itself_is_itself():
    network, at = subject("vit"), 1
    width = network.model.dim
    same = with_map(stitched(network, network, at, at), at, np.eye(width), np.zeros(width))
    np.testing.assert_allclose(output(same), output(network), rtol=1e-5, atol=1e-5)
    assert same.model.depth == network.model.depth


def test_least_squares_finds_the_map_of_a_network_with_itself():
    network, told = subject("vit"), []
    step = Stitch("itself", at=1, to=1, ridge=0.0)
    same = step.apply(network, calibration(network, network, told))
    np.testing.assert_allclose(output(same), output(network), rtol=2e-3, atol=2e-3)
    assert "layers, then" in told[0]


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


def test_two_widths_are_one_ordinary_network():
    large = subject("vit")
    small, told = narrow(large), []
    made = Stitch("small", at=1, to=1).apply(large, calibration(large, small, told))
    assert made.model.dim == 8
    assert [block.width for block in made.model.layer_blocks] == [large.model.dim] + [None] * (
        large.model.depth - 1
    )
    drawn = jax.eval_shape(lambda: meta.unbox(made.task.init(jax.random.key(0), large.example)))["params"]
    assert jax.tree.map(jnp.shape, made.params) == jax.tree.map(lambda leaf: leaf.shape, drawn)
    assert np.isfinite(output(made)).all()
    first, last = take_apart(made)[0].params["mixer"], take_apart(made)[-1].params
    jax.tree.map(np.testing.assert_array_equal, first, take_apart(small)[0].params["mixer"])
    jax.tree.map(np.testing.assert_array_equal, last, take_apart(large)[-1].params)
    assert float(told[0].split("leaves ")[1].split()[0]) < 1


@pytest.mark.parametrize(("small", "large", "counts"), [("ti", "s", TO_S), ("s", "b", TO_B)])
def test_parameters_are_those_of_the_published_family(small, large, counts):
    networks = deit(small), deit(large)

    def params(at, to, *given):
        whole = [network.with_params(own) for network, own in zip(networks, given, strict=True)]
        return stitched(*whole, at, to).params

    published = paths(12, 12)
    assert len(published) == 34
    assert published[:5] == ((1, 0), (1, 1), (2, 0), (2, 1), (2, 2))
    for (at, to), count in zip(published, counts, strict=False):
        held = (network.params for network in networks)
        made = jax.eval_shape(functools.partial(params, at, to), *held)
        total = sum(leaf.size for leaf in jax.tree.leaves(made))
        # The published figures count neither class token nor positions.
        assert total - sum(made[name].size for name in ("class_token", "positions")) == count


def test_what_cannot_be_stitched_is_named():
    large = subject("vit")
    small = narrow(large)
    with pytest.raises(UsageError, match="at=3 is at most the 2 layers"):
        stitched(small, large, 3, 1)
    other = dataclasses.replace(small, task=dataclasses.replace(small.task, model=small.model.clone(patch=1)))
    with pytest.raises(UsageError, match="they differ in patch"):
        stitched(other, large, 1, 1)
    with pytest.raises(UsageError, match="LM cannot be stitched"):
        stitched(subject("lm"), subject("lm"), 1, 1)
    with pytest.raises(UsageError, match="at=0"):
        Stitch("a", at=0, to=0)
    with pytest.raises(UsageError, match=r"experiments\.compress"):
        Stitch("a", at=1, to=1).apply(large, Calibration(lambda: iter(()), jax.random.key(0)))

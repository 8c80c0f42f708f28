import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.compress.recovery import evaluated_output
from effjax.compress.steps.stitch import Stitch
from effjax.compress.stitching import Pair
from effjax.compress.structure.layers import take_apart
from effjax.compress.subject import Calibration
from effjax.errors import UsageError
from tests.compress.structure.networks import noisy, subject


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


def test_least_squares_finds_the_map_of_a_network_with_itself():
    network, told = subject("vit"), []
    step = Stitch("itself", at=1, to=1, ridge=0.0)
    same = step.apply(network, calibration(network, network, told))
    np.testing.assert_allclose(output(same), output(network), rtol=2e-3, atol=2e-3)
    assert "layers, then" in told[0]


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


def test_what_cannot_be_stitched_is_named():
    large = subject("vit")
    small = narrow(large)
    with pytest.raises(UsageError, match="at=3 is from 1 to the 2 layers"):
        Pair.of(small, large).path(3, 1)
    other = dataclasses.replace(small, task=dataclasses.replace(small.task, model=small.model.clone(patch=1)))
    with pytest.raises(UsageError, match="they differ in patch"):
        Pair.of(other, large)
    with pytest.raises(UsageError, match="LM cannot be stitched"):
        Pair.of(subject("lm"), subject("lm"))
    with pytest.raises(UsageError, match="at=0"):
        Stitch("a", at=0, to=0)
    with pytest.raises(UsageError, match=r"experiments\.compress"):
        Stitch("a", at=1, to=1).apply(large, Calibration(lambda: iter(()), jax.random.key(0)))

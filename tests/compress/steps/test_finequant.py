import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.steps.finequant import FineQuant, halvings
from effjax.compress.storage.trees import stored_in
from effjax.compress.storage.uniform import Uniform
from effjax.compress.subject import Calibration
from effjax.errors import UsageError
from effjax.layers.stored import Place
from tests.compress.tiny import BATCH, language


def normal(draw, *shape):
    return jnp.asarray(draw.normal(size=shape), jnp.float32)


def test_even_weights_keep_whole_columns(draw):
    assert FineQuant().layout(normal(draw, 1024, 64)) == Uniform(4, 0)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_groups_are_cut_down_to_the_block_that_is_large(size, draw):
    weights = normal(draw, 1024, 64).at[512 : 512 + size].multiply(10.0)
    assert FineQuant().layout(weights) == Uniform(4, size)


def test_a_stack_takes_the_finest_and_a_threshold_of_one_never_cuts(draw):
    weights = normal(draw, 2, 512, 16).at[1, :128].multiply(10.0)
    assert FineQuant().layout(weights).group == 128
    assert FineQuant().layout(weights[:1]).group == 0
    assert FineQuant(alpha=1.0).layout(weights).group == 0


def test_columns_are_halved_while_they_can_be():
    assert halvings(192, 48) == [192, 96, 48]
    assert halvings(96, 1) == [96, 48, 24, 12, 6, 3]
    assert halvings(64, 64) == [64]


def test_planted_outliers_cost_only_their_own_block(draw):
    """Weights on the grid of 4 bits come back to the bit, but only where blocks have their own scale."""
    codes = draw.integers(-6, 7, (512, 8)).astype(np.float32)
    codes[::64] = 7
    weights = jnp.asarray(codes).at[128:192].multiply(16.0)
    place = Place((512, 8), ("embed", "mlp"), (512,), (8,), False)
    fine = FineQuant(smallest=64).layout(weights)
    assert fine.group == 64
    np.testing.assert_array_equal(fine.store(weights, place).whole(jnp.float32), weights)
    whole = Uniform(4, 0).store(weights, place).whole(jnp.float32)
    assert float(jnp.mean((whole != weights)[:128])) > 0.8


def test_a_halved_group_has_no_larger_bound(draw):
    weights, place = jnp.asarray(draw.standard_t(3, (256, 8)), jnp.float32), None
    place = Place((256, 8), ("embed", "mlp"), (256,), (8,), False)
    errors = []
    for group in (256, 128, 64, 32):
        held = Uniform(4, group, scale="float32").store(weights, place)
        error = jnp.abs(held.whole(jnp.float32) - weights).reshape(256 // group, group, 8)
        assert jnp.all(error <= held.scale[:, None] / 2 * (1 + 1e-5))
        errors.append(float(jnp.mean(error**2)))
    assert errors == sorted(errors, reverse=True)


def test_a_model_is_rounded_by_the_groups_that_each_kernel_asks_for():
    subject = language()
    params = subject.params
    wide = params["blocks"]["ffn"]["contract"]["kernel"]
    wide = wide.at[:, :8].multiply(20.0)
    params["blocks"]["ffn"]["contract"]["kernel"] = wide
    told = []
    step = FineQuant(smallest=8, alpha=0.3, leave=("embedding", "head"))
    small = step.apply(subject, Calibration(lambda: [BATCH], jax.random.key(0), told.append))
    groups = {path: leaf.layout.group for path, leaf in stored_in(small.params).items()}
    assert groups.pop("blocks/ffn/contract/kernel") == 8
    assert set(groups.values()) == {0}
    assert len(told) == len(groups) + 1
    # b + 16 / g, as the paper counts; of a whole column of 16 weights 16 / 16.
    assert "blocks/ffn/contract/kernel: groups of 8, 6.000 bits a weight." in told
    assert "blocks/ffn/expand/kernel: groups of 16, 5.000 bits a weight." in told


def test_a_threshold_out_of_range_is_refused():
    with pytest.raises(UsageError, match=r"alpha=1\.5"):
        FineQuant(alpha=1.5)

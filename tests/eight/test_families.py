"""Every family under every parallelism gives the losses of one device."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from effjax.errors import UsageError
from effjax.matching import named_leaves
from tests.train.toy import FAMILIES, losses, program_of

MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}
CHANGES = {"train__steps": "20 steps", "train__log_every": "1 steps", "evaluators": {}}


@functools.cache
def losses_on_one_device(family):
    return losses(program_of(family, devices=jax.devices()[:1], **CHANGES))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mesh", MESHES)
def test_losses_are_those_of_one_device(family, mesh):
    program = program_of(family, mesh=MESHES[mesh], **CHANGES)
    found = losses(program)
    assert len(found) == 20
    assert found[-1] < found[0]
    np.testing.assert_allclose(found, losses_on_one_device(family), rtol=1e-5)


PARTS = {
    "mixture": (
        {"model__block__ffn": {"kind": "mixture", "experts": 4, "chosen": 2, "hidden": 32}},
        {"data": 2, "tensor": 2, "expert": 2},
    ),
    "experts folded over attention's axes": (
        {
            "model__block__ffn": {"kind": "exchanged_mixture", "experts": 8, "chosen": 2, "hidden": 32},
            "sharding": {"expert": ("data", "sequence", "tensor")},
        },
        {"data": 2, "tensor": 2, "sequence": 2},
    ),
    "sigmoid": (
        {
            "model__block__mixer": dict(
                kind="sigmoid_attention", heads=4, kv_heads=2, causal=True, rotary_base=1e4, length=64
            )
        },
        {"data": 2, "fsdp": 2, "tensor": 2},
    ),
    "equally noisy modules": (
        {
            "train__accumulate": 2,
            "optimizer__agvm": dict(
                modules=("blocks/.*", "(?!blocks/).*"), every=1, start="0 steps", ema=0.5
            ),
        },
        {"data": 2, "fsdp": 2, "tensor": 2},
    ),
    "mamba": ({"model__block__mixer": {"kind": "mamba", "state": 4}}, {"data": 2, "fsdp": 2, "tensor": 2}),
    "mamba by kernel": (
        {"model__block__mixer": {"kind": "mamba", "state": 4, "implementation": "kernel"}},
        {"data": 2, "fsdp": 2, "tensor": 2},
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_other_parts_of_a_language_model_are_cut_too(part):
    changes, mesh = PARTS[part]
    changes = {**CHANGES, **changes, "train__steps": "6 steps"}
    single = losses(program_of("language", devices=jax.devices()[:1], **changes))
    program = program_of("language", mesh=mesh, **changes)
    axis = "expert" if part == "mixture" else "tensor"
    cut = [leaf.sharding.spec for leaf in jax.tree.leaves(program.shapes.params)]
    assert any(axis in jax.tree.leaves(tuple(spec)) for spec in cut)
    np.testing.assert_allclose(losses(program), single, rtol=1e-5)


def test_parameters_and_moments_are_cut_as_the_rules_say():
    program = program_of("vision", mesh={"data": 2, "fsdp": 2, "tensor": 2})
    spec = {path: leaf.sharding.spec for path, leaf in named_leaves(program.shapes).items()}
    kernel = PartitionSpec(None, "fsdp", "tensor")
    assert spec["params/blocks/ffn/expand/kernel"] == kernel
    assert [s for path, s in spec.items() if path.endswith("mu/blocks/ffn/expand/kernel")] == [kernel]
    assert spec["ema/blocks/ffn/expand/kernel"] == kernel
    assert spec["step"] == PartitionSpec()
    state = program.init()
    shard = state.params["blocks"]["ffn"]["expand"]["kernel"].addressable_shards[0].data
    assert shard.shape == (2, 8, 32), "an eighth of [2, 16, 64] but for the two copies along data"


def test_heads_that_the_tensor_axis_does_not_divide_are_refused():
    with pytest.raises(
        UsageError, match=r"blocks/mixer/key/bias has shape .* mesh axis tensor=8 does not divide"
    ):
        program_of("vision", mesh={"data": 1, "tensor": 8})


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UsageError, match=r"batch_size is 12, which does not divide into 8 parts \(data=8"):
        program_of("vision", data__batch_size=12)


def test_a_rule_can_be_changed_from_the_config():
    program = program_of("vision", mesh={"data": 4, "tensor": 2}, sharding={"mlp": None})
    assert program.shapes.params["blocks"]["ffn"]["expand"]["kernel"].sharding.spec == PartitionSpec(
        None, "fsdp", None
    )

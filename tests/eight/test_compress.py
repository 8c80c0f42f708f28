"""Weights in codes are cut over devices as the arrays are that they stand for."""

import contextlib

import jax
import numpy as np
import pytest

from effjax.compress.storage.trees import stored_in
from effjax.parallel.sharding import to_global
from effjax.train.checkpoint import Checkpoints
from tests.train.toy import program_of

LAYOUTS = {
    "blocks/ffn/expand/kernel": dict(kind="uniform", bits=4, group=8, symmetric=False),
    "blocks/ffn/contract/kernel": dict(kind="uniform", bits=3, group=8),
    "blocks/mixer/query/kernel": dict(kind="uniform", bits=8, group=0),
    "blocks/mixer/output/kernel": dict(kind="uniform", bits=4, group=8),
}
CHANGES = {"storage": LAYOUTS, "optimizer": dict(kind="still"), "evaluators": {}, "data__batch_size": 16}


@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, {"data": 4, "tensor": 2}])
def test_metrics_are_those_of_one_device(mesh):
    cut, single = (
        program_of("configs.language.lm", mesh=mesh, **CHANGES),
        program_of("configs.language.lm", devices=jax.devices()[:1], **CHANGES),
    )
    held = stored_in(cut.shapes.params)
    assert sorted(held) == sorted(LAYOUTS)
    for path in ("blocks/ffn/expand/kernel", "blocks/mixer/query/kernel"):
        assert all("tensor" in plane.sharding.spec for plane in held[path].codes), path
    batch = next(iter(single.data.train()))
    batch = {**batch, "mask": np.ones(16, np.float32)}
    ours, theirs = (
        program.metrics(
            program.variables(program.init(), ema=False), to_global(batch, program.batch_sharding)
        )
        for program in (cut, single)
    )
    for name in theirs:
        np.testing.assert_allclose(ours[name].total, theirs[name].total, rtol=1e-5)


def test_what_one_device_saved_is_restored_on_eight(tmp_path):
    single = program_of("configs.language.lm", devices=jax.devices()[:1], **CHANGES)
    cut = program_of("configs.language.lm", mesh={"fsdp": 4, "tensor": 2}, **CHANGES)
    state = single.init()
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as saved:
        saved.save(0, state, {"examples": 0})
    with contextlib.closing(Checkpoints(tmp_path, read_only=True)) as saved:
        restored = saved.restore(cut.shapes).state
    assert jax.tree.structure(restored.params) == jax.tree.structure(state.params)
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    planes = stored_in(restored.params)["blocks/ffn/expand/kernel"].codes
    assert all(len(plane.sharding.device_set) == 8 for plane in planes)

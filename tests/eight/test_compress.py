"""Weights in codes are cut over devices as the arrays are that they stand for."""

import jax
import numpy as np
import pytest

from effjax.compress.storage.trees import stored_in
from effjax.parallel.sharding import to_global
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

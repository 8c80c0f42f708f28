"""Rows that are tuned of matrices that are cut over devices: the steps of one device."""

import jax
import numpy as np

from effjax.parallel.sharding import to_global
from tests.train.toy import program_of

CHANGES = {"evaluators": {}, "data__batch_size": 16}


def test_steps_are_those_of_one_device():
    told = []
    for placed in ({"mesh": {"fsdp": 4, "tensor": 2}}, {"devices": jax.devices()[:1]}):
        program = program_of("configs.language.s2ft", **placed, **CHANGES)
        batch = to_global(next(iter(program.data.train())), program.batch_sharding)
        state = program.init()
        for _ in range(3):
            state, metrics = program.step(state, batch)
        told.append((metrics, jax.device_get(state.params["changes"])))
    (ours, changes), (theirs, others) = told
    for name in ("loss", "gradient_norm", "update_norm"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05, atol=1e-5), changes, others)

"""Attention by proxy, cut over eight devices in three ways at once, gives the losses of one device."""

import jax
import numpy as np

from tests.train.toy import losses_of_one_state, program_of

CHANGES = {"train__steps": "3 steps", "train__log_every": "1 steps", "evaluators": {}}


def test_losses_are_those_of_one_device():
    module = "configs.diffusion.pt_dit"
    one = program_of(module, devices=jax.devices()[:1], **CHANGES)
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    program = program_of(module, mesh=mesh, **CHANGES)
    single, found = losses_of_one_state(one, program)
    assert len(single) == 3
    np.testing.assert_allclose(found, single, rtol=1e-5)

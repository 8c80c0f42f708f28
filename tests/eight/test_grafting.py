"""A graft cut over eight devices in three ways at once gives the losses of one device."""

import jax
import numpy as np

from tests.train.toy import losses_of_one_state, program_of

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
CHANGES = {"train__steps": "3 steps", "train__log_every": "1 steps", "evaluators": {}}


def test_losses_are_those_of_one_device():
    module = "configs.diffusion.grafting"
    one = program_of(module, devices=jax.devices()[:1], **CHANGES)
    program = program_of(module, mesh=MESH, **CHANGES)
    mixer = program.shapes.params["blocks"]["members_1"]["mixer"]
    assert "tensor" in mixer["feature_kernel"].sharding.spec
    single, found = losses_of_one_state(one, program)
    np.testing.assert_allclose(found, single, rtol=1e-5)

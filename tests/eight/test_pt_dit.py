"""Attention by proxy, cut over eight devices in three ways at once, gives the losses of one device."""

import jax
import numpy as np

from tests.train.toy import losses, program_of

CHANGES = {"train__steps": "3 steps", "train__log_every": "1 steps", "evaluators": {}}


def test_losses_are_those_of_one_device():
    module = "configs.diffusion.pt_dit"
    single = losses(program_of(module, devices=jax.devices()[:1], **CHANGES))
    assert len(single) == 3
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    np.testing.assert_allclose(losses(program_of(module, mesh=mesh, **CHANGES)), single, rtol=1e-5)

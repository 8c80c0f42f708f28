"""LinGen, cut over eight devices in three ways at once, gives the losses of one device."""

import jax
import numpy as np

from tests.train.toy import losses_of_one_state, program_of

CHANGES = {"train__steps": "2 steps", "train__log_every": "1 steps", "evaluators": {}}


def test_losses_are_those_of_one_device():
    module = "configs.diffusion.lingen"
    one = program_of(module, devices=jax.devices()[:1], **CHANGES)
    program = program_of(module, mesh={"data": 2, "fsdp": 2, "tensor": 2}, **CHANGES)
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(program.shapes.params)]
    assert any("fsdp" in spec for spec in specs)
    assert any("tensor" in spec for spec in specs)
    single, found = losses_of_one_state(one, program)
    assert len(single) == 2
    np.testing.assert_allclose(found, single, rtol=1e-5)

"""Every image classifier, cut over eight devices in three ways at once, gives the losses of one device."""

import jax
import numpy as np
import pytest

from tests.models.test_backbones import NAMES
from tests.train.toy import losses_of_one_state, program_of

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
# Toys with one head, which no tensor axis can cut: the papers fix how many channels a head has.
WHOLE_HEADS = {key: {"data": 4, "fsdp": 2} for key in ("lowformer", "nextvit", "sparseformer")}
CHANGES = {"train__steps": "3 steps", "train__log_every": "1 steps", "evaluators": {}}


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_those_of_one_device(name):
    module = f"configs.vision.{name}"
    one = program_of(module, devices=jax.devices()[:1], **CHANGES)
    program = program_of(module, mesh=WHOLE_HEADS.get(name, MESH), **CHANGES)
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(program.shapes.params)]
    assert any("fsdp" in spec for spec in specs)
    single, found = losses_of_one_state(one, program)
    assert len(single) == 3
    np.testing.assert_allclose(found, single, rtol=1e-5)

"""Denoisers with parts of their own, cut over eight devices in three ways: the losses of one device."""

import jax
import numpy as np
import pytest

from tests.train.toy import losses_of_one_state, program_of

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
CHANGES = {"train__steps": "3 steps", "train__log_every": "1 steps", "evaluators": {}}
SOME_SQUARES = (dict(size=2, patch=1, depth=1, share=0.5), dict(size=8, patch=2, depth=1))
MODELS = {"switch_dit": {}, "lego_diffusion": {"model__bricks": SOME_SQUARES}}


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_one_device(name):
    module, changes = f"configs.diffusion.{name}", {**CHANGES, **MODELS[name]}
    one = program_of(module, devices=jax.devices()[:1], **changes)
    program = program_of(module, mesh=MESH, **changes)
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(program.shapes.params)]
    assert any("fsdp" in spec for spec in specs)
    single, found = losses_of_one_state(one, program)
    assert len(single) == 3
    np.testing.assert_allclose(found, single, rtol=1e-5)

"""Language models that are no plain LM give the losses of one device on a mesh."""

import jax
import numpy as np
import pytest

from tests.train.toy import losses_of_one_state, program_of

CHANGES = {"train__steps": "4 steps", "train__log_every": "1 steps", "evaluators": {}}
MESHES = {
    "tokenformer": {"data": 2, "fsdp": 2, "tensor": 2},
    "block_transformer": {"data": 2, "fsdp": 2, "tensor": 2},
    "mixture_of_transformers": {"data": 4, "tensor": 2},
    "ultramem_v2": {"data": 2, "fsdp": 2, "tensor": 2},
}


@pytest.mark.parametrize("name", MESHES)
def test_losses_are_those_of_one_device(name):
    module = f"configs.language.{name}"
    program = program_of(module, mesh=MESHES[name], **CHANGES)
    cut = {axis for leaf in jax.tree.leaves(program.shapes.params) for axis in leaf.sharding.spec if axis}
    assert "tensor" in cut
    one = program_of(module, devices=jax.devices()[:1], **CHANGES)
    single, found = losses_of_one_state(one, program)
    np.testing.assert_allclose(found, single, rtol=1e-4)

"""Two streams, in regions and compressed, cut over eight devices give the losses of one device."""

import jax
import numpy as np

from tests.eight.test_backbones import CHANGES, MESH
from tests.train.toy import losses_of_one_state, program_of


def test_losses_are_those_of_one_device():
    module = "configs.diffusion.e_mmdit"
    one = program_of(module, devices=jax.devices()[:1], **CHANGES)
    program = program_of(module, mesh=MESH, **CHANGES)
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves(program.shapes.params)]
    assert any("tensor" in spec for spec in specs)
    single, found = losses_of_one_state(one, program)
    np.testing.assert_allclose(found, single, rtol=1e-5)

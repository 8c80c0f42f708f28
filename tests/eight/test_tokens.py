"""A network that reduces its tokens, cut over eight devices, gives the losses of one device."""

import jax
import numpy as np
import pytest

from tests.eight.test_backbones import CHANGES, MESH
from tests.train.toy import losses_of_one_state, program_of

VIT = "configs.vision.vit"
METHODS = {
    "tome": dict(kind="tome", keep=0.7),
    "pitome": dict(kind="pitome", keep=0.7),
    "ats": dict(kind="ats", keep=0.7, layers=(1,)),
    "token_transforming": dict(kind="token_transforming", keep=0.7),
    "restored": dict(kind="schedule", entries={"0": dict(kind="tome", remove=4), "2": dict(kind="restore")}),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_losses_are_those_of_one_device(method):
    changes = CHANGES | {"model__reduce": method}
    one = program_of(VIT, devices=jax.devices()[:1], **changes)
    program = program_of(VIT, mesh=MESH, **changes)
    single, found = losses_of_one_state(one, program)
    np.testing.assert_allclose(found, single, rtol=1e-5)

"""The loop, whose weights are used again and again, is cut like any other part."""

import jax
import numpy as np

from tests.train.toy import losses, program_of

CONFIG = "configs.language.algoformer"
CHANGES = {"train__steps": "2 steps", "train__log_every": "1 steps", "data__batch_size": 16, "evaluators": {}}


def test_losses_are_those_of_one_device():
    cut = program_of(CONFIG, mesh={"data": 2, "fsdp": 2, "tensor": 2}, **CHANGES)
    assert any("tensor" in leaf.sharding.spec for leaf in jax.tree.leaves(cut.shapes.params["loop"]))
    single = program_of(CONFIG, devices=jax.devices()[:1], **CHANGES)
    np.testing.assert_allclose(losses(cut), losses(single), rtol=1e-5)

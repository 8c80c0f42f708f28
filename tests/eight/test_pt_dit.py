"""Attention by proxy, cut over eight devices in three ways at once, gives the losses of one device."""

import jax
import numpy as np

from effjax.train.loop import fit
from tests.train.toy import Memory, Recorder, no_weights, program_of


def losses(**options):
    changes = {"train__steps": "3 steps", "train__log_every": "1 steps", "evaluators": {}}
    program, recorder = program_of("configs.diffusion.pt_dit", **options, **changes), Recorder()
    fit(
        program,
        program.init(),
        checkpoints=Memory(),
        observer=recorder,
        stop_requested=lambda: False,
        read=no_weights,
    )
    return np.array(recorder.losses())


def test_losses_are_those_of_one_device():
    single = losses(devices=jax.devices()[:1])
    assert len(single) == 3
    np.testing.assert_allclose(losses(mesh={"data": 2, "fsdp": 2, "tensor": 2}), single, rtol=1e-5)

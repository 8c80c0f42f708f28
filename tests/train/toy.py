"""The smallest real experiment of each family, for tests of the loop."""

import contextlib
import importlib

import numpy as np

from effjax.experiment import resolve
from effjax.train.loop import fit
from effjax.train.program import build_program

FAMILIES = {
    "vision": "configs.vision.vit",
    "diffusion": "configs.diffusion.dit",
    "language": "configs.language.lm",
}


def smoke(family, **changes):
    """The smoke config of a family, or of a module of configs; `changes` are keys with `__` for dots:
    `train__steps="4 steps"`."""
    config = importlib.import_module(FAMILIES.get(family, family)).get_config("smoke")
    config.unlock()
    for key, value in changes.items():
        *sections, last = key.split("__")
        section = config
        for name in sections:
            if name not in section:
                section[name] = {}
            section = section[name]
        section[last] = value
    return config


def program_of(family, devices=None, **changes):
    """A program ready to run."""
    experiment = resolve(smoke(family, **changes))
    return build_program(experiment, experiment.data.open(), devices)


class Recorder:
    """An observer that remembers."""

    def __init__(self):
        self.written, self.said, self.steps, self.kept = [], [], [], []

    def progress(self, step, total, values):
        self.steps.append(step)

    def write(self, step, split, values):
        self.written.append((step, split, dict(values)))

    def say(self, message):
        self.said.append(message)

    def pause(self, label):
        return contextlib.nullcontext()

    def spent(self, step, seconds):
        self.seconds = seconds

    def evidence(self, diagnosis, batch):
        self.kept.append((diagnosis, batch))
        return "replay it"

    def losses(self):
        return [values["loss"] for _, split, values in self.written if split == "train"]


class Memory:
    """Checkpoints that live in memory."""

    def __init__(self):
        self.saved = {}

    def save(self, step, state, extra):
        import jax

        self.saved[step] = (jax.tree.map(lambda x: x.copy(), state), extra)

    def wait(self):
        pass


def no_weights(folder, shapes, of):
    """What reads folders, for runs that need none."""
    raise AssertionError(f"nobody should read {folder}")


def losses(program, state=None):
    """Of every logged step of a whole run, from a state or from that of the seed."""
    recorder = Recorder()
    fit(
        program,
        program.init() if state is None else state,
        checkpoints=Memory(),
        observer=recorder,
        stop_requested=lambda: False,
        read=no_weights,
    )
    return np.array(recorder.losses())


def losses_of_one_state(*programs):
    """Those of programs that differ in their devices alone, each begun with what the first one drew."""
    import jax

    state = jax.tree.map(np.array, programs[0].init())  # every step gives its state away
    return [losses(program, jax.device_put(state, program.shardings)) for program in programs]

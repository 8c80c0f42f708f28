"""Kinds that a user brings."""

import os
import sys

import pytest

from effjax import mixers
from effjax.errors import UsageError
from effjax.experiment import resolve
from tests.experiments.driver import ROOT, start
from tests.train.toy import smoke

MINE = """
import flax.linen as nn
import jax.numpy as jnp
from effjax import mixers

class Mean(nn.Module):
    start: float = 0.5

    @nn.compact
    def __call__(self, x, context, train=False):
        keep = self.param("keep", nn.initializers.constant(self.start), (x.shape[-1],))[None, None]
        return keep * x + (1 - keep) * jnp.mean(x, axis=1, keepdims=True)

mixers.KINDS["mean_of_a_user"] = Mean
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mixer_of_a_user.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "mixer_of_a_user"
    mixers.KINDS.pop("mean_of_a_user", None)
    sys.modules.pop("mixer_of_a_user", None)


def config(**changes):
    return smoke("vision", model__block__mixer={"kind": "mean_of_a_user", "start": 0.25}, **changes)


def test_a_kind_of_a_user_is_known_once_its_module_is_imported(mine):
    with pytest.raises(UsageError, match="mean_of_a_user"):
        resolve(config())
    experiment = resolve(config(imports=(mine,)))
    assert experiment.model.block.mixer.start == 0.25
    assert experiment.imports == (mine,)


def test_a_module_that_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"there is no module 'nowhere\.at_all'\. Run this in the folder"):
        resolve(smoke("vision", imports=("nowhere.at_all",)))
    (tmp_path / "broken_of_a_user.py").write_text("import nothing_like_it")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_like_it"):
        resolve(smoke("vision", imports=("broken_of_a_user",)))


@pytest.mark.slow
def test_every_driver_takes_the_run_up(mine, tmp_path, monkeypatch):
    (tmp_path / "mean.py").write_text("""
from ml_collections import ConfigDict
from configs.vision import vit

def get_config():
    config = vit.get_config("smoke")
    config.imports = ("mixer_of_a_user",)
    config.model.block.mixer = ConfigDict(dict(kind="mean_of_a_user"))
    return config
""")
    run, file = f"--workdir={tmp_path / 'run'}", f"--config={tmp_path / 'mean.py'}"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    _ended(0, "train", file, run)
    assert "test accuracy" in _ended(0, "evaluate", run)
    assert "data 8" in _ended(0, "plan", file, "--topology=cpu:8", f"--out={tmp_path / 'plan.json'}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert "there is no module 'mixer_of_a_user'" in _ended(2, "evaluate", run)


def _ended(code, *command):
    """What a driver says, in a process that looks for modules anew."""
    process = start(*command)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == code, output + errors
    return output + errors

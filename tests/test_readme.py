"""The worked example of the README is run as it stands there."""

import re
import types

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from effjax import mixers
from effjax.experiment import resolve
from tests.experiments.driver import ROOT

README = (ROOT / "README.md").read_text()


def module(text, name):
    made = types.ModuleType(name)
    exec(compile(text, name, "exec"), made.__dict__)
    return made


@pytest.mark.slow
def test_the_worked_example_builds_and_trains(monkeypatch):
    blocks = re.findall(r"```python\n(# (\S+\.py)\n.*?)```", README, re.DOTALL)
    sources = {path: text for text, path in blocks}
    mean = module(sources["effjax/mixers/mean.py"], "mean")
    monkeypatch.setitem(mixers.KINDS, "mean", mean.Mean)
    config = module(sources["configs/vision/mean.py"], "config").get_config("smoke")
    model = resolve(config).model
    images = jnp.ones((2, 8, 8, 1))
    params = meta.unbox(model.init(jax.random.key(0), images))
    assert params["params"]["blocks"]["mixer"]["keep"].shape == (2, 16)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(model.apply(p, images))))(params)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_what_the_readme_names_exists():
    for path in re.findall(r"`((?:configs|effjax|experiments|docs|tests)/[\w/.]+?)(?::\w+)?`", README):
        if path not in ("effjax/mixers/mean.py", "configs/vision/mean.py"):
            assert (ROOT / path).exists(), path
    for name in set(re.findall(r"python -m experiments\.(\w+)", README)):
        assert (ROOT / "experiments" / f"{name}.py").exists(), name
    for picture in re.findall(r"!\[.+?\]\((\S+)\)", README):
        assert (ROOT / picture).exists(), picture

"""The tables of the papers hold: every published size is built from its config and counted again."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from effjax import catalog
from effjax.experiment import resolve
from experiments.run.cost import task_cost

ROOT = Path(__file__).parents[2]
# The first of each table always; the others where there is time.
SIZES = [
    pytest.param(size, id=size.config, marks=[pytest.mark.slow] if i else [])
    for entry in catalog.load()
    for i, size in enumerate(entry.sizes)
]

# Variants made here, and processes, pre-training, stages and data that share the networks of others.
OWN = (
    "smoke",
    "digits",
    "motion",
    "pydocs",
    "scenes",
    "regression",
    "autoregression",
    "probe",
    "needles",
    "pairs",
    "sum",
)
SHARED = (
    "-16k",
    "-flow",
    "-22k",
    "-tuned",
    "-reflow",
    "-one-step",
    "-ucf101",
    "-cityscapes",
    "-plain",
    "-unfolded",
)


def module_of(path):
    return importlib.import_module(path.removesuffix(".py").replace("/", "."))


def published(variants):
    """Those whose size a paper gives; of a network trained as branches that is the merged form."""
    return [
        variant
        for variant in variants
        if not variant.startswith(OWN)
        and not variant.endswith(SHARED)
        and f"{variant}-merged" not in variants
    ]


@pytest.mark.parametrize("size", SIZES)
def test_parameters_and_macs_are_those_of_the_paper(size):
    path, _, variant = size.config.partition(":")
    experiment = resolve(module_of(path).get_config(variant))
    task, data = experiment.task, experiment.data.described()
    batch = jax.tree.map(jnp.asarray, dict(data.example_batch(1)))
    cost = task_cost(task, data, meta.unbox(jax.eval_shape(task.init, jax.random.key(0), batch)))
    assert cost.parameters == pytest.approx(size.parameters, rel=0.01)
    if size.macs is not None:
        assert cost.macs == pytest.approx(size.macs, rel=0.02)
    assert not cost.unknown


def test_every_published_size_stands_in_the_catalogue():
    listed = {size.values[0].config for size in SIZES}
    built = {
        f"{file.relative_to(ROOT).as_posix()}:{variant}"
        for file in (ROOT / "configs").rglob("*.py")
        if file.name != "__init__.py" and file.parent.name != "compress"  # recipes have no model
        for variant in published(getattr(module_of(file.relative_to(ROOT).as_posix()), "VARIANTS", ()))
    }
    assert built == listed

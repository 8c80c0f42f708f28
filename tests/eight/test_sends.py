"""What is predicted of a step's traffic, beside what XLA sends."""

import importlib

import jax
import pytest

from effjax.experiment import resolve
from effjax.plan import hlo
from effjax.plan.collectives import collectives, located
from effjax.plan.sbp import received
from effjax.plan.search import first_round
from effjax.plan.sends import Step
from effjax.plan.topology import Topology
from tests.train.toy import program_of, smoke

MESHES = ({"data": 8}, {"data": 1, "fsdp": 8}, {"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2})


def compiled(family, mesh):
    program = program_of(family, mesh=mesh, evaluators={}, data__batch_size=16)
    with located():
        text = program.step.as_text()
    found, _ = collectives(hlo.parse(text), dict(program.mesh.shape), 8)
    total = 0.0
    for one in found:
        if one.kind != "collective-permute":
            whole = one.bytes * (one.group if one.kind == "all-to-all" else 1)
            total += received(one.kind, one.group, whole) * 8 / one.group
    return total


def test_meshes_are_ranked_as_by_what_xla_sends():
    experiment = resolve(smoke("language", data__batch_size=16))
    predicted = [Step.of(experiment).sent(mesh) for mesh in MESHES]
    measured = [compiled("language", mesh) for mesh in MESHES]
    assert sorted(range(4), key=predicted.__getitem__) == sorted(range(4), key=measured.__getitem__)
    for ours, theirs in zip(predicted, measured, strict=True):
        assert 0.5 < ours / theirs <= 1


@pytest.mark.parametrize("family", ["vision", "diffusion"])
def test_gradients_of_other_families(family):
    experiment = resolve(smoke(family, data__batch_size=16))
    assert 0.6 < Step.of(experiment).sent({"data": 8}) / compiled(family, {"data": 8}) <= 1


def test_what_a_device_holds_falls_with_what_is_cut():
    step = Step.of(resolve(smoke("language")))
    whole = step.held({"data": 8})
    assert whole == 16 * sum(leaf.size for leaf in jax.tree.leaves(program_of("language").shapes.params))
    assert whole / 8 <= step.held({"fsdp": 8}) < 1.05 * whole / 8  # norms are whole
    assert whole / 2 < step.held({"tensor": 2}) < whole


def test_meshes_that_cannot_hold_the_weights_are_tried_last():
    config = importlib.import_module("configs.language.lm").get_config("8b")
    first, *_, last = first_round(config, Topology.parse("h100:8"))
    assert dict(first.mesh)["data"] == 1  # eight times 128 GB are on no eight of them
    assert dict(last.mesh)["data"] * dict(last.mesh)["fsdp"] < 8 or dict(last.mesh)["data"] == 8

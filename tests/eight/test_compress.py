"""Weights in codes are cut over devices as the arrays are that they stand for."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from effjax.compress.recipe import read
from effjax.compress.storage.trees import stored_in
from effjax.compress.structure.layers import take_apart
from effjax.compress.structure.units import sizes
from effjax.compress.subject import Calibration, Subject
from effjax.errors import UsageError
from effjax.parallel.sharding import to_global
from effjax.train.checkpoint import Checkpoints
from experiments.run.compress_stages import Origin, Stages, digest_of
from experiments.run.config_file import LoadedConfig
from experiments.run.workdir import Workdir
from tests.train.toy import program_of, smoke

LAYOUTS = {
    "blocks/ffn/expand/kernel": dict(kind="uniform", bits=4, group=8, symmetric=False),
    "blocks/ffn/contract/kernel": dict(kind="uniform", bits=3, group=8),
    "blocks/mixer/query/kernel": dict(kind="uniform", bits=8, group=0),
    "blocks/mixer/output/kernel": dict(kind="uniform", bits=4, group=8),
}
CHANGES = {"storage": LAYOUTS, "optimizer": dict(kind="still"), "evaluators": {}, "data__batch_size": 16}


@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, {"data": 4, "tensor": 2}])
def test_metrics_are_those_of_one_device(mesh):
    cut, single = (
        program_of("configs.language.lm", mesh=mesh, **CHANGES),
        program_of("configs.language.lm", devices=jax.devices()[:1], **CHANGES),
    )
    held = stored_in(cut.shapes.params)
    assert sorted(held) == sorted(LAYOUTS)
    for path in ("blocks/ffn/expand/kernel", "blocks/mixer/query/kernel"):
        assert all("tensor" in plane.sharding.spec for plane in held[path].codes), path
    batch = next(iter(single.data.train()))
    batch = {**batch, "mask": np.ones(16, np.float32)}
    ours, theirs = (
        program.metrics(
            program.variables(program.init(), ema=False), to_global(batch, program.batch_sharding)
        )
        for program in (cut, single)
    )
    for name in theirs:
        np.testing.assert_allclose(ours[name].total, theirs[name].total, rtol=1e-5)


def test_what_one_device_saved_is_restored_on_eight(tmp_path):
    single = program_of("configs.language.lm", devices=jax.devices()[:1], **CHANGES)
    cut = program_of("configs.language.lm", mesh={"fsdp": 4, "tensor": 2}, **CHANGES)
    state = single.init()
    with contextlib.closing(Checkpoints(tmp_path, keep=1)) as saved:
        saved.save(0, state, {"examples": 0})
    with contextlib.closing(Checkpoints(tmp_path, read_only=True)) as saved:
        restored = saved.restore(cut.shapes).state
    assert jax.tree.structure(restored.params) == jax.tree.structure(state.params)
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    planes = stored_in(restored.params)["blocks/ffn/expand/kernel"].codes
    assert all(len(plane.sharding.device_set) == 8 for plane in planes)


@pytest.mark.parametrize(("head_step", "fits"), [(1, False), (2, True)])
def test_heads_that_no_longer_divide_the_mesh_are_refused(tmp_path, head_step, fits):
    heads = {"model__block__mixer__heads": 4, "model__block__mixer__kv_heads": 4}
    changes = {"mesh": {"data": 4, "tensor": 2}, "evaluators": {}, "data__batch_size": 16, **heads}
    program = program_of("configs.language.lm", **changes)
    state = program.init()
    least = dict(heads=1, head_step=head_step)
    step = dict(kind="prune", score=dict(kind="random"), kinds=("heads",), left=0.97, least=least)
    recipe = LoadedConfig(ConfigDict(dict(steps=(step,))), "prune.py", None, {})
    subject = Subject(
        program.task, {"params": state.params}, jax.tree.map(jnp.asarray, program.data.example_batch(1))
    )
    left = read(recipe.config).apply(subject, Calibration(lambda: [], jax.random.key(0)))
    assert {sizes(layer).heads for layer in take_apart(left)} == {4, 4 - head_step}
    run = tmp_path / "run"
    config = smoke("configs.language.lm", **changes)
    Workdir.create_or_resume(run, config, command="", config_file="").close()
    stages = Stages(
        tmp_path / "out", Origin(str(run), program, state, False, digest_of(state.params)), recipe
    )
    if fits:
        stages.keep(1, left)
        assert stages.complete()
    else:
        with pytest.raises(UsageError, match=r"tensor=2 does not divide dimension 1 \(3\).*least.head_step"):
            stages.keep(1, left)
        assert not stages.out.exists()

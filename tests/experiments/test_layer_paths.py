"""From a language model to plans of its layers, and on to routers that learn them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.language.dr_llm import get_config
from effjax.data.arrays import Arrays
from effjax.decoding.layer_plan import planned
from effjax.decoding.layer_search import Search
from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.train.program import build_program
from effjax.train.tasks.layer_routing import solved
from experiments.run import path_search
from tests.experiments.driver import drive, metric_rows

# Of two symbols half of the answers are right by chance, also of a network that was never trained.
TOY = dict(dim=16, depth=4, unroll=1)
SOURCE = dict(kind="probe_mixture", parts=(dict(task=dict(kind="induction")),), vocab=4)


@pytest.fixture(scope="module")
def program():
    config = get_config("probe-base")
    config.model.update(TOY)
    config.data.source = SOURCE | dict(length=8)
    experiment = resolve(config)
    return build_program(experiment, experiment.data.open())


@pytest.mark.parametrize("agree", [0, 3])
def test_plans_that_are_found_answer_their_examples(program, agree):
    variables = program.variables(program.init(), ema=False)
    noisy = jax.tree.map(
        lambda leaf: leaf + 0.3 * jnp.sin(jnp.arange(leaf.size).reshape(leaf.shape)), variables
    )
    search = Search(turns=30, enough=None)
    rows = path_search.searched(program, noisy, search, path_search.Request(10, 8, 0, agree))
    assert rows["tokens"].shape == (10, 8)
    assert rows["right"].any()
    assert len(np.unique(rows["counts"][rows["right"] > 0], axis=0)) <= (agree or 10)
    assert agree or np.all(rows["right"] >= rows["whole"])
    for i in np.flatnonzero(rows["right"] * rows["counts"].sum(axis=1)):
        model, kept = planned(program.task.model, noisy, rows["counts"][i].tolist())
        batch = {name: jnp.asarray(rows[name][i : i + 1]) for name in path_search.FIELDS}
        logits = model.apply(kept, batch["tokens"], batch["positions"], batch["segments"])
        assert bool(solved(logits, batch)[0])


def test_bad_requests_are_named(program, tmp_path):
    with pytest.raises(UsageError, match="exists: name another folder"):
        path_search.run("no/run", str(tmp_path), Search(), path_search.Request(1, 1, 0))
    with pytest.raises(UsageError, match="--batch=0 must be at least 1"):
        path_search.Request(1, 0, 0)
    smoke = resolve(get_config("smoke"))
    routing = build_program(smoke, smoke.data.open())
    with pytest.raises(UsageError, match="this run is layerrouting"):
        path_search.searched(routing, {}, Search(), path_search.Request(1, 1, 0))


@pytest.mark.slow
def test_a_run_from_model_to_routers(tmp_path):
    base, paths = tmp_path / "base", tmp_path / "paths"

    def written(name, variant, *lines):
        """A file with a variant of the config, changed by these lines."""
        begin = "from configs.language.dr_llm import get_config as of", "def get_config():"
        body = f"config = of({variant!r})", f"config.model.update({TOY!r})", *lines, "return config"
        file = tmp_path / f"{name}.py"
        file.write_text("\n".join([*begin, *(f"    {line}" for line in body)]) + "\n")
        return f"--config={file}"

    source = f"config.data.source = {SOURCE | dict(length=24)!r}"
    small = "config.train.steps = '2 steps'", "config.train.start = None", "config.evaluators = {}"
    drive("train", written("small", "probe-base", source, *small), f"--workdir={base}")
    few = "--examples=64", "--batch=64", "--turns=4"
    said, _ = drive("layer_paths", f"--workdir={base}", f"--out={paths}", *few)
    assert "skip, execute, repeat" in said
    rows = Arrays(str(paths)).open()
    assert rows[0]["labels"].sum() == 4 * len(rows)
    drive(
        "train",
        written("routers", "probe", "config.data.expected = None"),
        f"--workdir={tmp_path / 'routers'}",
        f"--config.train.start={base}",
        f"--config.data.source.root={paths}",
        "--config.data.batch_size=8",
        "--config.train.steps=3 epochs",
        "--config.train.log_every=1 epochs",
        "--config.train.checkpoint_every=3 epochs",
        "--config.evaluators.test.data.source.examples=32",
        "--config.evaluators.test.data.source.length=24",
        "--config.evaluators.test.data.batch_size=32",
    )
    shown = metric_rows(tmp_path / "routers")
    train = [row for row in shown if row["split"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"]
    assert 0 < [row for row in shown if row["split"] == "test"][-1]["layers"] <= 8
    # By default it searches for minutes, and that is too late to hear it.
    _, errors = drive("layer_paths", f"--workdir={base}", f"--out={paths}", code=2)
    assert "exists: name another folder" in errors

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
TOY = dict(dim=16, depth=3, unroll=3)
TASK = dict(kind="induction")


@pytest.fixture(scope="module")
def program():
    config = get_config("probe-base")
    config.model.update(TOY)
    config.data.source.update(dict(vocab=4, length=8))
    config.data.source.task = TASK
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


def test_bad_requests_are_named(program):
    with pytest.raises(UsageError, match="--batch=0 must be at least 1"):
        path_search.Request(1, 0, 0)
    smoke = resolve(get_config("smoke"))
    routing = build_program(smoke, smoke.data.open())
    with pytest.raises(UsageError, match="this run is layerrouting"):
        path_search.searched(routing, {}, Search(), path_search.Request(1, 1, 0))


@pytest.mark.slow
def test_a_run_from_model_to_routers(tmp_path):
    config, base = "--config=configs/language/dr_llm.py", tmp_path / "base"
    toy = [f"--config.model.{name}={value}" for name, value in TOY.items()]
    config_file = tmp_path / "base.py"
    config_file.write_text(
        "from configs.language.dr_llm import get_config as of\n"
        "def get_config():\n"
        "    config = of('probe-base')\n"
        f"    config.model.update({TOY!r})\n"
        f"    config.data.source.task = {TASK!r}\n"
        "    config.data.source.vocab = 4\n"
        "    config.train.steps = '2 steps'\n"
        "    config.evaluators = {}\n"
        "    return config\n"
    )
    drive("train", f"--config={config_file}", f"--workdir={base}")
    said, _ = drive(
        "layer_paths", f"--workdir={base}", f"--out={tmp_path / 'paths'}", "--examples=64", "--turns=4"
    )
    assert "skip, execute, repeat" in said
    rows = Arrays(str(tmp_path / "paths")).open()
    assert rows[0]["labels"].sum() == 3 * len(rows)
    drive(
        "train",
        f"{config}:probe",
        f"--workdir={tmp_path / 'routers'}",
        *toy,
        f"--config.train.start={base}",
        f"--config.data.source.root={tmp_path / 'paths'}",
        "--config.data.batch_size=8",
        "--config.train.steps=3 epochs",
        "--config.train.log_every=1 epochs",
        "--config.train.checkpoint_every=3 epochs",
        "--config.evaluators.test.data.source.examples=32",
    )
    shown = metric_rows(tmp_path / "routers")
    train = [row for row in shown if row["split"] == "train"]
    assert train[-1]["loss"] < train[0]["loss"]
    assert 0 < [row for row in shown if row["split"] == "test"][-1]["layers"] <= 6
    drive("layer_paths", f"--workdir={base}", f"--out={tmp_path / 'paths'}", code=2)

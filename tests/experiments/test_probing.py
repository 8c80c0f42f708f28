"""The table of probes, of models that were not trained."""

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.data.probes import Probe
from effjax.errors import UsageError
from effjax.train.tasks.mean import Mean
from experiments.run.method_spec import parse
from experiments.run.probing import probe_data, probe_table, written_table
from tests.train.toy import program_of


@pytest.fixture(scope="module")
def program():
    return program_of("language")


class Answering:
    """A program whose model answers every second question rightly."""

    def __init__(self, program):
        self.experiment, self.task = program.experiment, program.task
        self.batch_sharding = program.batch_sharding

    def metrics(self, variables, batch):
        weights = batch["weights"] * batch["mask"][:, None]
        right = jnp.broadcast_to(jnp.arange(len(weights))[:, None] % 2 == 0, weights.shape)
        return {"loss": Mean.of(weights, weights), "accuracy": Mean.of(right, weights)}


def test_a_row_a_probe_and_a_column_a_length(program):
    rows = probe_table(Answering(program), {}, ["copy", "needle"], [16, 32], examples=16)
    assert rows == [["copy", "0.500", "0.500"], ["needle", "0.500", "0.500"]]


def test_a_model_is_asked_with_its_own_tokens_and_none_that_it_has_seen(program):
    data = probe_data(program, "recall", 32, examples=8)
    assert isinstance(data.source, Probe)
    assert data.source.vocab == program.experiment.model.vocab
    assert data.source.seed != 0
    tokens = np.concatenate([batch["tokens"].reshape(-1) for batch in data.open().evaluate()])
    assert tokens.max() > 128


def test_a_model_trained_on_probes_is_asked_with_their_tokens():
    trained = program_of("configs.language.probes", data__source__vocab=40)
    data = probe_data(trained, "recall", 128, examples=8)
    assert data.source.vocab == 40
    assert data.source.seed not in (trained.experiment.data.source.seed, 1)
    # 128 tokens have room for 32 pairs, and 40 tokens are keys for 19.
    assert {int(row.nonzero()[0][0]) for row in next(data.open().evaluate())["weights"]} == {2 * 19}


def test_methods_answer_token_by_token_beside_the_full_model(program):
    """What keeps everything is right where the full model is; the last length tells the bytes."""
    variables = program.variables(program.init(), ema=False)
    specs = ["all", "window:budget=12,sinks=1", "unified_softmax:splits=3"]
    rows = written_table(
        program, variables, [parse(spec) for spec in specs], ["copy", "needle"], [16, 32], 16
    )
    assert [row[:2] for row in rows] == [[m, p] for m in ("full model", *specs) for p in ("copy", "needle")]
    full, kept, window, parts = (rows[i : i + 2] for i in (0, 2, 4, 6))
    assert [row[2:] for row in full] == [row[2:] for row in kept] == [row[2:] for row in parts]
    whole = probe_table(program, variables, ["copy", "needle"], [16, 32], 16)
    assert [row[3:] for row in full] == [row[1:] for row in whole]
    sizes = [float(row[2].removesuffix("kB")) for row in (full[0], window[0])]
    assert sizes[1] / sizes[0] == pytest.approx(12 / 32, rel=0.02)
    with pytest.raises(UsageError, match=r"cats:sparsity=0\.5 changes nothing of how a model writes"):
        written_table(program, variables, [parse("cats:sparsity=0.5")], ["copy"], [16], 4)


@pytest.mark.parametrize(
    ("names", "lengths", "message"),
    [
        (["coyp"], [16], "'coyp', which is no probe. Did you mean 'copy'?"),
        (["copy"], [16, 65], "--lengths names 65, and the model is made for 64 tokens"),
        (["needle"], [8], "needle needs at least 10 tokens, and length=8"),
    ],
)
def test_bad_requests_are_named(program, names, lengths, message):
    with pytest.raises(UsageError, match=message):
        probe_table(Answering(program), {}, names, lengths, examples=4)


def test_what_is_no_language_model_is_refused():
    with pytest.raises(UsageError, match="--probes needs a language model, and this run is classification"):
        probe_table(program_of("vision"), {}, ["copy"], [16], examples=4)

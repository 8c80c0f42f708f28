import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.data import OpenData
from effjax.errors import Preempted, RunError, UsageError
from effjax.train.loop import fit
from effjax.train.state import examples_seen
from tests.train.toy import FAMILIES, Memory, Recorder, no_weights, program_of

# One family shows the loop's own mechanics quickly; that the others keep them too takes longer.
EACH_FAMILY = [pytest.param(f, marks=[pytest.mark.slow] if f != "vision" else []) for f in FAMILIES]


def train(program, state=None, stop=lambda: False):
    recorder, memory = Recorder(), Memory()
    outcome = fit(
        program,
        program.init() if state is None else state,
        checkpoints=memory,
        observer=recorder,
        stop_requested=stop,
        read=no_weights,
    )
    return outcome, recorder, memory


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_stopping_and_going_on_is_the_straight_run_bit_by_bit(family):
    program = program_of(family, train__steps="6 steps", train__log_every="1 steps", evaluators={})
    straight, recorder, _ = train(program)
    calls = iter(range(100))
    memory = Memory()
    with pytest.raises(Preempted, match="saved at step 3"):
        fit(
            program,
            program.init(),
            checkpoints=memory,
            observer=Recorder(),
            stop_requested=lambda: next(calls) >= 3,
            read=no_weights,
        )
    state, extra = memory.saved[3]
    assert extra["examples"] == 3 * program.experiment.data.batch_size == examples_seen(state)
    # A fresh program, as a new process would build it.
    again = program_of(family, train__steps="6 steps", train__log_every="1 steps", evaluators={})
    resumed, second, _ = train(again, state)
    assert_equal(straight.state, resumed.state)
    assert recorder.losses()[3:] == second.losses()


def test_logs_evaluates_and_saves_when_due():
    program = program_of("vision")
    outcome, recorder, memory = train(program)
    assert [step for step, split, _ in recorder.written if split == "train"] == [5, 10, 15, 20]
    assert [step for step, split, _ in recorder.written if split == "test"] == [10, 20]
    assert sorted(memory.saved) == [10, 20]
    assert recorder.steps == list(range(1, 21))
    assert outcome.evaluations["test"].keys() == {"loss", "accuracy"}
    assert outcome.step_seconds > 0
    first = next(values for _, split, values in recorder.written if split == "train")
    assert {"loss", "learning_rate", "gradient_norm", "examples_per_second"} <= first.keys()


@pytest.mark.slow
def test_a_failing_evaluator_is_said_and_marked_and_training_goes_on(monkeypatch):
    program = program_of("vision", train__steps="10 steps")
    monkeypatch.setattr(
        type(program.task), "metrics", lambda *_: (_ for _ in ()).throw(ValueError("no such thing"))
    )
    outcome, recorder, _ = train(program)
    assert int(outcome.state.step) == 10
    assert outcome.failures == {"test": "ValueError: no such thing"}
    assert recorder.said == ["evaluator 'test' failed at step 10: ValueError: no such thing"]
    assert (10, "test", {"failed": 1.0}) in recorder.written


@pytest.mark.slow
def test_a_bad_number_stops_with_the_state_before_it_and_the_evidence():
    program = program_of("vision", train__steps="8 steps", train__log_every="4 steps", evaluators={})
    good, _, _ = train(program_of("vision", train__steps="8 steps", evaluators={}))
    poisoned = 2  # the third batch

    class Poison(OpenData):
        """The data, with a NaN in one picture of one batch."""

        def __init__(self, data):
            self.__dict__.update(data.__dict__)

        def train(self, *, start=0, **process):
            size = program.experiment.data.batch_size
            for number, batch in enumerate(super().train(start=start, **process), start // size):
                if number == poisoned:
                    batch = batch | {"image": batch["image"].copy()}
                    batch["image"][1, 2, 3] = np.nan
                yield batch

    program = dataclasses.replace(program, data=Poison(program.data))
    recorder, memory = Recorder(), Memory()
    with pytest.raises(RunError, match=r"step 3: batch/image is not finite \(1 NaN, 0 infinite\)") as error:
        fit(
            program,
            program.init(),
            checkpoints=memory,
            observer=recorder,
            stop_requested=lambda: False,
            read=no_weights,
        )
    assert "checkpoint 2" in str(error.value)
    assert "replay it" in str(error.value)
    (diagnosis, batch) = recorder.kept[0]
    assert diagnosis.step == 3
    assert np.isnan(batch["image"]).sum() == 1
    assert np.isfinite(list(diagnosis.norms.values())).all()
    state, _ = memory.saved[2]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    # With the poison gone, the saved state goes on to where the clean run arrived.
    clean = program_of("vision", train__steps="8 steps", evaluators={})
    outcome, _, _ = train(clean, state.replace(halted=jnp.zeros((), bool)))
    assert_equal(outcome.state.params, good.state.params)


@pytest.mark.slow
@pytest.mark.parametrize("family", EACH_FAMILY)
def test_accumulation_gives_the_large_batch(family):
    changes = {
        "train__steps": "3 steps",
        "train__log_every": "1 steps",
        "evaluators": {},
        # Adam's first steps are signs, which magnify rounding.
        "optimizer": {"kind": "sgd", "lr": 0.1},
    }
    if family == "vision":
        # Stochastic depth draws for each micro-batch apart; everything else must agree.
        changes["model__drop_path"] = 0.0
    one, first, _ = train(program_of(family, **changes))
    four, second, _ = train(program_of(family, **changes, train__accumulate=4))
    np.testing.assert_allclose(first.losses(), second.losses(), rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        one.state.params,
        four.state.params,
    )


@pytest.mark.slow
def test_bfloat16_computes_on_float32_masters():
    program = program_of(
        "vision", train__steps="20 steps", train__precision={"compute": "bfloat16"}, evaluators={}
    )
    outcome, recorder, _ = train(program)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(outcome.state.params)} == {"float32"}
    assert recorder.losses()[-1] < recorder.losses()[0] - 0.05
    lowered = program.step.as_text()
    assert "bf16" in lowered


def test_the_batch_must_divide_the_mesh_and_the_micro_batches():
    with pytest.raises(UsageError, match=r"batch_size is 32, which does not divide into 3 parts"):
        program_of("vision", train__accumulate=3)
    with pytest.raises(UsageError, match=r"does not multiply to the 1 devices that are here"):
        program_of("vision", mesh__fsdp=4)

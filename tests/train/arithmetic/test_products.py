"""Which products of a run are in fewer bits, and that nothing else changes."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.layers.stored import Place, Stored
from effjax.train.arithmetic import InFewerBits, scaled
from effjax.train.arithmetic.products import Operand
from effjax.train.arithmetic.reduced import Reduced
from effjax.train.arithmetic.scaled import Int8
from effjax.train.step import loss_and_gradient
from tests.experiments.driver import ROOT, drive
from tests.train.toy import program_of

KINDS = {
    "int8": dict(kind="int8"),
    "fp8": dict(kind="fp8"),
    "reduced": dict(kind="reduced", operands="e4m3", gradients="e5m2"),
}
SMALL = dict(data__batch_size=4, evaluators={})


@pytest.fixture(scope="module")
def plain():
    return of("language")


def of(family, accumulate=1, **changes):
    """What a program, and its first gradient, are."""
    program = program_of(family, **(SMALL | changes))
    batch = jax.tree.map(jnp.asarray, next(iter(program.data.train())))
    state = program.init()
    task, precision = program.task, program.precision
    passes = jax.jit(lambda state: loss_and_gradient(task, state, batch, precision, accumulate)[:2])
    means, gradient = passes(state)
    return program, means["loss"].value(), gradient


def apart(one, other):
    """The norm of the difference of two trees over that of the second."""

    def norm(tree):
        return np.sqrt(sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(tree)))

    return norm(jax.tree.map(jnp.subtract, one, other)) / norm(other)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_near_those_of_float_and_the_state_is_the_same(kind, plain):
    program, loss, gradient = of("language", train__arithmetic=KINDS[kind])
    whole, expected, exact = plain
    assert 0 < abs(loss - expected) < 0.01 * expected
    assert 1e-3 < apart(gradient, exact) < 0.2
    # The embedding alone is no kernel of the blocks; its gradient differs by what comes back through them.
    assert jax.tree.structure(program.shapes) == jax.tree.structure(whole.shapes)
    assert jax.tree.leaves(program.shapes) == jax.tree.leaves(whole.shapes)


@pytest.mark.parametrize("family", ["vision", "diffusion", "configs.vision.convnext"])
def test_other_families_train_so(family):
    _, loss, gradient = of(family, train__arithmetic=KINDS["int8"])
    assert jnp.isfinite(loss)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(gradient))


def test_experts_have_rounded_weights():
    changes = dict(train__arithmetic=KINDS["int8"])
    _, loss, gradient = of("configs.language.moe", **changes)
    _, expected, exact = of("configs.language.moe")
    assert 0 < abs(loss - expected) < 0.01 * expected
    assert apart(gradient["blocks"]["ffn"], exact["blocks"]["ffn"]) < 0.2


def test_layers_that_are_computed_again_and_micro_batches_are_nearly_the_same():
    """Another program sums in another order, and a few codes fall to the other side."""
    kept, _, gradient = of("language", train__arithmetic=KINDS["int8"])
    _, _, again = of("language", train__arithmetic=KINDS["int8"], model__remat="full", model__unroll=1)
    assert apart(again, gradient) < 0.02
    _, _, parts = of("language", accumulate=2, train__arithmetic=KINDS["int8"])
    assert apart(parts, gradient) < 0.05  # columns of gradients have the scale of their micro-batch
    assert isinstance(kept.precision, InFewerBits)


def test_only_chosen_kernels_are_operands_and_only_in_the_step():
    patterns = dict(kernels=("blocks/ffn/.*", "blocks/mixer/output/kernel"), leave=(".*/gate/.*",))
    program = program_of("language", **SMALL, train__arithmetic=KINDS["int8"] | patterns)
    params = program.init().params
    seen = program.precision.cast(params)
    held = {path for path, leaf in leaves(seen).items() if isinstance(leaf, Operand)}
    assert held == {
        "blocks/ffn/contract/kernel",
        "blocks/ffn/expand/kernel",
        "blocks/mixer/output/kernel",
    }
    cast = program.experiment.train.precision.cast(params)
    assert not any(isinstance(leaf, Stored) for leaf in leaves(cast).values())


def leaves(tree):
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, Stored))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def test_a_table_is_read_as_it_is_and_multiplied_in_fewer_bits(draw):
    table = jnp.asarray(draw.normal(size=(10, 8)), jnp.float32)
    operand = Operand(table, Reduced(operands="e8m1"), 1, 1, turned=True)
    np.testing.assert_array_equal(operand.take(jnp.asarray([3, 1])), table[jnp.asarray([3, 1])])
    x = jnp.asarray(draw.normal(size=(4, 8)), jnp.float32)
    by_hand = operand.arithmetic.rounded(x, ()) @ operand.arithmetic.rounded(table, ()).T
    np.testing.assert_allclose(operand.product(x), by_hand, rtol=1e-5, atol=1e-6)


def test_a_rule_that_matches_nothing_names_what_there_is():
    with pytest.raises(UsageError, match=r"arithmetic.kernels\[0\]: 'head' matches no .*blocks/ffn/contract"):
        program_of("language", train__arithmetic=KINDS["int8"] | dict(kernels=("head",)))
    with pytest.raises(UsageError, match="leaves no kernel of those in"):
        program_of("language", train__arithmetic=KINDS["int8"] | dict(leave=("blocks/.*",)))
    with pytest.raises(UsageError, match=r"config.train.arithmetic.kind is 'int9'.*Did you mean 'int8'"):
        program_of("language", train__arithmetic=dict(kind="int9"))


def test_without_qwix_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(scaled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'effjax\[low-precision\]'"):
        program_of("language", train__arithmetic=KINDS["fp8"])


def test_a_run_without_it_never_imports_qwix():
    code = """
import sys
from tests.train.toy import program_of
program = program_of("language", evaluators={}, train__arithmetic=dict(kind="reduced"))
program.trace()
assert "qwix" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_run_in_fewer_bits_goes_on_as_one_without_them(tmp_path):
    """Checkpoints hold float weights: trained in integers, a run is evaluated and trained on in floats."""
    arguments = "--config=configs/language/lm.py:smoke", f"--workdir={tmp_path / 'run'}"
    drive("train", *arguments, "--config.train.arithmetic.kind=int8", "--config.train.steps=4 steps")
    output, _ = drive("evaluate", f"--workdir={tmp_path / 'run'}")
    assert "loss" in output
    arguments = "--config=configs/language/lm.py:smoke", f"--workdir={tmp_path / 'on'}"
    drive("train", *arguments, f"--config.train.start={tmp_path / 'run'}", "--config.train.steps=2 steps")


def test_operands_of_a_stack_say_their_shape():
    place = Place((2, 3, 4, 5), (None,) * 4, (3, 4), (5,), False)
    operand = Operand(jnp.zeros(place.shape), Int8(), len(place.ins), len(place.outs))
    assert operand.shape == (2, 3, 4, 5)
    assert operand._summed == (1, 2)
    assert dataclasses.replace(operand, turned=True)._summed == (2, 3)

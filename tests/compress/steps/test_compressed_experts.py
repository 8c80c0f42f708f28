import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.recovery import Recovery, recovered
from effjax.compress.steps.compressed_experts import CompressedExperts, compressed
from effjax.compress.storage.trees import leaves_of
from effjax.compress.subject import Calibration
from effjax.errors import UsageError
from effjax.ffn import CompressedMixture, Mixture
from tests.compress import tiny
from tests.compress.structure.networks import noisy


@functools.cache
def language():
    made = tiny.language(ffn=dict(kind="mixture", experts=6, chosen=4, hidden=8, normalised=False))
    return made.with_params(noisy(made.params))


def calibration(network, told=None):
    report = (lambda said: None) if told is None else told.append
    return Calibration(lambda: iter([network.example] * 40), jax.random.key(3), report, network)


def logits(network, model=None):
    model = model or network.model
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, tiny.TOKENS))(network.params))


def test_a_trained_mixture_becomes_its_main_experts_and_vectors_that_do_nothing():
    parent, told = language(), []
    made = CompressedExperts().apply(parent, calibration(parent, told))
    assert told == ["2 layers run 2 of 4 experts a token."]
    assert made.model.block.ffn == compressed(parent.model.block.ffn, 2)
    old, new = leaves_of(parent.params), leaves_of(made.params)
    assert {path.rpartition("/")[2] for path in new.keys() - old.keys()} == {
        "compressed_gate",
        "compressed_expand",
        "compressed_contract",
    }
    for path, leaf in old.items():
        np.testing.assert_array_equal(new[path], leaf)
    shapes = jax.tree.map(jnp.shape, made.boxed())
    assert jax.tree.leaves(shapes) == jax.tree.leaves(jax.tree.map(jnp.shape, made.params))
    alone = parent.model.block.clone(ffn=Mixture(6, 2, 8, normalised=False))
    np.testing.assert_array_equal(logits(made), logits(parent, parent.model.clone(block=alone)))


def test_with_all_experts_it_is_the_network_itself():
    parent = language()
    made = CompressedExperts(main=4).apply(parent, calibration(parent))
    jax.tree.map(np.testing.assert_array_equal, made.params, parent.params)
    np.testing.assert_array_equal(logits(made), logits(parent))


def test_a_recovery_moves_the_vectors_and_comes_nearer():
    parent, told = language(), []
    made = CompressedExperts(main=1).apply(parent, calibration(parent))
    how = Recovery(steps=24, lr=3e-3, share=1.0)
    tuned = recovered(made, parent, calibration(parent, told), how)
    vectors = tuned.params["blocks"]["ffn"]["compressed_contract"]
    assert np.abs(vectors).max() > 0
    losses = [float(said.split()[-1].rstrip(".")) for said in told]
    assert losses[-1] < 0.8 * losses[0]


def test_definitions_keep_what_their_parent_had():
    parent = Mixture(8, 5, 16, shared=4, scores="sigmoid", balance=0.01, capacity=1.5)
    made = compressed(parent)
    assert isinstance(made, CompressedMixture)
    assert (made.main, made.vectors) == (3, "matrix")
    assert (made.shared, made.scores, made.balance, made.capacity) == (4, "sigmoid", 0.01, 1.5)


def test_wrong_requests():
    dense = tiny.language()
    with pytest.raises(UsageError, match="no layer has a mixture"):
        CompressedExperts().apply(dense, calibration(dense))
    with pytest.raises(UsageError, match="main=5 of chosen=4"):
        CompressedExperts(main=5).apply(language(), calibration(language()))
    with pytest.raises(UsageError, match="main=0"):
        compressed(Mixture(4, 2, 8), 0)

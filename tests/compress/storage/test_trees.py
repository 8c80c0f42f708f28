import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.compress.steps.round import Round, fitted
from effjax.compress.storage.trees import boxed_like, held_bytes, stored_in, whole
from effjax.compress.storage.uniform import Uniform
from effjax.compress.subject import Calibration, Subject
from effjax.compress.watch import watch
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.models import KINDS
from effjax.train.tasks.language import Language

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 12)), jnp.int32)
BATCH = {
    "tokens": TOKENS,
    "targets": TOKENS,
    "positions": jnp.broadcast_to(jnp.arange(12)[None], (2, 12)),
    "segments": jnp.ones((2, 12), jnp.int32),
    "weights": jnp.ones((2, 12)),
    "mask": jnp.ones(2),
}


@pytest.fixture(scope="module")
def subject():
    block = dict(mixer=dict(kind="attention", heads=2, rotary_base=1e4, causal=True),
                 ffn=dict(kind="gated", hidden=32))  # fmt: skip
    section = dict(kind="lm", block=block, vocab=16, dim=16, depth=2, max_length=16)
    task = Language(model=build_kind(KINDS, section, "config.model"))
    variables = meta.unbox(jax.jit(task.init)(jax.random.key(0), BATCH))
    return Subject(task, variables, BATCH)


def rounded(subject, layout, **options):
    calibration = Calibration(lambda: [BATCH], jax.random.key(0), report=lambda text: None)
    return Round(layout, **options).apply(subject, calibration)


def logits(subject):
    return jax.jit(subject.model.apply)(subject.variables, TOKENS)


def test_a_model_runs_on_codes_as_on_the_weights_they_stand_for(subject):
    small = rounded(subject, Uniform(4, 8, False))
    assert sorted(stored_in(small.params)) == sorted(subject.places())
    same = small.with_params(whole(small.params, jnp.float32))
    np.testing.assert_allclose(logits(small), logits(same), atol=2e-5)
    assert held_bytes(small.params) < 0.3 * held_bytes(subject.params)


def test_decoding_with_layers_apart_is_the_same(subject):
    small = rounded(subject, Uniform(4, 8))
    apart = small.model.layers_apart(small.variables)
    step = jax.jit(lambda variables: small.model.apply(
        variables, TOKENS, small.model.init_cache(2, 16), method="step")[0])  # fmt: skip
    np.testing.assert_allclose(step(apart), logits(small), atol=2e-5)


def test_shapes_of_a_stored_model_follow_from_its_layouts(subject):
    small = rounded(subject, Uniform(3, 8, False), leave=("embedding",))
    layouts = {path: leaf.layout for path, leaf in stored_in(small.params).items()}
    boxed = jax.eval_shape(lambda: subject.task.init(jax.random.key(0), BATCH)["params"])
    made = jax.eval_shape(lambda: meta.unbox(boxed_like(
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), boxed), layouts)))  # fmt: skip
    assert jax.tree.structure(made) == jax.tree.structure(small.params)
    for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(small.params), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_a_narrower_range_has_no_larger_error(draw):
    matrix = jnp.asarray(draw.standard_t(3, (64, 8)), jnp.float32)
    layout = Uniform(3, 32, False)

    def error(how):
        scale, zero = fitted(matrix, layout, how)
        codes = layout.codes(matrix, scale, zero).reshape(2, 32, 8)
        return float(jnp.sum(((codes - zero[:, None]) * scale[:, None] - matrix.reshape(2, 32, 8)) ** 2))

    assert error("mse") < 0.9 * error("min_max")
    whole = fitted(matrix, layout, "percentile", percentile=100.0)
    for ours, theirs in zip(whole, layout.fit(matrix), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_what_enters_every_kernel_is_seen_once(subject):
    places = subject.places()
    seen = watch(subject, places, [BATCH, BATCH], lambda rows: (rows.shape[0], jnp.sum(rows)),
                 lambda a, b: (a[0] + b[0], a[1] + b[1]))  # fmt: skip
    assert seen.pop("embedding") == [None]  # looked up, not multiplied: the head is a table of its own
    for path in seen:
        place = places[path]
        assert len(seen[path]) == int(np.prod(place.front))
        if path == "embedding":  # whose rows are taken, and never multiplied
            assert seen[path] == [None]
            continue
        assert all(count == 2 * TOKENS.size for count, _ in seen[path]), path
    # What enters the gate is what enters the other half, and layers differ.
    np.testing.assert_allclose(seen["blocks/ffn/gate/kernel"], seen["blocks/ffn/expand/kernel"], rtol=1e-5)
    first, second = seen["blocks/ffn/gate/kernel"]
    assert first[1] != second[1]


def test_what_matches_nothing_is_refused(subject):
    with pytest.raises(UsageError, match="matches no parameter"):
        rounded(subject, Uniform(), kernels=("blocks/fnn/.*",))
    with pytest.raises(UsageError, match="leaves no kernel"):
        rounded(rounded(subject, Uniform(4, 8)), Uniform(4, 8))
    with pytest.raises(UsageError, match=r"group=128 .*blocks/ffn/contract/kernel"):
        rounded(subject, Uniform(4, 128))

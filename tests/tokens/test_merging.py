"""ToMe and PiToMe: the published code's outputs, and what they promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.mixers.stats import Stats
from effjax.tokens import PiToMe, Tokens, ToMe
from effjax.tokens.assignment import apply
from effjax.tokens.pitome import energy
from effjax.tokens.point import Where
from tests.tokens.toy import IMAGES, difference, params_of, recorded, run, vit

# The published code of PiToMe for images gives attention no sizes.
CASES = {
    "plain": None,
    "tome_4": ToMe(remove=4),
    "tome_falling": ToMe(remove=6, inflection=-1.0, proportional=False),
    "tome_half": ToMe(remove=30),
    "pitome": PiToMe(keep=0.8, proportional=False),
    "pitome_first_half": PiToMe(keep=0.8, everyone="first_half", proportional=False),
    "pitome_second_half": PiToMe(keep=0.8, everyone="second_half", proportional=False),
}


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_the_published_code(name):
    model, params, images, outputs = recorded("merging")
    ours = run(model.clone(reduce=CASES[name]), params, images)
    assert difference(ours, outputs[name]) <= 1e-5


def bag(metric, size=None, ends=(1, 0)):
    tokens = Tokens.of(metric, ends=ends)
    return tokens if size is None else tokens.replace(size=size)


def stats(metric):
    return Stats(metric, keys=metric[:, :, None])


@functools.partial(jax.jit, static_argnums=0)
def reduced(method, tokens):
    """The bag behind the first of twelve layers, its tokens being the keys."""
    return apply(method.plan(tokens, stats(tokens.x), Where(0, 12)), tokens, True)


METRIC = jax.random.normal(jax.random.key(4), (3, 13, 8))
METHODS = {
    "tome": ToMe(remove=4),
    "pitome": PiToMe(remove=4),
    "everyone": PiToMe(remove=4, everyone="first_half"),
}


@pytest.mark.parametrize("ends", [(0, 0), (1, 0), (2, 3)])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_sizes_are_conserved_and_new_tokens_are_means_of_what_they_hold(method, ends):
    size = jax.random.randint(jax.random.key(5), (3, 13), 1, 5).astype(jnp.float32)
    before = bag(METRIC, size, ends)
    after = reduced(method, before)
    assert after.x.shape == (3, 9, 8)
    np.testing.assert_allclose(after.size.sum(1), size.sum(1))
    held = np.asarray(after.origin)[:, None, :] == np.arange(9)[None, :, None]  # [B, M, N]
    weights = held * np.asarray(size)[:, None]
    np.testing.assert_allclose(after.size, weights.sum(-1))
    means = np.einsum("bmn,bnc->bmc", weights, METRIC) / weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(after.x, means, atol=1e-5)
    for place in range(ends[0]):
        np.testing.assert_array_equal(after.origin[:, place], place)
    for place in range(1, ends[1] + 1):
        np.testing.assert_array_equal(after.origin[:, -place], 9 - place)


@pytest.mark.parametrize("method", [ToMe(keep=1.0), PiToMe(keep=1.0), ToMe(remove=0)])
def test_keeping_all_changes_nothing(method):
    params = params_of()
    assert difference(run(vit().clone(reduce=method), params), run(vit(), params)) <= 1e-6


def test_equal_tokens_merge_first_and_attention_counts_them_as_before():
    """Two equal patches merged into one of size 2: every later block sees the same sums."""
    params = params_of(positioned="none", pool="mean")
    model = vit(positioned="none", pool="mean")
    images = IMAGES.at[:, :, 2:4].set(IMAGES[:, :, :2])  # two equal columns of patches, side by side
    whole = run(model, params, images)
    counted = ToMe(remove=6, layers=(0,))
    assert difference(run(model.clone(reduce=counted), params, images), whole) <= 1e-5
    uncounted = ToMe(remove=6, layers=(0,), proportional=False)
    assert difference(run(model.clone(reduce=uncounted), params, images), whole) > 1e-3


def test_crowds_have_energy_and_loners_stay():
    crowd = jnp.ones((1, 6, 4)) + 0.01 * jax.random.normal(jax.random.key(6), (1, 6, 4))
    loners = jnp.concatenate([jnp.eye(4)[None] * 3, -jnp.eye(4)[None]], axis=1)  # [1, 8, 4]
    metric = jnp.concatenate([loners[:, :4], crowd, loners[:, 4:]], axis=1)  # [1, 14, 4]
    after = reduced(PiToMe(remove=3), bag(metric, ends=(0, 0)))
    alone = np.asarray(after.origin)[0, [0, 1, 2, 3, 10, 11, 12, 13]]
    np.testing.assert_array_equal(np.asarray(after.size)[0, alone], 1.0)


def test_energy_is_its_equation():
    similarity = jnp.array([[[1.0, 0.8, -0.2], [0.8, 1.0, 0.1], [-0.2, 0.1, 1.0]]])
    f = lambda c: c - 0.5 if c > 0.5 else 2.0 * (np.exp(c - 0.5) - 1)
    expected = [[np.mean([f(c) for c in row]) for row in np.asarray(similarity[0], np.float64)]]
    np.testing.assert_allclose(energy(similarity, 0.5, 2.0), expected, rtol=1e-5)


def laplacian(x):
    """Eigenvalues of the normalised Laplacian of the graph of cosine distances."""
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    w = np.exp(x @ x.T - 1)
    d = w.sum(1)
    return np.sort(np.linalg.eigvalsh(np.eye(len(x)) - w / np.sqrt(d[:, None] * d[None])))


def test_the_spectrum_is_kept_better_than_by_places():
    """Planted clusters of unequal size, coarsened by a third: the eigenvalues stay nearer than with ToMe."""
    gaps = {"tome": [], "pitome": []}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sizes = (12, 6, 2, 2, 1, 1)
        # The largest cluster has the even places to itself: what splits by place must merge across clusters.
        centres = 4 * rng.standard_normal((6, 16))
        metric = np.concatenate(
            [c + 0.1 * rng.standard_normal((s, 16)) for c, s in zip(centres, sizes, strict=True)]
        )
        metric = metric[np.argsort(np.concatenate([np.arange(24)[::2], np.arange(24)[1::2]]))]
        x = jnp.asarray(metric[None], jnp.float32)
        full = laplacian(metric)
        for name, method in (("tome", ToMe(remove=8)), ("pitome", PiToMe(remove=8))):
            lifted = np.asarray(reduced(method, bag(x, ends=(0, 0))).restored().x)[0]
            gaps[name].append(np.abs(laplacian(lifted) - full).sum())
    assert np.mean(gaps["pitome"]) < np.mean(gaps["tome"])


@pytest.mark.parametrize("method", [ToMe(keep=0.7), PiToMe(keep=0.7)])
def test_gradients_are_those_of_finite_differences(method):
    params, model = params_of(), vit().clone(reduce=method)
    loss = lambda p: jnp.sum(jnp.sin(model.apply(p, IMAGES.astype(jnp.float64))))
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        leaves, tree = jax.tree.flatten(params)
        drawn = [jax.random.normal(jax.random.key(i), leaf.shape) for i, leaf in enumerate(leaves)]
        length = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in drawn))
        way = jax.tree.unflatten(tree, [leaf / length for leaf in drawn])
        line = jax.jit(lambda s: loss(jax.tree.map(lambda p, w: p + s * w, params, way)))
        # Logits are float32 in any case: a smaller step would measure rounding, a larger one choose others.
        slope = (line(2e-3) - line(-2e-3)) / 4e-3
        np.testing.assert_allclose(jax.jit(jax.grad(line))(0.0), slope, rtol=1e-2)


@pytest.mark.parametrize("kind", [ToMe, PiToMe])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(keep=0.0), "no share in (0, 1]"),
        (dict(keep=1.1), "no share in (0, 1]"),
        (dict(), "either keep"),
        (dict(keep=0.5, remove=3), "either keep"),
        (dict(remove=-1), "negative"),
    ],
)
def test_impossible_amounts_are_refused(kind, fields, message):
    with pytest.raises(UsageError) as refusal:
        kind(**fields)
    assert message in str(refusal.value)


def test_more_tokens_than_there_are_and_layers_that_are_not_are_refused():
    for method, message in (
        (ToMe(remove=40), "remove=40 asks for more tokens than the 36 that are there"),
        (ToMe(remove=4, layers=(1, 2)), "layer 2 is not there: the network has 2 layers, 0 to 1"),
    ):
        with pytest.raises(UsageError) as refusal:
            jax.eval_shape(vit().clone(reduce=method).apply, params_of(), IMAGES)
        assert message in str(refusal.value)

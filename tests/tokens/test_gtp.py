from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.mixers.dot_product import largest
from effjax.mixers.stats import Stats
from effjax.models import KINDS
from effjax.tokens import GTP, Tokens
from effjax.tokens.assignment import apply
from effjax.tokens.gtp import grid_graph, nearest_graph, propagation, scores
from effjax.tokens.point import Where

FIXTURE = Path(__file__).parent / "fixtures" / "adaptive.npz"
HERE = Where(0, 3)


def bag(key=0, grid=(4, 5)):
    """Patches behind a class token."""
    x = jax.random.normal(jax.random.key(key), (2, 1 + grid[0] * grid[1], 6))
    return Tokens.of(x, ends=(1, 0), grid=grid)


def stats(tokens, key=9):
    n = tokens.x.shape[1]
    logits = jax.random.normal(jax.random.key(key), (2, 3, n, n))
    return Stats(tokens.x, attention=jax.nn.softmax(logits))


@pytest.mark.parametrize(
    ("case", "method"),
    [
        ("gtp_mixed", GTP(remove=6, alpha=0.3, share=0.9, neighbours=5)),
        ("gtp_spatial", GTP(remove=9, graph="spatial", alpha=0.1, proportional=False)),
        ("gtp_semantic", GTP(remove=4, graph="semantic", alpha=0.2, share=0.8, proportional=False)),
    ],
)
def test_published_code_is_equalled(case, method):
    held = np.load(FIXTURE)
    params = unflatten_dict({k[7:]: jnp.asarray(held[k]) for k in held if k.startswith("params/")}, sep="/")
    block = dict(mixer=dict(kind="attention", heads=2), ffn=dict(kind="mlp"))
    section = dict(kind="vit", patch=4, dim=16, depth=3, classes=5, block=block)
    model = build_kind(KINDS, section, "model").clone(reduce=method)
    logits = jax.jit(model.apply)({"params": params}, jnp.asarray(held["images"]))
    np.testing.assert_allclose(logits, held[case], atol=1e-5)


def test_the_spatial_graph_is_eight_neighbours():
    graph = np.asarray(grid_graph((3, 4)))
    for i in range(12):
        for j in range(12):
            (r, c), (s, d) = divmod(i, 4), divmod(j, 4)
            assert graph[i, j] == (i != j and abs(r - s) <= 1 and abs(c - d) <= 1)


def test_the_semantic_graph_is_the_nearest_by_cosine():
    x = jax.random.normal(jax.random.key(1), (2, 9, 4))
    graph = np.asarray(nearest_graph(x, 3))
    unit = np.asarray(x, np.float64) / np.linalg.norm(x, axis=-1, keepdims=True)
    for b in range(2):
        for i in range(9):
            ranked = sorted((j for j in range(9) if j != i), key=lambda j: -unit[b, i] @ unit[b, j])
            assert set(np.flatnonzero(graph[b, i])) == set(ranked[:3])


def test_propagation_has_spectral_radius_one_and_is_symmetric_on_the_grid():
    spatial = propagation(grid_graph((4, 5))[None])[0]
    np.testing.assert_allclose(spatial, spatial.T)
    assert np.abs(np.linalg.eigvals(spatial)).max() == pytest.approx(1, abs=1e-5)
    semantic = propagation(nearest_graph(bag().inner(bag().x), 4))[0]
    assert np.abs(np.linalg.eigvals(semantic)).max() == pytest.approx(1, abs=1e-5)


def test_scores_are_own_attention_times_what_is_given():
    attention = jax.nn.softmax(jax.random.normal(jax.random.key(2), (1, 3, 5, 5)))
    a = np.asarray(attention, np.float64)[0]
    expected = [max(a[:, n, n]) * max(a[h, :, n].sum() for h in range(3)) for n in range(5)]
    np.testing.assert_allclose(scores(attention)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("graph", ["mixed", "spatial", "semantic"])
def test_two_layers_move_exactly_what_goes(graph):
    method = GTP(remove=6, graph=graph, neighbours=4, alpha=0.3)
    tokens = bag()
    whole = np.zeros((2, 20, 20))
    if graph != "spatial":
        whole = np.maximum(whole, nearest_graph(tokens.inner(tokens.x), 4))
    if graph != "semantic":
        whole = np.maximum(whole, grid_graph(tokens.grid)[None])
    dense = np.asarray(propagation(jnp.asarray(whole, jnp.float32)), np.float64)
    x, size = np.asarray(tokens.x, np.float64), np.ones((2, 21))
    left = [list(range(20)) for _ in range(2)]
    for layer in range(2):
        told = stats(tokens, key=layer)
        rank = np.asarray(scores(told.attention), np.float64)
        after = apply(method.plan(tokens, told, HERE), tokens, True)
        for b in range(2):
            order = np.argsort(-rank[b, 1:], kind="stable")
            keep, gone = sorted(order[:-6]), order[-6:]
            weights = 0.3 * dense[b][np.ix_([left[b][i] for i in keep], [left[b][i] for i in gone])]
            y = x[b, 1:][keep] + weights @ x[b, 1:][gone]
            np.testing.assert_allclose(after.x[b], np.vstack([x[b, :1], y]), atol=1e-5)
            sizes = size[b, 1:][keep] + weights @ size[b, 1:][gone]
            np.testing.assert_allclose(after.size[b], np.append(1, sizes), atol=1e-5)
            left[b] = [left[b][i] for i in keep]
        tokens, x, size = after, np.asarray(after.x, np.float64), np.asarray(after.size, np.float64)
    for b in range(2):
        for place, original in enumerate(left[b]):
            assert tokens.origin[b, 1 + original] == 1 + place


def test_without_propagation_it_prunes_and_without_removal_it_does_nothing():
    tokens = bag()
    pruned = apply(GTP(remove=5, alpha=0.0).plan(tokens, stats(tokens), HERE), tokens, True)
    held = {tuple(row) for row in np.asarray(tokens.x[0])}
    assert all(tuple(row) in held for row in np.asarray(pruned.x[0]))
    np.testing.assert_array_equal(pruned.size, 1)
    assert GTP(remove=0).plan(tokens, stats(tokens), HERE) is None


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_the_largest_weights_of_a_head_alone_count(share):
    weights = jax.nn.softmax(3 * jax.random.normal(jax.random.key(3), (2, 3, 7, 7)))
    found = np.asarray(largest(weights, share))
    rank = int(49 * (1 - share))  # numbers from 1 in rising order
    for b in range(2):
        for h in range(3):
            head = np.asarray(weights[b, h])
            least = np.sort(head.reshape(-1))[max(rank - 1, 0)]
            np.testing.assert_array_equal(found[b, h], np.where(head >= least, head, 0))


def test_gradients_reach_what_went():
    tokens = bag()
    told = stats(tokens)

    def loss(x):
        moved = Tokens.of(x, ends=(1, 0), grid=(4, 5))
        return jnp.sum(apply(GTP(remove=6).plan(moved, told, HERE), moved, True).x[:, 1:])

    gradient = np.asarray(jax.grad(loss)(tokens.x))
    gone = np.asarray(GTP(remove=6).plan(tokens, told, HERE).gone)
    for b in range(2):
        assert (gradient[b, 1 + gone[b]] < 1).all()
        assert (gradient[b, 1 + gone[b]] > 0).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GTP(remove=1, share=0.0), "share=0 is no share"),
        (lambda: GTP(remove=1, neighbours=0), "neighbours=0 must be at least 1"),
        (lambda: GTP(remove=1, neighbours=20).plan(bag(), stats(bag()), HERE), "more than the 19 other"),
        (lambda: GTP(), "say either keep"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_neighbours_on_the_grid_need_whole_pictures():
    tokens = apply(GTP(remove=5, graph="semantic").plan(bag(), stats(bag()), HERE), bag(), True)
    with pytest.raises(UsageError, match="neighbours on the grid"):
        GTP(remove=2).plan(tokens.replace(carried=None), stats(tokens), HERE)

"""Expedit: the published operators' outputs, its limits, and its price."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.config import build_kind
from effjax.data.builders.scenes import draw
from effjax.errors import UsageError
from effjax.measure import count
from effjax.mixers.stats import Stats
from effjax.tokens import KINDS, Expedit, Restore, Schedule, Tokens, ToMe
from effjax.tokens.assignment import apply
from effjax.tokens.expedit import clusters, neighbours, pooled, reconstruction, weighted
from effjax.tokens.point import Where
from tests.tokens.toy import IMAGES, difference, params_of, vit

FIXTURE = Path(__file__).parent / "fixtures" / "expedit.npz"
DENSE = dict(depth=4, pool="none", class_token=True)


@pytest.mark.parametrize("name", ["halves", "uneven", "published"])
def test_outputs_are_those_of_the_published_code(name):
    """Halves: cells of equal size; uneven: of one or two tokens a side; published: tau, window and k."""
    with np.load(FIXTURE) as data:
        case = {key.split("/")[1]: data[key] for key in data.files if key.startswith(f"{name}/")}
    method = Expedit(
        grid=tuple(map(int, case["grid"])),
        rounds=int(case["rounds"]),
        temperature=float(case["temperature"]),
        window=int(case["window"]),
        nearest=int(case["nearest"]),
        normalise="length",
    )
    tokens = Tokens.of(jnp.asarray(case["z"]), grid=tuple(map(int, case["size"])))
    after = apply(method.plan(tokens, Stats(tokens.x), Where(0, 2)), tokens, False)
    assert difference(after.x, case["centres"]) <= 1e-5
    refined = after.replace(x=jnp.asarray(case["refined"]))
    assert difference(refined.restored().x, case["restored"]) <= 1e-5
    by_sum = Expedit(**{**vars(method), "normalise": "sum"}).plan(tokens, Stats(tokens.x), Where(0, 2))
    np.testing.assert_allclose(by_sum.back.sum(-1), 1.0, rtol=1e-5)
    assert difference(by_sum.back @ refined.x, case["restored"]) > 1e-2


def reference(z, size, grid, rounds, tau, window):
    """Soft k-means token by token in float64; returns Q of the last round and the centres."""
    (height, width), (h, w) = size, grid
    z = np.asarray(z, np.float64)
    at = [(y, x) for y in range(height) for x in range(width)]
    s = np.zeros((h * w, z.shape[-1]))
    for i in range(h):
        for j in range(w):
            top, bottom = i * height // h, -(-(i + 1) * height // h)
            left, right = j * width // w, -(-(j + 1) * width // w)
            s[i * w + j] = z.reshape(height, width, -1)[top:bottom, left:right].mean((0, 1))
    for _ in range(rounds):
        q = np.zeros((len(at), h * w))
        for p, (y, x) in enumerate(at):
            row, column = y * h // height, x * w // width
            for i in range(max(row - window // 2, 0), min(row + window // 2, h - 1) + 1):
                for j in range(max(column - window // 2, 0), min(column + window // 2, w - 1) + 1):
                    q[p, i * w + j] = np.exp(-((z[p] - s[i * w + j]) ** 2).sum() / tau)
            q[p] /= q[p].sum()
        s = (q.T @ z) / q.sum(0)[:, None]
    return q, s


@pytest.mark.parametrize(
    ("size", "grid", "window"), [((6, 8), (3, 4), 3), ((7, 5), (4, 3), 3), ((4, 4), (4, 4), 1)]
)
def test_clustering_is_its_equations(size, grid, window):
    z = jax.random.normal(jax.random.key(0), (2, size[0] * size[1], 4))
    weights, mass = clusters(z, size, grid, 3, 2.0, window)
    np.testing.assert_allclose(mass.sum(1), z.shape[1], rtol=1e-6)  # the rows of Q sum to one
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    for b in range(2):
        q, s = reference(z[b], size, grid, 3, 2.0, window)
        np.testing.assert_allclose(weights[b] * mass[b][:, None], q.T, atol=1e-5)
        np.testing.assert_allclose(weighted(weights, z)[b], s, atol=1e-5)


def test_reconstruction_is_a_softmax_over_the_nearest():
    z, s = (jax.random.normal(jax.random.key(i), (1, n, 4)) for i, n in ((0, 9), (1, 6)))
    distances = np.sum((np.asarray(z[0])[:, None] - np.asarray(s[0])) ** 2, -1)
    expected = np.exp(-distances / 3.0) * (distances <= np.sort(distances, 1)[:, 1:2])
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(reconstruction(z, s, 3.0, 2)[0], expected, atol=1e-5)
    lengths = np.linalg.norm(reconstruction(z, s, 3.0, 2, "length")[0], axis=-1)
    np.testing.assert_allclose(lengths, 1.0, rtol=1e-5)


def test_tokens_choose_among_the_centres_around_their_own():
    near = np.asarray(neighbours((10, 10), (5, 5), 3)).reshape(10, 10, 5, 5)
    np.testing.assert_array_equal(near[4, 9].sum(0), [0, 0, 0, 3, 3])
    np.testing.assert_array_equal(near[4, 9].any(1), [False, True, True, True, False])
    assert near[0, 0].sum() == 4


@pytest.mark.parametrize(
    "fields", [DENSE, dict(depth=4, pool="none", registers=2)], ids=["class", "registers"]
)
def test_as_many_centres_as_tokens_and_no_temperature_change_nothing(fields):
    params, model = params_of(**fields), vit(**fields)
    method = Expedit(grid=(6, 6), after=1, blocks=2, temperature=1e-5)
    fast = jax.jit(model.clone(reduce=method).apply)(params, IMAGES)
    assert difference(fast, jax.jit(model.apply)(params, IMAGES)) <= 1e-6


def test_piecewise_constant_maps_are_made_anew_exactly():
    """Regions that no border of cells follows: every k, many centres of one value and few."""
    values = jax.random.normal(jax.random.key(3), (3, 6))
    region = np.zeros((8, 8), int)
    region[:3, 2:] = 1
    region[5:, :5] = 2
    tokens = Tokens.of(values[region.reshape(-1)][None] * 4, grid=(8, 8))
    for nearest in (1, 3, 20):
        method = Expedit(grid=(4, 4), temperature=0.05, nearest=nearest)
        after = apply(method.plan(tokens, Stats(tokens.x), Where(0, 2)), tokens, False)
        assert after.x.shape == (1, 16, 6)
        assert difference(after.restored().x, tokens.x) <= 1e-5
        # The blocks between may do anything that treats equal tokens equally.
        moved = after.replace(x=jnp.sin(after.x))
        assert difference(moved.restored().x, jnp.sin(tokens.x)) <= 1e-5
    means = pooled(tokens.x, (8, 8), (4, 4))  # what averaging alone would lose
    assert (
        difference(jnp.repeat(jnp.repeat(means.reshape(1, 4, 4, 6), 2, 1), 2, 2).reshape(1, 64, 6), tokens.x)
        > 0.1
    )


def test_edges_survive_that_resampling_blurs():
    """Drawn scenes, a token for each 4 x 4 pixels: a seventh as many centres beat four tenths resampled."""
    images = np.stack([draw(number)["image"] for number in range(8)]).astype(np.float32) / 16
    z = images.reshape(8, 16, 4, 16, 4, 3).mean((2, 4))  # [8, 16, 16, 3]
    tokens = Tokens.of(jnp.asarray(z.reshape(8, 256, 3)), grid=(16, 16))
    plan = Expedit(grid=(6, 6), temperature=1.0).plan(tokens, Stats(tokens.x), Where(0, 2))
    ours = apply(plan, tokens, False).restored().x.reshape(z.shape)
    small = jax.image.resize(z, (8, 10, 10, 3), "linear")
    resampled = jax.image.resize(small, z.shape, "linear")
    error = lambda x: float(jnp.mean((x - z) ** 2))
    assert error(ours) < 0.6 * error(resampled)


def test_dense_outputs_keep_their_shape_and_see_clusters_between():
    params, model = params_of(**DENSE), vit(**DENSE)
    whole = jax.jit(model.apply)(params, IMAGES)
    fast = model.clone(reduce=Expedit(grid=(3, 3), after=1, blocks=2))
    got, sown = jax.jit(functools.partial(fast.apply, mutable=["tokens"]))(params, IMAGES)
    assert got.shape == whole.shape == (2, 37, 5)
    assert 1e-3 < difference(got, whole) < 2.0
    assert int(jnp.max(sown["tokens"]["layer_1"][0])) == 9
    by_schedule = Schedule({"1": Expedit(grid=(3, 3)), "3": Restore()})
    assert difference(jax.jit(model.clone(reduce=by_schedule).apply)(params, IMAGES), got) <= 1e-6


def test_the_cost_is_its_formula():
    """Blocks see 10 tokens instead of 37 twice; clustering takes two products of N M C a round, and more."""
    model = vit(**DENSE)
    fast = model.clone(reduce=Expedit(grid=(3, 3), after=1, blocks=2, rounds=5))
    params, image = params_of(**DENSE), IMAGES[:1]
    whole, less = (count(m.apply, params, image).macs for m in (model, fast))
    n, m, c = 36, 9, 24
    block = lambda tokens: 12 * tokens * c * c + 2 * tokens**2 * c
    pooling = 3 * 36 * c + 3 * 18 * c  # rows, then columns
    rounds = 2 * 5 * n * m * c - n * m * c  # the first centres are the pool's
    ends = 3 * n * m * c + (n + 1) * (m + 1) * c
    assert whole - less == 2 * (block(n + 1) - block(m + 1)) - pooling - rounds - ends


def test_savings_are_those_of_the_published_table():
    """Segmenter's ViT-L/16 at 640 pixels: six blocks more on 28 x 28 centres save 529.81 - 443.84 GMACs."""
    block = lambda tokens: 12 * tokens * 1024**2 + 2 * tokens**2 * 1024
    assert 6 * (block(1601) - block(785)) / 1e9 == pytest.approx(529.81 - 443.84, rel=0.01)


def test_gradients_flow_through_values_and_reconstruction_alone():
    z = jax.random.normal(jax.random.key(4), (1, 36, 5))
    way, r = (jax.random.normal(jax.random.key(i), shape) for i, shape in ((5, (1, 9, 5)), (6, z.shape)))
    with jax.enable_x64(True):
        z, way, r = (jnp.asarray(a, jnp.float64) for a in (z, way, r))
        weights, _ = clusters(z, (6, 6), (3, 3), 3, 2.0, 3)
        moved = lambda z: jnp.sum(way * weighted(clusters(z, (6, 6), (3, 3), 3, 2.0, 3)[0], z))
        np.testing.assert_allclose(jax.grad(moved)(z), jnp.swapaxes(weights, 1, 2) @ way, atol=1e-12)
        centres = weighted(weights, z)
        back = lambda t: jnp.sum(jnp.sin(reconstruction(z + t * r, centres, 2.0, 4)) @ way)
        slope = (back(1e-6) - back(-1e-6)) / 2e-6
        np.testing.assert_allclose(jax.grad(back)(0.0), slope, rtol=1e-6)


def test_bfloat16_is_near_float32():
    params, model = params_of(**DENSE), vit(**DENSE).clone(reduce=Expedit(grid=(3, 3), after=1, blocks=2))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    got = jax.jit(model.apply)(half, IMAGES.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    assert difference(got.astype(jnp.float32), jax.jit(model.apply)(params, IMAGES)) < 0.1


WRONG = {
    "has no centres": dict(grid=(0, 3)),
    "rounds=0": dict(rounds=0),
    "must be above 0": dict(temperature=0.0),
    "it must be odd": dict(window=4),
    "at least one centre": dict(nearest=0),
    "at least one runs": dict(blocks=0),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_refused_by_the_config(message):
    section = dict(kind="expedit", grid=(3, 3), after=1) | WRONG[message]
    with pytest.raises(UsageError, match=f"config.model.reduce: .*{message}"):
        build_kind(KINDS, section, "config.model.reduce")


def test_what_does_not_fit_the_network_is_refused():
    params = params_of(**DENSE)
    run = lambda reduce: jax.eval_shape(vit(**DENSE).clone(reduce=reduce).apply, params, IMAGES)
    with pytest.raises(UsageError, match="say after="):
        run(Expedit(grid=(3, 3)))
    with pytest.raises(UsageError, match="2 and 3 blocks are more than the 4"):
        run(Expedit(grid=(3, 3), after=2, blocks=3))
    with pytest.raises(UsageError, match="layer 4 is not there"):
        run(Expedit(grid=(3, 3), after=4))
    with pytest.raises(UsageError, match=r"grid=\(3, 7\) has more rows or columns than the \(6, 6\) tokens"):
        run(Expedit(grid=(3, 7), after=1))
    with pytest.raises(UsageError, match="before other methods"):
        run(Schedule({0: ToMe(remove=4), 2: Expedit(grid=(3, 3)), 4: Restore()}))
    model = vit(depth=4, class_place="middle").clone(reduce=Expedit(grid=(3, 3), after=1))
    with pytest.raises(UsageError, match="no class token in the middle"):
        jax.eval_shape(model.init, jax.random.key(0), IMAGES)

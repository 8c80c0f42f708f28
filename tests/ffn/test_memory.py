"""The memory finds what brute force finds, reads what a dense layer would say, and starts at a set size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.language import ultramem_v2
from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.ffn import Gated, Memory
from effjax.ffn.product_keys import best_sums, best_tucker, rank_one, spread

X = jnp.float32(np.random.default_rng(1).normal(size=(2, 6, 12)))
SMALL = dict(rows=7, chosen=5, key_dim=6, value_dim=8, read_dim=4)


def brute(grid, chosen):
    """The best of all slots, best first."""
    flat = np.asarray(grid).reshape(len(grid), -1)
    order = np.argsort(-flat, axis=1, kind="stable")[:, :chosen]
    return np.take_along_axis(flat, order, axis=1), order


@pytest.mark.parametrize("chosen", [1, 4, 9, 30, 81])
def test_no_slot_of_the_best_sums_is_missed(chosen, draw):
    rows, columns = draw.normal(size=(2, 20, 9)).astype(np.float32)
    scores, slots = jax.jit(best_sums, static_argnums=2)(rows, columns, chosen)
    expected, order = brute(rows[:, :, None] + columns[:, None, :], chosen)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    np.testing.assert_array_equal(slots, order)


@pytest.mark.parametrize("chosen", [1, 4, 9, 30])
def test_rank_one_misses_nothing_where_no_score_is_negative(chosen, draw):
    rows, columns = np.abs(draw.normal(size=(2, 20, 1, 9, 1))).astype(np.float32)
    cores = np.float32([0.4, 0.6]).reshape(2, 1, 1, 1)
    scores, slots = jax.jit(best_tucker, static_argnums=3)(rows, columns, cores, chosen)
    expected, order = brute(rows[:, 0] @ columns[:, 0].swapaxes(1, 2), chosen)
    np.testing.assert_allclose(jnp.sum(scores, -1)[:, 0], expected, rtol=1e-5)
    np.testing.assert_array_equal(slots[:, 0], order)
    np.testing.assert_allclose(scores[..., 0] * 1.5, scores[..., 1], rtol=1e-5)  # each core's own share


def test_more_ranks_miss_the_less_the_nearer_the_cores_are_to_rank_one(draw):
    rows, columns = draw.uniform(size=(2, 200, 1, 32, 2)).astype(np.float32)
    u, v = np.float32([[[0.8, 0.6]]]), np.float32([[[0.6, 0.8]]])
    across = np.float32([[[0.6, -0.8]]]), np.float32([[[0.8, -0.6]]])
    recalls = []
    for rest in (0.0, 0.15, 1.0):
        core = u.swapaxes(1, 2) @ v + rest * across[0].swapaxes(1, 2) @ across[1]
        _, slots = best_tucker(jnp.asarray(rows), jnp.asarray(columns), jnp.asarray(core[None]), 8)
        _, order = brute(np.einsum("bir,rs,bjs->bij", rows[:, 0], core[0], columns[:, 0]), 8)
        recalls.append(
            np.mean(
                [len(set(a) & set(b)) / 8 for a, b in zip(slots[:, 0].tolist(), order.tolist(), strict=True)]
            )
        )
    assert recalls[0] == 1.0  # of rank one, and no score is negative
    assert recalls[0] > recalls[1] > recalls[2]


def test_the_rank_one_part_is_the_best_and_points_up(draw):
    core = jnp.float32(draw.uniform(size=(3, 4, 4)))
    u, v = rank_one(core)
    assert (u > 0).all()
    assert (v > 0).all()
    sigma = np.linalg.svd(np.asarray(core), compute_uv=False)
    np.testing.assert_allclose(jnp.einsum("hr,hrs,hs->h", u, core, v), sigma[:, 0], rtol=1e-5)
    turned_u, turned_v = rank_one(-core)
    np.testing.assert_allclose(turned_u, u, rtol=1e-5)
    np.testing.assert_allclose(turned_v, -v, rtol=1e-5)  # the score of a row times that of a column stays


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_spread_is_that_of_the_singular_values_and_has_their_slope(rank, draw):
    cores = draw.uniform(size=(2, 3, rank, rank)) * 0.7
    rest = np.linalg.svd(cores.sum(0), compute_uv=False)[:, 1:]
    expected = np.mean(np.maximum(np.sqrt(np.sum(rest**2, axis=1)) - 0.15, 0) ** 2)
    with jax.enable_x64(True):
        at, along = jnp.asarray(cores), jnp.asarray(draw.normal(size=cores.shape))
        np.testing.assert_allclose(spread(at), expected, rtol=1e-6, atol=1e-12)
        slope = jnp.sum(jax.grad(spread)(at) * along)
        ahead, behind = spread(at + 1e-6 * along), spread(at - 1e-6 * along)
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-4, atol=1e-9)
    assert np.isfinite(jax.grad(spread)(jnp.ones((1, 1, 2, 2)))).all()  # of rank one already


def made(**fields):
    memory = Memory(**{**SMALL, **fields})
    shapes = meta.unbox(jax.eval_shape(memory.init, jax.random.key(1), X))
    draw = np.random.default_rng(2)
    return memory, jax.tree.map(lambda leaf: jnp.float32(draw.normal(size=leaf.shape)), shapes)


@functools.partial(jax.jit, static_argnames="memory")
def apply(memory, variables, x=X):
    return memory.apply(variables, x)


@pytest.mark.parametrize(
    "fields",
    [
        dict(activation="gelu"),
        dict(heads=2, cores=1, rank=3),
        dict(score="sum", heads=2, read_dim=0),
        dict(score="sum", activation="relu", hidden=9),
    ],
)
def test_reading_is_a_dense_layer_with_all_other_gates_shut(fields):
    memory, variables = made(**fields)
    params = jax.tree.map(np.asarray, variables["params"])
    tokens = np.asarray(X).reshape(-1, 12)
    rms = lambda a, scale: a / np.sqrt(np.mean(a**2, -1, keepdims=True) + 1e-5) * scale
    query = rms(np.einsum("tc,cad->tad", tokens, params["query"]["kernel"]), params["query_norm"]["scale"])
    keys = rms(params["keys"], params["keys_norm"]["scale"])
    scores = jnp.float32(np.einsum("tad,hanrd->athnr", query, keys))
    found, slots = memory.retrieve(*scores, variables["params"].get("cores"))
    # All n^2 neurons of a layer with one hidden layer; the gates are the scores, and mostly zero.
    gates = np.zeros((len(tokens), 49, found.shape[-1]))
    for t, h, k in np.ndindex(found.shape[:3]):
        gates[t, slots[t, h, k]] += found[t, h, k]
    assert (gates[..., 0] != 0).sum(1).max() <= 5 * memory.heads
    if memory.read_dim:
        exact = functools.partial(jax.nn.gelu, approximate=False)
        act = {"gelu": exact, "relu": jax.nn.relu, None: lambda a: a}[memory.activation]
        hidden = tokens @ params["reader"]["kernel"] @ params["inputs"].T
        gates = gates * np.asarray(act(jnp.asarray(hidden)))[:, :, None]
    values = params["values"].reshape(49, found.shape[-1], -1)
    expected = np.einsum("tnm,nmv->tmv", gates, values).reshape(len(tokens), -1) @ params["output"]["kernel"]
    if memory.hidden:
        expected = expected + Gated(9).apply({"params": variables["params"]["beside"]}, X).reshape(-1, 12)
    np.testing.assert_allclose(apply(memory, variables).reshape(-1, 12), expected, rtol=1e-3, atol=1e-3)


def test_the_read_starts_at_a_set_size_whatever_is_read():
    x = jax.random.normal(jax.random.key(3), (64, 8, 32))
    for fields in (
        dict(chosen=2),
        dict(chosen=32, activation="gelu"),
        dict(rows=40, heads=2, chosen=8),
        dict(score="sum", chosen=32, read_dim=0),
    ):
        memory = Memory(**{**dict(rows=24, key_dim=32, value_dim=48, read_dim=32, initial=0.5), **fields})

        def size(key, memory=memory):
            return jnp.mean(memory.apply(memory.init(key, x), x) ** 2)

        found = jnp.sqrt(jnp.mean(jax.jit(jax.vmap(size))(jax.random.split(jax.random.key(4), 8))))
        assert 0.35 < found < 0.7, fields


def test_a_sum_over_depth_keeps_its_variance():
    x = jax.random.normal(jax.random.key(3), (256, 32))

    def through(depth):
        memory = Memory(24, 8, 32, 48, 32, initial=depth**-0.5)
        made = jax.jit(jax.vmap(lambda key: memory.apply(memory.init(key, x), x)))
        return jnp.mean(jnp.sum(made(jax.random.split(jax.random.key(4), depth)), axis=0) ** 2)

    assert 0.5 < through(4) / through(16) < 2


def test_losses_are_sown_in_training():
    memory, variables = made(rank_penalty=0.5, balance=0.25)
    _, sown = memory.apply(variables, X, train=True, mutable=["losses"])
    (rank,), (balance,) = sown["losses"]["tucker_rank"], sown["losses"]["key_balance"]
    np.testing.assert_allclose(rank, 0.5 * spread(variables["params"]["cores"]), rtol=1e-6)
    assert 0.4 < balance < 0.25 * 2 * 7
    assert "losses" not in memory.apply(variables, X, mutable=["losses"])[1]
    even = memory.uneven(jnp.tile(jnp.eye(7) * 1e-6, (8, 1, 1)).reshape(-1, 1, 7))
    np.testing.assert_allclose(even, 1.0, rtol=1e-3)


def test_only_slots_that_were_read_have_a_gradient():
    memory, variables = made(chosen=3, cores=1)
    slope = jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(memory.apply(v, X)))))(variables)["params"]
    for name in ("values", "inputs"):
        touched = np.abs(slope[name]).max(axis=1) > 0
        assert 3 <= touched.sum() <= 36
    assert all(np.abs(slope[name]).max() > 0 for name in ("keys", "cores"))


@pytest.mark.parametrize("layer", [0, 2])
def test_a_part_of_a_pool_is_a_memory_of_its_own(layer):
    pooled, variables = made(pool=100, stride=30)
    params = variables["params"]
    own = (np.arange(49) + layer * 30) % 100  # the last of layer 2 are the first of the pool
    cut = {name: params[name][own] if name in ("inputs", "values") else params[name] for name in params}
    found = jax.jit(lambda v, layer: pooled.apply(v, X, layer=layer))(variables, jnp.int32(layer))
    np.testing.assert_allclose(found, apply(Memory(**SMALL), {"params": cut}), rtol=1e-5, atol=1e-5)


def pooled_lm(depth=3):
    config = ultramem_v2.get_config("smoke")
    config.model.depth = config.model.unroll = depth
    config.model.block.ffn.update(rows=9, pool=depth * 64, stride=64)  # 81 of 192 slots: parts overlap
    return resolve(config).model


@functools.cache
def lm_variables():
    shapes = meta.unbox(jax.eval_shape(pooled_lm().init, jax.random.key(0), TOKENS))
    draw = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: jnp.float32(0.3 * draw.normal(size=leaf.shape)), shapes)


TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, 256, size=(2, 12)))


def test_layers_look_into_one_pool_each_at_its_place():
    lm, held = pooled_lm(), lm_variables()
    ffn = held["params"]["blocks"]["ffn"]
    assert ffn["values"].shape == (192, 16)
    assert ffn["keys"].shape[0] == 3
    slope = jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(lm.apply(v, TOKENS)))))(held)["params"]["blocks"][
        "ffn"
    ]
    touched = np.abs(slope["values"]).max(axis=1) > 0
    assert all(touched[64 * layer :][:64].any() for layer in range(3))
    # As three layers with tables of their own, cut out of the pool.
    block = lm.block.clone(ffn=lm.block.ffn.clone(pool=0, stride=0))
    apart = lm.clone(block=block, shared=())
    places = (np.arange(81)[None] + 64 * np.arange(3)[:, None]) % 192
    cut = ffn | {name: ffn[name][places] for name in ("inputs", "values")}
    blocks = held["params"]["blocks"] | {"ffn": cut}
    own = {"params": held["params"] | {"blocks": blocks}}
    np.testing.assert_allclose(
        jax.jit(lm.apply)(held, TOKENS), jax.jit(apart.apply)(own, TOKENS), rtol=1e-4, atol=1e-4
    )


def test_decoding_with_a_pool_equals_the_whole():
    lm, held = pooled_lm(), lm_variables()
    step = jax.jit(functools.partial(lm.apply, method="step"))
    caches, found = lm.init_cache(2, 12), []
    for cut in (slice(0, 7), *(slice(i, i + 1) for i in range(7, 12))):
        logits, caches = step(held, TOKENS[:, cut], caches)
        found.append(logits)
    whole = jax.jit(lm.apply)(held, TOKENS)
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, rtol=1e-3, atol=1e-3)


def test_bad_requests_are_named():
    with pytest.raises(UsageError, match="not in a pool of 40"):
        Memory(**SMALL, pool=40)
    with pytest.raises(UsageError, match="share its tables"):
        pooled_lm().clone(shared=())
    with pytest.raises(UsageError, match=r"chosen=50 of rows\^2=49 slots"):
        Memory(**{**SMALL, "chosen": 50})
    with pytest.raises(UsageError, match="cores divide value_dim=8"):
        Memory(**SMALL, cores=3)

"""Switch-DiT against the published code's numbers, its dispatch spelled out, and what its prior does."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta
from scipy.optimize import linear_sum_assignment

from configs.diffusion import dit, switch_dit
from effjax import models
from effjax.config import build_kind
from effjax.diffusion.caches import ConfidenceTaylor
from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.examples import example_keys
from effjax.diffusion.generate import Sampling, sample_classes
from effjax.diffusion.samplers import DDIMSampler
from effjax.errors import UsageError
from effjax.ffn.mlp import MLP
from effjax.layers.modulation import TimeEmbed
from effjax.measure import count
from effjax.measure.analytic.inference import Transformer
from effjax.mixers.attention import Attention
from effjax.mixers.context import Context
from effjax.models.blocks import switch_dit as room
from effjax.models.blocks.adaln import DiTBlock, Layer
from effjax.models.blocks.switch_dit import SwitchDiTBlock, TimeRouter
from effjax.models.dit import DiT
from effjax.train.tasks.diffusion import Diffusion
from tests.models.official import FOLDER, translated

PARTS = dict(mixer=Attention(heads=2), ffn=MLP(activation="gelu_tanh"))
ROWS = (
    ("x_embedder.proj.weight", "embed/projection/kernel", "o i p q -> (p q i) o"),
    ("x_embedder.proj.bias", "embed/projection/bias", None),
    ("t_embedder.mlp.0.weight", "time_embed/expand/kernel", "o i -> i o"),
    ("t_embedder.mlp.0.bias", "time_embed/expand/bias", None),
    ("t_embedder.mlp.2.weight", "time_embed/contract/kernel", "o i -> i o"),
    ("t_embedder.mlp.2.bias", "time_embed/contract/bias", None),
    ("y_embedder.embedding_table.weight", "label_embed/embedding", None),
    ("routers.{}.f_gate.1.weight", "router/kernel", "e i -> i e"),
    ("routers.{}.f_gate.1.bias", "router/bias", None),
    ("routers.{}.experts.w", "blocks/experts/kernel", None),
    ("routers.{}.experts.b", "blocks/experts/bias", None),
    *(
        (
            f"blocks.{{}}.attn.qkv.{leaf}",
            tuple(f"blocks/mixer/{name}/{ours}" for name in ("query", "key", "value")),
            layout,
        )
        for leaf, ours, layout in (
            ("weight", "kernel", "(heads size) i -> i heads size"),
            ("bias", "bias", "(heads size) -> heads size"),
        )
    ),
    ("blocks.{}.attn.proj.weight", "blocks/mixer/output/kernel", "o (heads size) -> heads size o"),
    ("blocks.{}.attn.proj.bias", "blocks/mixer/output/bias", None),
    ("blocks.{}.mlp.fc1.weight", "blocks/ffn/expand/kernel", "o i -> i o"),
    ("blocks.{}.mlp.fc1.bias", "blocks/ffn/expand/bias", None),
    ("blocks.{}.mlp.fc2.weight", "blocks/ffn/contract/kernel", "o i -> i o"),
    ("blocks.{}.mlp.fc2.bias", "blocks/ffn/contract/bias", None),
    ("blocks.{}.adaLN_modulation.1.weight", "blocks/modulation/projection/kernel", "(six o) i -> i six o"),
    ("blocks.{}.adaLN_modulation.1.bias", "blocks/modulation/projection/bias", "(six o) -> six o"),
    ("final_layer.adaLN_modulation.1.weight", "modulation/projection/kernel", "(two o) i -> i two o"),
    ("final_layer.adaLN_modulation.1.bias", "modulation/projection/bias", "(two o) -> two o"),
    ("final_layer.linear.weight", "output/kernel", "o i -> i o"),
    ("final_layer.linear.bias", "output/bias", None),
)


def tiny(block=None, **changes):
    fields = {"patch": 2, "dim": 8, "depth": 2, "classes": 3, "frequencies": 6}
    return DiT(block=block or SwitchDiTBlock(**PARTS), **{**fields, **changes})


def inputs(batch=2, channels=2):
    x = np.random.default_rng(5).normal(size=(batch, 4, 4, channels)).astype(np.float32)
    return jnp.asarray(x), jnp.linspace(1.0, 900.0, batch), jnp.arange(batch) % 4


def drawn(model, *args, spread=0.3):
    """Parameters with no zeros, so that every path counts."""
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *args))["params"]
    draw = np.random.default_rng(9)
    return jax.tree.map(lambda s: jnp.asarray(spread * draw.normal(size=s.shape), s.dtype), shapes)


def run(model, params, *args, **options):
    return jax.jit(lambda p, *a: model.apply({"params": p}, *a, **options))(params, *args)


def test_the_published_codes_output_and_prior():
    """A toy of three layers, at times whose paths differ; the prior as its training pass computes it."""
    with np.load(FOLDER / "switch_dit.npz") as data:
        tensors = dict(data)
    x, t, label, out, prior, starts = (
        tensors.pop(f"__{n}") for n in ("x", "t", "y", "out", "prior", "windows")
    )
    model = tiny(patch=2, dim=16, depth=3, classes=4, frequencies=256)
    params = translated(tensors, ROWS, heads=2, six=6, two=2)
    args = jnp.asarray(x), jnp.asarray(t), jnp.asarray(label)
    wanted = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *args))["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, wanted)

    got, sown = run(model, params, *args, train=True, mutable=["losses"])
    # Theirs lays a token out as (p, q, channel), ours too.
    np.testing.assert_allclose(got, out, rtol=1e-4, atol=1e-4 * np.abs(out).max())
    (ours,) = sown["losses"]["router"]["diffusion_prior"]
    assert float(ours) == pytest.approx(float(prior), rel=1e-4)
    np.testing.assert_array_equal(room.windows(1000, 3, 3, 2).argmax(1), starts)


@pytest.mark.parametrize(
    ("variant", "theirs"),
    [("s2", 38_201_156), ("b2", 151_604_804), ("l2", 533_485_672), ("xl2", 786_505_076)],
)
def test_parameters_are_those_of_the_published_code(variant, theirs):
    """Counted from it, without the fixed table of positions; DiT's own are among them under their names."""
    shapes = {}
    for name, config in (("switch", switch_dit), ("plain", dit)):
        model = build_kind(models.KINDS, config.get_config(variant).model, "config.model")
        init = jax.eval_shape(
            model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 4)), jnp.zeros(1), jnp.zeros(1, int)
        )
        leaves = jax.tree_util.tree_flatten_with_path(meta.unbox(init))[0]
        shapes[name] = {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
    assert sum(map(math.prod, shapes["switch"].values())) == theirs
    assert shapes["plain"].items() <= shapes["switch"].items()


def test_experts_that_say_nothing_leave_a_dit():
    """At the start, and with one expert of zeros: the same numbers from the same parameters."""
    switch, plain = tiny(), tiny(DiTBlock(**PARTS))
    params = drawn(switch, *inputs())
    params["blocks"]["experts"] = jax.tree.map(jnp.zeros_like, params["blocks"]["experts"])
    rest = {name: value for name, value in params.items() if name != "router"}
    rest["blocks"] = {name: value for name, value in params["blocks"].items() if name != "experts"}
    ours, theirs = run(switch, params, *inputs()), run(plain, rest, *inputs())
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    started = meta.unbox(jax.jit(switch.init)(jax.random.key(0), *inputs()))["params"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(started["blocks"]["experts"]))
    bound = math.sqrt(6 / (8 + 3))
    assert 0.8 * bound < np.max(np.abs(started["router"]["kernel"])) <= bound


def block_numbers(batch=5, experts=4, chosen=2):
    draw = np.random.default_rng(3)
    z = draw.normal(size=(batch, 6, 8))
    p = draw.dirichlet(np.ones(experts), size=batch)
    kernel, bias = draw.normal(size=(experts, 8, 8)), draw.normal(size=(experts, 8))
    return z, p, kernel, bias, np.argsort(-p, axis=1)[:, :chosen]


def test_the_merged_product_is_dispatch_to_the_chosen_and_the_masked_sum_of_all():
    """In float64: chosen experts gathered picture by picture, all experts masked, and ours."""
    z, p, kernel, bias, best = block_numbers()
    gathered = np.stack([sum(p[b, e] * (z[b] @ kernel[e] + bias[e]) for e in best[b]) for b in range(len(z))])
    mask = np.zeros_like(p)
    np.put_along_axis(mask, best, 1.0, axis=1)
    dense = sum((mask * p)[:, e, None, None] * (z @ kernel[e] + bias[e]) for e in range(4))
    np.testing.assert_allclose(gathered, dense, rtol=1e-12, atol=1e-12)

    gates = room.selected(jnp.asarray(p, jnp.float32), 2)
    np.testing.assert_array_equal(np.count_nonzero(gates, axis=1), 2)
    params = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    ours = run(room.Experts(4), params, jnp.asarray(z, jnp.float32), gates)
    np.testing.assert_allclose(ours, dense, rtol=1e-4, atol=1e-4)


def test_a_block_is_the_equation():
    """block(m z) + (1 - m) z with m = 1 + the experts' sum, around DiT's own block."""
    z, p, kernel, bias, best = block_numbers()
    gates = np.zeros_like(p)
    np.put_along_axis(gates, best, np.take_along_axis(p, best, axis=1), axis=1)
    c = jnp.asarray(np.random.default_rng(4).normal(size=(5, 8)), jnp.float32)
    x, route = jnp.asarray(z, jnp.float32), jnp.asarray(gates, jnp.float32)
    switch, plain = SwitchDiTBlock(**PARTS, experts=4), DiTBlock(**PARTS)
    params = drawn(switch, x, Layer(route=route), c, Context())
    params["experts"] = {
        "kernel": jnp.asarray(0.1 * kernel, jnp.float32),
        "bias": jnp.asarray(bias, jnp.float32),
    }
    rest = {name: value for name, value in params.items() if name != "experts"}

    m = 1 + np.einsum("be,eio,bni->bno", gates, 0.1 * kernel, z) + (gates @ bias)[:, None]
    inner, _ = run(plain, rest, jnp.asarray(m * z, jnp.float32), Layer(), c, Context())
    got, _ = run(switch, params, x, Layer(route=route), c, Context())
    np.testing.assert_allclose(got, inner + (1 - m) * z, rtol=1e-4, atol=1e-4)


def gates_of(model, params, t, label):
    x = jnp.zeros((len(t), 4, 4, 2))
    return run(model, params, x, jnp.asarray(t), jnp.asarray(label), method="begin").route


def test_the_time_alone_routes():
    """Not label nor picture; every time and layer takes exactly two; and tokens do not know each other."""
    model = tiny()
    params = drawn(model, *inputs(), spread=1.0)
    gates = gates_of(model, params, np.float32([10, 10, 700, 700]), np.int32([0, 2, 1, 3]))  # [2, 4, 3]
    np.testing.assert_array_equal(np.count_nonzero(gates, axis=-1), 2)
    np.testing.assert_array_equal(gates[:, 0], gates[:, 1])
    np.testing.assert_array_equal(gates[:, 2], gates[:, 3])
    assert np.any(gates[:, 0] != gates[:, 2])

    z, p, *_ = block_numbers(experts=3)
    x, route, order = jnp.asarray(z, jnp.float32), jnp.asarray(p, jnp.float32), np.array([3, 0, 5, 1, 4, 2])
    block, c = SwitchDiTBlock(**PARTS), jnp.ones((5, 8))
    own = drawn(block, x, Layer(route=route), c, Context())
    straight, shuffled = (run(block, own, a, Layer(route=route), c, Context())[0] for a in (x, x[:, order]))
    np.testing.assert_allclose(straight[:, order], shuffled, rtol=1e-4, atol=1e-5)


def test_the_windows_share_the_middle_and_move_at_noisy_times():
    table = room.windows(1000, depth=4, experts=3, chosen=2)
    np.testing.assert_array_equal(table.sum(axis=1), 8)
    assert table[:, 4:8].all()  # one expert a block is everybody's
    starts = table.argmax(axis=1)
    assert starts[0] == 0
    assert starts[-1] == 4
    assert starts[500] == 0  # (1/2)^4 of the way
    np.testing.assert_array_equal(starts, np.sort(starts))


def test_the_matching_is_the_best_one():
    """Against scipy's, on units that are shuffled windows with errors; and units keep their own column."""
    draw = np.random.default_rng(0)
    table = room.windows(200, depth=3, experts=3, chosen=2)
    taken = table[:, draw.permutation(9)]
    taken = np.where(draw.random(taken.shape) < 0.1, 1 - taken, taken)
    cost = np.abs(taken[:, :, None] - table[:, None]).sum(0)
    best = cost[linear_sum_assignment(cost)].sum()
    for key in (None, jax.random.key(0), jax.random.key(1)):
        order = np.asarray(jax.jit(room.matching)(jnp.asarray(taken), jnp.asarray(table), key))
        np.testing.assert_array_equal(np.sort(order), np.arange(9))
        assert cost[np.arange(9), order].sum() == best


def test_a_network_on_the_paths_of_the_prior_has_no_loss():
    table = jnp.asarray(room.windows(1000, depth=4, experts=3, chosen=2))
    t = jnp.asarray([0.0, 400.0, 999.0])
    taken, p = table[:, ::-1], table[t.astype(int), ::-1] * 4 / 8  # probabilities of a layer add up to one
    assert float(room.diffusion_prior(t, p, taken, 4, 2)) == pytest.approx(0.0, abs=1e-6)
    wrong = float(room.diffusion_prior(t, p[::-1], taken, 4, 2))
    assert 0.05 < wrong < math.log(2)


def similarity(seed, steps):
    """How many experts two times share, by how far apart they are, after training on the prior alone."""
    embed, router = TimeEmbed(16, 32), TimeRouter(depth=2, experts=3, chosen=2, prior=1.0)
    times = jnp.arange(1000.0)
    told = meta.unbox(embed.init(jax.random.key(seed), times, jnp.float32))
    told = jax.tree.map(lambda leaf: 20 * leaf, told)
    every = lambda variables: lambda t: embed.apply(variables["embed"], t, jnp.float32)
    start = every({"embed": told})
    first = meta.unbox(router.init(jax.random.key(seed), times, start(times), start))
    variables, optimizer = {"embed": told, "router": first}, optax.adam(2e-2)

    def loss(variables, t):
        embedded = every(variables)
        _, sown = router.apply(variables["router"], t, embedded(t), embedded, mutable=["losses"])
        return sown["losses"]["diffusion_prior"][0]

    @jax.jit
    def train(variables):
        def step(carry, key):
            variables, state = carry
            t = jax.random.uniform(key, (64,), maxval=1000.0)
            grads = jax.grad(loss)(variables, t)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(variables, updates), state), None

        keys = jax.random.split(jax.random.key(seed), steps)
        return jax.lax.scan(step, (variables, optimizer.init(variables)), keys)[0][0]

    variables = train(variables)
    gates = router.apply(variables["router"], times, every(variables)(times), every(variables))
    taken = np.asarray(gates > 0, np.float32).transpose(1, 0, 2).reshape(1000, -1)  # [T, U]
    shared = taken @ taken.T
    gap = np.abs(np.subtract.outer(np.arange(1000), np.arange(1000)))
    near = [shared[(low <= gap) & (gap < low + 200)].mean() for low in range(0, 1000, 200)]
    return np.array(near), float(loss(variables, times))


@pytest.mark.slow
def test_the_prior_makes_neighbours_share_experts_and_far_times_not():
    before, loss = similarity(seed=0, steps=0)
    after, less = similarity(seed=0, steps=50)
    assert less < 0.1 * loss
    assert np.all(np.diff(after) < 0)
    assert after[0] - after[-1] > 1.0 > before[0] - before[-1]


def task():
    return Diffusion(model=tiny(), process=DDPM())


def test_the_prior_is_part_of_training_and_of_nothing_else():
    """It joins the loss, its gradient reaches the router, and evaluation does not know it."""
    built, key = task(), jax.random.key(0)
    batch = {"image": inputs(4)[0], "label": jnp.arange(4) % 3, "mask": jnp.ones(4)}
    variables = meta.unbox(jax.jit(built.init)(key, batch))
    assert set(variables) == {"params"}
    prepared = built.prepare(batch, key)
    means, grads = jax.jit(
        lambda v: (
            built.loss(v, prepared, key)[0],
            jax.grad(lambda p: built.loss({"params": p}, prepared, key)[0]["diffusion_prior"].value())(
                v["params"]
            ),
        )
    )(variables)
    mse_and_vlb = means["mse"].value() + means["vlb"].value()
    assert float(means["loss"].value() - mse_and_vlb) == pytest.approx(
        float(means["diffusion_prior"].value()), rel=1e-3
    )
    assert np.any(grads["router"]["kernel"])
    assert np.any(grads["time_embed"]["contract"]["kernel"])
    assert not np.any(grads["label_embed"]["embedding"])
    assert "diffusion_prior" not in jax.jit(built.metrics)(variables, batch)


def test_the_gradient_of_the_experts_is_the_slope():
    z, p, *_ = block_numbers(experts=3)
    x, route, c = jnp.asarray(z, jnp.float32), jnp.asarray(p, jnp.float32), jnp.ones((5, 8))
    block = SwitchDiTBlock(**PARTS)
    params = drawn(block, x, Layer(route=route), c, Context())
    out = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

    def value(at):
        experts = jax.tree.map(lambda leaf, way: leaf + at * way, params["experts"], way)
        made = block.apply({"params": params | {"experts": experts}}, x, Layer(route=route), c, Context())
        return jnp.mean(made[0] * out)

    way = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), params["experts"]
    )
    slope, (high, low) = jax.jit(lambda: (jax.grad(value)(0.0), jax.vmap(value)(jnp.array([1e-2, -1e-2]))))()
    assert float(slope) == pytest.approx(float(high - low) / 2e-2, rel=2e-2)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_step_caches_that_skip_nothing_draw_the_same_pictures(guidance):
    built = task()
    params = drawn(built.model, *inputs(), spread=0.2)
    label, keys = jnp.array([0, 2]), example_keys(jax.random.key(1), jnp.arange(2))

    @jax.jit
    def draw(params, label):
        ways = (
            Sampling(DDIMSampler(4), guidance),
            Sampling(DDIMSampler(4), guidance, cache=ConfidenceTaylor(threshold=0.0)),
        )
        return [sample_classes(built, {"params": params}, label, (4, 4, 2), way, keys) for way in ways]

    plain, cached = draw(params, label)
    assert np.abs(plain - cached).max() < 1e-5 * np.abs(plain).max()


def test_branches_that_are_kept_are_used_and_the_experts_are_computed_anew():
    model = tiny()
    params = drawn(model, *inputs())
    stream = run(model, params, *inputs(), method="begin")
    recall = jax.jit(lambda *a: model.apply({"params": params}, *a, method="recall"))
    none = jnp.zeros((2, 2, 2, 4, 8))
    whole, kept = recall(stream, jnp.ones((2, 2), bool), none)
    np.testing.assert_array_equal(whole.x, run(model, params, stream, method="layers").x)
    again, _ = recall(stream, jnp.zeros((2, 2), bool), kept)
    np.testing.assert_allclose(again.x, whole.x, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_close_and_routes_alike():
    model = tiny()
    params = drawn(model, *inputs())
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    x, t, label = inputs()
    wide, narrow = run(model, params, x, t, label), run(model, half, x.astype(jnp.bfloat16), t, label)
    assert narrow.dtype == jnp.bfloat16
    assert np.abs(np.float32(narrow) - wide).max() < 0.06 * np.abs(wide).max()


def test_the_closed_form_counts_it_exactly():
    model = tiny(depth=3)
    args = (
        jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32),
        *(jax.ShapeDtypeStruct((1,), d) for d in (jnp.float32, jnp.int32)),
    )
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *args))["params"]
    cost = count(lambda p, *a: model.apply({"params": p}, *a), shapes, *args)
    closed = Transformer.of_dit(model, channels=2)
    assert closed.parameters == cost.parameters
    assert closed.matrix_macs(4) + closed.attention_macs(4, 4) == cost.macs


def test_wrong_requests():
    with pytest.raises(UsageError, match="chosen=4 of experts=3: choose from 1 to all"):
        SwitchDiTBlock(**PARTS, chosen=4)
    with pytest.raises(UsageError, match="take condition='shared'"):
        jax.eval_shape(tiny(condition="per_block").init, jax.random.key(0), *inputs())

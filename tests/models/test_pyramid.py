import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.vision.recipes import stages
from effjax import models
from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.mixers.context import Context

# Whole networks: the whole suite has time for them.
pytestmark = pytest.mark.slow

IMAGES = jax.random.normal(jax.random.key(3), (2, 16, 12, 3))


def pyramid(**changes):
    section = dict(
        kind="pyramid",
        stem=dict(kind="patches", patch=2),
        stages=(
            dict(depth=3, dim=8, blocks=(block(8, False), block(8, True))),
            dict(depth=2, dim=16, blocks=(block(16, False),), downsample=dict(kind="merge")),
        ),
        classes=5,
        head=dict(kind="linear"),
    )
    return build_kind(models.KINDS, section | changes, "config.model")


def block(dim, shifted, **more):
    mixer = dict(kind="shifted_window", heads=2, window=3, shifted=shifted)
    return dict(kind="metaformer", mixer=mixer, ffn=dict(kind="mlp", ratio=2.0), **more)


def randomised(model, images=IMAGES):
    """Parameters that are random throughout, so that nothing is the identity."""
    held = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images))
    draw = np.random.default_rng(9)
    params = jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), s.dtype), held["params"])
    others = {c: jax.tree.map(lambda s: jnp.ones(s.shape), held[c]) for c in held if c != "params"}
    return {**others, "params": params}


def test_a_stage_is_its_blocks_in_turn_and_an_odd_one_stands_behind():
    model = pyramid()
    held = randomised(model)
    maps = model.apply(held, IMAGES, method="features")
    stage, params = model.stages[0], held["params"]["stages_0"]
    assert set(params) == {"stack", "rest_0"}
    x = maps["stem"]
    one, two = (params["stack"][f"members_{m}"] for m in (0, 1))
    for kind, layers in enumerate((one, two, params["rest_0"])):
        layer = jax.tree.map(lambda p: p[0], layers)
        x, _ = stage.blocks[kind % 2].apply({"params": layer}, x, jnp.zeros(()), Context())
    np.testing.assert_allclose(maps["stage_1"], x, rtol=1e-5, atol=1e-5)


def test_features_come_out_by_name_and_the_head_reads_the_last():
    model = pyramid()
    held = randomised(model)
    maps = model.apply(held, IMAGES, method="features")
    assert {name: x.shape for name, x in maps.items()} == {
        "stem": (2, 8, 6, 8),
        "stage_1": (2, 8, 6, 8),
        "stage_2": (2, 4, 3, 16),
    }
    head = jax.tree.map(np.asarray, held["params"]["head"])
    x = np.float64(maps["stage_2"])
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = (x * head["norm"]["scale"] + head["norm"]["bias"]).mean((1, 2))
    logits = x @ head["classifier"]["kernel"] + head["classifier"]["bias"]
    np.testing.assert_allclose(model.apply(held, IMAGES), logits, rtol=1e-4, atol=1e-4)


def test_heads_differ_in_where_the_norm_stands_and_in_what_they_pool():
    model = pyramid()
    held = randomised(model)
    x = np.asarray(model.apply(held, IMAGES, method="features")["stage_2"])
    kernel = jax.tree.map(np.asarray, held["params"]["head"]["classifier"])
    after = pyramid(head=dict(kind="linear", norm="layer_plain", place="after_pool", pool="max"))
    params = {**held["params"], "head": {"classifier": kernel}}
    pooled = x.max((1, 2))
    pooled = (pooled - pooled.mean(-1, keepdims=True)) / np.sqrt(pooled.var(-1, keepdims=True) + 1e-6)
    logits = pooled @ kernel["kernel"] + kernel["bias"]
    np.testing.assert_allclose(after.apply({"params": params}, IMAGES), logits, rtol=1e-4, atol=1e-4)
    bare = pyramid(head=dict(kind="linear", norm=None), classes=0)
    params = {key: value for key, value in params.items() if key != "head"}
    np.testing.assert_allclose(bare.apply({"params": params}, IMAGES), x.mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_two_heads_are_averaged():
    model = pyramid(head=dict(kind="linear", norm="batch", place="after_pool", distillation=True))
    held = randomised(model)
    one = pyramid(head=dict(kind="linear", norm="batch", place="after_pool"))
    parts = []
    for prefix in ("", "distillation_"):
        head = {name: held["params"]["head"][f"{prefix}{name}"] for name in ("norm", "classifier")}
        stats = {"head": {"norm": held["batch_stats"]["head"][f"{prefix}norm"]}}
        params = {**held["params"], "head": head}
        parts.append(one.apply({"params": params, "batch_stats": stats}, IMAGES))
    np.testing.assert_allclose(model.apply(held, IMAGES), sum(parts) / 2, rtol=1e-5, atol=1e-6)


def test_depth_is_dropped_from_the_first_to_the_last_block_linearly():
    """At a rate of one, in the last block, its branches always vanish."""
    model = pyramid(drop_path=1.0)
    held = randomised(model)
    zeroed = jax.tree.map(jnp.copy, held)
    last = zeroed["params"]["stages_1"]["stack"]["ffn"]["contract"]
    last["kernel"] = last["kernel"].at[1].set(jnp.nan)
    rngs = {"dropout": jax.random.key(1)}
    assert bool(jnp.isnan(model.apply(zeroed, IMAGES)).all())
    rates = []

    class Spy(type(model.stages[0])):
        def __call__(self, x, drop_rates, **options):
            rates.append(np.asarray(drop_rates))
            return super().__call__(x, drop_rates, **options)

    spied = model.clone(stages=tuple(Spy(**fields_of(stage)) for stage in model.stages))
    spied.apply(held, IMAGES, train=True, rngs=rngs)
    np.testing.assert_allclose(np.concatenate(rates), [0, 0.25, 0.5, 0.75, 1.0])


def fields_of(stage):
    return {name: getattr(stage, name) for name in ("depth", "dim", "blocks", "downsample", "first")}


@pytest.mark.parametrize("options", [dict(remat="full"), dict(unroll=3)])
def test_remat_and_unrolling_change_nothing(options):
    model, other = pyramid(), pyramid(**options)
    held = randomised(model)

    def loss(model):
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(model.apply({"params": p}, IMAGES) ** 2)))

    (one, gradient), (two, same) = loss(model)(held["params"]), loss(other)(held["params"])
    np.testing.assert_allclose(one, two, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), gradient, same)


def test_batch_statistics_move_in_training_and_stay_in_evaluation():
    stage = dict(depth=2, dim=8, blocks=(block(8, False, norm="batch"),))
    model = pyramid(stages=(stage,), head=dict(kind="linear", norm="batch"))
    held = randomised(model)
    _, changed = model.apply(held, IMAGES, train=True, mutable=["batch_stats"])
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), held["batch_stats"], changed["batch_stats"])
    assert all(jax.tree.leaves(moved))
    assert moved["stages_0"]["stack"]["mixer_norm"] == {"mean": True, "var": True}
    trained = {**held, **changed}
    assert not np.allclose(model.apply(trained, IMAGES), model.apply(held, IMAGES))


def test_what_does_not_fit_is_said():
    with pytest.raises(UsageError, match=r"config.model.stages\[0\].*depth=2 and 0 kinds of blocks"):
        pyramid(stages=(dict(depth=2, dim=8),))
    wide = dict(depth=1, dim=16, blocks=(block(16, False),))
    narrow = dict(depth=1, dim=8, blocks=(block(8, False),))
    with pytest.raises(UsageError, match="dim=16 gets 8 channels"):
        randomised(pyramid(stages=(narrow, wide)))
    odd = dict(depth=1, dim=9, blocks=(block(9, False),))
    with pytest.raises(UsageError, match="heads=2 does not divide the width 9"):
        randomised(pyramid(stages=(odd,)))
    with pytest.raises(UsageError, match="depth for 2, dim for 3"):
        stages((2, 2), (8, 16, 32))
    with pytest.raises(UsageError, match="1 x 12 cannot be cut into patches of 2 x 2"):
        randomised(pyramid(), IMAGES[:, :1])

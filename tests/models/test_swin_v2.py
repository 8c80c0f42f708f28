"""What Swin V2 changes in the network around its attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from configs.vision.swin_v2 import get_config, swin_v2
from effjax import models
from effjax.config import build_kind
from effjax.experiment import resolve
from effjax.matching import named_leaves
from effjax.mixers.context import Context
from effjax.models.blocks.metaformer import Block

# Whole networks: the whole suite has time for them.
pytestmark = pytest.mark.slow

IMAGES = jax.random.normal(jax.random.key(3), (1, 16, 16, 3))
TOY = dict(classes=5, drop_path=0.0, patch=2, head_dim=4, hidden=8)


def made(depths=(2, 2), window=4, **more):
    section = swin_v2(8, depths, window=window, **{**TOY, **more})
    return build_kind(models.KINDS, section, "config.model")


def test_every_branch_starts_at_zero():
    model = made()
    params = meta.unbox(jax.jit(model.init)(jax.random.key(0), IMAGES))["params"]
    scales = [
        v for k, v in named_leaves(params).items() if k.endswith(("mixer_norm/scale", "ffn_norm/scale"))
    ]
    assert len(scales) == 8
    assert not any(jnp.any(scale) for scale in scales)
    assert jnp.all(params["stem"]["norm"]["scale"] == 1)
    maps = jax.jit(functools.partial(model.apply, method="features"))({"params": params}, IMAGES)
    np.testing.assert_array_equal(maps["stem"], maps["stage_1"])


def test_weights_go_from_one_window_to_another():
    """No parameter has the size of a window; with that of training given, small maps do not change."""
    small, large = made(window=4), made(window=8, trained=(4, 4))
    shapes = [jax.eval_shape(m.init, jax.random.key(0), IMAGES) for m in (small, large)]
    assert jax.tree.map(lambda a: a.shape, shapes[0]) == jax.tree.map(lambda a: a.shape, shapes[1])
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.asarray(draw.normal(size=a.shape), jnp.float32), meta.unbox(shapes[0])
    )
    tiny = IMAGES[:, :8, :8]  # a map of one window of 4 in the first stage
    wide = jax.jit(large.apply)
    same = jax.jit(made(window=4, trained=(4, 4)).apply)
    np.testing.assert_allclose(wide(params, tiny), same(params, tiny), atol=1e-5)
    assert float(jnp.abs(wide(params, IMAGES) - jax.jit(small.apply)(params, IMAGES)).max()) > 1e-2


def test_the_stream_of_a_huge_network_is_normed_behind_every_sixth_block():
    model = resolve(get_config("giant")).model
    normed = [[block.stream_norm for block in stage.blocks] for stage in model.stages]
    assert normed == [[False] * 2, [False] * 2, [False] * 5 + [True], [False] * 2]
    assert [block.mixer.shifted for block in model.stages[2].blocks] == [False, True] * 3
    block = made(depths=(6, 2), extra=6).stages[0].blocks[5]
    x = 100.0 * jax.random.normal(jax.random.key(0), (1, 4, 4, 8)) + 7.0
    held = meta.unbox(jax.jit(block.init)(jax.random.key(1), x, jnp.zeros(()), Context()))
    y, _ = jax.jit(block.apply)(held, x, jnp.zeros(()), Context())
    np.testing.assert_allclose(jnp.mean(y, -1), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.var(y, -1), 1, rtol=1e-3)


def growth(order, gain):
    """Size of the residual stream behind 12 blocks over that before, with branches `gain` times as strong."""
    section = dict(mixer=made().stages[0].blocks[0].mixer, ffn=made().stages[0].blocks[0].ffn)
    block = Block(**section, order=order)
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))

    @jax.jit
    def step(x, key):
        params = meta.unbox(block.init(key, x, jnp.zeros(()), Context()))["params"]
        for part, name in (("mixer", "output"), ("ffn", "contract")):
            params[part][name]["kernel"] = gain * params[part][name]["kernel"]
        return block.apply({"params": params}, x, jnp.zeros(()), Context())[0], None

    y, _ = jax.lax.scan(step, x, jax.random.split(jax.random.key(1), 12))
    return float(jnp.std(y) / jnp.std(x))


def test_norms_behind_the_branches_bound_the_stream_whatever_the_branches_do():
    """With norms before the branches the stream grows with the weights; behind, with the depth alone."""
    behind = [growth("res_post_norm", gain) for gain in (1.0, 8.0)]
    before = [growth("pre_norm", gain) for gain in (1.0, 8.0)]
    assert behind[1] == pytest.approx(behind[0], rel=0.3)
    assert behind[1] < 1.5 * np.sqrt(1 + 24)  # 24 branches of variance one
    assert before[1] > 4 * before[0]
    assert before[1] > 2 * behind[1]


def test_the_networks_of_the_bias_do_not_decay():
    experiment = resolve(get_config("smoke"))
    shapes = meta.unbox(jax.eval_shape(experiment.model.init, jax.random.key(0), jnp.ones((1, 8, 8, 1))))
    rules = experiment.optimizer.explain(shapes["params"])
    decayed = {path for path, rule in rules.items() if rule["decay"]}
    assert any(path.endswith("ffn/expand/kernel") for path in decayed)
    assert not any("/bias/" in path or path.endswith("logit_scale") for path in decayed)

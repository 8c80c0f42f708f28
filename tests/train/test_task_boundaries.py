import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import meta

from effjax.config import build
from effjax.decoding.policies.attention_shift import AttentionShift
from effjax.errors import UsageError
from effjax.mixers.boundaries import BoundaryPredictor, attention_ratio
from effjax.mixers.context import Context
from effjax.train.tasks import KINDS
from effjax.train.tasks.boundaries import Boundaries
from effjax.train.tasks.mean import values
from tests.decoding.policies.common import BLOCK, toy
from tests.decoding.policies.common import variables as of_teacher

TASK = Boundaries(BoundaryPredictor(window=2, heads=2, hidden=16), toy(), ratio=1.3)


@pytest.fixture
def batch(draw):
    return {"tokens": jnp.asarray(draw.integers(0, 17, (3, 20)), jnp.int32)}


def drawn(batch):
    variables = meta.unbox(jax.jit(TASK.init)(jax.random.key(0), batch))
    return {**variables, "teacher": of_teacher()}


def test_it_is_shown_the_keys_and_the_attention_of_every_layer(batch):
    keys, ratios = jax.jit(TASK.shown)(of_teacher(), batch["tokens"])
    assert keys.shape == (6, 20, 2, 4)
    # The first layer's, once more by itself.
    model = toy()
    block = jax.tree.map(lambda leaf: leaf[0], meta.unbox(of_teacher())["params"]["blocks"])
    x = meta.unbox(of_teacher())["params"]["embedding"][batch["tokens"]]
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
    x = x * block["mixer_norm"]["scale"][None, None]
    held, needs = {"params": block["mixer"]}, ("keys", "attention")
    _, stats = model.block.mixer.apply(held, x, Context(), needs, method="observe")
    np.testing.assert_allclose(keys[:3], stats.keys, atol=1e-5)
    np.testing.assert_allclose(ratios[:3], attention_ratio(stats.attention, 2), rtol=1e-3)


def test_only_the_predictor_learns_and_it_does(batch):
    variables = drawn(batch)
    optimizer = optax.adam(1e-2)

    def loss(params):
        means, collections = TASK.loss({**variables, "params": params}, batch, jax.random.key(0))
        assert set(collections) == {"teacher"}
        return means["loss"].value()

    @jax.jit
    def train(params):
        def step(state, _):
            params, held = state
            value, grad = jax.value_and_grad(loss)(params)
            changes, held = optimizer.update(grad, held)
            return (optax.apply_updates(params, changes), held), value

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=60)

    (params, _), losses = train(variables["params"])
    assert losses[-1] < 0.3 * losses[0]
    means = jax.jit(TASK.metrics)({**variables, "params": params}, batch)
    told = TASK.finish({name: float(value) for name, value in values(means).items()})
    assert 0.1 < told["boundaries"] < 0.9
    assert told["recall"] > 0.8
    assert told["precision"] > 0.8


def test_rows_that_do_not_count_change_nothing(batch):
    variables = drawn(batch)
    metrics = jax.jit(TASK.metrics)
    mask = jnp.asarray([1.0, 1.0, 0.0])
    kept = values(metrics(variables, {"tokens": batch["tokens"], "mask": mask}))
    alone = values(metrics(variables, {"tokens": batch["tokens"][:2]}))
    for name, value in alone.items():
        np.testing.assert_allclose(kept[name], value, rtol=1e-5)


def test_a_text_in_pieces_is_refused(batch):
    model = toy(cache=AttentionShift())
    with pytest.raises(UsageError, match="20 tokens came into a cache of 30 slots"):
        model.apply(of_teacher(), batch["tokens"], model.init_cache(3, 30), method="step")


def test_a_config_names_it():
    teacher = dict(kind="lm", block=BLOCK, vocab=17, dim=16, depth=2)
    section = dict(teacher=teacher, ratio=1.5)
    task = build(KINDS["boundaries"], section, "task", {"model": BoundaryPredictor()})
    assert task == Boundaries(BoundaryPredictor(), toy(), ratio=1.5)

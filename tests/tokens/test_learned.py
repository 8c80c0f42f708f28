"""Reductions with parameters: entries of a schedule that the model owns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import meta

from effjax.config import build_kind
from effjax.interop.converted import section
from effjax.layers.dense import Dense
from effjax.layers.stack import streams
from effjax.models import KINDS
from effjax.tokens import Restore, Schedule, ToMe
from effjax.tokens.assignment import Mixture, apply
from tests.tokens.tiny import images, vit

IMAGES = images()


class Halve(nn.Module):
    """Neighbours are averaged, and the averages projected."""

    @nn.compact
    def __call__(self, tokens, train):
        n = tokens.count
        pairs = jnp.repeat(jnp.eye(n // 2), 2, axis=1) / 2  # [N/2, N]
        weights = jnp.broadcast_to(pairs[None], (tokens.x.shape[0], n // 2, n))
        made = apply(Mixture(weights), tokens, proportional=False)
        return made.replace(x=Dense(made.x.shape[-1], ("embed", "mlp"), name="mix")(made.x))


def watched(model, held):
    """The residual stream layer by layer, and all that was sown."""
    run = jax.jit(functools.partial(model.apply, mutable=["intermediates", "tokens"]))
    _, sown = run(held, IMAGES)
    return streams(sown["intermediates"]["blocks"]), sown


@pytest.fixture(scope="module")
def halved():
    model = vit(reduce=Schedule({1: Halve(), "3": Halve()}))
    return model, jax.jit(model.init)(jax.random.key(0), IMAGES)


def test_the_model_owns_its_parameters_layer_by_layer_and_blocks_stay_one_stack(halved):
    model, boxed = halved
    plain = jax.eval_shape(vit().init, jax.random.key(0), IMAGES)
    assert set(boxed["params"]) == {*plain["params"], "reduce_1", "reduce_3"}
    assert boxed["params"]["reduce_1"]["mix"]["kernel"].names == ("embed", "mlp")
    held = meta.unbox(boxed)["params"]
    assert held["blocks"]["mixer"]["query"]["kernel"].shape[0] == model.depth
    assert not np.allclose(held["reduce_1"]["mix"]["kernel"], held["reduce_3"]["mix"]["kernel"])
    assert set(boxed) == {"params"}


def test_it_stands_between_two_blocks(halved):
    model, boxed = halved
    held = meta.unbox(boxed)
    seen, _ = watched(model, held)
    assert [bag.x.shape[1] for bag in seen] == [17, 9, 9, 5, 5]
    rest = {name: leaf for name, leaf in held["params"].items() if not name.startswith("reduce")}
    whole, _ = watched(vit(), {"params": rest})
    np.testing.assert_allclose(seen[0].x, whole[0], atol=1e-6)
    kernel, bias = (held["params"]["reduce_1"]["mix"][name] for name in ("kernel", "bias"))
    means = (whole[1][:, 1::2] + whole[1][:, 2::2]) / 2
    mixed = jnp.concatenate([whole[1][:, :1], means], axis=1) @ kernel + bias[None, None]
    np.testing.assert_allclose(seen[1].x, mixed, atol=1e-5)
    np.testing.assert_allclose(seen[3].size, jnp.array([[1.0, 4, 4, 4, 4]] * len(IMAGES)))


def test_gradients_reach_it_through_a_scan_with_rematerialisation(halved):
    model, boxed = halved
    held = meta.unbox(boxed)["params"]
    held["head"]["kernel"] = jax.random.normal(jax.random.key(1), held["head"]["kernel"].shape)

    def loss(params, remat):
        return jnp.sum(model.clone(remat=remat).apply({"params": params}, IMAGES) ** 2)

    plain, full = (jax.jit(jax.grad(loss), static_argnums=1)(held, remat) for remat in ("none", "full"))
    assert np.any(plain["reduce_1"]["mix"]["kernel"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), plain, full)


def test_streams_are_those_of_the_layers_one_by_one_whatever_reduces():
    model = vit(reduce=Schedule({1: ToMe(remove=2), 4: Restore()}))
    held = meta.unbox(jax.jit(model.init)(jax.random.key(0), IMAGES))
    assert set(held) == {"params"}  # what is recorded of a pass is no variable
    seen, sown = watched(model, held)
    assert [bag.x.shape[1] for bag in seen] == [17, 17, 15, 15, 17]
    np.testing.assert_array_equal(np.sort(np.unique(sown["tokens"]["layer_1"][0])), np.arange(15))


def test_a_schedule_is_written_and_read_as_a_section():
    model = vit(reduce=Schedule({"1": ToMe(remove=2), "4": Restore()}))
    held = section(model, KINDS)
    assert held["reduce"]["entries"] == {"1": {"kind": "tome", "remove": 2}, "4": {"kind": "restore"}}
    assert build_kind(KINDS, held, "model") == model

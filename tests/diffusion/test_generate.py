"""Asking a task for pictures: what is refused, and that guidance, keys and devices do what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.examples import example_keys
from effjax.diffusion.generate import check_request, sample_classes
from effjax.diffusion.samplers import DDIMSampler, DDPMSampler, EulerSampler
from effjax.errors import UsageError
from effjax.ffn.mlp import MLP
from effjax.mixers.attention import Attention
from effjax.models.dit import DiT, DiTBlock
from effjax.train.tasks.diffusion import Diffusion

SHAPE = (4, 4, 1)


def task(label_dropout=0.1):
    block = DiTBlock(mixer=Attention(heads=2), ffn=MLP(activation="gelu_tanh"))
    model = DiT(block, patch=2, dim=8, depth=1, classes=3, frequencies=8)
    return Diffusion(model=model, process=DDPM(), label_dropout=label_dropout)


@pytest.fixture(scope="module")
def variables():
    batch = {"image": jnp.zeros((1, *SHAPE)), "label": jnp.zeros(1, jnp.int32)}
    shapes = meta.unbox(jax.eval_shape(task().init, jax.random.key(0), batch))
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), s.dtype), shapes)


def pictures(variables, label, keys, guidance=2.0, label_dropout=0.1):
    def run(variables, label, keys):
        sampler = DDPMSampler(steps=3, clip=1.0)
        return sample_classes(task(label_dropout), variables, label, SHAPE, sampler, guidance, keys)

    return jax.jit(run)(variables, label, keys)


def test_same_key_same_picture_in_any_batch(variables):
    label = jnp.array([0, 1, 2, 2])
    keys = example_keys(jax.random.key(3), jnp.arange(4))
    whole = pictures(variables, label, keys)
    assert whole.shape == (4, *SHAPE)
    part = pictures(variables, label[2:], keys[2:])
    np.testing.assert_allclose(part, whole[2:], rtol=1e-4, atol=1e-5)
    assert float(jnp.max(jnp.abs(whole[2] - whole[3]))) > 1e-2


@pytest.mark.devices8
def test_same_picture_on_eight_devices(variables):
    label = jnp.arange(16) % 3
    keys = example_keys(jax.random.key(3), jnp.arange(16))
    sharding = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
    spread = pictures(variables, *jax.device_put((label, keys), sharding))
    assert spread.sharding.shard_shape(spread.shape)[0] == 2
    np.testing.assert_allclose(spread, pictures(variables, label, keys), rtol=1e-4, atol=1e-5)


def test_guidance_reads_the_null_class(variables):
    label, keys = jnp.array([0, 1]), example_keys(jax.random.key(3), jnp.arange(2))
    plain, strong = (pictures(variables, label, keys, guidance=s) for s in (1.0, 5.0))
    assert float(jnp.max(jnp.abs(plain - strong))) > 1e-3
    # Scale 0 forgets the class: both labels give what their keys alone give.
    none, swapped = (pictures(variables, lb, keys, guidance=0.0) for lb in (label, label[::-1]))
    np.testing.assert_allclose(none[..., :1], swapped[..., :1], rtol=0.2, atol=0.2)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"classes": [0, 3]}, "class 3 does not exist: the model knows classes 0 to 2"),
        ({"classes": [-1]}, "class -1 does not exist"),
        ({"guidance": -1.0}, "guidance=-1 must not be negative"),
        ({"task": task(label_dropout=0.0)}, "guidance=2 needs a model trained with dropped labels"),
        ({"sampler": DDIMSampler(steps=1001)}, "steps=1001 .* schedule has 1000 steps"),
        ({"sampler": EulerSampler()}, "'euler' does not walk a ddpm process"),
    ],
)
def test_refusals(request_, message):
    asked = {"task": task(), "sampler": DDIMSampler(), "classes": [0], "guidance": 2.0, **request_}
    with pytest.raises(UsageError, match=message):
        check_request(**asked)


def test_what_is_allowed():
    check_request(task(label_dropout=0.0), DDIMSampler(), [0, 2], 1.0)
    check_request(task(), DDPMSampler(steps=1000), [0], 0.0)

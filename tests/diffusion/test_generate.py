"""Asking a task for pictures: what is refused, and that guidance, keys and devices do what they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.diffusion.ddpm import DDPM
from effjax.diffusion.examples import example_keys
from effjax.diffusion.generate import Sampling, sample_classes
from effjax.diffusion.samplers import DDIMSampler, DDPMSampler, EulerSampler
from effjax.errors import UsageError
from effjax.ffn.mlp import MLP
from effjax.mixers.attention import Attention
from effjax.models.blocks.adaln import DiTBlock
from effjax.models.dit import DiT
from effjax.train.tasks.diffusion import Diffusion

SHAPE = (4, 4, 1)


def task(label_dropout=0.1):
    block = DiTBlock(mixer=Attention(heads=2), ffn=MLP(activation="gelu_tanh"))
    model = DiT(block=block, patch=2, dim=8, depth=1, classes=3, frequencies=8)
    return Diffusion(model=model, process=DDPM(), label_dropout=label_dropout)


@pytest.fixture(scope="module")
def variables():
    batch = {"image": jnp.zeros((1, *SHAPE)), "label": jnp.zeros(1, jnp.int32)}
    shapes = meta.unbox(jax.eval_shape(task().init, jax.random.key(0), batch))
    draw = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.3 * draw.normal(size=s.shape), s.dtype), shapes)


ANCESTRAL = DDPMSampler(steps=3, clip=1.0)


@functools.cache
def compiled(sampling):
    def run(variables, label, keys):
        return sample_classes(task(), variables, label, SHAPE, sampling, keys)

    return jax.jit(run)


def pictures(variables, label, keys, guidance=2.0, sampler=ANCESTRAL, **options):
    return compiled(Sampling(sampler, guidance, **options))(variables, label, keys)


def test_same_key_same_picture_in_any_batch(variables):
    label = jnp.array([0, 1, 2, 2])
    keys = example_keys(jax.random.key(3), jnp.arange(4))
    whole = pictures(variables, label, keys)
    assert whole.shape == (4, *SHAPE)
    part = pictures(variables, label[2:], keys[2:])
    np.testing.assert_allclose(part, whole[2:], rtol=1e-4, atol=1e-5)
    assert float(jnp.max(jnp.abs(whole[2] - whole[3]))) > 1e-2


def test_guidance_of_0_forgets_the_class(variables):
    keys = example_keys(jax.random.key(3), jnp.arange(2))

    def swap(guidance):
        got = [
            pictures(variables, jnp.array(label), keys, guidance, DDIMSampler(3))
            for label in ([0, 1], [1, 0])
        ]
        return float(jnp.max(jnp.abs(got[0] - got[1])))

    assert swap(0.0) == 0.0
    assert swap(1.0) > 1e-3


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"classes": [0, 3]}, "class 3 does not exist: the model knows classes 0 to 2"),
        ({"classes": [-1]}, "class -1 does not exist"),
        ({"guidance": -1.0}, "guidance=-1 must not be negative"),
        ({"task": task(label_dropout=0.0)}, "guidance=2 needs a model trained with dropped labels"),
        ({"sampler": DDIMSampler(steps=1001)}, "steps=1001 .* schedule has 1000 steps"),
        ({"sampler": EulerSampler()}, "'euler' does not walk a ddpm process"),
        ({"interval": (0.6, 0.3)}, "interval=0.6,0.3: guidance needs two rising shares"),
        ({"interval": (0.0, 900.0)}, "interval=0,900"),
    ],
)
def test_refusals(request_, message):
    asked = {"sampler": DDIMSampler(), "guidance": 2.0, **request_}
    tried, classes = asked.pop("task", task()), asked.pop("classes", [0])
    with pytest.raises(UsageError, match=message):
        Sampling(**asked).check(tried, classes)


def test_what_is_allowed():
    Sampling(DDIMSampler()).check(task(label_dropout=0.0), [0, 2])
    Sampling(DDPMSampler(steps=1000), 0.0).check(task(), [0])


def test_an_interval_is_a_share_of_the_process(variables):
    """Steps at times 999, 500 and 0: guided between the shares 0.4 and 0.6 means at the second alone."""
    label, keys = jnp.array([0, 1]), example_keys(jax.random.key(3), jnp.arange(2))
    sampler = DDIMSampler(3)
    some = pictures(variables, label, keys, 3.0, sampler, interval=(0.4, 0.6))
    none = pictures(variables, label, keys, 1.0, sampler)
    everywhere = pictures(variables, label, keys, 3.0, sampler)
    assert float(jnp.max(jnp.abs(some - none))) > 1e-3
    assert float(jnp.max(jnp.abs(some - everywhere))) > 1e-3
    beyond = pictures(variables, label, keys, 3.0, sampler, interval=(0.6, 0.9))  # no step lies there
    np.testing.assert_allclose(beyond, none, rtol=1e-5, atol=1e-6)

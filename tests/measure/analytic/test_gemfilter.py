import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from effjax.decoding.gemfilter import GemFilter, compress
from effjax.decoding.prefill import prefill
from effjax.errors import UsageError
from effjax.ffn import Gated
from effjax.measure import count
from effjax.measure.analytic.gemfilter import prefill_macs
from effjax.measure.analytic.shape import DecoderShape
from effjax.mixers import Attention
from effjax.models.lm import LM, DecoderBlock

# Llama-3.1-8B, whose layer 13 of 32 chooses.
LLAMA = DecoderShape(32, 4096, 32, 8, 128, 14_336, 128_256)


def model_of(depth=4, **fields):
    mixer = Attention(4, kv_heads=2, rotary_base=100.0, causal=True)
    return LM(DecoderBlock(mixer, Gated(24)), vocab=19, dim=16, depth=depth, **fields)


@pytest.mark.parametrize("gems", [None, GemFilter(0, 5), GemFilter(2, 5), GemFilter(3, 5, pool=1)])
def test_the_closed_form_is_what_counting_finds(gems):
    model, n, new = model_of(), 12, 3
    variables = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))

    def read(variables, prompts, lengths):
        if gems is not None:
            prompts, lengths = compress(model, variables, prompts, lengths, gems)
        return prefill(model, variables, prompts, lengths, prompts.shape[1] + new - 1)

    shapes = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, n), (1,)))
    assert count(read, variables, *shapes).macs == prefill_macs(DecoderShape.of(model), n, gems, new)


def test_long_prompts_cost_the_share_of_the_layers_before():
    gems = GemFilter(13, 1024)
    ratios = [prefill_macs(LLAMA, n, gems) / prefill_macs(LLAMA, n) for n in (2**17, 2**22)]
    assert ratios[0] == pytest.approx(13 / 32, abs=0.01)
    assert ratios[1] == pytest.approx(13 / 32, abs=1e-3)
    assert prefill_macs(LLAMA, 1000, gems) == prefill_macs(LLAMA, 1000)


@pytest.mark.parametrize(
    ("prompt", "gems", "message"), [(0, None, "prompt=0"), (9, GemFilter(32, 4), "layer=32 of 32")]
)
def test_bad_requests_are_named(prompt, gems, message):
    with pytest.raises(UsageError, match=message):
        prefill_macs(LLAMA, prompt, gems)

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from configs.language.spark import get_config
from effjax.errors import UsageError
from effjax.experiment import resolve
from effjax.ffn import CATS, MLP, Gated, SparkFFN
from effjax.measure import count
from effjax.measure.analytic.active import decode_macs, read_share
from effjax.mixers import Attention, SparkAttention
from effjax.models.lm import LM, DecoderBlock, Layer

GEMMA, SPARK = (resolve(get_config(variant)).model for variant in ("gemma2-2b", "2b"))


def small(mixer=None, ffn=None, **fields):
    mixer = mixer or Attention(4, 2, qkv_bias=False, out_bias=False, causal=True)
    return LM(DecoderBlock(mixer, ffn or Gated(48)), vocab=20, dim=16, depth=3, tied=True, **fields)


def test_half_of_the_neurons_need_two_thirds_of_the_weights():
    assert read_share(0.5) == pytest.approx(0.667, abs=1e-3)
    assert read_share(0.1) == pytest.approx(0.4)
    assert (read_share(0), read_share(1)) == (pytest.approx(1 / 3), pytest.approx(1))
    with pytest.raises(UsageError, match=r"active=1\.5"):
        read_share(1.5)


def test_a_dense_step_is_what_counting_finds():
    model, seen = small(), 12
    variables = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), int)))
    caches = jax.eval_shape(lambda: model.init_cache(1, seen))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    cost = count(lambda v, t, c: model.apply(v, t, c, method="step"), variables, token, caches)
    assert decode_macs(model, seen).total == cost.macs


def test_spark_with_everything_active_multiplies_what_is_there():
    spark = small(SparkAttention(4, 2, 99, 2), SparkFFN(72, 7, 72))
    assert decode_macs(spark, 12) == decode_macs(small(), 12)
    assert decode_macs(small(ffn=CATS(48)), 12, active=0.25).ffn == decode_macs(small(), 12).ffn / 2


def test_layers_with_a_window_see_no_more_than_that():
    windows = small(layers=(Layer(window=5), Layer()))
    each = decode_macs(small(), 1).attention / 3
    assert decode_macs(windows, 12).attention == each * (5 + 12 + 5)


def test_gemma_with_spark_has_its_parameters_and_two_fifths_of_the_arithmetic():
    parameters = [
        sum(
            leaf.size
            for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), int)))
        )
        for model in (GEMMA, SPARK)
    ]
    assert parameters[0] == parameters[1] == 2_614_341_888
    for seen in (2048, 4096):
        ratio = decode_macs(GEMMA, seen).layers / decode_macs(SPARK, seen).layers
        assert ratio == pytest.approx(2.5, abs=0.05)
    # 2.6 where the long layers see 8192 tokens; with the logits, which stay dense, 2.0.
    whole = [decode_macs(model, 8192) for model in (GEMMA, SPARK)]
    assert whole[0].layers / whole[1].layers == pytest.approx(2.62, abs=0.01)
    assert whole[0].total / whole[1].total == pytest.approx(2.03, abs=0.01)


def test_the_paper_s_own_forms():
    # With r = C/2: C F + 3 C k of 6 C F FLOPs, F of the dense one; in attention d n + 3 d min(k, n) of 4 d n.
    spark = small(SparkAttention(4, 2, 5), SparkFFN(64, 8, 6))
    macs = decode_macs(spark, 12)
    assert 2 * macs.ffn / 3 == 16 * 64 + 3 * 16 * 6
    assert 2 * macs.attention / 3 == 16 * 12 + 3 * 16 * 5


def test_other_parts_have_no_closed_form():
    with pytest.raises(UsageError, match="Attention with MLP"):
        decode_macs(small(ffn=MLP()), 12)

"""Inference from shapes: published counts, the library's own counter, and the limits of the roofline."""

import importlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from effjax.config import build_kind
from effjax.errors import UsageError
from effjax.measure import count
from effjax.measure.analytic import DecoderShape, serve
from effjax.measure.analytic.inference import BERT_BASE, GPT2, Shrink, Transformer, infer
from effjax.models import KINDS

A100 = SimpleNamespace(peak={"bfloat16": 312e12}, memory=80 * 10**9, bandwidth=2e12, host_link=20e9)


def built(family, size):
    section = importlib.import_module(f"configs.{family}").get_config(size).model
    return build_kind(KINDS, section, "config.model")


def counted(model, *inputs):
    params = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]
    return count(lambda p, *x: model.apply({"params": p}, *x), params, *inputs)


def array(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def test_published_counts():
    """109.48M, 124.44M and 86.57M."""
    assert BERT_BASE.parameters == 109_482_240
    assert GPT2.parameters == 124_439_808
    vit = Transformer.of_vit(built("vision.vit", "b16"), tokens=197)
    assert vit.parameters == 86_567_656


@pytest.mark.parametrize("size", ["ti16", "b16", "l16"])
def test_vit_is_counted_exactly(size):
    model = built("vision.vit", size)
    cost, closed = counted(model, array(1, 224, 224, 3)), Transformer.of_vit(model, tokens=197)
    assert closed.parameters == cost.parameters
    assert closed.matrix_macs(197) + closed.attention_macs(197, 197) == cost.macs


@pytest.mark.parametrize("size", ["digits", "s2", "xl2"])
def test_dit_is_counted_exactly(size):
    model = built("diffusion.dit", size)
    side, channels = (8, 1) if size == "digits" else (32, 4)
    cost = counted(model, array(1, side, side, channels), array(1), array(1, dtype=jnp.int32))
    closed, tokens = Transformer.of_dit(model, channels=channels), (side // model.patch) ** 2
    assert closed.parameters == cost.parameters
    assert closed.matrix_macs(tokens) + closed.attention_macs(tokens, tokens) == cost.macs


@pytest.mark.parametrize(
    "changes",
    [
        dict(distillation=True, registers=2, patch_norm=True, mask_token=True),
        dict(pool="mean", class_token=True, final_norm="after_pool", patch_bias=False, pre_norm=True),
        dict(pool="token_mean", positioned="class_and_patches", registers=3),
        dict(positioned="none", final_norm="none", representation=7),
        dict(order="parallel", layer_scale=0.1, norm="rms"),
        dict(qk_norm=True),
        dict(qk_norm=True, qk_norm_kind="layer"),
        dict(qk_norm=True, qk_norm_over="width"),
        dict(order="res_post_norm", layer_scale=0.1),
    ],
)
def test_variants_of_vit_are_counted_exactly(changes):
    of_block = {key: changes[key] for key in ("order", "layer_scale", "norm") if key in changes}
    of_mixer = {key: value for key, value in changes.items() if key.startswith("qk_norm")}
    mixer = dict(kind="attention", heads=3, **of_mixer)
    block = dict(mixer=mixer, ffn=dict(kind="mlp"), **of_block)
    of_model = {key: value for key, value in changes.items() if key not in of_block | of_mixer}
    section = dict(kind="vit", patch=2, dim=12, depth=2, classes=5, block=block, **of_model)
    model = build_kind(KINDS, section, "config.model")
    tokens = 12 + model.prefix
    cost, closed = counted(model, array(1, 8, 6, 3)), Transformer.of_vit(model, tokens)
    assert closed.parameters == cost.parameters
    assert closed.matrix_macs(tokens) + closed.attention_macs(tokens, tokens) == cost.macs


def test_a_pool_with_parameters_has_no_closed_form():
    pool = dict(kind="attention", heads=3, ffn=dict(kind="mlp"))
    block = dict(mixer=dict(kind="attention", heads=3), ffn=dict(kind="mlp"))
    section = dict(kind="vit", patch=2, dim=12, depth=2, classes=5, block=block)
    model = build_kind(KINDS, section | dict(pool=pool), "config.model")
    with pytest.raises(UsageError, match="pool='AttentionPool'"):
        Transformer.of_vit(model, 12)


def test_dit_with_a_condition_a_block_is_counted_exactly():
    block = dict(
        kind="adaln_zero", mixer=dict(kind="attention", heads=2), ffn=dict(kind="mlp"), ffn_affine=True
    )
    section = dict(kind="dit", patch=2, dim=12, depth=3, classes=5, condition="per_block", block=block)
    model = build_kind(KINDS, section, "config.model")
    cost = counted(model, array(1, 4, 4, 4), array(1), array(1, dtype=jnp.int32))
    closed = Transformer.of_dit(model)
    assert closed.parameters == cost.parameters
    assert closed.matrix_macs(4) + closed.attention_macs(4, 4) == cost.macs


@pytest.mark.parametrize("size", ["smoke", "125m", "1b", "8b"])
def test_lm_is_counted_exactly(size):
    model = built("language.lm", size)
    cost, closed = counted(model, array(1, 48, dtype=jnp.int32)), Transformer.of_lm(model)
    assert closed.parameters == cost.parameters
    assert closed.matrix_macs(48) + closed.attention_macs(48, 48) == cost.macs
    assert 2 * cost.macs == infer(closed, A100, new=48).flops


def test_a_decoding_step_agrees_with_serving():
    shape = DecoderShape.of(built("language.lm", "8b"))
    step = infer(Transformer.of_decoder(shape), A100, new=1, seen=4096)
    served = serve(shape, A100, 4096)
    assert step.kv_bytes == served.kv_bytes_per_user
    assert step.flops == served.decode_flops_per_token
    assert step.weight_bytes == served.weight_bytes


def test_large_batches_are_bound_by_compute_and_small_ones_by_memory():
    model = Transformer.of_lm(built("language.lm", "8b"))
    assert infer(model, A100, new=1, seen=4096, batch=8).bound == "memory"  # the module's example
    calls = [infer(model, A100, new=1, seen=16, batch=batch) for batch in (1, 8, 64, 512, 4096)]
    assert [call.bound for call in calls] == ["memory", "memory", "memory", "compute", "compute"]
    intensities = [call.intensity for call in calls]
    assert intensities == sorted(intensities)
    assert calls[0].seconds == pytest.approx(calls[2].seconds, rel=0.01)  # the weights are read once
    assert calls[4].seconds == pytest.approx(8 * calls[3].seconds)


def test_bits_change_bytes_and_not_flops():
    plain, small = (infer(GPT2, A100, new=1, seen=64, shrink=s) for s in (None, Shrink(4, 8)))
    assert small.flops == plain.flops
    assert small.kv_bytes == plain.kv_bytes / 2
    vectors = 2 * (GPT2.parameters - GPT2.matrices)
    assert small.weight_bytes - vectors == (plain.weight_bytes - vectors) / 4


def test_sparsity_takes_its_share_of_bytes_and_of_work():
    plain, half = (infer(GPT2, A100, new=8, shrink=s) for s in (None, Shrink(sparsity=0.5)))
    attention = 2 * GPT2.attention_macs(8, 8)
    assert half.flops - attention == (plain.flops - attention) / 2
    assert plain.weight_elements - half.weight_elements == GPT2.matrices / 2


def test_a_square_at_half_its_rank_saves_nothing():
    square = Transformer(1, 64, 4, 4, 16, 64)
    assert Shrink(rank=0.5).block_matrices(square) == square.block_matrices
    assert Shrink(rank=0.25).block_matrices(square) == square.block_matrices / 2
    wide = Transformer(1, 64, 4, 2, 16, 256, gated=True)
    by_hand = 0.25 * (2 * 64 * 128 + 2 * 32 * 96 + 3 * 64 * 320)
    assert Shrink(rank=0.25).block_matrices(wide) == by_hand


def test_wrong_requests():
    with pytest.raises(UsageError, match="new=4, seen=2, batch=1: give 0 < new <= seen"):
        infer(GPT2, A100, new=4, seen=2)
    with pytest.raises(UsageError, match="sparsity is the share left out"):
        Shrink(sparsity=1)
    with pytest.raises(UsageError, match="must be positive"):
        Shrink(rank=0)

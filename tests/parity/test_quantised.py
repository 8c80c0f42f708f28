"""Packed kernels of a Llama in the hands of torch and transformers.

transformers' own loaders do not run here: that of GPTQ asks for the packages optimum and gptqmodel, that of
AWQ for gptqmodel and accelerate. So words are taken apart by shifts of int32 in torch, as AutoGPTQ
and AutoAWQ do it where their kernels are missing, and the weights go into the model of the config.json that
was written.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils.quantization_config import AwqConfig, GPTQConfig

from effjax.compress.storage.trees import boxed_like
from effjax.compress.storage.uniform import Uniform
from effjax.interop import export_to
from effjax.interop.load import family_of
from effjax.layers.stored import kernels

SOURCE = "transformers:llama"
CONFIG = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    vocab_size=37,
    tie_word_embeddings=True,
)
UNDO = [0, 4, 1, 5, 2, 6, 3, 7]  # where the outputs of a word of awq stand


def pieces(words, bits, across):
    """Codes of int32 words: one more axis behind `across`, joined with it."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    if across == 0:
        codes = torch.bitwise_right_shift(words[:, None], shifts[None, :, None]) & (2**bits - 1)
        return codes.reshape(-1, words.shape[1])
    codes = torch.bitwise_right_shift(words[:, :, None], shifts[None, None]) & (2**bits - 1)
    return codes.reshape(words.shape[0], -1)


def weight(parts, bits, config):
    """`[o, i]` of a packed layer."""
    scales = parts["scales"].float()
    if config["quant_method"] == "awq":
        codes, zeros = (
            pieces(parts[name], 4, 1).reshape(parts[name].shape[0], -1, 8)[..., UNDO].flatten(1)
            for name in ("qweight", "qzeros")
        )
        groups = torch.arange(codes.shape[0]) // (codes.shape[0] // scales.shape[0])
    else:
        codes, zeros = pieces(parts["qweight"], bits, 0), pieces(parts["qzeros"], bits, 1)
        zeros = zeros + (config["checkpoint_format"] == "gptq")
        groups = parts["g_idx"].long()
    return (scales[groups] * (codes - zeros[groups])).T


@pytest.mark.parametrize(
    ("form", "layout"),
    [
        ("gptq", Uniform(4, 16)),
        ("gptq", Uniform(8, 0)),
        ("gptq_v2", Uniform(2, 32, symmetric=False)),
        ("awq", Uniform(4, 32, symmetric=False)),
    ],
)
def test_the_weights_that_torch_reads_give_our_logits(form, layout, tmp_path):
    model = family_of(SOURCE).build(CONFIG)
    tokens = np.random.default_rng(0).integers(0, 37, (2, 9))
    params = jax.jit(model.init)(jax.random.key(0), jnp.asarray(tokens, jnp.int32))["params"]
    codes = meta.unbox(boxed_like(params, {path: layout for path in kernels(params) if "blocks/" in path}))
    export_to(tmp_path / "out", model, codes, SOURCE, quantised=form)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    told = config.pop("quantization_config")
    read = (AwqConfig if form == "awq" else GPTQConfig)(
        **{key: value for key, value in told.items() if key != "quant_method"}
    )
    assert (read.bits, read.group_size) == (layout.bits, layout.group or -1)
    assert read.format == ("gemm" if form == "awq" else form)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    plain, layers = {}, {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    assert len(layers) == 14
    for name, tensor in tensors.items():
        if name.rpartition(".")[0] not in layers:
            plain[name] = tensor
    for name in layers:
        parts = {
            part: tensors[f"{name}.{part}"]
            for part in ("qweight", "qzeros", "scales", "g_idx")
            if f"{name}.{part}" in tensors
        }
        plain[f"{name}.weight"] = weight(parts, layout.bits, told)
    module = AutoModelForCausalLM.from_config(LlamaConfig(**config)).float().eval()
    left = module.load_state_dict(plain, strict=False)
    assert left.missing_keys == ["lm_head.weight"]
    assert not left.unexpected_keys
    with torch.no_grad():
        theirs = module(torch.from_numpy(tokens), use_cache=False).logits.numpy()
    ours = np.asarray(jax.jit(model.apply)({"params": codes}, jnp.asarray(tokens, jnp.int32)))
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    other = np.asarray(jax.jit(model.apply)({"params": meta.unbox(params)}, jnp.asarray(tokens, jnp.int32)))
    assert np.abs(other - theirs).max() > 1e-3 * np.abs(theirs).max()  # the codes, not what they came from

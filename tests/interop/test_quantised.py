"""A language model whose kernels are codes, out as packed layers and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from effjax.compress.storage.binary_coding import BinaryCoding
from effjax.compress.storage.inputs import Static
from effjax.compress.storage.trees import boxed_like, stored_in
from effjax.compress.storage.uniform import Uniform
from effjax.errors import UsageError
from effjax.interop import (
    export,
    export_to,
    load_converted_variables,
    load_variables,
    save_converted,
)
from effjax.interop.load import family_of
from effjax.interop.packed import unpack
from effjax.layers.stored import kernels

LLAMA = "transformers:llama"
CONFIG = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    vocab_size=37,
)
MODEL = family_of(LLAMA).build(CONFIG)
TOKENS = jnp.arange(6, dtype=jnp.int32)[None]


@pytest.fixture(scope="module")
def drawn():
    return jax.jit(MODEL.init)(jax.random.key(0), TOKENS)["params"]


def stored(drawn, layout, only=("blocks/",), **others):
    chosen = {path: layout for path in kernels(drawn) if path.startswith(only)}
    layouts = chosen | {path.replace("__", "/"): other for path, other in others.items()}
    return meta.unbox(jax.jit(lambda: boxed_like(drawn, layouts))())


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert [x.dtype for x in jax.tree.leaves(a)] == [x.dtype for x in jax.tree.leaves(b)]


@pytest.mark.parametrize(
    ("form", "layout"),
    [
        ("gptq", Uniform(4, 16)),
        ("gptq", Uniform(3, 0)),
        ("gptq_v2", Uniform(2, 32, symmetric=False)),
        ("gptq_v2", Uniform(8, 16, symmetric=False, scale="bfloat16")),
        ("awq", Uniform(4, 32, symmetric=False)),
    ],
)
def test_there_and_back_to_the_bit(form, layout, drawn, tmp_path):
    params = stored(drawn, layout)
    files = export_to(tmp_path / "theirs", MODEL, params, LLAMA, quantised=form)
    assert files == ["model.safetensors", "config.json"]
    model, back = load_variables(LLAMA, tmp_path / "theirs")
    assert model == MODEL
    same(back["params"], params)
    save_converted(tmp_path / "ours", model, back, LLAMA, CONFIG)
    again, read, _ = load_converted_variables(tmp_path / "ours")
    assert again == model
    same(read, back)


def test_every_tensor_stands_for_the_weights_of_its_layer(drawn):
    """Against the rows of plain weights, which are tried on their own."""
    params = stored(drawn, Uniform(4, 16, symmetric=False))
    packed = export(MODEL, params, LLAMA, quantised="gptq_v2")
    plain = export(MODEL, params, LLAMA, quantised="whole")
    names = [name for name in packed if name.endswith(".qweight")]
    assert len(names) == 14
    for name in names:
        layer = name.removesuffix(".qweight")
        parts = {part: packed[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        np.testing.assert_array_equal(unpack(parts, "gptq_v2").weights().T, plain[f"{layer}.weight"])
    assert {name for name in packed if "norm" in name} == {name for name in plain if "norm" in name}


def test_weights_may_be_read_whole(drawn, tmp_path):
    params = stored(drawn, Uniform(4, 16))
    export_to(tmp_path / "theirs", MODEL, params, LLAMA, quantised="gptq")
    _, whole = load_variables(LLAMA, tmp_path / "theirs", quantised="whole")
    assert not stored_in(whole["params"])
    kernel = params["blocks"]["ffn"]["contract"]["kernel"]
    np.testing.assert_array_equal(
        whole["params"]["blocks"]["ffn"]["contract"]["kernel"], kernel.whole(jnp.float32)
    )
    run = jax.jit(MODEL.apply)
    np.testing.assert_allclose(run(whole, TOKENS), run({"params": params}, TOKENS), atol=1e-5)


def test_the_configuration_says_what_is_packed_and_how(drawn, tmp_path):
    def written(params, form, name):
        export_to(tmp_path / name, MODEL, params, LLAMA, quantised=form)
        return json.loads((tmp_path / name / "config.json").read_text())

    config = written(stored(drawn, Uniform(4, 16)), "gptq", "a")
    assert family_of(LLAMA).build(config) == MODEL
    told = dict(
        bits=4, group_size=16, quant_method="gptq", checkpoint_format="gptq", sym=True, desc_act=False
    )
    assert config["quantization_config"] == told
    config = written(stored(drawn, Uniform(4, 0), ("blocks/mixer",)), "awq", "b")
    told = config["quantization_config"]
    assert told["group_size"] == -1
    assert told["modules_to_not_convert"] == [
        f"model.layers.{layer}.mlp.{part}_proj" for part in ("gate", "up", "down") for layer in (0, 1)
    ]
    mixed = stored(drawn, Uniform(4, 16), blocks__ffn__contract__kernel=Uniform(8, 32))
    told = written(mixed, "gptq", "c")["quantization_config"]
    assert told["dynamic"] == {
        rf"+:^model\.layers\.{layer}\.mlp\.down_proj$": {"bits": 8, "group_size": 32, "sym": True}
        for layer in (0, 1)
    }
    same(load_variables(LLAMA, tmp_path / "c")[1]["params"], mixed)
    some = written(stored(drawn, Uniform(4, 16), ("blocks/mixer",)), "gptq", "d")["quantization_config"]
    assert [[name] for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")] == some[
        "modules_in_block_to_quantize"
    ][:3]
    assert r"-:^model\.layers\.1\.mlp\.up_proj$" in some["dynamic"]


def test_what_cannot_be_packed_names_the_way_out(drawn):
    def refused(params, form="gptq_v2", target=LLAMA):
        with pytest.raises(UsageError) as error:
            export(MODEL, params, target, quantised=form)
        return str(error.value)

    codes = stored(drawn, Uniform(4, 16))
    assert "14 kernels" not in (said := refused(codes, None))
    assert "7 kernels, blocks/ffn/contract/kernel among them" in said
    assert "--quantised=gptq, gptq_v2 or awq" in said
    assert "it can be gptq, gptq_v2, awq, whole" in refused(codes, "gguf")
    assert "is a format of transformers" in refused(codes, target="timm:vit_tiny_patch16_224")
    assert "no kernel is stored in codes" in refused(meta.unbox(drawn))
    signs = stored(drawn, BinaryCoding(2, 16, 0, tables=False))
    assert "which no packed layer can be. --quantised=whole" in refused(signs)
    assert "rounds what enters" in refused(stored(drawn, Uniform(8, 0, inputs=Static())))
    assert "embedding is a table" in refused(stored(drawn, Uniform(4, 16), ("embedding",)))
    assert "lm_head" not in export(MODEL, signs, LLAMA, quantised="whole")
    mixed = stored(drawn, Uniform(4, 16), blocks__ffn__contract__kernel=Uniform(4, 32))
    with pytest.raises(UsageError, match="awq has one layout"):
        export_to("unused", MODEL, mixed, LLAMA, quantised="awq")


def test_what_is_packed_otherwise_is_refused_or_read_whole(drawn, tmp_path):
    params = stored(drawn, Uniform(4, 16))
    tensors = export(MODEL, params, LLAMA, quantised="gptq")
    config = {**CONFIG, "quantization_config": dict(quant_method="gptq", bits=4, group_size=16, sym=True)}
    same(load_variables(LLAMA, tensors, config)[1]["params"], params)
    with pytest.raises(UsageError, match="gptq, gptq_v2 and awq"):
        load_variables(LLAMA, tensors, {**CONFIG, "quantization_config": dict(quant_method="bitsandbytes")})
    name = "model.layers.1.mlp.up_proj"
    turned = {**tensors, f"{name}.g_idx": tensors[f"{name}.g_idx"][::-1].copy()}
    with pytest.raises(UsageError, match="desc_act"):
        load_variables(LLAMA, turned, config)
    _, whole = load_variables(LLAMA, turned, config, quantised="whole")
    kernel = unpack(
        {part: turned[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}, "gptq"
    )
    np.testing.assert_array_equal(whole["params"]["blocks"]["ffn"]["expand"]["kernel"][1], kernel.weights())
    lacking = {key: array for key, array in tensors.items() if key != f"{name}.scales"}
    with pytest.raises(UsageError, match="up_proj has a qweight and no scales"):
        load_variables(LLAMA, lacking, config)
    eight = export(MODEL, stored(drawn, Uniform(8, 16)), LLAMA, quantised="gptq")
    other = {key: eight[key] if key.startswith(name) else array for key, array in tensors.items()}
    with pytest.raises(UsageError, match="the layers of one stack have one layout"):
        load_variables(LLAMA, other, config)

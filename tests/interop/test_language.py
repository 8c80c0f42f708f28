"""Configurations of transformers' language models: two generations of the same words, and what is refused."""

import jax
import numpy as np
import pytest

from effjax.errors import UsageError
from effjax.interop.families import FAMILIES
from effjax.interop.families.brands import BRANDS
from effjax.interop.load import leaf_specs
from effjax.interop.names import resolve
from effjax.matching import named_leaves
from effjax.mixers.rotary import Linear, Llama3, LongRope, Yarn
from effjax.models.lm import Layer

CONFIG = dict(
    hidden_size=16,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=20,
    vocab_size=11,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
)
LLAMA3 = dict(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=32)


def build(kind, **fields):
    return FAMILIES[f"transformers:{kind}"].build({**CONFIG, **fields})


@pytest.mark.parametrize("kind", BRANDS)
def test_every_family_names_all_of_its_parameters(kind):
    family = FAMILIES[f"transformers:{kind}"]
    model = family.build({**CONFIG, "hidden_size": 32, "head_dim": 8})
    leaves = named_leaves(leaf_specs(model, family.inputs(model, CONFIG)))
    for spell in (family.names, *family.spellings):
        resolve(spell(model), leaves)


def test_both_generations_of_rotary_settings_mean_the_same():
    older = build("llama", rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3})
    newer = build("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    assert older == newer
    assert older.block.mixer.rotary_scaling == Llama3(8.0, 1.0, 4.0, 32)
    older = build("llama", rope_scaling={"type": "linear", "factor": 2})
    assert older.block.mixer.rotary_scaling == Linear(2.0)
    stretched = dict(max_position_embeddings=64, rope_scaling={"type": "yarn", "factor": 4.0})
    assert build("qwen2", **stretched).block.mixer.rotary_scaling == Yarn(4.0, 64)
    factors = dict(short_factor=[1, 2], long_factor=[3, 4])
    found = build(
        "phi3",
        rope_scaling={"type": "su", **factors},
        original_max_position_embeddings=16,
        max_position_embeddings=64,
    ).block.mixer.rotary_scaling
    assert found == LongRope((1.0, 2.0), (3.0, 4.0), 16, np.sqrt(1 + np.log(4) / np.log(16)))


def test_gemma3_rescales_its_whole_layers_alone_in_both_generations():
    scaling = {"rope_type": "linear", "factor": 8.0}
    older = build(
        "gemma3_text", rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=scaling, sliding_window=5
    )
    newer = build(
        "gemma3_text",
        sliding_window=5,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_theta": 1e6, **scaling},
        },
    )
    assert older == newer
    assert older.layers == (Layer(5, 1e4),) * 5 + (Layer(None, 1e6, Linear(8.0)),)


def test_windows_stand_where_the_configuration_puts_them():
    assert build("mistral").block.mixer.window == 4096
    assert build("mistral", sliding_window=None).block.mixer.window is None
    assert build("qwen2", sliding_window=7).block.mixer.window is None  # use_sliding_window is false
    late = build("qwen2", sliding_window=7, use_sliding_window=True, max_window_layers=4)
    assert [layer.window for layer in late.layers] == [None] * 4 + [7] * 2
    given = ["full_attention", "sliding_attention"] * 3
    assert [layer.window for layer in build("gemma2", layer_types=given).layers] == [None, 4096] * 3
    silent = build("smollm3", num_hidden_layers=4).layers  # every fourth layer turns nothing
    assert [layer.rotary_base for layer in silent] == [2e6] * 3 + [None]


def test_unknown_settings_are_named():
    with pytest.raises(UsageError, match="lacks hidden_size, vocab_size"):
        build("llama", hidden_size=None, vocab_size=None)
    with pytest.raises(UsageError, match="rope_type is 'spiral'"):
        build("llama", rope_scaling={"rope_type": "spiral"})
    with pytest.raises(UsageError, match=r"activation 'gelo' is not known here\. Did you mean 'gelu"):
        build("llama", hidden_act="gelo")
    with pytest.raises(UsageError, match="layers with and without experts"):
        build("qwen2_moe", mlp_only_layers=[0])
    with pytest.raises(UsageError, match="layer 0 is of type 'chunked_attention'"):
        build("olmo3", layer_types=["chunked_attention"] * 6)
    with pytest.raises(UsageError, match=r"lacks n_embd, n_layer, n_head: give the content of config\.json"):
        FAMILIES["transformers:gpt2"].build({"vocab_size": 5})


def test_published_parameter_counts():
    """GPT-2, 124M with the tied head; Mistral 7B and Mixtral 8x7B, 46.7B; from their config.json."""
    heads = dict(num_heads=24, head_dim=64, n_groups=1, tie_word_embeddings=True)
    wide = dict(hidden_size=4096, intermediate_size=14_336, num_attention_heads=32, num_key_value_heads=8)
    wide |= dict(num_hidden_layers=32, vocab_size=32_000)
    sizes = {
        "gpt2": (dict(n_embd=768, n_layer=12, n_head=12, vocab_size=50_257), 124_439_808),
        "mistral": (wide, 7_241_732_096),
        "mixtral": ({**wide, "num_local_experts": 8, "num_experts_per_tok": 2}, 46_702_792_704),
        "mamba": (dict(hidden_size=768, num_hidden_layers=24, vocab_size=50_280), 129_135_360),
        "mamba2": (dict(hidden_size=768, num_hidden_layers=24, vocab_size=50_288, **heads), 128_989_632),
    }
    for kind, (config, parameters) in sizes.items():
        family = FAMILIES[f"transformers:{kind}"]
        model = family.build(config)
        leaves = jax.tree.leaves(leaf_specs(model, family.inputs(model, config)))
        assert sum(leaf.size for leaf in leaves) == parameters, kind

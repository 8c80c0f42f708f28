"""What language models do besides one forward pass: greedy decoding, stacks of experts, bare checkpoints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from effjax.decoding.generate import generate
from effjax.decoding.sampling import Sampling
from effjax.interop import load_pretrained
from tests.parity.case import original, state
from tests.parity.cases_language import MAMBA_130M, TOYS

DECODED = [
    "gpt2",
    "llama",
    "llama_dynamic",
    "mistral",
    "mixtral",
    "mamba",
    "falcon_mamba",
    "mamba2",
    "olmo2",
    "gemma3",
]


def test_mamba_130m_agrees_in_both_precisions():
    """transformers' float32 against our float64 is their rounding; against our float32, both roundings."""
    case = MAMBA_130M
    module = original(case)
    (tokens,) = case.inputs(np.random.default_rng(1))
    with torch.no_grad():
        theirs = case.call(module, torch.from_numpy(tokens)).numpy()
    model, params = load_pretrained(case.source, case.tensors(module), case.config)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        exact = np.asarray(jax.jit(model.apply)({"params": double}, tokens))
    single = np.asarray(jax.jit(model.apply)({"params": params}, tokens))
    assert np.abs(theirs - exact).max() < 1e-4 * np.abs(theirs).max()
    assert np.abs(theirs - single).max() < 1e-4 * np.abs(theirs).max()


LAST_NORM = {"transformer": "transformer.ln_f.weight", "model": "model.norm.weight"}
LAST_NORM["backbone"] = "backbone.norm_f.weight"


@pytest.mark.parametrize("name", DECODED)
def test_greedy_decoding_writes_the_same_tokens(name):
    case, new = TOYS[name], 24
    module = original(case)
    with torch.no_grad():  # a last norm of any sign: a tied head would else repeat the last token for ever
        last = dict(module.named_parameters())[LAST_NORM[module.base_model_prefix]]
        last.copy_(4 * torch.randn(last.shape, generator=torch.Generator().manual_seed(5)))
    prompt = np.random.default_rng(3).integers(0, 37, (3, 9))
    tokens = torch.from_numpy(prompt)
    mask = torch.ones_like(tokens)
    theirs = module.generate(
        tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    model, params = load_pretrained(case.source, case.tensors(module), case.config)
    model = model.clone(max_length=None)
    ours = generate(
        model,
        {"params": params},
        jnp.asarray(prompt, jnp.int32),
        jnp.full(3, prompt.shape[1]),
        new,
        jax.random.key(0),
        Sampling(temperature=0.0),
    )
    theirs = theirs.numpy()[:, prompt.shape[1] :]
    assert len(np.unique(theirs)) > 3
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "qwen2_moe", "gpt_neox"])
def test_memory_and_checkpoint_names_give_the_same_parameters(name):
    """transformers 5 stacks experts, and renames GPT-NeoX's head, in memory alone."""
    case = TOYS[name]
    module = original(case)
    assert state(module).keys() != case.tensors(module).keys()
    _, of_memory = load_pretrained(case.source, state(module), case.config)
    _, of_checkpoint = load_pretrained(case.source, case.tensors(module), case.config)
    jax.tree.map(np.testing.assert_array_equal, of_memory, of_checkpoint)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "mamba", "gemma2"])
def test_a_model_without_its_head_loads_where_the_head_is_tied(name):
    case = TOYS[name]
    module = original(case)
    _, whole = load_pretrained(case.source, state(module), case.config)
    _, bare = load_pretrained(case.source, state(module.base_model), case.config)
    jax.tree.map(np.testing.assert_array_equal, whole, bare)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "mixtral", "mamba", "phi3_longrope"])
def test_a_saved_folder_loads(name, tmp_path):
    """What `save_pretrained` writes, config.json included."""
    case = TOYS[name]
    module = original(case)
    module.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    model, params = load_pretrained(case.source, tmp_path, config)
    wanted, expected = load_pretrained(case.source, state(module), case.config)
    assert model == wanted
    jax.tree.map(np.testing.assert_array_equal, params, expected)

"""The choice against transformers' Llama: last query and keys of one layer, as it rotates them."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.llama import modeling_llama

from effjax.decoding.gemfilter import GemFilter, compress, scores
from effjax.interop import load_pretrained
from tests.parity.case import original
from tests.parity.cases_language import TOYS


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_linear"])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_choice_is_that_of_a_whole_forward_pass_of_llama(name, layer, monkeypatch):
    case = TOYS[name]
    module = original(case).double()
    seen, attend = [], modeling_llama.eager_attention_forward

    def watched(module, query, key, value, *given, **options):
        seen.append((query, key))
        return attend(module, query, key, value, *given, **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", watched)
    prompt = np.random.default_rng(3).integers(0, 37, (1, 40)).astype(np.int32)
    with torch.no_grad():
        module(torch.from_numpy(prompt).long(), use_cache=False)
        query, key = seen[layer]  # [1, H, N, D], [1, G, N, D]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        theirs = (query[:, :, -1:] @ key.transpose(2, 3))[:, :, 0].sum(1, keepdim=True)  # [1, 1, N]
        pooled = torch.nn.functional.avg_pool1d(theirs, 5, stride=1, padding=2)
        places = pooled[0, 0].topk(12).indices.sort().values.numpy()

    model, params = load_pretrained(case.source, case.tensors(original(case)), case.config)
    variables, lengths = {"params": params}, jnp.array([40])
    ours = scores(model, variables, jnp.asarray(prompt), lengths, layer)
    np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=1e-4, atol=1e-4)
    tokens, _ = compress(model, variables, prompt, lengths, GemFilter(layer, 12))
    np.testing.assert_array_equal(tokens[0], prompt[0, places])

"""Bits a byte: of the same text and the same bits, however the tokenizer cuts it."""

import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax.config import build
from effjax.train.evaluators import Metrics
from effjax.train.tasks.language import Language
from effjax.train.tasks.mean import Mean

TEXTS = ["the cat and the dog", "café and the hat", "the"]
BYTES = sum(len(text.encode()) + 1 for text in TEXTS) - 1  # a separator ends each document but the last


@pytest.fixture(params=["bytes", "tokenizer_file"])
def data(request, tmp_path):
    lines = tmp_path / "texts.jsonl"
    lines.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    tokenizer = dict(kind=request.param)
    if request.param == "tokenizer_file":
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=290, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
        )
        model.train_from_iterator(TEXTS * 9, trainer)
        model.save(str(tmp_path / "tokenizer.json"))
        tokenizer["path"] = str(tmp_path / "tokenizer.json")
    source = dict(kind="jsonl", path=str(lines))
    return dict(source=source, packing=dict(length=7, tokenizer=tokenizer), batch_size=4, threads=0)


def test_bits_a_byte_are_all_bits_over_all_bytes(data):
    """A model that needs `1 + target / 100` nats for each token."""
    spent = []

    def metrics(variables, batch):
        weights = batch["weights"] * batch["mask"][:, None]
        nats = 1.0 + batch["targets"].astype(jnp.float32) / 100.0
        spent.append(float(jnp.sum(nats * weights)))
        return {"loss": Mean.of(nats, weights)}

    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    program = types.SimpleNamespace(
        task=Language(nn.Module()), metrics=metrics, batch_sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    evaluator = build(Metrics, dict(data=data, every="1 steps"), "config.evaluators.test").open(
        lambda *_: None
    )
    found = evaluator(program, {}, lambda: None)
    assert found["bits_per_byte"] == pytest.approx(sum(spent) / np.log(2.0) / BYTES, rel=1e-6)
    same = found["bits_per_byte"] == pytest.approx(found["bits_per_token"])
    assert same == (data["packing"]["tokenizer"]["kind"] == "bytes")


def test_it_runs_no_further_ahead_of_the_devices_than_two_batches(data):
    """On several devices of one CPU an evaluation that ran ahead without bound never came to its end."""

    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 20, lambda _, x: jnp.tanh(x @ x), x)

    begun = []

    def metrics(variables, batch):
        assert all(result.is_ready() for result in begun[:-2])
        begun.append(slow(jnp.full((400, 400), 0.01)))
        return {"loss": Mean.of(begun[-1])}

    slow(jnp.zeros((400, 400))).block_until_ready()
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    program = types.SimpleNamespace(
        task=Language(nn.Module()), metrics=metrics, batch_sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    data = data | dict(batch_size=1, packing=data["packing"] | dict(length=2))
    evaluator = build(Metrics, dict(data=data, every="1 steps"), "config.evaluators.test").open(
        lambda *_: None
    )
    evaluator(program, {}, lambda: None)
    assert len(begun) > 4

"""The driver's own part: text in, text out, and what it refuses. Decoding itself is tested in its room."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from effjax.data.text import Bytes
from effjax.decoding.sampling import Sampling
from effjax.errors import UsageError
from effjax.ffn import Gated
from effjax.mixers import Attention
from effjax.models.lm import LM, DecoderBlock
from experiments.run.writing import continuation


def chain(following):
    """A model that answers each byte with the one `following` names: its blocks add nothing."""
    model = LM(DecoderBlock(Attention(2, causal=True), Gated(8)), vocab=256, dim=256, depth=1, max_length=16)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)["params"]
    params["norm"]["scale"] = jnp.ones(256)
    params["embedding"] = jnp.eye(256)
    for now, then in following.items():
        params["head"] = params["head"].at[ord(then), ord(now)].set(1.0)
    return model, {"params": params}


def write(following, prompt, max_new):
    model, variables = chain(following)
    greedy = Sampling(temperature=0.0)
    return continuation(model, variables, Bytes(), prompt, max_new, greedy, jax.random.key(0))


def test_it_writes_on_and_stops_at_the_end_of_the_document():
    following = {"a": "b", "b": "c", "c": "\0", "\0": "a"}
    assert write(following, "xa", 9) == "bc"
    assert write(following, "xb", 1) == "c"


def test_the_prompt_may_be_any_text():
    assert write({chr(0xA9): "!", "!": "\0"}, "é", 5) == "!"  # 0xA9 is the last byte of "é"


@pytest.mark.parametrize(
    ("prompt", "max_new", "message"),
    [
        ("", 1, "--prompt is empty"),
        ("éé", 12, r"a prompt of 5 tokens exceeds the 16 .* give --max_new=11 or less"),
        ("long" * 4, 1, "give a shorter --prompt"),
        ("a", 0, "max_new is 0"),
    ],
)
def test_bad_requests_are_named(prompt, max_new, message):
    with pytest.raises(UsageError, match=message):
        write({}, prompt, max_new)


def drive(*arguments):
    command = [sys.executable, "-m", "experiments.generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_names_every_flag():
    shown = drive("--help")
    assert shown.returncode == 0
    for flag in ("workdir", "prompt", "max_new", "temperature", "top_k", "top_p", "seed", "step"):
        assert f"--{flag}=" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt=a",), "--workdir is missing"),
        (("--workdir=nowhere", "--prompt=a"), "--workdir='nowhere' holds no run"),
        (("--workdir=nowhere", "--prompt=a", "--top_p=0"), "top_p is 0.0"),
        (("--workdir=nowhere", "--prompt=a", "--temperature=-1"), "temperature is -1.0"),
    ],
)
def test_a_wrong_command_ends_in_one_line(arguments, message):
    said = drive(*arguments)
    assert said.returncode == 2
    assert message in said.stderr
    assert said.stderr.count("\n") == 1

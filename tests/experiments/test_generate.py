"""The driver's own part: text in, text out, and what it refuses. Decoding itself is tested in its room."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from flax.core import meta

from effjax.data.text import Bytes
from effjax.decoding.beam import Beams
from effjax.decoding.gemfilter import GemFilter
from effjax.decoding.policies.window import Window
from effjax.decoding.sampling import Sampling
from effjax.errors import UsageError
from effjax.ffn import Gated
from effjax.mixers import Attention
from effjax.mixers.unified_softmax import UnifiedSoftmax
from effjax.models.lm import LM, DecoderBlock
from experiments.run.drafting import Drafting
from experiments.run.shortcuts import Shortcuts
from experiments.run.writing import continue_texts, figures


def chain(following, vocab=256):
    """A model that answers each byte with the one `following` names: its blocks add nothing."""
    block = DecoderBlock(Attention(2, causal=True), Gated(8))
    model = LM(block, vocab=vocab, dim=256, depth=1, max_length=16)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)["params"]
    params["norm"]["scale"] = jnp.ones(256)
    params["embedding"] = jnp.eye(vocab, 256)
    for now, then in following.items():
        params["head"] = params["head"].at[ord(then), ord(now)].set(1.0)
    return model, {"params": params}


GREEDY = Sampling(temperature=0.0)


def write(following, *prompts, max_new, how=GREEDY, vocab=256, **shortcuts):
    model, variables = chain(following, vocab)
    made = Shortcuts(**shortcuts)
    return continue_texts(model, variables, Bytes(), prompts, max_new, how, jax.random.key(0), made)


CIRCLE = {"a": "b", "b": "c", "c": "\0", "\0": "a"}


def test_it_writes_on_and_stops_at_the_end_of_the_document():
    assert write(CIRCLE, "xa", max_new=9).texts == ("bc",)
    assert write(CIRCLE, "xb", max_new=1).texts == ("c",)


def test_several_prompts_are_written_on_at_once_and_it_says_what_that_took():
    written = write(CIRCLE, "x", "xb", "xxxa", max_new=4)
    assert written.texts == ("", "c", "bc")
    assert written.tokens == 1 + 2 + 3  # the end of each counts
    assert 0 < written.first_token_seconds < written.seconds
    assert written.compile_seconds > 0
    # Keys and values of 256 channels, the positions of 5 + 4 - 1 slots of 3 texts, and a counter.
    assert written.cache_bytes == 3 * 8 * (2 * 256 + 1) * 4 + 4
    shown = figures(written)
    assert shown["tokens written"] == "6"
    assert shown["time to first token"].endswith("(compiled)")
    assert shown["caches"] == "49.25kB"


def test_beams_find_the_likeliest_text():
    written = write(CIRCLE, "xa", "b", max_new=6, how=Beams(3))
    assert written.texts == ("bc", "c")
    assert written.tokens == 5
    assert "time to first token" not in figures(written)


@pytest.mark.parametrize("drafting", [Drafting(layers=(0,), tokens=2), Drafting(words=2, tokens=2)])
def test_a_draft_proposes_and_the_texts_stay(drafting):
    written = write({**CIRCLE, "c": "a"}, "xabc", "xxb", max_new=9, drafting=drafting)
    assert written.texts == ("abcabcabc", "cabcabcab")
    assert written.tokens == 18
    if drafting.layers:
        assert written.acceptance == 1.0
        assert written.tokens_per_call == 3.0
        assert written.first_tokens == 6
        # Model and draft have slots for the text, 5 + 9 - 1, and for proposals, 2 + 1; and a count a text.
        assert written.cache_bytes == 2 * 2 * (16 * (2 * 256 + 1) + 1) * 4 + 2 * (4 + 1)
    shown = figures(written)
    assert float(shown["tokens a step"]) > 1.5
    assert shown["proposals accepted"].endswith("%")
    assert "tokens a step" not in figures(write(CIRCLE, "xa", max_new=9))


def test_a_run_may_be_the_draft(monkeypatch):
    model, variables = chain({**CIRCLE, "b": "x"})

    def load(workdir):
        assert workdir == "runs/small"
        data = types.SimpleNamespace(tokenizer=Bytes())
        return types.SimpleNamespace(data=data, task=types.SimpleNamespace(model=model)), variables

    monkeypatch.setattr("experiments.run.drafting.load_run", load)
    written = write(CIRCLE, "xa", "b", max_new=9, drafting=Drafting("runs/small"))
    assert written.texts == ("bc", "c")
    # Of `a` it knows what follows, and of `b` not; then of `c`.
    assert written.acceptance == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [(None, "holds no language model"), (types.SimpleNamespace(identity="other"), "another tokenizer")],
)
def test_a_draft_that_reads_something_else_is_refused(monkeypatch, tokenizer, message):
    program = types.SimpleNamespace(data=types.SimpleNamespace(tokenizer=tokenizer))
    monkeypatch.setattr("experiments.run.drafting.load_run", lambda workdir: (program, {}))
    with pytest.raises(UsageError, match=rf"--draft='runs/small' .*{message}"):
        write(CIRCLE, "a", max_new=4, drafting=Drafting("runs/small"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"words": 0}, "--draft_words=0: give 1 or more"),
        ({"run": "x", "tokens": 0}, "--draft_tokens=0: give 1 or more"),
        ({"tokens": 3}, "none of --draft, --draft_layers, --draft_words is given"),
        ({"run": "x", "words": 2}, "--draft and --draft_words are given"),
    ],
)
def test_one_draft_is_named(fields, message):
    with pytest.raises(UsageError, match=message):
        Drafting(**fields)


def test_drafts_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="layer 3 is not there: the model has the layers 0 to 0"):
        write(CIRCLE, "a", max_new=4, drafting=Drafting(layers=(0, 3)))
    with pytest.raises(UsageError, match="SimpleNamespace has no stack to leave layers out of"):
        Drafting(layers=(0,)).made(types.SimpleNamespace(), {}, Bytes())
    with pytest.raises(UsageError, match="--beams draws nothing"):
        write(CIRCLE, "a", max_new=4, how=Beams(2), drafting=Drafting(words=2))


def test_of_long_prompts_a_part_is_read():
    gems = Shortcuts.of(["gemfilter:layer=0,keep=3,recent=1"]).gems
    assert gems == GemFilter(0, 3, recent=1)
    written = write(CIRCLE, "xyxyxyxyxa", "b", max_new=4, gems=gems)
    assert written.texts == ("bc", "c")
    assert [len(text) for text in written.read] == [2, 1]  # and the separator, of equal scores the first
    assert written.read[0].endswith("a")
    # Two prompts of 3 + 4 - 1 slots.
    assert written.cache_bytes == 2 * 6 * (2 * 256 + 1) * 4 + 4
    assert write(CIRCLE, "a", max_new=4).read is None
    # What is read must fit with what is written, and the prompt by itself.
    assert write(CIRCLE, "x" * 14 + "a", max_new=9, gems=gems).texts == ("bc",)
    with pytest.raises(UsageError, match=r"a prompt of 17 tokens exceeds the 16 .* give a shorter --prompt"):
        write(CIRCLE, "x" * 16, max_new=1, gems=gems)


def test_a_policy_keeps_less():
    cache = Shortcuts.of(["window:budget=6,sinks=1"]).cache
    assert cache == Window(budget=6, sinks=1)
    assert write(CIRCLE, "xyxyxya", max_new=4, cache=cache).cache_bytes == 6 * (2 * 256 + 1) * 4 + 4
    assert write(CIRCLE, "xyxyxya", max_new=4, cache=cache).texts == ("bc",)
    with pytest.raises(UsageError, match="another method says that already"):
        Shortcuts.of(["window", "heavy_hitters"])


def test_the_softmax_may_be_summed_in_parts():
    asked = Shortcuts.of(["unified_softmax:phi=2,splits=3", "window:budget=6,sinks=1"])
    assert asked == Shortcuts(cache=Window(6, sinks=1), softmax=UnifiedSoftmax(2.0, splits=3))
    made = asked.model(chain(CIRCLE)[0])
    assert (made.block.mixer.unified, made.cache) == (asked.softmax, asked.cache)
    assert write(CIRCLE, "xyxyxya", max_new=4, softmax=asked.softmax).texts == ("bc",)


def test_the_prompt_may_be_any_text():
    assert write({chr(0xA9): "!", "!": "\0"}, "é", max_new=5).texts == ("!",)  # 0xA9 is the last byte of "é"


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
        write({}, "b", prompt, max_new=max_new)


def test_a_tokenizer_of_other_weights_is_refused():
    with pytest.raises(UsageError, match="the tokenizer has 256 tokens and the model 128"):
        write({}, "a", max_new=1, vocab=128)


def drive(*arguments):
    command = [sys.executable, "-m", "experiments.generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_names_every_flag():
    shown = drive("--help")
    assert shown.returncode == 0
    for flag in ("workdir", "prompt", "prompts", "max_new", "temperature", "top_k", "top_p", "min_p"):
        assert f"--{flag}=" in shown.stdout
    for flag in ("beams", "length_penalty", "method", "seed", "step"):
        assert f"--{flag}=" in shown.stdout
    for flag in ("draft", "draft_layers", "draft_words", "draft_tokens"):
        assert f"--{flag}=" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt=a",), "--workdir is missing"),
        (("--workdir=nowhere", "--prompt=a"), "--workdir='nowhere' holds no run"),
        (("--workdir=nowhere", "--prompt=a", "--top_p=0"), "top_p is 0.0"),
        (("--workdir=nowhere", "--prompt=a", "--temperature=-1"), "temperature is -1.0"),
        (("--workdir=nowhere", "--prompt=a", "--beams=0"), "beams is 0"),
        (("--workdir=nowhere",), "--prompt is missing"),
        (("--workdir=nowhere", "--prompt=a", "--method=gemfilter:keep=3"), "layer is missing"),
        (("--workdir=nowhere", "--prompt=a", "--method=gem"), "--method=gem.kind is 'gem', which is no kind"),
        (("--workdir=nowhere", "--prompts=nothing.txt"), "--prompts='nothing.txt' is no file"),
        (("--workdir=nowhere", "--prompt=a", "--draft_layers=0,b"), "--draft_layers: 'b' is no layer"),
        (("--workdir=nowhere", "--prompt=a", "--draft=x", "--beams=2"), "--beams draws nothing"),
    ],
)
def test_a_wrong_command_ends_in_one_line(arguments, message):
    said = drive(*arguments)
    assert said.returncode == 2
    assert message in said.stderr
    assert said.stderr.count("\n") == 1

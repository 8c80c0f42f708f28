import json

import pytest

from effjax.data.text import Bytes
from effjax.decoding.sampling import Sampling
from experiments.run.server.body import Served, parse
from experiments.run.server.problems import Problem, to_json

SERVED = Served("toy", Bytes(), ("all", "short"))


def read(**fields):
    return parse(json.dumps(fields).encode(), SERVED)


def test_what_is_left_out_is_as_openai_has_it():
    asked = read(prompt="ab")
    request = asked.request
    assert request.prompt == (0, 97, 98)  # the separator begins a document
    assert (request.max_new, request.sampling, request.cache) == (16, Sampling(1.0), "all")
    assert request.stop_tokens == {0}
    assert (asked.stops, asked.stream, asked.usage) == ((), False, False)
    assert read(prompt="ab").request.seed != request.seed


def test_every_field_is_read():
    asked = read(
        model="toy",
        prompt=[5, 6],
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=-4,
        stop=["x", "yz"],
        stop_token_ids=[9],
        stream=True,
        stream_options=dict(include_usage=True),
        cache="short",
        user="somebody",
        n=1,
        logprobs=None,
        echo=False,
    )
    assert asked.request.prompt == (5, 6)
    assert asked.request.sampling == Sampling(0.5, 7, 0.9, 0.1)
    assert (asked.request.seed, asked.request.cache) == (-4, "short")
    assert asked.request.stop_tokens == {0, 9}
    assert (asked.stops, asked.stream, asked.usage) == (("x", "yz"), True, True)
    assert read(prompt="a", stop="x", top_k=-1).request.sampling.top_k is None


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        (dict(), "prompt", "prompt is missing"),
        (dict(prompt=""), "prompt", "prompt is empty"),
        (dict(prompt=[]), "prompt", "prompt is empty"),
        (dict(prompt=7), "prompt", "give a text or a list of tokens"),
        (dict(prompt=["a", "b"]), "prompt", "a list of prompts"),
        (dict(prompt=[1, True]), "prompt", "give a list of tokens"),
        (dict(prompt=[1, -1]), "prompt", "give a list of tokens"),
        (dict(prompt="\ud800"), "prompt", "half of a surrogate pair"),
        (dict(prompt="a", max_tokens=0), "max_tokens", "at least 1"),
        (dict(prompt="a", max_tokens=True), "max_tokens", "at least 1"),
        (dict(prompt="a", max_tokens=1.5), "max_tokens", "at least 1"),
        (dict(prompt="a", temperature=-1), "temperature", "temperature is -1.0"),
        (dict(prompt="a", temperature="hot"), "temperature", "give a number"),
        (dict(prompt="a", temperature=10**400), "temperature", "give a number"),
        (dict(prompt="a", top_p=0), "top_p", "top_p is 0.0"),
        (dict(prompt="a", min_p=2), "min_p", "min_p is 2.0"),
        (dict(prompt="a", top_k=-2), "top_k", "0 or -1 for all"),
        (dict(prompt="a", seed=2**63), "seed", "64 bits"),
        (dict(prompt="a", stop=[""]), "stop", "1 to 256 characters"),
        (dict(prompt="a", stop=["a"] * 5), "stop", "up to 4"),
        (dict(prompt="a", stream="yes"), "stream", "give true or false"),
        (dict(prompt="a", stream_options={}), None, None),
        (dict(prompt="a", stream_options=dict(include_usage=True)), "stream_options", "set stream to true"),
        (dict(prompt="a", stream=True, stream_options=dict(x=1)), "stream_options", "include_usage"),
        (dict(prompt="a", n=2), "n", "n=2 is not supported"),
        (dict(prompt="a", logprobs=1), "logprobs", "logprobs=1 is not supported"),
        (dict(prompt="a", cache="shrt"), "cache", "Name one of: 'all', 'short'"),
        (dict(prompt="a", cache="window:budget=9"), "cache", "Name one of: 'all', 'short'"),
        (dict(prompt="a", max_tokes=5), "max_tokes", "Did you mean 'max_tokens'"),
        (dict(prompt="a", model="toi"), "model", "model 'toi' is not served"),
    ],
)
def test_what_is_wrong_is_named(fields, field, said):
    if said is None:
        read(**fields)
        return
    with pytest.raises(Problem, match=said) as found:
        read(**fields)
    assert found.value.field == field
    assert found.value.status == (404 if field == "model" else 400)
    assert json.loads(to_json(found.value.body()))["error"]["param"] == field


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'"x"',
        b"\xff",
        b'{"prompt": NaN}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(Problem, match="the body is no JSON") as found:
        parse(body, SERVED)
    assert found.value.status == 400


def test_answers_quote_little_and_always_have_bytes():
    for fields in (
        {"x" * 10_000: 1},
        {"prompt": "a", "model": "\ud800" * 999},
        {"prompt": {"a": [1] * 9999}},
    ):
        with pytest.raises(Problem) as found:
            read(**fields)
        assert len(to_json(found.value.body())) < 2000

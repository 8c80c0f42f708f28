"""What a client may send to `/v1/completions`, checked field by field."""

import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from effjax.data.text import Tokenizer
from effjax.decoding.sampling import Sampling
from effjax.decoding.serving.requests import Request
from effjax.errors import UsageError, did_you_mean
from experiments.run.server.problems import Problem, quoted

MOST_STOPS = 4
LONGEST_STOP = 256


@dataclasses.dataclass(frozen=True)
class Served:
    """What there is.

    Attributes:
      name: of the model.
      tokenizer: of the model.
      caches: names of the cache policies, the one that is taken by default first.
    """

    name: str
    tokenizer: Tokenizer
    caches: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request as it was asked.

    Attributes:
      request: for the engine.
      stops: strings that end the text.
      stream: whether the text is sent as it comes.
      usage: whether a stream ends with the counts.
    """

    request: Request
    stops: tuple[str, ...]
    stream: bool
    usage: bool


def parse(body: bytes, served: Served) -> Asked:
    """Reads a body.

    Raises:
      Problem: for anything that cannot be done as it is asked, naming the field.
    """
    fields = _object(body)
    if strange := [name for name in fields if name not in FIELDS]:
        near = did_you_mean(strange[0][:80], FIELDS)
        raise Problem(400, f"{quoted(strange[0])} is no field of a completion. {near}", strange[0][:80])
    # A null is a field left out.
    given = {name: read(name, fields[name]) for name, read in FIELDS.items() if fields.get(name) is not None}
    model, cache = given.get("model", served.name), given.get("cache", served.caches[0])
    if model != served.name:
        raise Problem(
            404, f"model {quoted(model)} is not served: {served.name!r} is.", "model", "model_not_found"
        )
    if cache not in served.caches:
        there = ", ".join(map(repr, served.caches))
        raise Problem(
            400, f"cache {quoted(cache)} is not served. Name one of: {there}.", "cache", "cache_not_found"
        )
    for name, value in ONLY.items():
        if name in given and given[name] != value:
            raise Problem(400, f"{name}={quoted(given[name])} is not supported: leave it out.", name)
    if "prompt" not in given:
        raise Problem(400, "prompt is missing: send a text or a list of tokens.", "prompt")
    prompt = given["prompt"]
    if isinstance(prompt, str):
        prompt = [served.tokenizer.separator, *served.tokenizer.encode(prompt.encode()).tolist()]
    try:
        sampling = Sampling(
            given.get("temperature", 1.0),
            given.get("top_k", -1) if given.get("top_k", -1) > 0 else None,
            given.get("top_p", 1.0),
            given.get("min_p", 0.0),
        )
    except UsageError as error:
        # The message begins with the name of the field.
        raise Problem(400, str(error), str(error).split()[0]) from None
    stop_tokens = frozenset({served.tokenizer.separator, *given.get("stop_token_ids", ())})
    request = Request(
        prompt=tuple(prompt),
        max_new=given.get("max_tokens", 16),
        sampling=sampling,
        seed=given.get("seed", secrets.randbits(32)),
        stop_tokens=stop_tokens,
        cache=cache,
    )
    stream = given.get("stream", False)
    options = given.get("stream_options", {})
    if options and not stream:
        raise Problem(400, "stream_options are those of a stream: set stream to true.", "stream_options")
    return Asked(request, given.get("stop", ()), stream, options.get("include_usage", False))


def _object(body: bytes) -> Mapping[str, Any]:
    def constant(name: str) -> float:
        raise ValueError(f"{name} is no number of JSON")

    try:
        fields = json.loads(body.decode(), parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is no JSON: {str(error)[:200]}.", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise Problem(400, 'the body is no JSON object: send {"prompt": "..."}.', code="invalid_json")
    return fields


def _wrong(name: str, value: Any, wanted: str) -> Problem:
    return Problem(400, f"{name} is {quoted(value)}: give {wanted}.", name)


def _whole(least: int, most: float, wanted: str) -> Callable[[str, Any], int]:
    def read(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _wrong(name, value, wanted)
        return value

    return read


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise _wrong(name, value, "a number")
    return float(value)


def _truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Problem(400, f"{name} holds half of a surrogate pair, which is no text.", name) from None
    return value


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(
        isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**31 for token in value
    ):
        raise _wrong(name, value, "a list of tokens")
    return tuple(value)


def _prompt(name: str, value: Any) -> str | tuple[int, ...]:
    if not isinstance(value, str | list):
        raise _wrong(name, value, "a text or a list of tokens")
    if not value:
        raise Problem(400, "prompt is empty: give at least one token to go on from.", name)
    if isinstance(value, list) and isinstance(value[0], str | list):
        raise Problem(400, "prompt is a list of prompts: send each in a request of its own.", name)
    return _text(name, value) if isinstance(value, str) else _tokens(name, value)


def _stops(name: str, value: Any) -> Sequence[str]:
    stops = [value] if isinstance(value, str) else value
    wanted = f"a string or up to {MOST_STOPS} of them, each of 1 to {LONGEST_STOP} characters"
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise _wrong(name, value, wanted)
    if not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops):
        raise _wrong(name, value, wanted)
    return tuple(stops)


def _options(name: str, value: Any) -> dict[str, bool]:
    if not isinstance(value, dict) or set(value) - {"include_usage"}:
        raise _wrong(name, value, '{"include_usage": true}')
    return {key: _truth(f"{name}.{key}", told) for key, told in value.items()}


def _anything(name: str, value: Any) -> Any:
    return value


FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "model": _text,
    "prompt": _prompt,
    "cache": _text,
    "max_tokens": _whole(1, 2**31 - 1, "a whole number of tokens, at least 1"),
    "temperature": _number,
    "top_p": _number,
    "top_k": _whole(-1, 2**30, "a whole number of tokens; 0 or -1 for all"),
    "min_p": _number,
    "seed": _whole(-(2**63), 2**63 - 1, "a whole number of 64 bits"),
    "stop": _stops,
    "stop_token_ids": _tokens,
    "stream": _truth,
    "stream_options": _options,
    "user": _anything,
    "n": _anything,
    "best_of": _anything,
    "echo": _anything,
    "logprobs": _anything,
    "suffix": _anything,
    "presence_penalty": _anything,
    "frequency_penalty": _anything,
    "logit_bias": _anything,
}

# Fields of OpenAI's that clients may send with the value that changes nothing.
ONLY: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": None,
    "suffix": "",
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
}

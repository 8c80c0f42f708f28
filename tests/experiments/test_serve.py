"""The server as its clients meet it, and what the driver refuses."""

import asyncio
import contextlib
import http.client
import json
import re
import signal
import socket
import threading
import time
import types

import numpy as np
import pytest

from effjax.data.text import Bytes
from effjax.decoding.policies.policy import Policy
from effjax.decoding.policies.window import Window
from effjax.decoding.serving.engine import Engine
from effjax.errors import RunError, UsageError
from experiments.run.server import process
from experiments.run.server.app import Limits, Stream
from experiments.run.server.body import Served
from experiments.run.server.service import Service
from experiments.run.serving import Sizes, make_engine, read_caches, read_key
from tests.experiments import serve_load
from tests.experiments.driver import drive, start
from tests.experiments.serve_load import HEADERS, ask, cases, gauges, leaked, load, total, toy_engine

TOY = dict(dim=32, depth=2, length=64)
ROWS, QUEUE = 4, 6
LIMITS = Limits(body=4000, seconds=1.5)


@pytest.fixture(scope="module")
def engine():
    held = toy_engine(ROWS, QUEUE, **TOY)
    for lane in held.lanes.values():
        lane.warm()
    return held


@contextlib.contextmanager
def serving(engine, limits=LIMITS):
    """A server in a thread; gives its address and what is told to stop it."""
    stop, listening = types.SimpleNamespace(requested=False), process.bind("127.0.0.1", 0)
    service, ready = Service(engine, Served("toy", Bytes(), tuple(engine.lanes))), threading.Event()
    failed = []

    def run():
        try:
            process.run(service, limits, listening, stop, 20.0, ready.set)
        except RunError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(60)
    try:
        yield types.SimpleNamespace(
            address=listening.getsockname(), stop=stop, thread=thread, failed=failed, service=service
        )
    finally:
        stop.requested = True
        thread.join(60)
        listening.close()


@pytest.fixture
def another(engine):
    """An engine with the same programs: two servers share none."""
    return Engine(engine.lanes, QUEUE)


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine) as running:
        yield running


@pytest.fixture
def address(server):
    yield server.address
    assert leaked(server.address) == 0


def call(address, method="POST", path="/v1/completions", body=None, headers=HEADERS):
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=60)) as connection:
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, sent, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers


def test_many_clients_get_what_each_gets_alone(address):
    bodies = cases(12, ["all", "short"], 64)
    expected = [ask(address, body) for body in bodies]
    assert len({text for text, *_ in expected}) > 6
    report = load(address, bodies, expected, clients=16, seconds=2.0, rude=0.3)
    assert report.wrong == []
    assert report.leaked == 0
    assert report.answered["whole"] > 5
    assert report.answered["streamed"] > 0
    assert report.answered["refused"] > 0  # 16 clients, 4 + 4 rows and a queue of 6


def test_an_answer_tells_what_it_took(address):
    body = dict(prompt="Return", max_tokens=9, temperature=0, cache="short")
    status, text, _ = call(address, body=body)
    told = json.loads(text)
    assert status == 200
    assert told["usage"] == dict(prompt_tokens=7, completion_tokens=9, total_tokens=16)
    assert (told["model"], told["cache"], told["object"]) == ("toy", "short", "text_completion")
    assert told["choices"][0]["finish_reason"] == "length"
    timings = told["timings"]
    assert 0 <= timings["queue_seconds"] <= timings["first_token_seconds"] <= timings["seconds"]
    # One page of 16 slots: keys and values of 2 heads of 8 channels in 2 layers, and the positions of a row.
    page = 2 * 2 * 16 * 2 * 8 * 4
    assert page < timings["cache_bytes"] < page + 1000


def test_tokens_are_a_prompt_and_seeds_repeat(address):
    text = dict(prompt="ab", max_tokens=12, temperature=2, seed=5)
    tokens = text | dict(prompt=[0, 97, 98])
    assert ask(address, text) == ask(address, tokens) == ask(address, tokens, stream=True)
    assert ask(address, text) != ask(address, text | dict(seed=6))


def test_a_stop_string_and_a_stop_token_end_the_text(address):
    body = dict(prompt="Return", max_tokens=30, temperature=1.5, seed=3)
    text, count, _ = ask(address, body)
    letters = [i for i, letter in enumerate(text) if letter.isascii() and text.index(letter) == i]
    at = next(i for i in letters if 2 < i < 20)
    for stream in (False, True):
        found = ask(address, body | dict(stop=text[at : at + 2]), stream)
        assert (found[0], found[2]) == (text[:at], "stop")
        assert found[1] < count
        found = ask(address, body | dict(stop_token_ids=[ord(text[at])]), stream)
        assert (found[0], found[2]) == (text[:at], "stop")


@pytest.mark.parametrize(
    ("status", "sent", "said"),
    [
        (400, dict(body=b"{"), "the body is no JSON"),
        (400, dict(body=dict(prompt=3)), "prompt is 3"),
        (400, dict(body=dict(prompt=[999])), "token 999 is unknown"),
        (400, dict(body=dict(prompt="a", cache="shrt")), "Name one of: 'all', 'short'"),
        (404, dict(body=dict(prompt="a", model="gpt")), "model 'gpt' is not served: 'toy' is"),
        (404, dict(method="GET", path="/v1"), "POST /v1/completions"),
        (405, dict(method="GET"), "Method Not Allowed"),
        (413, dict(body=dict(prompt="a" * 60)), "more than a sequence of 64 holds"),
        (413, dict(body=b" " * 4001), "larger than 4000 bytes"),
        (415, dict(body=b"{}", headers={}), "Content-Type: application/json"),
    ],
)
def test_a_wrong_request_is_answered_with_what_is_wrong(address, status, sent, said):
    found, body, _ = call(address, **sent)
    assert found == status
    assert said in json.loads(body)["error"]["message"]


def test_a_body_without_a_length_is_cut_as_well(address):
    chunks = (b" " * 1000 for _ in range(9))
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=60)) as connection:
        connection.request("POST", "/v1/completions", chunks, HEADERS, encode_chunked=True)
        status = connection.getresponse().status
    assert status == 413


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"", b""),
        (b"POST /v1/compl", b""),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: 50\r\n\r\n{",
            b"408",
        ),
        (b"\x16\x03\x01 what is this\r\n\r\n", b"400"),
    ],
    ids=["nothing", "half_a_head", "half_a_body", "no_http"],
)
def test_who_is_slow_or_speaks_no_http_is_let_go(address, sent, said):
    with socket.create_connection(address, timeout=30) as client:
        client.sendall(sent)
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := client.recv(999):
                found += piece
    assert said in found[:20]
    assert bool(said) == bool(found)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_row_and_pages(server, address, stream):
    before = gauges(address)
    body = json.dumps(dict(prompt="a", max_tokens=62, temperature=0, stream=stream)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    with slowed(server.service.engine):
        with socket.create_connection(address, timeout=30) as client:
            client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            while total(gauges(address), "running") == 0:
                time.sleep(0.01)
            assert total(gauges(address), "free_pages") == total(before, "pages") - 4
        assert leaked(address) == 0
    after = gauges(address)
    ended = 'effjax_requests_total{cache="all",end="cancelled"}'
    assert after[ended] == before.get(ended, 0) + 1
    assert total(after, "tokens_total") - total(before, "tokens_total") < 60


def test_who_takes_nothing_of_a_stream_is_let_go():
    """A send that never ends stands for a client that never reads."""

    class Endless:
        name, model, created, closed = "cmpl-1", "toy", 0, 0
        asked = types.SimpleNamespace(usage=False)
        answer = types.SimpleNamespace(request=types.SimpleNamespace(cache="all"))

        async def pieces(self):
            while True:
                yield "a"

        def close(self):
            self.closed += 1

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    completion = Endless()
    begun = time.monotonic()
    asyncio.run(Stream(completion, 0.1)({"type": "http"}, receive, send))
    assert completion.closed == 1
    assert time.monotonic() - begun < 5


@contextlib.contextmanager
def slowed(engine):
    """Every step takes its time: requests can be met while they run."""
    lane = engine.lanes["all"]
    advance = lane.advance

    def slow(alive):
        time.sleep(0.1)
        return advance(alive)

    lane.advance = slow
    try:
        yield
    finally:
        lane.advance = advance


def test_a_full_queue_says_when_to_come_again(server, address):
    body = json.dumps(dict(prompt="a", max_tokens=50, temperature=0)).encode()
    with contextlib.ExitStack() as clients:
        with paused(server.service.engine):
            for _ in range(ROWS + QUEUE):
                connection = clients.enter_context(
                    contextlib.closing(http.client.HTTPConnection(*address, timeout=60))
                )
                connection.request("POST", "/v1/completions", body, HEADERS)
            while total(told := gauges(address), "waiting") + total(told, "running") < ROWS + QUEUE:
                time.sleep(0.01)
            status, said, headers = call(address, body=body)
        assert status == 429
        assert 1 <= int(headers["retry-after"]) <= 60
        assert "6 requests wait, and 6 may" in json.loads(said)["error"]["message"]
        while total(gauges(address), "waiting"):
            time.sleep(0.01)
        assert call(address, body=body)[0] == 200


@contextlib.contextmanager
def paused(engine):
    """No step ends meanwhile."""
    lane, going = engine.lanes["all"], threading.Event()
    advance = lane.advance

    def held(alive):
        assert going.wait(60)
        return advance(alive)

    lane.advance = held
    try:
        yield
    finally:
        lane.advance = advance
        going.set()


def test_what_is_served_and_how_it_is(address):
    told = json.loads(call(address, "GET", "/v1/models")[1])["data"][0]
    assert (told["id"], told["caches"], told["max_length"]) == ("toy", ["all", "short"], 64)
    assert told["policies"]["short"] == repr(Window(48))
    assert call(address, "GET", "/health")[:2] == (200, b'{"status":"ok"}')
    assert gauges(address)['effjax_pages{cache="all"}'] == ROWS * 4


def test_a_recurrent_model_is_served_by_its_states():
    """Without a policy's name; under any it is refused."""
    model, variables = serve_load.toy_model(mixer="mamba", **TOY)
    held = make_engine(model, variables, Bytes(), {}, Sizes(rows=2))
    assert list(held.lanes) == ["state"]
    with serving(held) as running:
        bodies = [
            dict(prompt=text, max_tokens=9, temperature=0) for text in ("Return", "a", "the first of it")
        ]
        expected = [ask(running.address, body) for body in bodies]
        assert len({text for text, *_ in expected}) == 3
        report = load(running.address, bodies, expected, clients=4, seconds=0.5, rude=0.0)
        assert (report.wrong, report.leaked) == ([], 0)
        assert json.loads(call(running.address, "GET", "/v1/models")[1])["data"][0]["caches"] == ["state"]
        status, said, _ = call(running.address, body=dict(prompt="a", cache="window"))
        assert (status, b"Name one of: 'state'" in said) == (400, True)
    with pytest.raises(UsageError, match="Window chooses among keys and values, and Mamba keeps a state"):
        make_engine(model, variables, Bytes(), dict(short=Window(9)), Sizes())


def test_strangers_are_kept_out(another):
    limits = Limits(key="secret", hosts=frozenset({"127.0.0.1"}))
    with serving(another, limits) as running:
        address, key = running.address, {"Authorization": "Bearer secret"}
        body = dict(prompt="a", max_tokens=1)
        assert call(address, body=body)[0] == 401
        assert call(address, body=body, headers=HEADERS | {"Authorization": "Bearer Secret"})[0] == 401
        assert call(address, body=body, headers=HEADERS | key)[0] == 200
        assert call(address, "GET", "/metrics")[0] == 401
        assert call(address, "GET", "/health")[0] == 200
        assert call(address, "GET", "/health", headers={"Host": "page.example:80"})[0] == 403


def test_told_to_stop_it_answers_who_is_there_and_takes_nobody(another):
    with serving(another) as running, slowed(another):
        found = []
        body = dict(prompt="a", max_tokens=30, temperature=0)
        client = threading.Thread(target=lambda: found.append(ask(running.address, body, stream=True)))
        client.start()
        while total(gauges(running.address), "running") == 0:
            time.sleep(0.01)
        running.stop.requested = True
        while call(running.address, "GET", "/health")[0] == 200:
            time.sleep(0.01)
        assert call(running.address, body=body)[0] == 503
        client.join()
        assert found[0][1:] == (30, "length")
        running.thread.join(30)
        assert not running.thread.is_alive()
    assert running.failed == []


def test_an_engine_that_fails_ends_the_server_and_says_so(another):
    with serving(another) as running:
        lane = another.lanes["all"]
        advance = lane.advance
        lane.advance = lambda alive: 1 // 0
        try:
            assert call(running.address, body=dict(prompt="a"))[0] == 503
            running.thread.join(30)
        finally:
            lane.advance = advance
    assert "the engine failed, and the server with it: ZeroDivisionError" in str(running.failed[0])


def test_caches_are_named_on_the_command_line():
    assert read_caches(["all", "window:budget=32,sinks=1", "a-b=window:budget=16"]) == {
        "all": Policy(),
        "window": Window(32, sinks=1),
        "a-b": Window(16),
    }


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: read_caches(["windw"]), "Did you mean 'window'"),
        (lambda: read_caches(["all", "all"]), "there is a cache 'all' already"),
        (lambda: read_caches(["a=window:budget=2"]), "no window beside sinks=4"),
        (lambda: read_key("nowhere"), "--api_key_file='nowhere' is no file"),
        (lambda: process.bind("127.0.0.1", 99999), "--port=99999 cannot be listened to"),
        (
            lambda: make_engine(*serve_load.toy_model(**TOY), Bytes(), {}, Sizes(length=50)),
            "page=16 does not divide the 50 slots",
        ),
        (
            lambda: make_engine(*serve_load.toy_model(**TOY), Bytes(), {}, Sizes(length=80)),
            "longer than the 64 that the model is made for",
        ),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        make()


def test_only_this_machine_is_loopback():
    hosts = ["127.0.0.1", "127.9.9.9", "::1", "localhost", "0.0.0.0", "::", "192.168.0.1", "example.org", ""]
    assert [process.is_loopback(host) for host in hosts] == [True] * 4 + [False] * 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--workdir is missing"),
        (("--workdir=nowhere", "--port=0"), "--workdir='nowhere' holds no run"),
        (("--workdir=nowhere", "--host=0.0.0.0"), "--host=0.0.0.0 can be reached from other machines"),
        (("--workdir=nowhere", "--cache=windw"), "Did you mean 'window'"),
    ],
)
def test_a_wrong_command_ends_in_one_line(arguments, said):
    _, errors = drive("serve", *arguments, code=2)
    assert said in errors
    assert errors.count("\n") == 1


@pytest.mark.slow
def test_a_run_is_served_until_sigterm(tmp_path):
    drive("train", "--config=configs/language/lm.py:smoke", f"--workdir={tmp_path}/run")
    serving = start("serve", f"--workdir={tmp_path}/run", "--port=0", "--rows=2", "--name=smoke")
    try:
        said = serving.stdout.readline()
        address = ("127.0.0.1", int(re.fullmatch(r"serving smoke at http://127.0.0.1:(\d+)\n", said)[1]))
        text, count, _ = ask(address, dict(prompt="Return the ", max_tokens=20, temperature=0))
        written, _ = drive(
            "generate", f"--workdir={tmp_path}/run", "--prompt=Return the ", "--max_new=20", "--temperature=0"
        )
        assert written == f"Return the {text}\n"
        assert count == 20
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(60) == 0
        assert "SIGTERM received" in serving.stderr.read()
    finally:
        serving.kill()
        serving.communicate()


def test_load_counts_what_is_wrong(address):
    body = dict(prompt="a", max_tokens=3, temperature=0)
    report = load(address, [body], [("something else", 3, "length")], clients=1, seconds=0.2, rude=0.0)
    assert len(report.wrong) == sum(report.answered.values()) > 0
    assert np.isfinite(report.rate)

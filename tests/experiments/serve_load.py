"""Many clients at once, of whom some are rude: is every answer the one that its request gets alone?

    python -m tests.experiments.serve_load toy --clients=64 --seconds=120
    python -m tests.experiments.serve_load runs/lm --clients=64 --seconds=120 --rows=16

Asks every request once, one at a time, and then again and again by all clients together, while some leave in
the middle of an answer, send what is no JSON, or more than may be sent. Prints what was answered, what was
wrong, the pages that nobody gave back, and the tokens a second of both. Exits with 1 where anything is wrong.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEADERS = {"Content-Type": "application/json"}
WORDS = ["return", "the", "first", "element", "of", "a", "list", "whose", "items", "are", "given", "by"]
RUDE = ("leave", "vanish", "malformed", "unknown", "huge", "long")


@dataclasses.dataclass
class Report:
    """What came of it; `answered` by kind, `tokens` of answers that were compared."""

    answered: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    wrong: list = dataclasses.field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    leaked: int = 0

    @property
    def rate(self):
        return self.tokens / self.seconds


def cases(count, caches, length, seed=0):
    """Requests of many lengths; every fourth draws its tokens."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        prompt = " ".join(draw.choices(WORDS, k=draw.randint(1, max(length // 12, 1))))[: length // 2]
        body = dict(
            prompt=prompt, max_tokens=draw.randint(length // 8, length // 3), cache=caches[i % len(caches)]
        )
        body |= dict(temperature=0) if i % 4 else dict(temperature=0.9, top_p=0.95, seed=i)
        made.append(body)
    return made


def ask(address, body, stream=False):
    """Text, tokens and the reason of the end; or the status where it is refused."""
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=300)) as connection:
        if stream:
            body = body | dict(stream=True, stream_options=dict(include_usage=True))
        connection.request("POST", "/v1/completions", json.dumps(body), HEADERS)
        answer = connection.getresponse()
        if answer.status != 200:
            answer.read()
            return answer.status
        if not stream:
            told = json.loads(answer.read())
            return whole(told["choices"][0]["text"], told["usage"], told["choices"][0]["finish_reason"])
        lines = [line[6:] for line in answer.read().decode().splitlines() if line]
        assert lines.pop() == "[DONE]"
        events = [json.loads(line) for line in lines]
        choices = [choice for event in events for choice in event["choices"]]
        return whole("".join(c["text"] for c in choices), events[-1]["usage"], choices[-1]["finish_reason"])


def whole(text, usage, reason):
    return text, usage["completion_tokens"], reason


def be_rude(address, how, body, draw):
    """Does something that no client should; returns whether the server said the right thing."""
    if how == "malformed":
        return status(address, b'{"prompt": "a", ') == 400
    if how == "unknown":
        return status(address, json.dumps(body | dict(temprature=1)).encode()) == 400
    if how == "huge":
        return status(address, b'{"prompt": "' + b"a" * 2**21 + b'"}') in (413, None)
    if how == "long":
        return status(address, json.dumps(body | dict(max_tokens=10**6)).encode()) == 413
    text = json.dumps(body | dict(stream=how == "leave", max_tokens=body["max_tokens"])).encode()
    with socket.create_connection(address, timeout=60) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address[0]}\r\nContent-Length: {len(text)}\r\n"
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + text)
        if how == "leave":
            client.recv(draw.randint(1, 600))
        else:
            time.sleep(draw.random() * 0.2)
    return True


def status(address, body):
    """Of the answer; None where the server closed the connection on what it did not want to read."""
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=300)) as connection:
        try:
            connection.request("POST", "/v1/completions", body, HEADERS)
            answer = connection.getresponse()
        except (BrokenPipeError, ConnectionResetError):
            return None
        answer.read()
        return answer.status


def load(address, bodies, expected, clients, seconds, rude=0.1):
    """Asks for so long; returns a report."""
    report, lock = Report(), threading.Lock()
    until = time.monotonic() + seconds

    def client(number):
        draw = random.Random(number)
        while time.monotonic() < until:
            i, how, streams = draw.randrange(len(bodies)), draw.choice(RUDE), draw.random() < 0.3
            try:
                if draw.random() < rude:
                    kind, good, tokens = how, be_rude(address, how, bodies[i], draw), 0
                else:
                    found = ask(address, bodies[i], streams)
                    refused = found == 429
                    kind = "refused" if refused else "streamed" if streams else "whole"
                    good = refused or found == expected[i]
                    tokens = 0 if refused else expected[i][1]
            except Exception as error:
                kind, good, tokens, found = f"{how}: {error!r}", False, 0, None
            with lock:
                report.answered[kind] += 1
                report.tokens += tokens
                if not good:
                    report.wrong.append((kind, bodies[i]))
            if kind == "refused":
                time.sleep(draw.random())

    begun = time.monotonic()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report.seconds = time.monotonic() - begun
    report.leaked = leaked(address)
    return report


def gauges(address):
    """The metrics by name and labels."""
    with contextlib.closing(http.client.HTTPConnection(*address, timeout=60)) as connection:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    }


def total(told, name):
    return sum(value for key, value in told.items() if key.startswith(f"effjax_{name}{{"))


def leaked(address, patience=30.0):
    """Pages that are not free once nobody runs or waits."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        told = gauges(address)
        if total(told, "running") == total(told, "waiting") == 0:
            break
        time.sleep(0.05)
    return int(total(told, "pages") - total(told, "free_pages"))


@functools.cache
def toy_model(dim=256, depth=4, length=256, mixer="attention"):
    """A model of random weights, wide enough that its answers differ and its products take time."""
    import jax
    import jax.numpy as jnp
    from flax.core import meta

    from effjax.ffn import Gated
    from effjax.mixers import Attention, Mamba
    from effjax.models.lm import LM, DecoderBlock

    kinds = dict(attention=lambda: Attention(4, kv_heads=2, rotary_base=1e4, causal=True), mamba=Mamba)
    block = DecoderBlock(kinds[mixer](), Gated(2 * dim))
    model = LM(block, vocab=256, dim=dim, depth=depth, max_length=length)
    held = meta.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    # Logits of a fresh model hardly differ.
    return model, jax.tree.map(lambda leaf: leaf * (4.0 if leaf.ndim > 1 else 1.0), held)


def toy_engine(rows=8, queue=64, pages=None, page=16, **sizes):
    from effjax.data.text import Bytes
    from experiments.run.serving import Sizes, make_engine, read_caches

    caches = read_caches(["all", "short=window:budget=48"])
    model, variables = toy_model(**sizes)
    return make_engine(model, variables, Bytes(), caches, Sizes(rows, page, pages, None, queue))


def serve_toy(rows, queue):
    """The process of a server of the toy."""
    from effjax.data.text import Bytes
    from experiments.run.server import process
    from experiments.run.server.app import Limits
    from experiments.run.server.body import Served
    from experiments.run.server.service import Service
    from experiments.run.signals import StopFlag

    stop, listening = StopFlag().install(), process.bind("127.0.0.1", 0)
    engine = toy_engine(rows, queue)
    for lane in engine.lanes.values():
        lane.warm()
    service = Service(engine, Served("toy", Bytes(), tuple(engine.lanes)))
    port = listening.getsockname()[1]
    ready = functools.partial(print, f"serving toy at http://127.0.0.1:{port}", flush=True)
    process.run(service, Limits(), listening, stop, 10.0, ready)


@contextlib.contextmanager
def server(of, rows, queue):
    """A server in a process of its own; gives its address."""
    if of == "toy":
        command = ["tests.experiments.serve_load", "toy", "--serve"]
    else:
        command = ["experiments.serve", f"--workdir={of}", "--port=0"]
        command += ["--cache=all", "--cache=short=window:budget=64"]
    command = [sys.executable, "-m", *command, f"--rows={rows}", f"--queue={queue}"]
    # Without it JAX looks for chips, and says at length that there are none.
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        port = process.stdout.readline().rsplit(":", 1)[-1]
        yield "127.0.0.1", int(port)
    finally:
        process.terminate()
        print(f"the server ended with {process.wait(60)}")


def main():
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    flags.add_argument("of", help="folder of a run, or 'toy'")
    flags.add_argument("--clients", type=int, default=64)
    flags.add_argument("--seconds", type=float, default=120)
    flags.add_argument("--alone", type=float, default=20, help="seconds of one client, to compare with")
    flags.add_argument("--rows", type=int, default=8)
    flags.add_argument("--queue", type=int, default=64)
    flags.add_argument("--length", type=int, default=256)
    flags.add_argument("--serve", action="store_true", help="be the server of the toy")
    given = flags.parse_args()
    if given.serve:
        serve_toy(given.rows, given.queue)
        return 0
    with server(given.of, given.rows, given.queue) as address:
        bodies = cases(48, ["all", "short"], given.length)
        expected = [ask(address, body) for body in bodies]
        print(f"{len({text for text, *_ in expected})} different answers to {len(bodies)} requests")
        one = load(address, bodies, expected, 1, given.alone, rude=0.0)
        many = load(address, bodies, expected, given.clients, given.seconds)
    for name, report in (("one client", one), (f"{given.clients} clients", many)):
        print(
            f"{name}: {sum(report.answered.values())} requests in {report.seconds:.1f} s "
            f"{dict(report.answered)}, {len(report.wrong)} wrong, {report.leaked} pages leaked, "
            f"{report.rate:.0f} tokens/s"
        )
    print(f"throughput: {many.rate / one.rate:.2f} of one at a time")
    for kind, body in [*one.wrong, *many.wrong][:5]:
        print(f"wrong: {kind} {body}")
    return int(bool(one.wrong or many.wrong or one.leaked or many.leaked))


if __name__ == "__main__":
    sys.exit(main())

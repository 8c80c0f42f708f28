"""Serves a trained language model over HTTP, as OpenAI's completions.

    python -m experiments.serve --workdir=runs/lm
    python -m experiments.serve --workdir=runs/lm --rows=16 --cache=all --cache=short=window:budget=64
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "Return the ", "max_tokens": 50, "temperature": 0, "cache": "short"}'

Requests join and leave a running batch at any step, and each gets what it would get alone. Keys and values
stand in pages of one pool; a request joins when all the pages that it can need are free. Quantised ones, and
the states of recurrent models, stand in rows of their own. See docs/serving.md for the fields of a request,
the answers where there is no room, and the metrics.

Only this machine can call it. Another --host wants a key that clients must know, or --open. SIGTERM answers
those who are there, for up to --grace seconds, and ends.
"""

import importlib.util
from pathlib import Path

from absl import flags

from experiments import cli
from experiments.run.signals import StopFlag

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
STEP = flags.DEFINE_integer("step", None, "step of the checkpoint; by default the newest")
NAME = flags.DEFINE_string("name", None, "of the model, for clients; by default that of the folder")
HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen to")
PORT = flags.DEFINE_integer("port", 8000, "to listen to; 0 takes a free one")
ROWS = flags.DEFINE_integer("rows", 8, "texts that each cache policy writes at once")
PAGE = flags.DEFINE_integer("page", 16, "slots of a page of the caches")
PAGES = flags.DEFINE_integer("pages", None, "of each pool; by default as many as all rows can need")
LENGTH = flags.DEFINE_integer(
    "length", None, "tokens of the longest prompt with its answer; by default what the model is made for"
)
QUEUE = flags.DEFINE_integer("queue", 64, "requests that may wait; others are answered with 429")
CACHE = flags.DEFINE_multi_string(
    "cache", [], "NAME=KIND:FIELD=VALUE,... that requests may name; the first is taken by default"
)
MAX_BODY = flags.DEFINE_integer("max_body", 2**20, "the most bytes of a request; more are answered with 413")
PATIENCE = flags.DEFINE_float("patience", 20.0, "seconds that a client may take to send or to receive")
GRACE = flags.DEFINE_float("grace", 30.0, "seconds that answers may take after SIGTERM")
API_KEY_FILE = flags.DEFINE_string("api_key_file", None, "file whose first line clients must send as the key")
OPEN = flags.DEFINE_boolean("open", False, "serve a --host that others can reach without a key")

STOP = StopFlag()


def main(argv: list[str]) -> int:
    """Loads the run, compiles, serves."""
    del argv
    STOP.install()
    # Imported here, so that --help and a wrong flag answer at once.
    from effjax.errors import UsageError

    if WORKDIR.value is None:
        raise UsageError("--workdir is missing. Name a run that was trained: --workdir=runs/NAME.")
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise UsageError(f"a server needs {' and '.join(missing)}: pip install 'effjax[serve]'.")

    from rich.console import Console

    from experiments.run import serving
    from experiments.run.formatting import count
    from experiments.run.server import process
    from experiments.run.server.app import Limits
    from experiments.run.server.body import Served
    from experiments.run.server.service import Service

    console = Console(stderr=True, highlight=False)
    local = process.is_loopback(HOST.value)
    key = None if API_KEY_FILE.value is None else serving.read_key(API_KEY_FILE.value)
    if not local and key is None:
        if not OPEN.value:
            raise UsageError(
                f"--host={HOST.value} can be reached from other machines, and nobody is asked for a key: "
                f"give --api_key_file=FILE, or --open to serve whoever comes."
            )
        console.print(f"[bold]warning:[/] whoever reaches {HOST.value} is served; nobody is asked for a key")
    policies = serving.read_caches(CACHE.value)
    sizes = serving.Sizes(ROWS.value, PAGE.value, PAGES.value, LENGTH.value, QUEUE.value)
    listening = process.bind(HOST.value, PORT.value)
    with listening:
        model, variables, tokenizer = serving.load(WORKDIR.value, STEP.value)
        engine = serving.make_engine(model, variables, tokenizer, policies, sizes)
        for name, lane in engine.lanes.items():
            if STOP.requested:
                return 0
            console.print(
                f"cache {name}, {lane.told}: {lane.rows} rows, {lane.pages} pages of {lane.page} slots, "
                f"{count(lane.cache_bytes)}B; compiling for prompts of up to {lane.length} tokens",
                soft_wrap=True,
            )
            lane.warm()
        served = Served(NAME.value or Path(WORKDIR.value).resolve().name, tokenizer, tuple(engine.lanes))
        hosts = frozenset({HOST.value, "127.0.0.1", "localhost", "[::1]"}) if local and key is None else None
        port = listening.getsockname()[1]
        shown = f"[{HOST.value}]" if ":" in HOST.value else HOST.value
        process.run(
            Service(engine, served),
            Limits(MAX_BODY.value, PATIENCE.value, key, hosts),
            listening,
            STOP,
            GRACE.value,
            ready=lambda: print(f"serving {served.name} at http://{shown}:{port}", flush=True),
        )
    return 0


if __name__ == "__main__":
    cli.run(main)

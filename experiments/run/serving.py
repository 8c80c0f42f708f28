"""From a run that trained a language model to an engine that serves it."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effjax.config import build_kind
from effjax.data.text import Tokenizer, check_vocabulary
from effjax.decoding.policies.kinds import POLICIES
from effjax.decoding.policies.policy import Policy
from effjax.decoding.serving.engine import Engine
from effjax.decoding.serving.lane import Lane
from effjax.errors import UsageError
from effjax.mixers.cached import Recurrent
from experiments.run import kind_spec
from experiments.run.restore import load_run

# Of a model that sets no limit.
LENGTH = 2048


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of what is served.

    Attributes:
      rows: of each running batch.
      page: slots of a page.
      pages: of each pool; None means as many as all rows can need.
      length: tokens of the longest sequence; None means what the model is made for, in whole pages.
      queue: requests that may wait.
    """

    rows: int = 8
    page: int = 16
    pages: int | None = None
    length: int | None = None
    queue: int = 64


def read_caches(specs: Sequence[str]) -> dict[str, Policy]:
    """Cache policies by name, from `NAME=KIND:FIELD=VALUE,...` or `KIND:FIELD=VALUE,...`.

    Raises:
      UsageError: for what cannot be read, an unknown kind or field, or a name that stands twice.
    """
    policies: dict[str, Policy] = {}
    for spec in specs:
        named = re.fullmatch(r"([\w.-]+)=(.*)", spec)
        name, rest = named.groups() if named else (spec.partition(":")[0], spec)
        kind, fields = kind_spec.read("cache", rest, "short=window:budget=128")
        if name in policies:
            raise UsageError(
                f"--cache={spec}: there is a cache {name!r} already; name it: --cache=NAME={rest}"
            )
        policies[name] = build_kind(POLICIES, {"kind": kind, **fields}, f"--cache={spec}")
    return policies


def load(workdir: str, step: int | None) -> tuple[Any, Any, Tokenizer]:
    """The model of a run, its variables and its tokenizer.

    Raises:
      UsageError: for a run whose model reads no text.
    """
    program, variables = load_run(workdir, step)
    if program.data.tokenizer is None:
        raise UsageError(f"--workdir='{workdir}' holds no language model: its data has no tokenizer.")
    return program.task.model, variables, program.data.tokenizer


def make_engine(
    model: Any, variables: Any, tokenizer: Tokenizer, policies: dict[str, Policy], sizes: Sizes
) -> Engine:
    """An engine with a lane for each policy; nothing is compiled yet.

    Raises:
      UsageError: as `Lane` does, and for a tokenizer with tokens that the model does not have.
    """
    check_vocabulary(tokenizer, model.vocab)
    # A token reads every weight once: nothing is copied on the way.
    variables = model.layers_apart(variables) if hasattr(model, "layers_apart") else variables
    served: dict[str, Policy | None] = {**policies}
    if not served:
        recurrent = isinstance(getattr(getattr(model, "block", None), "mixer", None), Recurrent)
        served = {"state": None} if recurrent else {"all": getattr(model, "cache", None) or Policy()}
    length = sizes.length or (getattr(model, "max_length", None) or LENGTH) // sizes.page * sizes.page
    lanes = {
        name: Lane(model, variables, policy, sizes.rows, length, sizes.page, sizes.pages)
        for name, policy in served.items()
    }
    return Engine(lanes, sizes.queue)


def read_key(path: str) -> str:
    """The key that clients must know: the first line of a file.

    Raises:
      UsageError: for no such file, or an empty line.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"--api_key_file='{path}' is no file. Name one whose first line is the key.")
    key = file.read_text().partition("\n")[0].strip()
    if not key:
        raise UsageError(f"--api_key_file='{path}' begins with an empty line: write the key there.")
    return key

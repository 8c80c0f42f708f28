"""The two errors a user meets, and the one way to say "did you mean".

Every message names the thing and what to type instead. The drivers in `experiments/` turn a `UsageError`
into exit code 2, a `RunError` into exit code 1 and `Preempted` into 75, each without a traceback unless
`--debug` is given.
"""

import difflib
from collections.abc import Iterable


class EffjaxError(Exception):
    """An expected failure whose message is meant for the user."""

    exit_code = 1


class UsageError(EffjaxError):
    """What was asked for cannot be done as it was asked: a wrong key, kind, type, shape, path or flag."""

    exit_code = 2


class RunError(EffjaxError):
    """The request was fine and the run failed: a full disk, a broken record, a number that is not finite."""


class Preempted(EffjaxError):
    """The run was told to stop and can be resumed; sysexits calls this EX_TEMPFAIL."""

    exit_code = 75


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns a sentence with the nearest known names, or with all of them where none is near.

    >>> did_you_mean("depht", ["depth", "dim"])
    "Did you mean 'depth'?"
    >>> did_you_mean("zzz", ["depth", "dim"])
    "Known: 'depth', 'dim'."
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    return f"Known: {', '.join(repr(n) for n in known)}." if known else "Nothing is known here."

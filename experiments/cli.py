'''What every driver does alike: flags, configs, help, and errors in one line.

    """Trains a model.

    python -m experiments.train --config=configs/vision/vit.py:smoke --workdir=runs/vit
    """

    cli.define_config("configs/vision/vit.py:smoke")
    WORKDIR = flags.DEFINE_string("workdir", None, "where the run lives")

    def main(argv):
        loaded = cli.load_config()
        ...

    if __name__ == "__main__":
        cli.run(main)

Exit codes: 0 done, 1 failed, 2 asked wrongly, 75 stopped and can be resumed, 130 interrupted.
'''

import ctypes.util
import errno
import importlib.util
import logging
import os
import shlex
import shutil
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from absl import flags
from rich.console import Console
from rich.text import Text

from effjax.errors import EffjaxError, Preempted, UsageError, did_you_mean
from experiments.run.config_file import (
    LoadedConfig,
    define_config,
    define_configs,
    load_config,
    load_configs,
)
from experiments.run.files import refusal

__all__ = [
    "LoadedConfig",
    "command_line",
    "define_config",
    "define_configs",
    "load_config",
    "load_configs",
    "run",
]

# Flags belong to the driver on whose behalf this file defines them, and show up in its --help.
flags.disclaim_key_flags()

_HELP = {"-h", "-help", "--help", "-helpshort", "--helpshort", "-helpfull", "--helpfull", "-?", "--?"}
_DEBUG = {"-debug", "--debug", "--debug=true", "--debug=True", "--debug=1"}


def run(
    main: Callable[[list[str]], int | None],
    *,
    positional: str | None = None,
    flag_values: flags.FlagValues = flags.FLAGS,
) -> NoReturn:
    """Parses the command line, calls `main`, and ends the process with the right code and one clear message.

    Args:
      main: the driver; gets the program's name and the positional arguments, returns the exit code or
        None for 0.
      positional: what the positional arguments are, for --help. By default there are none and
        one is refused.
      flag_values: where the driver defined its flags.
    """
    _choose_platform()
    arguments = sys.argv[1:]
    debug = not _DEBUG.isdisjoint(arguments)
    if not debug:
        # What orbax and asyncio log about an error reaches the user once, as the error of the run.
        for library in ("absl", "asyncio"):
            logging.getLogger(library).setLevel(logging.CRITICAL + 1)
    try:
        if "debug" not in flag_values:
            flags.DEFINE_boolean("debug", False, "show the traceback of an error", flag_values=flag_values)
        if not _HELP.isdisjoint(_before_separator(arguments)):
            print(_help(main, positional, flag_values))
            code = 0
        else:
            code = main(_parse(flag_values, positional is not None, main)) or 0
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output left (`| head`). Python would complain once more while it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + 13
    except KeyboardInterrupt:
        _say("", "interrupted")
        code = 130
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        code = _explain(error, debug)
        _leave_others(error, code)
    sys.exit(code)


def _choose_platform() -> None:
    """Keeps JAX from starting compilers for chips that are not here.

    The extras for planning install libtpu and the CUDA plug-in. On a machine without such chips JAX would try
    both, fail, and fill the terminal with how.
    """
    if "JAX_PLATFORMS" in os.environ:
        return
    tpu = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    gpu = ctypes.util.find_library("cuda") is not None
    installed = importlib.util.find_spec("libtpu") or importlib.util.find_spec("jax_plugins")
    if installed and not tpu and not gpu:
        os.environ["JAX_PLATFORMS"] = "cpu"


def command_line() -> str:
    """What a person types to start this process again, quoted for a shell."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", spec.name] if spec is not None and spec.name else ["python", sys.argv[0]]
    return shlex.join([*program, *sys.argv[1:]])


def _parse(flag_values: flags.FlagValues, takes_positional: bool, main: Callable) -> list[str]:
    """Parses `sys.argv`; every mistake in it is a UsageError of one line."""
    own = [flag.name for flag in _own_flags(main, flag_values)]
    try:
        rest = flag_values(sys.argv)
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        if name.startswith("config."):
            raise UsageError(f"--{name} needs a --config=PATH that it changes.") from error
        raise UsageError(f"--{name} is no flag of this program. {did_you_mean(name, own)}") from error
    except flags.Error as error:
        raise UsageError(_one_line(str(error))) from error
    if rest[1:] and not takes_positional:
        raise UsageError(f"'{rest[1]}' stands alone; this program takes flags only. {_all_flags(own)}")
    return rest


def _leave_others(error: Exception, code: int) -> None:
    """Ends a process of several at once, unless all of them end so.

    In an orderly end it would wait for the others, and they for it. What is cut off tells them.
    """
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return
    if isinstance(error, Preempted) or getattr(error, "everywhere", False):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _explain(error: Exception, debug: bool) -> int:
    """Says what went wrong in one line; returns the exit code."""
    if isinstance(error, Preempted):
        _say("stopped", str(error))
        return error.exit_code
    if isinstance(error, EffjaxError):
        _say("error", str(error))
        return error.exit_code
    full = _disk_full(error)
    if full is not None:
        _say("error", refusal(full, full.filename))
        return 1
    hint = "" if debug else " (run again with --debug for the traceback)"
    _say("error", f"{type(error).__name__}: {_one_line(str(error))}{hint}")
    return 1


def _disk_full(error: BaseException | None) -> OSError | None:
    """Finds "no space left" in the chain of causes; libraries wrap it, and C++ ones turn it into text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error
        if os.strerror(errno.ENOSPC) in str(error):
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        error = error.__cause__ or error.__context__
    return None


def _say(kind: str, message: str) -> None:
    console = Console(stderr=True, highlight=False)
    label = Text(f"{kind}: ", style="bold red" if kind == "error" else "bold") if kind else Text()
    # soft_wrap leaves the line whole: it is the terminal that breaks it, so copying and grep still work.
    console.print(label + Text(message), soft_wrap=True)


def _one_line(message: str, limit: int = 400) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return text if len(text) <= limit else f"{text[:limit]}..."


def _before_separator(arguments: list[str]) -> list[str]:
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _own_flags(main: Callable, flag_values: flags.FlagValues) -> list[flags.Flag]:
    """The flags of the driver alone, not the dozens that libraries define."""
    return flag_values.get_key_flags_for_module(sys.modules[main.__module__])


def _all_flags(names: Iterable[str]) -> str:
    return f"Flags: {', '.join(f'--{name}' for name in sorted(names))}."


def _help(main: Callable, positional: str | None, flag_values: flags.FlagValues) -> str:
    """The docstring of the driver, then its flags."""
    width = min(shutil.get_terminal_size().columns, 110)
    lines = [(sys.modules[main.__module__].__doc__ or "").strip(), "", "Flags:"]
    for flag in sorted(_own_flags(main, flag_values), key=lambda flag: flag.name):
        lines.append(f"  {_usage(flag)}")
        default = "" if flag.default in (None, False) else f" (default: {flag.default})"
        text = " ".join(f"{flag.help or ''}{default}".split())
        lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if positional:
        lines += ["", "Arguments:", *textwrap.wrap(positional, width, initial_indent="  ")]
    return "\n".join(lines)


def _usage(flag: flags.Flag) -> str:
    if flag.name == "config":
        return "--config=PATH[:VARIANT]  --config.KEY=VALUE"
    if flag.boolean:
        return f"--[no]{flag.name}"
    return f"--{flag.name}={flag.flag_type().upper().replace(' ', '_')}"

"""`--config=PATH[:VARIANT]` and `--config.KEY=VALUE`: ml_collections' flag, with messages for people.

A config file has `get_config(variant="...")`, which returns a ConfigDict. Where it also has `VARIANTS`, the
strings that it takes, a misspelt one is answered with the nearest.
"""

import difflib
import importlib.util
import inspect
import re
import sys
import traceback
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from effjax.errors import EffjaxError, UsageError, did_you_mean

flags.disclaim_key_flags()

# Configs are also found beside this package, so that an installed driver knows them in any folder.
_HOME = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class LoadedConfig:
    """A config, and what the record of a run says about it.

    Attributes:
      config: locked, with the overrides of the command line in it.
      path: the file.
      variant: what stood after the colon, or None.
      overrides: the keys that the command line set, without `config.`.
    """

    config: ConfigDict
    path: str
    variant: str | None
    overrides: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What was given as `--config`."""
        return self.path if self.variant is None else f"{self.path}:{self.variant}"


def define_config(
    example: str = "configs/vision/vit.py:smoke", *, flag_values: flags.FlagValues = flags.FLAGS
) -> None:
    """Defines `--config` for the driver that calls; `load_config` reads it.

    Args:
      example: a config that this driver takes, for --help and for the message when the flag is missing.
      flag_values: where the driver defines its flags.
    """
    config_flags.DEFINE_config_file(
        "config", None, f"the experiment, for example --config={example}", flag_values=flag_values
    )
    # The parser of ml_collections runs files through a loader that Python deprecates, and keeps a missing
    # file to itself until the first use.
    flag_values["config"].parser = _Parser()


def load_config(flag_values: flags.FlagValues = flags.FLAGS) -> LoadedConfig:
    """Returns the config that the command line describes.

    Raises:
      UsageError: if no --config was given.
    """
    flag = flag_values["config"]
    if flag.value is None:
        raise UsageError(f"--config is missing: it names {flag.help}.")
    path, variant = _split(config_flags.get_config_filename(flag))
    return LoadedConfig(flag.value, path, variant, config_flags.get_override_values(flag))


class _Parser(flags.ArgumentParser):
    """Loads the file, then checks every `--config.KEY` of the command line against it."""

    def parse(self, argument: str) -> ConfigDict:
        path, variant = _split(argument)
        config = _call(_load(_find(path), path), path, variant)
        for given in sys.argv[1:]:
            override = re.match(r"--?(no)?config\.([^=]+)(?:=(.*))?$", given, re.DOTALL)
            if override:
                _check_override(config, *override.group(2, 3))
        config.lock()
        return config

    def flag_type(self) -> str:
        return "config file"


def _split(argument: str) -> tuple[str, str | None]:
    path, colon, variant = argument.partition(":")
    return path, variant if colon else None


def _find(path: str) -> Path:
    """The file that `path` names, here or beside the package."""
    for root in (Path(), _HOME):
        if (root / path).is_file():
            return (root / path).absolute()
    known = sorted(
        {
            file.relative_to(root).as_posix()
            for root in (Path(), _HOME)
            for file in (root / "configs").rglob("*.py")
            if file.name != "__init__.py"
        }
    )
    stems = {Path(name).stem: name for name in known}
    near = difflib.get_close_matches(path, known, n=3, cutoff=0.5)
    near += [stems[s] for s in difflib.get_close_matches(Path(path).stem, stems, n=2) if stems[s] not in near]
    shown, rest = (near or known)[:8], [] if near else known[8:]
    hint = (
        f"{'Near' if near else 'There are'}: {', '.join(shown)}{', ...' if rest else ''}."
        if shown
        else ("There is no configs/ folder here either.")
    )
    raise UsageError(f"--config: there is no file '{path}'. {hint}")


def _load(file: Path, shown: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("effjax_config_file", file)
    if spec is None or spec.loader is None:
        raise UsageError(f"--config: '{shown}' is no Python file; a config ends in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except EffjaxError:
        raise
    except Exception as error:
        raise UsageError(_blame(error, file, shown)) from error
    if not callable(getattr(module, "get_config", None)):
        raise UsageError(f"--config: '{shown}' has no get_config().")
    return module


def _call(module: types.ModuleType, path: str, variant: str | None) -> ConfigDict:
    variants = getattr(module, "VARIANTS", None)
    if variant is not None:
        if not inspect.signature(module.get_config).parameters:
            raise UsageError(f"--config: '{path}' has no variants; leave ':{variant}' away.")
        if variants is not None and variant not in variants:
            raise UsageError(
                f"--config: '{path}' has no variant '{variant}'. {did_you_mean(variant, variants)}"
            )
    try:
        config = module.get_config() if variant is None else module.get_config(variant)
    except EffjaxError:
        raise
    except Exception as error:
        file = Path(module.__file__ or path)
        said = path if variant is None else f"{path}:{variant}"
        raise UsageError(_blame(error, file, said)) from error
    if not isinstance(config, ConfigDict):
        raise UsageError(f"--config: get_config() of '{path}' must return a ConfigDict, not {config!r}.")
    return config


def _blame(error: Exception, file: Path, shown: str) -> str:
    """Says which line of the config file failed."""
    if isinstance(error, SyntaxError):
        return f"--config: '{shown}', line {error.lineno}: {error.msg}."
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    where = f", line {lines[-1]}" if lines else ""
    return f"--config: '{shown}'{where}: {type(error).__name__}: {error}"


def _check_override(config: ConfigDict, key: str, value: str | None) -> None:
    """Refuses a key that the config does not have, or a value that is not of the type it has there."""
    try:
        parts = config_path.split(key)
    except (ValueError, SyntaxError):
        raise UsageError(f"--config.{key} is no key. Write it like --config.optimizer.lr=1e-3.") from None
    here: Any = config
    for index, part in enumerate(parts):
        if not _has(here, part):
            raise UsageError(_unknown_key(config, key, here, parts[:index], part))
        here = here[part]
    # A placeholder is None and has a type; a list has one that the flag cannot write.
    known_type = config_path.get_type(key, config)
    if known_type in (type(None), list):
        kind = "None" if here is None else "a list"
        raise UsageError(
            f"--config.{key} is {kind} in the config file, so its type is not known here: set it in the "
            "file, or give it a type there (a number, a string, a tuple, config_dict.placeholder(int))."
        )
    if value is not None and known_type in (int, float):
        try:
            known_type(value)
        except ValueError:
            said = f"of type {known_type.__name__} ({here!r} in the file)"
            raise UsageError(f"--config.{key} is {said}; '{value}' is not.") from None


def _has(section: Any, part: Any) -> bool:
    if isinstance(section, ConfigDict | dict):
        return part in section
    return (
        isinstance(section, list | tuple) and isinstance(part, int) and -len(section) <= part < len(section)
    )


def _unknown_key(config: ConfigDict, key: str, section: Any, parents: tuple[Any, ...], part: Any) -> str:
    said = f"--config.{key} is no key of this config"
    above = _join("config", parents)
    if isinstance(section, list | tuple):
        return f"{said}: {above} holds {len(section)} values, from [0] to [{len(section) - 1}]."
    if not isinstance(section, ConfigDict | dict):
        return f"{said}: {above} is {section!r}, not a section."
    here = difflib.get_close_matches(str(part), list(section), n=3)
    near = [_join(above, (name,)) for name in here]
    last = re.split(r"[.\[]", key)[-1]
    near += [p for p in _paths(config, "config") if p.rsplit(".")[-1] == last and p not in near][:3]
    if near:
        return f"{said}. Did you mean {' or '.join(f'--{name}' for name in near)}?"
    return f"{said}: {above} has {', '.join(section)}."


def _paths(value: Any, path: str) -> list[str]:
    """Every key beneath `path`, sections included."""
    if isinstance(value, ConfigDict | dict):
        items = [(value[key], f"{path}.{key}") for key in value]
    elif isinstance(value, list | tuple):
        items = [(item, f"{path}[{index}]") for index, item in enumerate(value)]
    else:
        return []
    return [found for item, name in items for found in (name, *_paths(item, name))]


def _join(path: str, parts: tuple[Any, ...]) -> str:
    return path + "".join(f".{part}" if isinstance(part, str) else f"[{part}]" for part in parts)

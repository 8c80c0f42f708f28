"""`--config=PATH[:VARIANT]` and `--config.KEY=VALUE`: ml_collections' flag, with messages for people.

A config file has `get_config(variant="...")`, which returns a ConfigDict. Where it also has `VARIANTS`, the
strings that it takes, a misspelt one is answered with the nearest.
"""

import ast
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
    example: str = "configs/vision/vit.py:smoke",
    *,
    name: str = "config",
    what: str = "the experiment",
    flag_values: flags.FlagValues = flags.FLAGS,
) -> None:
    """Defines `--config` for the driver that calls; `load_config` reads it.

    Args:
      example: a config that this driver takes, for --help and for the message when the flag is missing.
      name: of the flag.
      what: it describes.
      flag_values: where the driver defines its flags.
    """
    config_flags.DEFINE_config_file(
        name, None, f"{what}, for example --{name}={example}", flag_values=flag_values
    )
    # The parser of ml_collections runs files through a loader that Python deprecates, and keeps a missing
    # file to itself until the first use.
    flag_values[name].parser = _Parser(name)


def load_config(flag_values: flags.FlagValues = flags.FLAGS, *, name: str = "config") -> LoadedConfig:
    """Returns the config that the command line describes.

    Raises:
      UsageError: if the flag was not given.
    """
    flag = flag_values[name]
    if flag.value is None:
        raise UsageError(f"--{name} is missing: it names {flag.help}.")
    path, variant = _split(config_flags.get_config_filename(flag))
    return LoadedConfig(flag.value, path, variant, config_flags.get_override_values(flag))


def define_configs(example: str, *, flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines `--config` for a driver that takes several, with commas between them; overrides go to each."""
    text = f"configs, with commas between them, for example --config={example}"
    flags.DEFINE(_ListParser(flag_values), "config", None, text, flag_values)


def load_configs(flag_values: flags.FlagValues = flags.FLAGS) -> tuple[LoadedConfig, ...]:
    """Returns the configs that the command line describes.

    Raises:
      UsageError: if no --config was given.
    """
    flag = flag_values["config"]
    if not flag.value:
        raise UsageError(f"--config is missing: it names {flag.help}.")
    return flag.value


class _ListParser(flags.ArgumentParser):
    """Reads each config with the overrides of the command line, as a driver that takes one reads it."""

    def __init__(self, flag_values: flags.FlagValues) -> None:
        super().__init__()
        self.flag_values = flag_values

    def parse(self, argument: str | tuple[LoadedConfig, ...]) -> tuple[LoadedConfig, ...]:
        if not isinstance(argument, str):
            return argument
        overrides = [given for given in sys.argv[1:] if re.match(r"--?(no)?config\.[^=]+", given)]
        for given in overrides:
            name = given.lstrip("-").partition("=")[0]
            if name not in self.flag_values:
                flags.DEFINE_string(name, None, "an override", flag_values=self.flag_values)
        return tuple(self._load(name, overrides) for name in argument.split(","))

    def _load(self, name: str, overrides: list[str]) -> LoadedConfig:
        own = flags.FlagValues()
        define_config(flag_values=own)
        own(["", f"--config={name}", *overrides])
        return load_config(own)

    def flag_type(self) -> str:
        return "config files"


class _Parser(flags.ArgumentParser):
    """Loads the file, then checks every `--config.KEY` of the command line against it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def parse(self, argument: str) -> ConfigDict:
        try:
            return self._parse(argument)
        except UsageError as error:  # what reads files calls its flag --config, whoever asks
            raise UsageError(str(error).replace("--config", f"--{self.name}")) from error

    def _parse(self, argument: str) -> ConfigDict:
        path, variant = _split(argument)
        config = _call(_load(_find(path), path), path, variant)
        for given in sys.argv[1:]:
            override = re.match(rf"--?(no)?{self.name}\.([^=]+)(?:=(.*))?$", given, re.DOTALL)
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
    """Makes room for a key that the file leaves at its default, and refuses a value of another type.

    Whether a key exists is not for the file to say: the dataclasses that the config is resolved into know all
    names, and refuse the others with the nearest.
    """
    try:
        parts = config_path.split(key)
    except (ValueError, SyntaxError):
        raise UsageError(f"--config.{key} is no key. Write it like --config.optimizer.lr=1e-3.") from None
    here: Any = config
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if isinstance(here, ConfigDict) and (part not in here or (last and here[part] is None)):
            here[part] = _literal(value) if last else ConfigDict()
        if not _has(here, part):
            raise UsageError(_unknown_key(key, here, parts[:index]))
        here = here[part]
    known_type = config_path.get_type(key, config)
    if known_type is list:
        raise UsageError(
            f"--config.{key} is a list in the config file; make it a tuple there to set it here."
        )
    if value is not None and known_type in (int, float):
        try:
            known_type(value)
        except ValueError:
            said = f"of type {known_type.__name__} ({here!r} in the file)"
            raise UsageError(f"--config.{key} is {said}; '{value}' is not.") from None


def _literal(value: str | None) -> Any:
    """What a value means where the file gives it no type: a Python literal, or else a string."""
    try:
        return ast.literal_eval(value or "True")
    except (ValueError, SyntaxError):
        return value


def _has(section: Any, part: Any) -> bool:
    if isinstance(section, ConfigDict | dict):
        return part in section
    return (
        isinstance(section, list | tuple) and isinstance(part, int) and -len(section) <= part < len(section)
    )


def _unknown_key(key: str, section: Any, parents: tuple[Any, ...]) -> str:
    said = f"--config.{key} is no key of this config"
    above = _join("config", parents)
    if isinstance(section, list | tuple):
        return f"{said}: {above} holds {len(section)} values, from [0] to [{len(section) - 1}]."
    return f"{said}: {above} is {section!r}, not a section."


def _join(path: str, parts: tuple[Any, ...]) -> str:
    return path + "".join(f".{part}" if isinstance(part, str) else f"[{part}]" for part in parts)

"""From an ml_collections config to frozen dataclasses and Linen modules, once, at the start.

The fields of a dataclass (a Linen module is one) are the schema: their names are the keys, their
annotations the types and their defaults the only place where a default stands. A section with several
implementations names one by `kind`, looked up in an explicit table that its room exports. Whatever nobody
reads is an error that names the full path and the nearest valid names, so a misspelling never trains.

    class Block(nn.Module):
        mixer: nn.Module = part(mixers.KINDS)       # dict(kind="attention", heads=3)
        ffn: nn.Module = part(ffn.KINDS)
        epsilon: float = 1e-6

    section = dict(mixer=dict(kind="attention", heads=3), ffn=dict(kind="mlp"))
    block = build(Block, section, "config.model.block")
"""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn

from effjax.errors import UsageError, did_you_mean

Kinds = Mapping[str, Any]


def part(kinds: Kinds, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field whose config section names one of `kinds` by its `kind`.

    A class as default is made anew for every owner: modules that share an instance share its parameters.
    """
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata={"kinds": kinds})
    return dataclasses.field(default=default, metadata={"kinds": kinds})


def section_of(value: Any) -> bool:
    """Whether a config value is a section: a dict or a ConfigDict."""
    return isinstance(value, Mapping) or hasattr(value, "to_dict")


def plain(value: Any) -> Any:
    """Turns ConfigDicts into dicts and lists into tuples, all the way down."""
    if section_of(value):
        return {key: plain(value[key]) for key in value}
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    return value


def build(schema: type, section: Any, path: str, given: Mapping[str, Any] | None = None) -> Any:
    """Makes one dataclass from a config section, and everything beneath it.

    Args:
      schema: a dataclass or Linen module class.
      section: a mapping whose keys are fields of `schema`.
      path: where the section stands, for messages: `config.model`.
      given: fields that the caller sets and the section must not.

    Raises:
      UsageError: for an unknown key, a missing key, a value of the wrong type, an unknown kind, or a value
        that the class itself refuses.
    """
    given = dict(given or {})
    if not section_of(section):
        raise UsageError(f"{path} must be a section like dict(...), not {section!r}.")
    section = {key: section[key] for key in section}
    fields = {f.name: f for f in dataclasses.fields(schema) if f.init and not _of_linen(schema, f.name)}
    open_keys = sorted(set(fields) - set(given))
    for key in section:
        if key not in open_keys:
            raise UsageError(
                f"{path}.{key} is read by nobody: {schema.__name__} has no such field. "
                f"{did_you_mean(key, fields)}"
            )
    hints = typing.get_type_hints(schema)
    values = dict(given)
    for name, field in fields.items():
        if name in section:
            values[name] = _convert(hints[name], field.metadata, section[name], f"{path}.{name}")
        elif (
            name not in given
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            raise UsageError(f"{path}.{name} is missing: {schema.__name__} needs it.")
    try:
        return schema(**values)
    except UsageError as error:
        raise type(error)(f"{path}: {error}") from None


def build_kind(kinds: Kinds, section: Any, path: str, given: Mapping[str, Any] | None = None) -> Any:
    """Like `build`, with the class chosen from `kinds` by the section's `kind`."""
    if not section_of(section):
        raise UsageError(f"{path} must be a section like dict(kind=...), not {section!r}.")
    section = {key: section[key] for key in section}
    if "kind" not in section:
        raise UsageError(f"{path}.kind is missing. {did_you_mean('', kinds)}")
    kind = section.pop("kind")
    if kind not in kinds:
        raise UsageError(f"{path}.kind is {kind!r}, which is no kind. {did_you_mean(str(kind), kinds)}")
    return build(kinds[kind], section, path, given)


def _of_linen(schema: type, field: str) -> bool:
    """Linen adds two fields to every module that are no part of its definition."""
    return issubclass(schema, nn.Module) and field in ("parent", "name")


def _convert(hint: Any, metadata: Mapping[str, Any], value: Any, path: str) -> Any:
    """Checks one value against its annotation, building what stands beneath it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        rest = [a for a in arguments if a is not type(None)]
        return _convert_any(rest, metadata, value, path)
    if origin is tuple or origin is Sequence:
        return _convert_tuple(arguments, metadata, value, path)
    if origin in (dict, Mapping):
        if not section_of(value):
            raise UsageError(f"{path} must be a section like dict(...), not {value!r}.")
        return {key: _convert(arguments[1], metadata, value[key], f"{path}.{key}") for key in value}
    if origin is typing.Literal:
        if value not in arguments:
            raise UsageError(f"{path} is {value!r}. {did_you_mean(str(value), map(str, arguments))}")
        return value
    if "kinds" in metadata:
        if value is None and hint is Any:
            return None
        return build_kind(metadata["kinds"], value, path)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, path)
    if hint is Any:
        return plain(value)
    return _convert_scalar(hint, value, path)


def _convert_any(hints: list[Any], metadata: Mapping[str, Any], value: Any, path: str) -> Any:
    """Takes the first of several annotations that the value fits.

    A section is held only against those that are made from one, so that the error names what was meant.
    """
    alike = [hint for hint in hints if _takes_section(hint, metadata) == section_of(value)]
    errors = []
    for hint in alike or hints:
        try:
            return _convert(hint, metadata, value, path)
        except UsageError as error:
            errors.append(error)
    raise errors[-1]


def _takes_section(hint: Any, metadata: Mapping[str, Any]) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return False
    return "kinds" in metadata or typing.get_origin(hint) in (dict, Mapping) or dataclasses.is_dataclass(hint)


def _convert_tuple(arguments: tuple[Any, ...], metadata: Mapping[str, Any], value: Any, path: str) -> Any:
    if not isinstance(value, list | tuple):
        raise UsageError(f"{path} must be a tuple, not {value!r}.")
    if len(arguments) == 1 or (len(arguments) == 2 and arguments[1] is Ellipsis):
        return tuple(_convert(arguments[0], metadata, v, f"{path}[{i}]") for i, v in enumerate(value))
    if len(value) != len(arguments):
        raise UsageError(f"{path} must hold {len(arguments)} values, not {len(value)}: {value!r}.")
    return tuple(
        _convert(a, metadata, v, f"{path}[{i}]")
        for i, (a, v) in enumerate(zip(arguments, value, strict=True))
    )


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, hint) and not (hint in (int, float) and isinstance(value, bool))
    if not fits:
        raise UsageError(f"{path} must be of type {hint.__name__}, not {type(value).__name__}: {value!r}.")
    return value

"""The whole catalogue: read, searched, checked against the repository, and written out as Markdown.

One TOML file a room, `rooms/ROOM.toml`, and in it one table a system, `[slug]`, whose keys are the fields of
`Entry`.
"""

import ast
import importlib.resources
import tomllib
from collections.abc import Iterable
from pathlib import Path

from effjax.catalog.entry import FAMILIES, NOT_MEASURED, STATUSES, Entry, parse
from effjax.errors import UsageError, did_you_mean


def load() -> tuple[Entry, ...]:
    """Reads every room, in the order of their names; within a room the order of its file stands.

    Raises:
      UsageError: where a file is no TOML, an entry has a wrong field, or two entries share a slug.
    """
    entries: dict[str, Entry] = {}
    folder = importlib.resources.files("effjax.catalog").joinpath("rooms")
    for file in sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name):
        try:
            tables = tomllib.loads(file.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"{file.name} is not TOML: {error}.") from None
        for slug, fields in tables.items():
            entry = parse(slug, file.name.removesuffix(".toml"), fields)
            if slug in entries:
                raise UsageError(f"{slug} stands twice: in {entries[slug].room} and in {entry.room}.")
            entries[slug] = entry
    return tuple(entries.values())


def get(slug: str, entries: Iterable[Entry]) -> Entry:
    """Returns one entry.

    Raises:
      UsageError: for an unknown slug, naming the nearest ones.
    """
    known = {entry.slug: entry for entry in entries}
    if slug not in known:
        raise UsageError(f"{slug!r} is not in the catalogue. {did_you_mean(slug, known)}")
    return known[slug]


def find(
    entries: Iterable[Entry],
    *,
    room: str | None = None,
    word: str | None = None,
    status: str | None = None,
    family: str | None = None,
) -> tuple[Entry, ...]:
    """Keeps the entries of a room and a family, with a status, whose text holds a word in whatever case.

    Raises:
      UsageError: for a room, a family or a status that does not exist; a word that occurs nowhere finds
        nothing.
    """
    entries = tuple(entries)
    rooms = {entry.room for entry in entries}
    if room is not None and room not in rooms:
        raise UsageError(f"No room {room!r} in the catalogue. {did_you_mean(room, rooms)}")
    if status is not None and status not in STATUSES:
        raise UsageError(f"No status {status!r}. {did_you_mean(status, STATUSES)}")
    if family is not None and family not in FAMILIES:
        raise UsageError(f"No family {family!r}. {did_you_mean(family, FAMILIES)}")
    return tuple(
        entry
        for entry in entries
        if room in (None, entry.room)
        and family in (None, entry.family)
        and status in (None, entry.status)
        and (word is None or word.casefold() in entry.text.casefold())
    )


def problems(entries: Iterable[Entry], root: Path) -> list[str]:
    """Names every file, config and test that an entry points at and the repository at `root` lacks.

    A planned entry may point at what does not exist yet.
    """
    found = []
    for entry in entries:
        if entry.status == "planned":
            continue
        named = {"files": entry.files, "configs": entry.configs, "tests": entry.tests}
        named["sizes"] = tuple(size.config for size in entry.sizes)
        for field, paths in named.items():
            for path in paths:
                if missing := _missing(root, path):
                    found.append(f"{entry.room}/{entry.slug}: {field} names {path}, but {missing}.")
    return found


def _missing(root: Path, path: str) -> str | None:
    """What is wrong with a path; after `::` stands a test, after `:` a config's variant."""
    path, _, test = path.partition("::")
    path = path.partition(":")[0]
    file = root / path
    if not file.is_file():
        return f"there is no file {path}"
    if test and test not in _functions(file):
        return f"{path} has no test {test}"
    return None


def _functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def render_markdown(entries: Iterable[Entry]) -> str:
    """Writes the catalogue as the text of CATALOG.md: a table of all, then every entry by room."""
    entries = tuple(entries)
    lines = [
        "# Catalogue",
        "",
        "What works here and how that is known. Written by `python -m experiments.papers --markdown` from",
        "`effjax/catalog/rooms/`; change those files, not this one.",
        "",
        "- **works**: built, proved by its tests, and the paper's claim tried here.",
        "- **unmeasured**: built; what the paper claims has not been tried here yet.",
        "- **planned**: not built.",
        "",
        "| system | room | family | year | status |",
        "|---|---|---|---|---|",
        *(f"| [{e.slug}](#{e.slug}) | {e.room} | {e.family} | {e.year} | {e.status} |" for e in entries),
    ]
    for room in dict.fromkeys(entry.room for entry in entries):
        lines += ["", f"## {room}"]
        for entry in entries:
            if entry.room == room:
                lines += _section(entry)
    return "\n".join(lines) + "\n"


def _section(entry: Entry) -> list[str]:
    rows = {
        "Mechanism": _code(entry.files),
        "Configs": _code(entry.configs),
        "Tests": _code(entry.tests),
        "Claimed": entry.claim,
        "Measured": f"*{NOT_MEASURED}*" if entry.measured == NOT_MEASURED else entry.measured,
        "Differences": entry.differences,
    }
    lines = [
        "",
        f"### {entry.slug}",
        "",
        f"**{entry.title}** ({entry.year}). {entry.paper} *{entry.status}*",
        "",
    ]
    lines += [f"- {name}: {text}" for name, text in rows.items() if text]
    if entry.sizes:
        lines += ["", "| published size | parameters | MACs |", "|---|---:|---:|"]
    for size in entry.sizes:
        macs = "" if size.macs is None else f"{size.macs / 1e9:.4g}G"
        lines.append(f"| `{size.config}` | {size.parameters / 1e6:,.6g}M | {macs} |")
    return lines


def _code(paths: tuple[str, ...]) -> str:
    return ", ".join(f"`{path}`" for path in paths)

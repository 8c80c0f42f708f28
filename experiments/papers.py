"""Lists the catalogue: what works here, and how that is known.

python -m experiments.papers                      one line a system
python -m experiments.papers --room=diffusion     one room; also --family, --find=WORD, --status=works
python -m experiments.papers vit dit              whole entries
python -m experiments.papers --markdown           the text of CATALOG.md
"""

import sys

from absl import flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from effjax import catalog
from effjax.errors import UsageError
from experiments.cli import run

ROOM = flags.DEFINE_string("room", None, "only this room: models, train, diffusion, ...")
FIND = flags.DEFINE_string("find", None, "only entries whose text holds this word")
STATUS = flags.DEFINE_string("status", None, f"only entries of this status: {', '.join(catalog.STATUSES)}")
FAMILY = flags.DEFINE_string("family", None, f"only this family: {', '.join(catalog.FAMILIES)}")
MARKDOWN = flags.DEFINE_boolean("markdown", False, "print the whole catalogue as Markdown")

_COLOURS = {"works": "green", "unmeasured": "yellow", "planned": "dim"}


def main(argv: list[str]) -> None:
    """Prints what was asked for."""
    entries = catalog.load()
    slugs = argv[1:]
    filters = {"room": ROOM.value, "word": FIND.value, "status": STATUS.value, "family": FAMILY.value}
    filtered = any(value is not None for value in filters.values())
    if (bool(slugs) + filtered + MARKDOWN.value) > 1:
        raise UsageError("Give names of systems, or filters, or --markdown: one of the three.")
    if MARKDOWN.value:
        sys.stdout.write(catalog.render_markdown(entries))
        return
    # A pipe has no width: there every row keeps its whole line.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 220)
    if slugs:
        for entry in [catalog.get(slug, entries) for slug in slugs]:
            console.print(_whole(entry))
        return
    found = catalog.find(entries, **filters)
    console.print(_overview(found))
    console.print(f"{len(found)} of {len(entries)} systems")


def _overview(entries: tuple[catalog.Entry, ...]) -> Table:
    # Only in a table that expands does the title alone give way.
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", expand=True)
    for heading in ("system", "room", "family", "year", "status"):
        table.add_column(heading, no_wrap=True)
    table.add_column("title", no_wrap=True, overflow="ellipsis", ratio=1)
    for entry in entries:
        status = Text(entry.status, style=_COLOURS[entry.status])
        table.add_row(entry.slug, entry.room, entry.family, str(entry.year), status, Text(entry.title))
    return table


def _whole(entry: catalog.Entry) -> Table:
    table = Table(title=Text(f"{entry.title} ({entry.year})"), show_header=False, min_width=60)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "system": entry.slug,
        "room": entry.room,
        "family": entry.family,
        "status": entry.status,
        "paper": entry.paper,
        "mechanism": "\n".join(entry.files),
        "configs": "\n".join(entry.configs),
        "tests": "\n".join(entry.tests),
        "claimed": entry.claim,
        "measured": entry.measured,
        "differences": entry.differences,
    }
    for name, value in rows.items():
        table.add_row(name, Text(value, style=_COLOURS[value] if name == "status" else ""))
    return table


if __name__ == "__main__":
    run(main, positional="Names of systems, each shown whole.")

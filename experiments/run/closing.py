"""The last thing a run prints: what came out and where it lies."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


def closing_table(title: str, rows: Mapping[str, str], console: Console | None = None) -> None:
    """Prints names and values: a table on a terminal, `name  value` lines elsewhere.

    Args:
      title: the run in a few words.
      rows: what to show, in order: accuracy, parameters, MACs, step time, report.
      console: where to write, standard output by default.
    """
    console = console or Console(highlight=False)
    if not console.is_terminal:
        width = max(map(len, rows), default=0)
        for line in (title, *(f"{name:<{width}}  {value}" for name, value in rows.items())):
            console.print(Text(line), soft_wrap=True)
        return
    table = Table(title=Text(title), show_header=False, title_justify="left")
    table.add_column(style="bold")
    # A path that is cut or broken cannot be opened by a click.
    table.add_column(overflow="fold", justify="left")
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    console.print(table)


def print_table(
    title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], console: Console | None = None
) -> None:
    """Prints rows under headings: a table on a terminal, aligned columns elsewhere."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        console.print(Text(title), soft_wrap=True)
        for row in (headings, *rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            console.print(Text("  ".join(cells).rstrip()), soft_wrap=True)
        return
    table = Table(title=Text(title), title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)

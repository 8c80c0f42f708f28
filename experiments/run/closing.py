"""The last thing a run prints: what came out and where it lies."""

from collections.abc import Mapping

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

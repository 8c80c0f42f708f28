"""`--recipe='configs/compress/prune.py:taylor steps[0].left=0.5'`: a recipe and its overrides, as typed."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator

from absl import flags

from effjax.compress import recipe
from effjax.errors import UsageError
from experiments.run.config_file import define_config, load_config


@dataclasses.dataclass(frozen=True)
class AskedRecipe:
    """One `--recipe` of several.

    Attributes:
      label: what was typed.
      arguments: of experiments.compress that say the same.
    """

    label: str
    arguments: tuple[str, ...]


def parse(spec: str) -> AskedRecipe:
    """Reads `FILE[:VARIANT] KEY=VALUE ...`, and resolves it once so that a wrong one is refused here.

    Raises:
      UsageError: for a file, a variant, a key or a value that a recipe does not have.
    """
    name, *overrides = spec.split() or [""]
    if any("=" not in given for given in overrides):
        raise UsageError(
            f"--recipe='{spec}' cannot be read. Example: "
            f"--recipe='configs/compress/prune.py:taylor steps[0].left=0.5'."
        )
    arguments = (f"--recipe={name}", *(f"--recipe.{given}" for given in overrides))
    own = flags.FlagValues()
    define_config("configs/compress/prune.py:taylor", name="recipe", flag_values=own)
    with _command_line(arguments):
        own(["", *arguments])
    recipe.read(load_config(own, name="recipe").config)
    return AskedRecipe(" ".join([name, *overrides]), arguments)


@contextlib.contextmanager
def _command_line(arguments: tuple[str, ...]) -> Iterator[None]:
    """Stands in for what was typed: ml_collections looks for overrides there and nowhere else."""
    typed = sys.argv
    sys.argv = [typed[0], *arguments]
    try:
        yield
    finally:
        sys.argv = typed

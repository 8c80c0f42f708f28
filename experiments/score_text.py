"""Scores documents by what a large language model knows of them and a small one does not.

    python -m experiments.score_text --config=configs/language/miniplm.py:pydocs --workdir=runs/large \\
        --reference=runs/reference --out=runs/scores.npz
    python -m experiments.train --config=configs/language/miniplm.py:pydocs --workdir=runs/student \\
        --config.data.source.scores=runs/scores.npz

Every document of the config's training data is read once by both runs, each with its own tokenizer and rows
of its own length. The file holds a score for each: `effjax.data.chosen`, which says what a student is then
trained on.
"""

from absl import flags

from experiments import cli
from experiments.run.config_file import define_config, load_config

define_config("configs/language/miniplm.py:pydocs", what="whose training text is scored")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of the large model's run")
REFERENCE = flags.DEFINE_string("reference", None, "folder of the small model's run")
OUT = flags.DEFINE_string("out", None, "file to write")
BATCH = flags.DEFINE_integer("batch", 16, "rows that are read at once")


def main(argv: list[str]) -> int:
    """Writes the file; returns the exit code."""
    del argv
    # Imported here, so that --help and a wrong flag answer at once.
    from effjax.errors import UsageError
    from experiments.run import scoring

    if WORKDIR.value is None or REFERENCE.value is None or OUT.value is None:
        raise UsageError(
            "say --workdir=RUN, the large model, --reference=RUN, the small one, and --out=FILE."
        )
    config = load_config().config
    return scoring.run(config, WORKDIR.value, REFERENCE.value, OUT.value, batch=BATCH.value)


if __name__ == "__main__":
    cli.run(main)

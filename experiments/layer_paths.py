"""Searches, for each of many training examples, for a short plan of a trained language model's layers.

    python -m experiments.layer_paths --workdir=runs/base --out=runs/paths --examples=4096
    python -m experiments.train --config=configs/language/dr_llm.py:probe --workdir=runs/routers \\
        --config.train.start=runs/base --config.data.source.root=runs/paths

A plan says how often each block runs: 0, 1 or 2 times. It is right where every answer of the example is. The
folder holds the examples that some plan answers, each with the shortest that was found: what routers of
`effjax.models.routed_lm` learn from, read as a source of kind `arrays`.
"""

from absl import flags

from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run of the language model")
OUT = flags.DEFINE_string("out", None, "folder to write")
EXAMPLES = flags.DEFINE_integer("examples", 4096, "examples to search for, the first of the training data")
TURNS = flags.DEFINE_integer("turns", 50, "plans to try for an example, at most")
ENOUGH = flags.DEFINE_integer(
    "enough", 2, "stop at a right plan so many layers shorter; 0 goes on to the end"
)
WORTH = flags.DEFINE_float("worth", 0.0, "layers that a nat of loss is worth among plans that are right")
PENALTY = flags.DEFINE_float("length_penalty", 3.0, "how much the search prefers short plans")
AGREE = flags.DEFINE_integer(
    "agree", 0, "plans found most often that all examples choose from; 0 for own ones"
)
COST = flags.DEFINE_float(
    "cost", 0.2, "share of answers that may be lost if all layers are saved, for --agree"
)
BATCH = flags.DEFINE_integer("batch", 256, "examples that are searched for side by side")
SEED = flags.DEFINE_integer("seed", 0, "of the search")
STEP = flags.DEFINE_integer("step", None, "checkpoint to take; by default the newest")


def main(argv: list[str]) -> int:
    """Writes the folder; returns the exit code."""
    del argv
    # Imported here, so that --help and a wrong flag answer at once.
    from effjax.decoding.layer_search import Search
    from effjax.errors import UsageError
    from experiments.run import path_search

    if WORKDIR.value is None or OUT.value is None:
        missing = "workdir" if WORKDIR.value is None else "out"
        raise UsageError(f"--{missing} is missing. Example: --workdir=runs/base --out=runs/paths.")
    search = Search(
        turns=TURNS.value,
        length_penalty=PENALTY.value,
        worth=WORTH.value,
        enough=ENOUGH.value or None,
    )
    request = path_search.Request(EXAMPLES.value, BATCH.value, SEED.value, AGREE.value, COST.value)
    return path_search.run(WORKDIR.value, OUT.value, search, request, step=STEP.value)


if __name__ == "__main__":
    cli.run(main)

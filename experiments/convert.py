"""Brings weights of timm, transformers or diffusers here, and takes them back.

    python -m experiments.convert --from=timm:vit_small_patch16_224 --weights=model.safetensors --out=small
    python -m experiments.convert --from=timm:vit_small_patch16_224 --weights=model.safetensors \\
        --library_config='{"img_size": 384, "num_classes": 10}' --classes=replace --out=small_384
    python -m experiments.convert --to=timm:vit_small_patch16_224 --weights=small --out=back
    python -m experiments.convert --to=timm:vit_small_patch16_224 --workdir=runs/small --out=back
    python -m experiments.convert --to=transformers:llama --workdir=runs/lm-4 --quantised=gptq --out=lm-gptq
    python -m experiments.convert --from=transformers:llama --weights=lm-gptq --out=lm-again

Writes a folder: on the way in params.safetensors with our paths and a config.json whose `model` is the
section of an effjax config; on the way out model.safetensors with the names of the other library. Only
safetensors is read. docs/interop.md says what is checked.
"""

from absl import flags

from experiments import cli

FROM = flags.DEFINE_string(
    "from", None, "where the weights come from: timm:ARCHITECTURE, transformers:MODEL_TYPE, diffusers:CLASS"
)
TO = flags.DEFINE_string("to", None, "the same names, on the way out")
WEIGHTS = flags.DEFINE_string(
    "weights", None, "a .safetensors file or a folder of shards; with --to, a folder that --from wrote"
)
WORKDIR = flags.DEFINE_string("workdir", None, "with --to, the folder of a training run instead of --weights")
STEP = flags.DEFINE_integer("step", None, "checkpoint of the run to take; by default the newest")
LIBRARY_CONFIG = flags.DEFINE_string(
    "library_config",
    None,
    "the other library's configuration, a JSON file or the JSON itself; by default the config.json "
    "of the folder of weights, where there is one; with --to and --quantised, what goes into config.json",
)
OUT = flags.DEFINE_string("out", None, "folder to write; it must not exist or be empty")
QUANTISED = flags.DEFINE_string(
    "quantised",
    None,
    "what becomes of kernels in codes; with --to: gptq, gptq_v2, awq, or whole for the weights that they "
    "stand for; with --from: codes (the default) or whole",
)
CLASSES = flags.DEFINE_string(
    "classes", "keep", "replace starts the classifier anew where the number of classes differs"
)
DTYPE = flags.DEFINE_string("dtype", None, "float32, bfloat16 or float16; by default what the weights have")
ALLOW_NAN = flags.DEFINE_boolean("allow_nan", False, "take tensors that hold NaN")
SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "size of a file, beyond which it is cut into shards")


def main(argv: list[str]) -> int:
    """Converts in the direction that was asked for; returns the exit code."""
    del argv
    # Imported here, so that --help and a wrong flag answer at once.
    from effjax.errors import UsageError
    from experiments.run import converting

    if (FROM.value is None) == (TO.value is None):
        raise UsageError("give one of --from=timm:... (weights come in) and --to=timm:... (they go back).")
    if WORKDIR.value is not None and (TO.value is None or WEIGHTS.value is not None):
        raise UsageError(
            "--workdir stands with --to and without --weights: it is a run whose weights go out."
        )
    if OUT.value is None or (WEIGHTS.value is None and WORKDIR.value is None):
        missing = "weights" if WEIGHTS.value is None else "out"
        raise UsageError(f"--{missing} is missing. Example: --weights=model.safetensors --out=converted.")
    shard_bytes = int(SHARD_GB.value * 1e9)
    if OUT.value.endswith(".safetensors"):
        raise UsageError(f"--out='{OUT.value}' is a file: give the folder that the files are written into.")
    packing = converting.Packing(QUANTISED.value, LIBRARY_CONFIG.value)
    if WORKDIR.value is not None:
        return converting.outwards_from_run(
            str(TO.value), WORKDIR.value, OUT.value, shard_bytes, STEP.value, packing
        )
    if TO.value is not None:
        return converting.outwards(
            str(TO.value), str(WEIGHTS.value), OUT.value, shard_bytes, ALLOW_NAN.value, packing
        )
    return converting.inwards(
        str(FROM.value),
        str(WEIGHTS.value),
        OUT.value,
        library_config=LIBRARY_CONFIG.value,
        classes=CLASSES.value,
        dtype=DTYPE.value,
        allow_nan=ALLOW_NAN.value,
        shard_bytes=shard_bytes,
        quantised=QUANTISED.value,
    )


if __name__ == "__main__":
    cli.run(main)

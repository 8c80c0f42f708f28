"""Plans a run on chips that are not here: does it compile, does it fit, what bounds it, how fast at best.

    python -m experiments.plan --config=configs/language/lm.py:1b --topology=v5p:8x8x8 --config.mesh.tensor=8
    python -m experiments.plan --config=configs/vision/vit.py:b16 --topology=v5e:4x4 --search=8
    python -m experiments.plan --config=configs/diffusion/dit.py:xl2 --topology=h200:8x4 --step=sample
    python -m experiments.plan --config=configs/language/lm.py:8b --topology=h100:8 --step=decode \\
        --config.mesh.tensor=8 --batch=16 --context=8192
    python -m experiments.plan --config=configs/language/lm.py:8b --topology=h100:8 --concurrency
    python -m experiments.plan --workdir=runs/lm-4 --topology=h100:1 --step=decode

Compiles the step of the config, or of a run, ahead of time, sharded as configured, and writes what it found
to --out. Weights take the bytes that they are stored in, those of a compressed run their few bits. The floor
is the time that no run can beat, not a prediction. Exit codes: 0 it fits, 1 it does not compile, 2 asked
wrongly, 3 it compiles and does not fit. docs/plan.md says what a plan can and cannot tell.
"""

from absl import flags

from experiments import cli

cli.define_config("configs/language/lm.py:1b")
WORKDIR = flags.DEFINE_string("workdir", None, "folder of a run, whose config is taken")
TOPOLOGY = flags.DEFINE_string("topology", None, "chips: v5p:8x8x8, v5e:16x16, h100:8, h200:8x4, cpu:8")
STEP = flags.DEFINE_string("step", "train", "train, evaluate, sample, prefill or decode")
OUT = flags.DEFINE_string("out", "plan.json", "where the plan is written")
SEARCH = flags.DEFINE_integer(
    "search", 0, "compile up to this many meshes, rematerialisation policies and batch sizes, and rank them"
)
CONCURRENCY = flags.DEFINE_boolean(
    "concurrency", False, "how many users a language model serves at peak rates; compiles nothing"
)
PRODUCTS = flags.DEFINE_boolean("products", False, "list the matrix products of one device, with their times")
WATTS = flags.DEFINE_float("watts", None, "power of a device, for the energy of --products")
ROOFLINE = flags.DEFINE_string("roofline", None, "a PNG of the chip's roofline with the step's work on it")
BATCH = flags.DEFINE_integer("batch", None, "pictures to sample or sequences to decode at a time")
CONTEXT = flags.DEFINE_integer("context", None, "tokens of a sequence; by default a training row's")
SAMPLER = flags.DEFINE_string(
    "sampler", None, "of a diffusion model; by default the usual one of its process"
)
SAMPLER_STEPS = flags.DEFINE_integer("sampler_steps", None, "of the sampler; by default its own number")
GUIDANCE = flags.DEFINE_float("guidance", 1.0, "scale of classifier-free guidance; 1 is none")
TIMEOUT = flags.DEFINE_integer("timeout", 1800, "seconds after which a compilation is given up")


def main(argv: list[str]) -> int:
    """Plans and reports; returns the exit code."""
    del argv
    # Imported here, so that --help and a wrong flag answer at once.
    from effjax.errors import UsageError
    from experiments.run import planning

    if TOPOLOGY.value is None:
        raise UsageError("--topology is missing. Say which chips: --topology=v5e:4x4, h100:8 or cpu:8.")
    request = planning.Request(
        loaded=cli.load_config() if WORKDIR.value is None else planning.of_run(WORKDIR.value),
        topology=TOPOLOGY.value,
        step=STEP.value,
        batch=BATCH.value,
        context=CONTEXT.value,
        sampler=SAMPLER.value,
        sampler_steps=SAMPLER_STEPS.value,
        guidance=GUIDANCE.value,
        timeout=TIMEOUT.value,
    )
    if CONCURRENCY.value:
        return planning.concurrency(request, OUT.value)
    if SEARCH.value:
        return planning.search(request, SEARCH.value, OUT.value)
    wanted = planning.Views(products=PRODUCTS.value, watts=WATTS.value, roofline=ROOFLINE.value)
    return planning.plan(request, OUT.value, wanted)


if __name__ == "__main__":
    cli.run(main)

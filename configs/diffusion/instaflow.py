"""InstaFlow: a rectified flow, its reflow, and a student of one step (Liu et al. 2024), on DiT.

    python -m experiments.train --config=configs/diffusion/instaflow.py:digits --workdir=runs/flow
    python -m experiments.pairs --workdir=runs/flow --out=runs/flow-pairs --count=8192 --guidance=2
    python -m experiments.train --config=configs/diffusion/instaflow.py:digits-reflow --workdir=runs/reflow
    python -m experiments.pairs --workdir=runs/reflow --out=runs/reflow-pairs --count=8192
    python -m experiments.train --config=configs/diffusion/instaflow.py:digits-one-step --workdir=runs/student
    python -m experiments.sample --workdir=runs/student --out=digits.png --steps=1

Folders other than these are given by --config.train.start and --config.data.source.root.

`smoke`
    20 steps of a toy on digits: seconds.
`digits`, `digits-reflow`, `digits-one-step`
    The flow of configs/diffusion/dit.py:digits-flow; a flow on its pairs, which have the guidance in them;
    and a student that learns the step from noise to the picture alone. About four minutes for each command
    on 2 busy CPU cores. In one step all of 360 pictures are in the class that was asked for, by a ViT at
    97.8% held-out, at a Fréchet distance of 0.42 behind reflow and 0.41 of the student; the first flow has
    0.39 in 25 guided steps and 0.90 in one, with a recall of 0.
`xl2-reflow`, `xl2-one-step`
    The same behind configs/diffusion/dit.py:xl2-flow, on latents of ImageNet. Not run here; InstaFlow itself
    is a U-Net of 0.9B parameters that starts from Stable Diffusion, with an FID of 23.3 on 5,000 texts of
    COCO in one step.
"""

from ml_collections import ConfigDict

from configs.diffusion import dit

VARIANTS = ("smoke", "digits", "digits-reflow", "digits-one-step", "xl2-reflow", "xl2-one-step")


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    size, _, stage = variant.partition("-")
    config = dit.get_config(f"{size}-flow")
    if not stage:
        return config
    before = "flow" if stage == "reflow" else "reflow"
    config.train.start = f"runs/{before}"
    real, config.data = config.data, pairs(f"runs/{before}-pairs", size)
    # Pairs hold the guidance that they were drawn with, and what an example shows is never left out.
    process = dict(kind="rectified_flow", density="uniform" if stage == "reflow" else "latest")
    config.task = ConfigDict(dict(kind="diffusion", process=process, label_dropout=0.0, coupling="noise"))
    if size == "digits":
        config.train.steps = "1000 steps"
        config.optimizer.lr = 5e-4
        del config.evaluators["test"]  # of other couplings than those that are learned
        config.evaluators.samples.guidance = 1.0
        config.evaluators.samples.sampler.steps = 1
        config.evaluators.samples.extractor.data = real  # and not the pairs
    else:
        config.train.steps = "50k steps"
        config.evaluators = ConfigDict()
    return config


def pairs(root: str, size: str) -> ConfigDict:
    """Pairs of noise and picture as experiments.pairs writes them."""
    side, channels = (8, 1) if size == "digits" else (32, 4)
    field = dict(shape=(side, side, channels), dtype="float32")
    return ConfigDict(
        dict(
            source=dict(kind="arrays", root=root),
            batch_size=64 if size == "digits" else 256,
            threads=1 if size == "digits" else 8,
            expected=dict(
                examples=8192 if size == "digits" else 1_281_167,
                fields=dict(noise=field, image=field, label=dict(dtype="int32")),
            ),
        )
    )

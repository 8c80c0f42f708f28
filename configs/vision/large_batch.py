"""A large batch for modules whose gradients are unequally noisy: AGVM, `effjax.train.agvm`.

    python -m experiments.train --config=configs/vision/large_batch.py:digits --workdir=runs/large

`smoke`
    20 steps of a toy on digits: seconds.
`digits`
    The ViT of `configs/vision/vit.py:digits` with all but a hundred of the 1,437 digits in every batch, in
    four parts: 80 steps, two minutes on 2 CPU cores beside other work, and an accuracy of 74.4%.
    Backbone and head are the modules.
`digits-plain`
    The same without AGVM: 75.0%.
`b16-16k`
    ViT-B/16 on ImageNet with 16,384 pictures a step in two parts. Not run here.
"""

from ml_collections import ConfigDict

from configs.vision import vit

VARIANTS = ("smoke", "digits", "digits-plain", "b16-16k")

AGVM = dict(modules=("(?!head/).*", "head/.*"))


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the config of a variant."""
    name = variant.partition("-")[0]
    config = vit.get_config(name)
    config.train.accumulate = 2 if name != "digits" else 4
    if not variant.endswith("plain"):
        config.optimizer.agvm = AGVM
    if variant == "digits":
        # The published averages are for thousands of steps.
        config.optimizer.agvm = dict(AGVM, ema=0.9, every=1)
    if name == "digits":
        config.data.batch_size = 1336
        config.train.steps = "80 steps"
        config.train.log_every = "10 steps"
        config.evaluators.test.every = "20 steps"
    if name == "b16":
        config.data.batch_size = 16384
        # The square root of sixteen times the batch, and a warm-up as long as large batches need it.
        config.optimizer.lr = 4.0 * config.optimizer.lr
        config.optimizer.schedule.warmup = "20 epochs"
        config.optimizer.agvm = dict(AGVM, start="20 epochs")
    return config

"""How image classifiers are trained: the sections that the configs of this folder share."""

from typing import Literal

from ml_collections import ConfigDict

from effjax.errors import UsageError

# Name in tfds, the splits to learn from and to watch, examples of the first.
DATASETS = {
    "1k": ("imagenet2012", "train", "validation", 1_281_167),
    "22k": ("imagenet21k", "train[51200:]", "train[:51200]", 14_145_922),
}


def stages(depths: tuple[int, ...], dims: tuple[int, ...], **of_stage: tuple) -> list[dict]:
    """Settings of stages side by side, as tables in papers give them.

    Args:
      depths: blocks a stage.
      dims: channels a stage.
      **of_stage: anything else that differs between stages.

    Raises:
      UsageError: where they are of unequal length.
    """
    columns = dict(depth=depths, dim=dims, **of_stage)
    if len({len(column) for column in columns.values()}) > 1:
        told = ", ".join(f"{name} for {len(column)}" for name, column in columns.items())
        raise UsageError(f"every setting must be given for as many stages: {told}.")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def digits(model: dict, smoke: bool, *, steps: str = "80 epochs", lr: float = 3e-3) -> ConfigDict:
    """The embedded digits, 8 x 8 pixels in ten classes; `smoke` is the same with less of everything.

    Args:
      model: the model section.
      smoke: whether this run is only to show that everything works.
      steps: the length of a whole run.
      lr: its largest learning rate.
    """
    source = dict(kind="tfds", name="digits")
    scale = dict(kind="normalize", mean=(0.5,), std=(0.5,))
    return ConfigDict(
        dict(
            model=model,
            task=dict(kind="classification", smoothing=0.1),
            data=dict(
                source=source | dict(split="train"),
                transforms=(dict(kind="random_shift", pixels=1), scale),
                batch_size=32 if smoke else 64,
                # Pictures this small cost Python, not pixels: a second thread only fights for the lock.
                threads=1,
                cache=True,
            ),
            optimizer=dict(
                # In one comparison (one seed) AdamW with the same settings ended 1.4 points lower.
                kind="muon",
                lr=1e-2 if smoke else lr,
                weight_decay=0.05,
                clip=1.0,
                schedule=dict(kind="cosine", warmup="5%"),
            ),
            train=dict(
                steps="20 steps" if smoke else steps,
                log_every="5 steps" if smoke else "50 steps",
                checkpoint_every="10 steps" if smoke else "20%",
                ema=dict(decay=0.99),
            ),
            evaluators=dict(
                test=dict(
                    kind="metrics",
                    data=dict(
                        source=source | dict(split="test"), transforms=(scale,), batch_size=120, cache=True
                    ),
                    every="10 steps" if smoke else "10 epochs",
                    ema=True,
                )
            ),
        )
    )


def imagenet(
    model: dict,
    *,
    size: int = 224,
    epochs: int = 300,
    batch_size: int = 1024,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    clip: float | None = None,
    warmup: str = "5 epochs",
    ema: float | None = 0.99996,
    dataset: Literal["1k", "22k"] = "1k",
) -> ConfigDict:
    """DeiT's recipe for ImageNet, in which papers since then change numbers.

    Args:
      model: the model section.
      size: side of the pictures in training and evaluation.
      epochs: the length of the run.
      batch_size: examples a step.
      lr: the largest learning rate, at this batch size.
      weight_decay: of AdamW.
      clip: largest norm of a gradient; None leaves it.
      warmup: how long the learning rate rises.
      ema: decay of the averaged weights; None keeps none.
      dataset: a key of `DATASETS`.
    """
    name, split, held_out, examples = DATASETS[dataset]
    source = dict(kind="tfds", name=name, fields=("image", "label"))
    normalize = dict(kind="normalize")
    return ConfigDict(
        dict(
            model=model,
            task=dict(
                kind="classification",
                smoothing=0.1,
                mixing=dict(mixup=0.8, cutmix=1.0, switch=0.5, probability=1.0),
            ),
            data=dict(
                source=source | dict(split=split),
                transforms=(
                    dict(kind="random_resized_crop", size=size),
                    dict(kind="random_flip"),
                    dict(kind="rand_augment", count=2, magnitude=9.0, magnitude_std=0.5),
                    normalize,
                    dict(kind="random_erasing", probability=0.25),
                ),
                batch_size=batch_size,
                threads=16,
                expected=dict(
                    examples=examples,
                    fields=dict(image=dict(shape=(None, None, 3), dtype="uint8"), label=dict(dtype="int64")),
                ),
            ),
            optimizer=dict(
                kind="adamw",
                lr=lr,
                weight_decay=weight_decay,
                clip=clip,
                schedule=dict(kind="cosine", warmup=warmup, end=0.01),
            ),
            train=dict(
                steps=f"{epochs} epochs",
                precision=dict(compute="bfloat16"),
                log_every="100 steps",
                checkpoint_every="1 epochs",
                ema=None if ema is None else dict(decay=ema),
            ),
            evaluators=dict(
                validation=dict(
                    kind="metrics",
                    data=dict(
                        source=source | dict(split=held_out),
                        transforms=(dict(kind="center_crop", size=size), normalize),
                        batch_size=batch_size,
                        threads=16,
                    ),
                    every="5 epochs",
                )
            ),
        )
    )

"""3-D poses from 2-D ones in video: MixSTE (Zhang et al. 2022), and its hourglass (HoT, Li et al. 2024).

    python -m experiments.train --config=configs/pose/hot.py:VARIANT --workdir=runs/hot

`smoke`
    20 steps of a toy on `motion`: seconds.
`motion`, `motion-attention`
    An hourglass of 0.03M parameters on the embedded clips: 21 of 64 frames between its first layer and its
    head, and all of them again on straight lines or by the published attention. 14.2 MMACs a clip, 40 mm
    after three minutes on one CPU core; the attention stays at 173 mm.
`motion-base`
    The same without a waist: 27.2 MMACs, 42 mm after five minutes.
`mixste`, `hot-mixste`
    Clips of 243 frames of 17 joints; the hourglass keeps 81 of them after three of eight layers. Human3.6M
    is not in tfds: prepare a data set `human36m` with the fields `seen` and `joints`, from the pelvis and in
    metres. Not run here; the papers report 40.9 mm and 41.0 mm MPJPE.
"""

from typing import Any

from ml_collections import ConfigDict

VARIANTS = ("smoke", "motion", "motion-attention", "motion-base", "mixste", "hot-mixste")

# Of the joints of Human3.6M in the loss: what is far from the trunk weighs more.
WEIGHTS = (1.0, 1.0, 2.5, 2.5, 1.0, 2.5, 2.5, 1.0, 1.0, 1.0, 1.5, 1.5, 4.0, 4.0, 1.5, 4.0, 4.0)


def get_config(variant: str = "motion") -> ConfigDict:
    """Returns the config of a variant."""
    if variant.endswith("mixste"):
        waist: dict[str, Any] | None = dict(after=3, keep=81) if variant == "hot-mixste" else None
        return human36m(
            pose(frames=243, joints=17, dim=512, depth=8, heads=8, drop_path=0.1, hourglass=waist)
        )
    smoke = variant == "smoke"
    size = dict(dim=16, depth=2, heads=2) if smoke else dict(dim=24, depth=3, heads=2)
    recover = "linear" if variant == "motion" else "attention"
    few: dict[str, Any] = dict(after=1, keep=21, heads=size["heads"], recover=recover)
    waist = None if variant == "motion-base" else few
    return motion(pose(frames=64, joints=11, **size, hourglass=waist), smoke)


def pose(heads: int, **fields: object) -> dict:
    """The model section."""
    block = dict(mixer=dict(kind="attention", heads=heads), ffn=dict(kind="mlp", ratio=2.0))
    return dict(kind="pose", space=block, time=block, **fields)


def motion(model: dict, smoke: bool) -> ConfigDict:
    """The embedded clips; `smoke` is the same with less of everything."""
    source = dict(kind="tfds", name="motion")
    return ConfigDict(
        dict(
            model=model,
            task=dict(kind="pose", velocity=0.5),
            data=dict(source=source | dict(split="train"), batch_size=16, threads=1, cache=True),
            optimizer=dict(
                kind="adamw",
                lr=4e-3,
                weight_decay=0.05,
                clip=1.0,
                schedule=dict(kind="cosine", warmup="5%"),
            ),
            train=dict(
                steps="20 steps" if smoke else "20 epochs",
                log_every="5 steps" if smoke else "50 steps",
                checkpoint_every="10 steps" if smoke else "50%",
            ),
            evaluators=dict(
                test=dict(
                    kind="metrics",
                    data=dict(
                        source=source | dict(split="test[:32]" if smoke else "test"),
                        batch_size=32,
                        cache=True,
                    ),
                    every="10 steps" if smoke else "5 epochs",
                )
            ),
        )
    )


def human36m(model: dict) -> ConfigDict:
    """The recipe of HoT's code, whose learning rate falls by a hundredth every epoch."""
    source = dict(kind="tfds", name="human36m")
    fields = {name: dict(shape=(243, 17, n), dtype="float32") for name, n in (("seen", 2), ("joints", 3))}
    return ConfigDict(
        dict(
            model=model,
            task=dict(kind="pose", weights=WEIGHTS, smoothness=0.5, velocity=2.0),
            data=dict(
                source=source | dict(split="train"),
                batch_size=4,
                expected=dict(examples=6_400, fields=fields),
            ),
            optimizer=dict(kind="adamw", lr=4e-5, weight_decay=0.1, schedule=dict(kind="cosine", end=0.2)),
            train=dict(steps="160 epochs", checkpoint_every="1 epochs", log_every="100 steps"),
            evaluators=dict(
                test=dict(
                    kind="metrics",
                    data=dict(source=source | dict(split="test"), batch_size=4),
                    every="1 epochs",
                )
            ),
        )
    )

"""PT-DiT (Qihoo-T2X, Wang et al. 2024): diffusion transformers whose tokens meet by proxy.

    python -m experiments.train --config=configs/diffusion/pt_dit.py:VARIANT --workdir=runs/pt_dit
    python -m experiments.sample --workdir=runs/pt_dit --out=digits.png --guidance=2

`smoke`
    20 steps of a toy on digits that is told its class as a text of one word: seconds.
`digits`, `digits-text`
    1.06M parameters on the digits, told a label, or 1.22M told a text of one word; v prediction, 1500 steps.
    Told a label, the held-out loss is 0.265 after 300 steps, 0.228 after 600 and 0.215 at the end (the DiT of
    `dit.py:digits` with 1.87M has 0.229); at scale 2 the evaluator finds all samples in their class, a
    Fréchet distance of 0.37 (the DiT's is 0.39), precision 0.97 and recall 0.40. Sixteen minutes of a busy
    core. The text was not run.
`s`
    The class-conditional model of the ablations on 32 x 32 x 4 latents of ImageNet, a TFDS data set
    `imagenet_latents` (fields `image` [32, 32, 4] float32 and `label`). The paper reports an FID of 19.30
    with 50 steps and a guidance scale of 6.
`b`, `l`, `xl`, `h`
    The text-to-image models at 256 pixels: a TFDS data set `captioned_latents_256` with fields `image`
    [32, 32, 4] and `text` [120, 4096] of T5-XXL, float32, zeros behind the last word. `xl` is Qihoo-T2I.
`xl-512`, `xl-1024`
    Its later stages, on `captioned_latents_512` and `captioned_latents_1024`. Windows grow with the picture,
    so that there are always as many proxies. A stage begins where the one before it ended:
    `--config.train.start=runs/xl`.
`xl-video-256`, `xl-video-512`
    Qihoo-T2V: 96 frames in 24 latent ones, field `video` [24, 32, 32, 4] (or [24, 64, 64, 4]).
`xl-views`
    Qihoo-T2MV: 24 views of an object. How they are compressed in time is not said; here each is a latent.

No published model was run here. The paper trained v prediction and sampled 50 steps at a guidance scale of
6; the published code samples `xl` as a rectified flow, 30 steps at a scale of 4. Learning rates, batches and
steps are the paper's; optimiser, schedule, dropped texts and averaged weights it gives for the ablations
alone, or not at all.
"""

from typing import Any

from ml_collections import ConfigDict

from configs.diffusion.dit import digits, latents, samples

#            dim, depth, heads: the paper's table 4
SIZES = {
    "smoke": (32, 2, 2),
    "digits": (96, 4, 4),
    "s": (288, 10, 6),
    "b": (640, 12, 10),
    "l": (864, 28, 12),
    "xl": (1152, 28, 16),
    "h": (1440, 30, 20),
}

# Side of the latents, latent frames (0 is a picture), batch and steps: the paper's table 3 and section A.2.
STAGES = {
    "": (32, 0, 10_240, "100k steps"),
    "512": (64, 0, 768, "50k steps"),
    "1024": (128, 0, 512, "50k steps"),
    "video-256": (32, 24, 512, "100k steps"),
    "video-512": (64, 24, 256, "50k steps"),
    "views": (64, 24, 128, "20k steps"),
}
TEXT = (120, 4096)

VARIANTS = (
    *("smoke", "digits", "digits-text", "s", "b", "l", "xl", "h"),
    *(f"xl-{stage}" for stage in STAGES if stage),
)


def get_config(variant: str = "digits") -> ConfigDict:
    """Returns the experiment of one variant."""
    size, _, stage = variant.partition("-")
    if size in ("smoke", "digits"):
        return small(size, told_a_text=size == "smoke" or stage == "text")
    if size == "s":
        config = latents()
        config.model = model(size, (1, 2, 2), classes=1000)
        config.task = task(prediction="v")
        return config
    side, frames, batch, steps = STAGES[stage]
    config = captioned(stage or "256", side, frames, batch, steps)
    # As many windows at every size of picture, and four frames in each.
    config.model = model(size, (4 if frames else 1, side // 16, side // 16), text=TEXT[1])
    config.task = task(prediction="v", content="video" if frames else "image", condition="text")
    return config


def small(size: str, told_a_text: bool) -> ConfigDict:
    """The embedded digits, 8 x 8 pixels in tokens of 2 x 2, told as a label or as a text of one word."""
    config = digits(smoke=size == "smoke")
    if size == "digits":
        config.evaluators.samples = samples(smoke=False, flow=False)
    told: dict[str, Any] = {"text": 10} if told_a_text else {"classes": 10}
    config.model = model(size, (1, 2, 2), learned_sigma=False, **told)
    config.task = task(prediction="v", sigma="small", condition="text" if told_a_text else "label")
    if told_a_text:
        for data in (config.data, *(evaluator.data for evaluator in config.evaluators.values())):
            data.transforms = (*data.transforms, dict(kind="one_hot_text", words=10))
    return config


def captioned(stage: str, side: int, frames: int, batch: int, steps: str) -> ConfigDict:
    """Latents with texts; the learning rate is the paper's, the rest of the recipe it does not say."""
    content, shape = ("video", (frames, side, side, 4)) if frames else ("image", (side, side, 4))
    source = dict(kind="tfds", name=f"captioned_latents_{stage.replace('-', '_')}")
    examples = {"256": 50_000_000, "video-256": 10_000_000, "video-512": 3_000_000, "views": 40_000}
    config = latents()
    config.data.source = source | dict(split="train")
    config.data.batch_size = batch
    config.data.expected = dict(
        examples=examples.get(stage, 18_000_000),
        fields={content: dict(shape=shape), "text": dict(shape=TEXT)},
    )
    config.optimizer.lr = 2e-5
    config.train.steps = steps
    config.evaluators.validation.data.source = source | dict(split="validation")
    return config


def task(prediction: str, sigma: str = "learned", **fields: str) -> ConfigDict:
    """The chain of DDPM, with the condition dropped for a tenth of the examples."""
    process = dict(kind="ddpm", schedule="linear", steps=1000, prediction=prediction, sigma=sigma)
    return ConfigDict(dict(kind="diffusion", process=process, label_dropout=0.1, **fields))


def model(size: str, window: tuple[int, int, int], learned_sigma: bool = True, **told: int) -> ConfigDict:
    """The transformer of one size, told labels or texts; latents are cut into patches of 2 x 2."""
    dim, depth, heads = SIZES[size]
    return ConfigDict(
        dict(
            kind="pt_dit",
            patch=2,
            dim=dim,
            depth=depth,
            learned_sigma=learned_sigma,
            block=dict(heads=heads, window=window, ffn=dict(kind="mlp", ratio=4.0, activation="gelu_tanh")),
            **told,
        )
    )

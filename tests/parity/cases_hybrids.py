"""timm's hybrids of convolution and attention: LowFormer and NextViT, toys and published sizes."""

import timm
import torch
from timm.models.nextvit import ConvNormAct, NextConvBlock, NextStage, NextTransformerBlock, NextViT

from tests.parity.case import Case, channels_first, images

_LOW = dict(
    width_list=[4, 6, 8, 10, 12],
    depth_list=[1, 1, 2, 1, 2],
    head_widths=[12, 14],
    num_classes=5,
    stem_expand_ratio=2.0,
    downsample_expand_ratios=[3.0, 2.0, 2.0, 3.0],
)
_NEXT = dict(
    depths=[1, 2, 5],
    stem_chs=[4, 4, 6],
    stage_chs=[[8, 8], [8, 40], [8, 40]],
    strides=[1, 2, 2],
    sr_ratios=[4, 2, 1],
    mix_block_ratio=0.5,
    head_dim=4,
    num_classes=5,
    drop_path_rate=0.0,
)


class ToyNextViT(NextViT):
    """timm's own parts in widths that it has no argument for."""

    def __init__(self, c):
        torch.nn.Module.__init__(self)
        stem = [3, *c["stem_chs"], c["stem_chs"][-1]]
        strides = (2, 1, 1, 2)
        self.stem = torch.nn.Sequential(*(ConvNormAct(stem[i], stem[i + 1], 3, strides[i]) for i in range(4)))
        channels, stages = stem[-1], []
        for i, (depth, (narrow, wide)) in enumerate(zip(c["depths"], c["stage_chs"], strict=True)):
            period = 5 if i == 2 else depth
            last = [(j + 1) % period == 0 and i > 0 for j in range(depth)]
            stages.append(
                NextStage(
                    channels,
                    [wide if wanted else narrow for wanted in last],
                    [NextTransformerBlock if wanted else NextConvBlock for wanted in last],
                    stride=c["strides"][i],
                    sr_ratio=c["sr_ratios"][i],
                    mix_block_ratio=c["mix_block_ratio"],
                    head_dim=c["head_dim"],
                )
            )
            channels = wide
        self.stages = torch.nn.Sequential(*stages)
        self.norm = torch.nn.BatchNorm2d(channels)
        self.head = timm.layers.ClassifierHead(channels, c["num_classes"])
        self.grad_checkpointing = False


def _low(changes, side=32, **options):
    config = {**_LOW, **changes}
    return Case(
        "timm:lowformer_b1",
        config,
        lambda: timm.create_model("lowformer_b1", **config),
        images(side),
        channels_first,
        **options,
    )


def _next(changes, side=24, **options):
    config = {**_NEXT, **changes}
    return Case(
        "timm:nextvit_small", config, lambda: ToyNextViT(config), images(side), channels_first, **options
    )


def _published(name, side=224, **options):
    return Case(
        f"timm:{name}", {}, lambda: timm.create_model(name), images(side, 1), channels_first, **options
    )


CASES = {
    "timm_lowformer": _low({}, fixture=True),
    # On smaller maps the last batch norms see two values, and rounding decides the gradient.
    "timm_lowformer_larger": _low({}, side=96, gradient=True),
    "timm_lowformer_odd": _low({}, side=45),
    "timm_lowformer_unfused": _low(dict(fused_conv=False), fixture=True),
    "timm_lowformer_wide": _low(dict(width_list=[4, 6, 8, 64, 256], depth_list=[0, 1, 1, 1, 1])),
    "timm_lowformer_no_attention": _low(dict(attn=False, attn_mlp=False)),
    "timm_lowformer_no_mlp": _low(dict(attn_mlp=False)),
    "timm_lowformer_features": _low(dict(num_classes=0)),
    "timm_lowformer_b0": _published("lowformer_b0"),
    "timm_lowformer_b3": _published("lowformer_b3"),
    "timm_lowformer_e3": _published("lowformer_e3"),
    "timm_nextvit_deep": _next(dict(depths=[1, 3, 20])),
    "timm_nextvit": _next({}, gradient=True, fixture=True),
    "timm_nextvit_odd": _next(dict(depths=[2, 3, 15]), side=45),
    "timm_nextvit_small": _published("nextvit_small"),
    "timm_nextvit_base": _published("nextvit_base", side=200, gain=0.5),
}

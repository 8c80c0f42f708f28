"""ConvNeXt, PoolFormer and FocalNet of timm and transformers: toys with odd choices, and whole networks."""

from typing import Any
from unittest import mock

import timm
import timm.layers
import timm.models.convnext
import timm.models.focalnet
import timm.models.metaformer
import torch
import transformers

from tests.parity.case import Case, channels_first, images

_DIMS = (8, 12, 16, 20)
_CONVNEXT = dict(depths=(1, 2, 1, 1), dims=_DIMS, num_classes=5)
_POOL = dict(depths=(1, 2, 1, 1), dims=_DIMS, num_classes=5)
_FOCAL = dict(depths=(1, 2, 1, 1), embed_dim=4, num_classes=5)


def _timm(name: str, config: dict[str, Any], side: int = 44, **options: Any) -> Case:
    return Case(
        f"timm:{name}",
        config,
        lambda: timm.create_model(name, **config),
        images(side),
        channels_first,
        **options,
    )


def _fid_pools(module: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """timm's Inception with the pools of the weights for FID."""
    average = torch.nn.functional.avg_pool2d

    def pool(x: torch.Tensor, **options: Any) -> torch.Tensor:
        if x.shape[1] == 2048:  # the last cell
            return torch.nn.functional.max_pool2d(x, **options)
        return average(x, count_include_pad=False, **options)

    with mock.patch.object(torch.nn.functional, "avg_pool2d", pool):
        return channels_first(module, images)


def _inception(call: Any, **fields: Any) -> Case:
    config = dict(num_classes=12)
    return Case(
        "timm:inception_v3",
        config | fields,
        lambda: timm.create_model("inception_v3", **config),
        images(139, 1),
        call,
    )


def _poolformer(config: dict[str, Any], **options: Any) -> Case:
    """A toy; timm's own functions let nobody change their sizes."""

    def module() -> torch.nn.Module:
        return timm.models.metaformer.MetaFormer(
            downsample_norm=None,
            mlp_act=torch.nn.GELU,
            mlp_bias=True,
            norm_layers=timm.layers.GroupNorm1,
            layer_scale_init_values=1e-5,
            res_scale_init_values=None,
            use_mlp_head=False,
            **config,
        )

    return Case("timm:poolformer_s12", config, module, images(44), channels_first, **options)


def _focalnet(name: str, config: dict[str, Any], **options: Any) -> Case:
    def module() -> torch.nn.Module:
        return timm.models.focalnet.FocalNet(**config)

    return Case(f"timm:{name}", config, module, images(44), channels_first, **options)


def _logits(module: Any, pictures: Any) -> Any:
    return channels_first(module, pictures).logits


def _pooled(module: Any, pictures: Any) -> Any:
    return channels_first(module, pictures).pooler_output


def _transformers(kind: str, config: dict[str, Any], call: Any = _logits, side: int = 44, **options: Any):
    cls = getattr(transformers, kind)
    model_type = cls.config_class.model_type
    return Case(
        f"transformers:{model_type}",
        config,
        lambda: cls(cls.config_class(**config)),
        images(side),
        call,
        **options,
    )


_HIDDEN = dict(depths=(1, 2, 1, 1), hidden_sizes=_DIMS, num_labels=5)
_LARGE = dict(
    focal_levels=(3, 3, 3, 3),
    use_post_norm=True,
    use_post_norm_in_modulation=True,
    use_overlap_down=True,
    normalize_modulator=True,
    layerscale_value=0.1,
    drop_path_rate=0.0,
)

CASES = {
    "timm_convnext_toy": _timm("convnext_tiny", _CONVNEXT, 44, gradient=True, fixture=True),
    "timm_convnext_conv": _timm("convnext_atto", dict(_CONVNEXT, act_layer="silu")),
    "timm_convnext_tiered": _timm("convnext_pico_ols", _CONVNEXT, 44, fixture=True),
    "timm_convnext_tiered_wide": _timm("convnext_atto_ols", dict(depths=(1, 1, 1, 1))),
    "timm_convnext_overlap": _timm("convnext_nano_ols", _CONVNEXT),
    "timm_convnext_act": _timm("convnext_nano_ols", dict(_CONVNEXT, stem_type="overlap_act")),
    "timm_convnext_rms": _timm("convnext_atto_rms", _CONVNEXT),
    "timm_convnext_norm_first": _timm("convnext_tiny_hnf", _CONVNEXT),
    "timm_convnext_hidden": _timm("convnext_large_mlp", dict(_CONVNEXT, head_hidden_size=12)),
    "timm_convnext_kernels": _timm("test_convnext3", {}),
    "timm_convnext_patch_2": _timm("convnext_tiny", dict(_CONVNEXT, patch_size=2)),
    # `timm.create_model` drops what is None, its class does not.
    "timm_convnext_no_scale": Case(
        "timm:convnext_tiny",
        dict(_CONVNEXT, ls_init_value=None),
        lambda: timm.models.convnext.ConvNeXt(**_CONVNEXT, ls_init_value=None),
        images(44),
        channels_first,
    ),
    "timm_convnext_max": _timm("convnext_tiny", dict(_CONVNEXT, global_pool="max")),
    "timm_convnext_features": _timm("convnext_tiny", dict(_CONVNEXT, num_classes=0)),
    "timm_convnext_tiny": _timm("convnext_tiny", {}, 224, gradient=True),
    "timm_poolformer_toy": _poolformer(_POOL, fixture=True),
    "timm_poolformer_wide": _poolformer(dict(_POOL, pool_size=5)),
    "timm_poolformer_s12": _timm("poolformer_s12", {}, 224),
    "timm_focalnet_toy": _focalnet(
        "focalnet_tiny_srf", dict(_FOCAL, drop_path_rate=0.0), gradient=True, fixture=True
    ),
    "timm_focalnet_large": _focalnet(
        "focalnet_tiny_srf", dict(_FOCAL, **_LARGE), gradient=True, fixture=True
    ),
    "timm_focalnet_tiny_srf": _timm("focalnet_tiny_srf", dict(drop_path_rate=0.0), 224, gradient=True),
    "timm_focalnet_tiny_lrf": _timm("focalnet_tiny_lrf", {}, 224),
    "timm_inception": _inception(channels_first),
    "timm_inception_fid": _inception(_fid_pools, fid=True),
    "transformers_convnext": _transformers(
        "ConvNextForImageClassification", _HIDDEN, side=44, fixture=True, gradient=True
    ),
    "transformers_convnext_model": _transformers("ConvNextModel", _HIDDEN, _pooled),
    "transformers_convnext_tiny": _transformers("ConvNextForImageClassification", {}, side=224),
    "transformers_poolformer": _transformers(
        "PoolFormerForImageClassification", _HIDDEN, side=44, fixture=True
    ),
    "transformers_poolformer_no_scale": _transformers(
        "PoolFormerForImageClassification",
        dict(_HIDDEN, use_layer_scale=False, pool_size=5, hidden_act="relu"),
    ),
    "transformers_poolformer_s12": _transformers("PoolFormerForImageClassification", {}, side=224),
    "transformers_focalnet": _transformers(
        "FocalNetForImageClassification",
        dict(depths=(1, 2, 1, 1), embed_dim=4, num_labels=5, drop_path_rate=0.0),
        side=44,
        fixture=True,
        gradient=True,
    ),
    "transformers_focalnet_large": _transformers(
        "FocalNetForImageClassification",
        dict(
            depths=(1, 2, 1, 1),
            embed_dim=4,
            num_labels=5,
            focal_levels=(3, 3, 3, 3),
            use_conv_embed=True,
            use_layerscale=True,
            use_post_layernorm=True,
            use_post_layernorm_in_modulation=True,
            normalize_modulator=True,
        ),
    ),
    "transformers_focalnet_model": _transformers(
        "FocalNetModel", dict(depths=(1, 2, 1, 1), embed_dim=4), _pooled
    ),
    "transformers_focalnet_tiny": _transformers("FocalNetForImageClassification", {}, side=224),
}

"""Vision transformers of timm and transformers, and DiT: a toy of every variant, and published sizes."""

import diffusers
import numpy as np
import timm
import torch
import transformers

from tests.parity.case import Case, channels_first, images
from tests.parity.official_dit import OfficialDiT

_TOY = dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5)

# Keyword arguments of timm, each changing one thing.
_VARIANTS = {
    "no_qkv_bias": dict(qkv_bias=False),
    "layer_scale": dict(init_values=0.1),
    "mean": dict(global_pool="avg"),
    "mean_no_class": dict(global_pool="avg", class_token=False),
    "mean_all": dict(global_pool="avg", pool_include_prefix=True),
    "max": dict(global_pool="max"),
    "mean_max": dict(global_pool="avgmax"),
    "attention_pool": dict(global_pool="map", class_token=False),
    "attention_pool_norm": dict(global_pool="map", reg_tokens=1, pool_include_prefix=True, fc_norm=True),
    "all_tokens": dict(global_pool=""),
    "features": dict(num_classes=0),
    "registers": dict(reg_tokens=4),
    "registers_no_place": dict(reg_tokens=4, no_embed_class=True),
    "no_place": dict(no_embed_class=True),
    "no_positions": dict(pos_embed="none"),
    "norm_after_pool": dict(fc_norm=True),
    "no_final_norm": dict(final_norm=False),
    "clip": dict(pre_norm=True, act_layer="quick_gelu"),
    "patch_norm": dict(embed_norm_layer="layernorm"),
    "qk_norm": dict(qk_norm=True),
    "qk_norm_rms": dict(qk_norm=True, norm_layer="rmsnorm"),
    "no_bias": dict(qkv_bias=False, proj_bias=False),
    "tanh": dict(act_layer="gelu_tanh"),
    "silu": dict(act_layer="silu"),
    "ratio": dict(mlp_ratio=2.7),
    "oblong": dict(img_size=(16, 40)),
    "one_channel": dict(in_chans=1),
}


def _timm(name, changes, **options):
    config = {**_TOY, **changes}
    size = config["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    shape = 2, height, width, config.get("in_chans", 3)
    return Case(
        source=f"timm:{name}",
        config=config,
        module=lambda: timm.create_model(name, **config),
        inputs=lambda rng: (rng.standard_normal(shape, dtype=np.float32),),
        call=channels_first,
        **options,
    )


def _published(name, **options):
    side = timm.create_model(name, depth=1).patch_embed.img_size[0]
    return Case(f"timm:{name}", {}, lambda: timm.create_model(name), images(side), channels_first, **options)


_ENCODER = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=8)
_PLAIN = dict(_ENCODER, intermediate_size=40)


def _logits(module, pictures):
    return channels_first(module, pictures).logits


def _pooled(module, pictures):
    return channels_first(module, pictures).pooler_output


def _encoder(kind, config, call=_logits, side=16, **options):
    """One class of transformers; the configuration does not say which, the tensors do."""
    cls = getattr(transformers, kind)
    config = cls.config_class(**config).to_dict()
    config.pop("dtype", None)
    model_type = config["model_type"]
    # Numbers and strings alone, so that it can be recorded.
    config = {key: value for key, value in config.items() if key in _KEYS}
    return Case(
        f"transformers:{model_type}",
        config,
        lambda: cls(cls.config_class(**config)),
        images(side),
        call,
        **options,
    )


_KEYS = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "mlp_ratio"),
    *("hidden_act", "layer_norm_eps", "image_size", "patch_size", "num_channels", "qkv_bias", "id2label"),
    *("layerscale_value", "use_swiglu_ffn", "num_register_tokens", "pooler_output_size"),
}

_DIT = dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, sample_size=8, num_embeds_ada_norm=7)
_OFFICIAL = dict(input_size=8, hidden_size=24, depth=2, num_heads=2, num_classes=7)


def _noisy(side, channels, classes):
    """Inputs: pictures, times, and labels of which the last is none."""

    def inputs(rng):
        pictures = rng.standard_normal((2, side, side, channels), dtype=np.float32)
        return pictures, np.array([3.0, 871.0], np.float32), np.array([1, classes], np.int32)

    return inputs


def _noise(module, pictures, t, label):
    out = module(pictures.permute(0, 3, 1, 2), t, label.long())
    return (out if isinstance(out, torch.Tensor) else out.sample).permute(0, 2, 3, 1)


def _diffusers(changes, side=8, channels=4, classes=7, **options):
    config = {**_DIT, **changes} if changes is not None else {}

    def module():
        made = diffusers.DiTTransformer2DModel(**config)
        for block in made.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0  # labels are dropped by the task here
        return made

    return Case(
        "diffusers:DiTTransformer2DModel",
        config,
        module,
        _noisy(side, channels, classes),
        _noise,
        **options,
    )


def _autoencoder(changes, fixture=False):
    """Pictures there and back, through the mean of their code."""
    stages = len(changes["block_out_channels"])
    blocks = dict(
        down_block_types=("DownEncoderBlock2D",) * stages, up_block_types=("UpDecoderBlock2D",) * stages
    )
    config = {**blocks, **changes}

    def call(module, pictures):
        code = module.encode(pictures.permute(0, 3, 1, 2)).latent_dist.mode()
        return module.decode(code).sample.permute(0, 2, 3, 1)

    return Case(
        "diffusers:AutoencoderKL",
        config,
        lambda: diffusers.AutoencoderKL(**config),
        images(16),
        call,
        gradient=fixture,
        fixture=fixture,
    )


CASES = {
    **{f"timm_vit_{name}": _timm("vit_base_patch16_224", changes) for name, changes in _VARIANTS.items()},
    "timm_deit_distilled": _timm("deit_base_distilled_patch16_224", {}, gradient=True, fixture=True),
    "timm_deit3": _timm("deit3_base_patch16_224", {}),
    "timm_dinov2_giant": _timm("vit_giant_patch14_reg4_dinov2", {}, gradient=True, fixture=True),
    "timm_aimv2": _timm("aimv2_large_patch14_224", {}, fixture=True),
    "timm_res_post_norm": _timm("vit_base_patch16_rpn_224", {}, fixture=True),
    "timm_parallel": _timm("vit_base_patch16_xp_224", {}, gradient=True, fixture=True),
    "timm_parallel_bias": _timm("vit_pwee_patch16_reg1_gap_256", {}),
    "timm_cropped": _timm("vit_so400m_patch14_siglip_384", dict(img_size=19)),
    "timm_siglip": _timm("vit_so400m_patch14_siglip_224", {}, gradient=True, fixture=True),
    "timm_clip": _timm("vit_base_patch16_clip_quickgelu_224", {}, fixture=True),
    "timm_registers": _timm("vit_base_patch16_reg4_gap_256", {}, gradient=True, fixture=True),
    "timm_test_vit3": _timm("test_vit3", {}),
    "timm_vit_base_patch16_224": _published("vit_base_patch16_224", gradient=True),
    "timm_deit_base_distilled_patch16_224": _published("deit_base_distilled_patch16_224"),
    "timm_vit_base_patch16_reg4_gap_256": _published("vit_base_patch16_reg4_gap_256"),
    "transformers_vit": _encoder("ViTForImageClassification", _PLAIN, fixture=True),
    "transformers_vit_model": _encoder("ViTModel", _PLAIN, _pooled),
    "transformers_vit_no_bias": _encoder(
        "ViTForImageClassification", dict(_PLAIN, qkv_bias=False, hidden_act="gelu_new")
    ),
    "transformers_deit": _encoder("DeiTForImageClassification", _PLAIN),
    "transformers_deit_teacher": _encoder("DeiTForImageClassificationWithTeacher", _PLAIN, fixture=True),
    "transformers_deit_model": _encoder("DeiTModel", _PLAIN, _pooled),
    "transformers_vit_msn": _encoder("ViTMSNForImageClassification", _PLAIN),
    "transformers_ijepa": _encoder("IJepaForImageClassification", _PLAIN),
    "transformers_dinov2": _encoder("Dinov2ForImageClassification", _ENCODER),
    "transformers_dinov2_model": _encoder("Dinov2Model", _ENCODER, _pooled),
    "transformers_dinov2_swiglu": _encoder(
        "Dinov2ForImageClassification", dict(_ENCODER, use_swiglu_ffn=True)
    ),
    "transformers_dinov2_registers": _encoder(
        "Dinov2WithRegistersForImageClassification", _ENCODER, fixture=True
    ),
    "transformers_clip": _encoder("CLIPVisionModel", _PLAIN, _pooled),
    "transformers_siglip": _encoder("SiglipVisionModel", _PLAIN, _pooled, fixture=True),
    "transformers_vit_base": _encoder("ViTForImageClassification", {}, side=224),
    "diffusers_dit": _diffusers({}, fixture=True),
    "diffusers_dit_sigma": _diffusers(dict(out_channels=8)),
    "diffusers_dit_no_bias": _diffusers(dict(attention_bias=False)),
    "diffusers_dit_geglu": _diffusers(dict(activation_fn="geglu")),
    "diffusers_dit_swiglu": _diffusers(dict(activation_fn="swiglu")),
    "diffusers_dit_affine": _diffusers(dict(norm_elementwise_affine=True, norm_eps=1e-3)),
    "diffusers_dit_patch": _diffusers(dict(patch_size=4, in_channels=3), channels=3),
    "diffusers_dit_larger": _diffusers({}, side=12),
    "diffusers_dit_xl": _diffusers(None, side=32, classes=1000),
    "diffusers_autoencoder": _autoencoder(
        dict(block_out_channels=(4, 8, 8), norm_num_groups=2, layers_per_block=2), fixture=True
    ),
    "diffusers_autoencoder_bare": _autoencoder(
        dict(
            block_out_channels=(4, 8),
            norm_num_groups=4,
            latent_channels=16,
            shift_factor=0.1,
            scaling_factor=0.36,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    ),
    "official_dit": Case(
        "official:DiT",
        _OFFICIAL,
        lambda: OfficialDiT(**_OFFICIAL),
        _noisy(8, 4, 7),
        _noise,
        gradient=True,
        fixture=True,
    ),
    "official_dit_xl": Case("official:DiT-XL/2", {}, OfficialDiT, _noisy(32, 4, 1000), _noise),
}

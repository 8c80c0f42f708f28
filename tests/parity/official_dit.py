"""The official DiT in torch, with the names of its checkpoints; github.com/facebookresearch/DiT, `models.py`.

Written anew from the paper and the names; patches, attention and perceptron are timm's, as they are there.
"""

import math

import torch
from timm.layers import Attention, Mlp, PatchEmbed
from torch import nn

from effjax.layers.patches import sincos_table


def _modulated(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


def _steering(dim: int, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, parts * dim))


class Times(nn.Module):
    """Cosines and sines of the time, then two layers."""

    def __init__(self, dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.half = frequencies // 2

    def forward(self, t):
        """Embeds times of training steps."""
        angle = t[:, None] * torch.exp(-math.log(10_000) / self.half * torch.arange(self.half))
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


class Labels(nn.Module):
    """A table of classes, with one row more for none."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)


class Layer(nn.Module):
    """The adaLN-Zero block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, heads, qkv_bias=True)
        self.mlp = Mlp(dim, 4 * dim, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = _steering(dim, 6)

    def forward(self, x, c):
        """Mixes tokens, then channels."""
        b_1, a_1, g_1, b_2, a_2, g_2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + g_1[:, None] * self.attn(_modulated(self.norm(x), b_1, a_1))
        return x + g_2[:, None] * self.mlp(_modulated(self.norm(x), b_2, a_2))


class Last(nn.Module):
    """The projection to pixels."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, outputs)
        self.adaLN_modulation = _steering(dim, 2)

    def forward(self, x, c):
        """Norm, modulation, projection."""
        return self.linear(_modulated(self.norm(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class OfficialDiT(nn.Module):
    """The whole network, with learned variances."""

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        num_classes=1000,
    ) -> None:
        super().__init__()
        self.side, self.patch, self.out = input_size // patch_size, patch_size, 2 * in_channels
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = Times(hidden_size)
        self.y_embedder = Labels(num_classes, hidden_size)
        table = torch.from_numpy(sincos_table((self.side, self.side), hidden_size))
        self.register_buffer("pos_embed", table[None])  # a parameter there, which is never trained
        self.blocks = nn.ModuleList(Layer(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = Last(hidden_size, patch_size**2 * self.out)

    def forward(self, x, t, label):
        """Predicts noise and variance from `[B, C, H, W]`."""
        c = self.t_embedder(t) + self.y_embedder.embedding_table(label)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).unflatten(2, (self.patch, self.patch, self.out))
        x = x.unflatten(1, (self.side, self.side))  # [B, h, w, p, q, C]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

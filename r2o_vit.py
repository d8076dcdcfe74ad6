"""ViT-B/16 as an encoder (A.5, Table 8): torchvision's, with maps of the resolution of a ResNet's C4 and C5."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer

WIDTH, PATCH = 768, 16


class ViT(VisionTransformer):
    """torchvision's vit_b_16, without classifier, for images of any size; layer3 makes C4 of the last block's map, and
    layer4 C5 of C4.

    appended: False for weights of other methods, which have no such layers: C4 is then the last block's map, C5 its
    2 x 2 means. differs: A.5 has "transpose convolution layers", which 14 x 14 and 7 x 7 need for patches of 32 pixels.
    """

    def __init__(self, appended: bool = True):
        super().__init__(image_size=224, patch_size=PATCH, num_layers=12, num_heads=12, hidden_dim=WIDTH, mlp_dim=3072)
        del self.heads
        self.layer3 = stage(stride=1) if appended else nn.Identity()
        self.layer4 = stage(stride=2) if appended else nn.AvgPool2d(2)

    def last_map(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> the patch tokens of the last block, normalized: (B, 768, S/16, S/16)."""
        x = self.conv_proj(x)
        H, W = x.shape[2:]
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x.flatten(2).mT], 1)  # (B, 1 + HW, 768)
        x = self.encoder.ln(self.encoder.layers(x + self.positions(H, W)))
        return x[:, 1:].mT.unflatten(2, (H, W))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> mean patch token of the last block (B, 768). R2O does not train the class token."""
        return self.last_map(x).mean((2, 3))

    def positions(self, H: int, W: int) -> Tensor:
        """The position embeddings (1, 1 + HW, 768), interpolated unless images have 224 pixels."""
        whole = self.encoder.pos_embedding  # (1, 1 + 14 * 14, 768)
        if (H, W) == (14, 14):
            return whole
        grid = whole[:, 1:].mT.unflatten(2, (14, 14))
        grid = F.interpolate(grid, (H, W), mode="bicubic", antialias=True, align_corners=False)
        return torch.cat([whole[:, :1], grid.flatten(2).mT], 1)


def stage(stride: int) -> nn.Module:
    """An appended layer, ending like a ResNet's stage: (B, 768, H, W) -> (B, 768, H / stride, W / stride)."""
    conv = nn.Conv2d(WIDTH, WIDTH, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True))


# torchvision's names and timm's (and MAE's, DINO's), most specific first.
NAMES = (
    ("encoder.layers.encoder_layer_", "blocks."),
    (".self_attention.in_proj_", ".attn.qkv."),
    (".self_attention.out_proj.", ".attn.proj."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".mlp.0.", ".mlp.fc1."),
    (".mlp.3.", ".mlp.fc2."),
    ("encoder.ln.", "norm."),
    ("encoder.pos_embedding", "pos_embed"),
    ("class_token", "cls_token"),
    ("conv_proj.", "patch_embed.proj."),
)


def rename(name: str, to_timm: bool) -> str:
    """A ViT tensor's name in torchvision -> timm's, or back."""
    for ours, theirs in NAMES:
        before, after = (ours, theirs) if to_timm else (theirs, ours)
        inside = before.startswith(".") and before in name
        name = name.replace(before, after) if inside or name.startswith(before) else name
    return name

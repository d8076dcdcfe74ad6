"""Fine-tuning a ViT-B as the backbone of a detector (A.5, Table 8): a simple feature pyramid, drop path, AdamW with
layer-wise decay of the learning rate."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import StochasticDepth

from r2o_vit import WIDTH, ViT


class SimpleFPN(nn.Module):
    """Four levels and a fifth, of 256 channels, from the last map of a ViT (ViTDet, arXiv 2203.16527)."""

    out_channels = 256

    def __init__(self, vit: ViT):
        super().__init__()
        vit.layer3 = vit.layer4 = nn.Identity()  # C4 and C5 are not used: DDP allows no idle weights
        self.body = vit
        norm, up = LayerNorm2d, partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        w = WIDTH
        quarter = nn.Sequential(up(w, w // 2), norm(w // 2, 1e-6), nn.GELU(), up(w // 2, w // 4))
        levels = (quarter, w // 4), (up(w, w // 2), w // 2), (nn.Identity(), w), (nn.MaxPool2d(2), w)
        self.fpn = nn.ModuleList(
            nn.Sequential(
                level,
                *(nn.Conv2d(width, 256, 1, bias=False), norm(256, 1e-6)),
                *(nn.Conv2d(256, 256, 3, padding=1, bias=False), norm(256, 1e-6)),
            )
            for level, width in levels
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body.last_map(x)
        levels = {str(i): level(x) for i, level in enumerate(self.fpn)}
        return levels | {"pool": F.max_pool2d(levels["3"], 1, 2)}


def set_drop_path(net: ViT, rate: float):
    """Stochastic depth that rises from 0 in the first block to `rate` in the last, in place of dropout, which is 0."""
    for i, block in enumerate(net.encoder.layers):
        block.dropout = block.mlp[4] = StochasticDepth(rate * i / (len(net.encoder.layers) - 1), "row")


def layer_of(name: str) -> int:
    """The layer of a parameter for layer-wise decay: 0 the embeddings, 1 to 12 the blocks, 13 what follows."""
    if name.startswith("encoder.layers."):
        return int(name.split(".")[2].removeprefix("encoder_layer_")) + 1
    return 0 if name in ("class_token", "encoder.pos_embedding") or name.startswith("conv_proj.") else 13


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW for a ViT, its learning rate falling by 0.75 from layer to layer (A.5). Only matrices are decayed."""
    groups = {}
    for name, p in model.named_parameters():
        inside = name.removeprefix("backbone.body.")
        scale = 0.75 ** (13 - layer_of(inside)) if inside != name else 1.0
        matrix = p.ndim > 1 and inside not in ("class_token", "encoder.pos_embedding")
        groups.setdefault((scale, matrix), []).append(p)
    rows = [{"params": ps, "scale": s, "weight_decay": weight_decay * d} for (s, d), ps in groups.items()]
    return torch.optim.AdamW(rows, lr=lr)

"""Pictures of masks: colors, overlays, and strips of labeled columns."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from r2o import gray


def evenly(n: int, count: int) -> list[int]:
    """At most `count` evenly spaced indices below n."""
    return np.linspace(0, n - 1, min(count, n)).astype(int).tolist()


def palette(ids: Tensor) -> Tensor:
    """A color for each id, (...) -> (..., 3) in [0.2, 1]; neighboring ids get distant hues."""
    hue = (ids[..., None].float() * 0.618034) % 1  # golden ratio
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return 1 - 0.8 * torch.minimum(k, 4 - k).clamp(0, 1)


def paint(images: Tensor, masks: Tensor) -> Tensor:
    """Label maps (n, h, w) as colors over the images (n, 3, S, S) uint8. Returns the images' shape and type."""
    color = F.interpolate(palette(masks).movedim(-1, 1), images.shape[-2:], mode="nearest")
    return (255 * (0.75 * color + 0.25 * gray(images.float() / 255))).round().to(torch.uint8)


def resize_labels(ids: Tensor, size) -> Tensor:
    """A label map (h, w) -> `size`, by the nearest pixel."""
    return F.interpolate(ids[None, None].float(), size, mode="nearest")[0, 0].long()


def film_strip(columns: list[tuple[str, Tensor]], zoom: int = 1, notes: list[str] | None = None) -> Image.Image:
    """Columns (label, (n, 3, S, S) uint8) as one image, enlarged by `zoom`. notes: for each row's first picture."""
    columns = [(label, x.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)) for label, x in columns]
    n, _, s, _ = columns[0][1].shape
    top, gap = 16, 4
    sheet = Image.new("RGB", (len(columns) * (s + gap) - gap, top + n * (s + gap) - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for c, (label, pictures) in enumerate(columns):
        draw.text((c * (s + gap) + 2, 2), label, fill="black")
        for r, picture in enumerate(pictures):
            sheet.paste(TF.to_pil_image(picture), (c * (s + gap), top + r * (s + gap)))
    for r, note in enumerate(notes or []):
        at = (3, top + r * (s + gap) + 2)
        draw.rectangle(draw.textbbox(at, note), fill="white")
        draw.text(at, note, fill="black")
    return sheet

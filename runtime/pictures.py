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
    """A color for each id, (...) -> (..., 3) in [0, 1]. Hue, strength and lightness differ between neighboring ids."""
    hue = (ids[..., None].float() * 0.381966) % 1  # golden ratio
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue) % 6
    light, strength = (torch.tensor(x)[ids.long() % len(x)][..., None] for x in ([1.0, 0.7, 0.4], [0.9, 0.5]))
    return light * (1 - strength * torch.minimum(k, 4 - k).clamp(0, 1))


def paint(images: Tensor, masks: Tensor) -> Tensor:
    """Label maps (n, h, w) as colors over the images (n, 3, S, S) uint8. Returns the images' shape and type."""
    color = F.interpolate(palette(masks).movedim(-1, 1), images.shape[-2:], mode="nearest")
    return (255 * (0.75 * color + 0.25 * gray(images.float() / 255))).round().to(torch.uint8)


def resize_labels(ids: Tensor, size) -> Tensor:
    """A label map (h, w) -> `size`, by the nearest pixel."""
    return F.interpolate(ids[None, None].float(), size, mode="nearest")[0, 0].long()


def film_strip(
    columns: list[tuple[str, Tensor]],
    zoom: int = 1,
    notes: list[str] | None = None,
    names: dict[int, str] | None = None,
) -> Image.Image:
    """Columns (label, (n, 3, S, S) uint8) as one image, enlarged by `zoom`. notes: for each row's first picture. names:
    of painted ids, for a legend below."""
    columns = [(label, x.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)) for label, x in columns]
    n, _, s, _ = columns[0][1].shape
    top, gap = 16, 4
    width, bottom = len(columns) * (s + gap) - gap, top + n * (s + gap) - gap
    across = max(1, width // 112)  # entries of the legend in a line
    lines = -(-len(names or {}) // across)
    sheet = Image.new("RGB", (width, bottom + (gap + lines * top if lines else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    for c, (label, pictures) in enumerate(columns):
        draw.text((c * (s + gap) + 2, 2), label, fill="black")
        for r, picture in enumerate(pictures):
            sheet.paste(TF.to_pil_image(picture), (c * (s + gap), top + r * (s + gap)))
    for r, note in enumerate(notes or []):
        at = (3, top + r * (s + gap) + 2)
        draw.rectangle(draw.textbbox(at, note), fill="white")
        draw.text(at, note, fill="black")
    for i, (id_, name) in enumerate((names or {}).items()):
        x, y = i % across * 112, bottom + gap + i // across * top
        gray = torch.full((1, 3, 1, 1), 127, dtype=torch.uint8)
        color = paint(gray, torch.tensor([[[id_]]])).flatten().tolist()  # as over a gray image
        draw.rectangle((x, y, x + 11, y + 11), fill=tuple(color))
        draw.text((x + 15, y), name[:16].encode("latin-1", "replace").decode("latin-1"), fill="black")
    return sheet

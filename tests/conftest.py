"""Folders of small pictures, made here."""

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(2)


def picture(seed: int, size=(80, 64)) -> Image.Image:
    """A coloured ellipse on a gradient."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[1], : size[0]] / 64
    ground = rng.uniform(0, 160, 3) + (x[..., None] * rng.uniform(0, 60, 3))
    cy, cx, r = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.9), rng.uniform(0.15, 0.3)
    inside = np.hypot(y - cy, (x - cx) * 0.7) < r
    return Image.fromarray(np.where(inside[..., None], rng.uniform(60, 255, 3), ground).astype(np.uint8))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """24 images, nested in two folders, PNG and JPEG."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(24):
        folder = root / ("ab"[i % 2])
        folder.mkdir(exist_ok=True)
        picture(i).save(folder / f"{i:02}.{('png', 'jpg')[i % 3 == 0]}")
    return root

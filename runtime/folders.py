"""What a folder of images holds: how many in each subfolder, their size, whether some are labels of the others."""

import contextlib
import itertools
import os

import numpy as np
from PIL import Image

from runtime.cli import printable, warn
from runtime.images import DAMAGE, ImageList
from runtime.pictures import evenly


def print_images(images: ImageList):
    """How many images there are in each top-level folder; a warning where some look like labels of the others."""
    folders = {}
    for i, name in enumerate(images):
        folder, inside, _ = name.rpartition(b"/")
        folders.setdefault(folder.split(b"/")[0] if inside else b"", []).append(i)
    counts = {os.fsdecode(folder): len(members) for folder, members in folders.items()}
    each = ", ".join(f"{count:,} in {folder or 'the folder itself'}" for folder, count in counts.items())
    low, high = min(counts.values()), max(counts.values())
    spread = f"{len(counts):,} folders of {f'{low:,} to ' if low < high else ''}{high:,}"
    print(printable(f"{len(images):,} images in {images.root}: {each if len(counts) <= 8 else spread}"))
    mend = "pass the folder of photographs as --data, or select it with --subset"
    stems = {}
    for folder, members in folders.items() if len(folders) <= 100 else ():
        where = os.fsdecode(folder) or images.root
        some = [members[j] for j in evenly(len(members), 16 if len(folders) <= 8 else 4)]
        few = sum(looks_like_labels(images.path(i)) for i in some)
        if few > len(some) / 4:
            warn(f"{few} of {len(some)} images sampled from {where} have few colors, like label images: {mend}")
        if len(folders) <= 8:
            names = (os.path.splitext(images[i][len(folder) :].lstrip(b"/")) for i in members)
            stems[where] = dict(names)
    for (a, x), (b, y) in itertools.combinations(stems.items(), 2):
        both = [stem for stem in x if y.get(stem, x[stem]) != x[stem]]  # .jpg here, .png there
        if len(both) > 0.9 * min(len(x), len(y)):
            warn(f"{a} and {b} share {len(both)} names, like images and their labels: if so, {mend}")
            break


def looks_like_labels(path: str) -> bool:
    """Whether 16 colors make up 95 % of an image's pixels."""
    try:
        with Image.open(path) as file:
            pixels = np.asarray(file.convert("RGB").resize((64, 64), Image.Resampling.NEAREST)).reshape(-1, 3)
    except (OSError, *DAMAGE):
        return False
    counts = np.unique(pixels, axis=0, return_counts=True)[1]
    return np.sort(counts)[-16:].sum() > 0.95 * counts.sum()


def median_side(images: ImageList) -> int:
    """The median of the shorter sides of some images, in pixels."""
    sides = [224]
    for i in evenly(len(images), 15):
        with contextlib.suppress(OSError, *DAMAGE), Image.open(images.path(i)) as file:
            sides.append(min(file.size))
    return sorted(sides)[len(sides) // 2]

"""What the evaluations share: the encoder under test, images and truth as files, the row of a table."""

import argparse
import contextlib
import importlib.util
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import files
import r2o
from r2o import UsageError

# ---------------------------------------------------------------------------------------------------------------------
# The encoder
# ---------------------------------------------------------------------------------------------------------------------


def add_encoder_flags(p: argparse.ArgumentParser):
    what = "r2o.pth, last.pth, a torchvision ResNet's state dict (supervised, say), or the word random"
    p.add_argument("--ckpt", required=True, help=f"{what}; for other layouts see transfer/export.py")
    p.add_argument("--arch", choices=r2o.ARCHS, help="what --ckpt holds, where it does not say (default: resnet50)")


def load_encoder(args, batches, device: torch.device) -> tuple[nn.Module, str]:
    """args.ckpt's encoder on `device` and a line about it. batches: normalised images, on which a random encoder's
    batch norm statistics are measured."""
    encoder, line = r2o.load_encoder(args.ckpt, args.arch)
    encoder = encoder.to(device)
    if args.ckpt == "random":
        line += ", batch norm statistics measured on these images"
        calibrate(encoder, (images.to(device) for images in batches))
    return encoder, line


@torch.no_grad()
def calibrate(encoder: nn.Module, batches):
    """Measures an untrained encoder's batch norm statistics on the images, with which alone it does better: without,
    a trained encoder would be credited with them. batches: of normalised images."""
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the plain average
    encoder.train()
    for images in batches:
        r2o.encode(encoder, images)
    encoder.eval()


def draw_masks(c4: Tensor, regions: Tensor, k: int, assign: str, generator: torch.Generator) -> Tensor:
    """Masks as in training, of one group of images that share K clusters. c4: (B, C, H, W); regions: (B, h, w).
    Returns (B, H, W) for assign = "pixel", (B, h, w) for "region"."""
    uniforms = r2o.seeding_uniforms(1, k, generator).to(c4.device)
    return r2o.R2O("tiny", assign=assign, hidden=1, dim=1).draw_masks(c4, regions, k, uniforms)  # its encoders are idle


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def read(reader, path: str | Path) -> Tensor:
    """reader(path), whose failure is one of the data's."""
    try:
        return reader(path)
    except OSError as e:
        raise UsageError(f"cannot read {path} ({e})") from None


def read_square(path: str | Path, size: int) -> Tensor:
    """A whole image, resized to (3, size, size) uint8 as in training, whatever its proportions."""
    return r2o.resize(read(r2o.read_image, path), size)


def read_ids(path: str | Path, kind: str = "auto") -> Tensor:
    """A mask file as ids (h, w) int64: 0 ground, -1 void, others objects.

    kind: "binary", an object above half of 255 (CUB's grey levels count annotators); "ids", one for each object, 255
    being void; "auto": ids where all values but 0 and 255 are below 51, CUB's lowest level, else binary. 16-bit files
    are ids, and so are ImageNet-S's colours, red + 256 green, 1000 being void. Raises UsageError for other colours.
    """
    with Image.open(path) as file:
        if file.mode.startswith("I"):
            return torch.from_numpy(np.array(file).astype(np.int64))
        if file.mode in ("RGB", "RGBA"):
            red, green, blue = torch.from_numpy(np.array(file.convert("RGB"))).long().unbind(-1)
            if (red != green).any() or (red != blue).any():
                if blue.any():
                    raise UsageError(
                        f"the mask {path} is coloured: expected grey levels, a palette, or ImageNet-S's ids"
                    )
                ids = red + 256 * green
                return torch.where(ids == 1000, -1, ids)
        mask = torch.from_numpy(np.array(file if file.mode == "P" else file.convert("L"))).long()
    between = mask[(mask > 0) & (mask < 255)]
    if kind == "binary" or (kind == "auto" and not (between.numel() and between.max() < 51)):
        return (mask > 127).long()
    return torch.where(mask == 255, -1, mask)


def squares(paths: list, size: int):
    """Normalised batches of at most 256 of the images, for calibrate()."""
    for i in range(0, min(len(paths), 256), 32):
        yield r2o.normalize(torch.stack([read_square(path, size) for path in paths[i : i + 32]]))


def check_outputs(*paths: str | Path | None):
    """Before hours are spent on what cannot be written."""
    for path in filter(None, paths):
        if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
            raise UsageError(f"cannot write {path}: no such folder")


def check_size(size: int):
    if size < 32:
        raise UsageError(f"--size must be at least 32, got {size}")


def list_cub(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """(image, mask) of CUB_200_2011: the ids of its own test set, or of a file that has one id a line, or ids with
    ReDO's 0 = train, 1 = validation, 2 = test behind them, of which 2 is taken."""
    if not (folder / "images.txt").exists():
        raise UsageError(
            f"no images.txt in {folder}: expected the folder CUB_200_2011, or two folders, of images and of masks"
        )
    if not (folder / "segmentations").is_dir():
        raise UsageError(
            f"no segmentations in {folder}: they are a download of their own, segmentations.tgz "
            "beside CUB_200_2011.tgz at data.caltech.edu/records/65de6-vp158; unpack it there"
        )
    rows = [line.split(maxsplit=1) for line in (folder / "images.txt").read_text().splitlines() if line.strip()]
    names = {row[0]: row[-1].strip() for row in rows}
    file = folder / "train_test_split.txt" if split == "test" else Path(split)
    if not file.is_file():
        raise UsageError(f"no such split: {file}; expected test, or a file of ids")
    rows = [line.split() for line in file.read_text(errors="replace").splitlines() if line.strip()]
    wanted = "0" if split == "test" else "2"
    ids = [row[0] for row in rows if len(row) == 1 or row[1] == wanted]
    unknown = [i for i in ids if i not in names]
    if unknown or not ids:
        raise UsageError(
            f"{file} names {len(unknown)} ids that images.txt has not, {len(ids)} in all"
            if unknown
            else f"{file} names no test image"
        )
    return [(folder / "images" / names[i], (folder / "segmentations" / names[i]).with_suffix(".png")) for i in ids]


def list_pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """(image, mask) of two folders whose files have the same relative names, up to the suffix."""
    lists = [files.list_images(folder) for folder in (images, masks)]
    of = [{os.path.splitext(os.fsdecode(name))[0]: x.root / os.fsdecode(name) for name in x} for x in lists]
    missing = [stem for stem in of[0] if stem not in of[1]]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(of[0])} images have no mask of the same name in {masks}, the first: {missing[0]}"
        )
    return [(path, of[1][stem]) for stem, path in of[0].items()]


def list_masks(data: list[Path], split: str) -> list[tuple[Path, Path]]:
    """(image, mask) of --data: CUB_200_2011, or a folder of images and one of masks."""
    if len(data) > 2:
        raise UsageError(f"--data takes one folder or two, got {len(data)}")
    for folder in data:
        if not folder.is_dir():
            raise UsageError(f"no such folder: {folder}")
    return list_pairs(*data) if len(data) == 2 else list_cub(data[0], split)


def load_coco(folder: Path, file: Path) -> tuple:
    """pycocotools' COCO of an instances JSON, and its images as (path in folder, id, annotations), by id. Raises
    UsageError where there are no annotations, they name categories or images that the file does not list, or images are
    missing."""
    if importlib.util.find_spec("pycocotools") is None:
        raise UsageError("COCO annotations need the package pycocotools: pip install pycocotools")
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(file)
        for a in coco.dataset["annotations"]:
            for key, known in (("image_id", coco.imgs), ("category_id", coco.cats)):
                if a[key] not in known:
                    raise UsageError(
                        f"annotation {a['id']} of {file} has {key} {a[key]}, none of the {len(known)} listed there"
                    )
            if not a["segmentation"] or len(a["bbox"]) != 4 or a["iscrowd"] not in (0, 1):
                raise UsageError(f"annotation {a['id']} of {file} needs a segmentation, a bbox of 4, iscrowd 0 or 1")
        rows = [(Path(folder, image["file_name"]), i, coco.imgToAnns[i]) for i, image in sorted(coco.imgs.items())]
    except (OSError, AssertionError, TypeError, KeyError, ValueError) as e:
        if isinstance(e, UsageError):
            raise
        raise UsageError(
            f"cannot read {file} ({type(e).__name__}: {e}): expected COCO instances, a JSON of images, annotations, "
            "categories"
        ) from None
    if not coco.dataset["annotations"]:
        raise UsageError(f"{file} has no annotations: expected objects with their segmentations")
    if missing := [path for path, *_ in rows if not path.exists()]:
        raise UsageError(f"{len(missing)} of the {len(rows)} images that {file} names are missing: {missing[0]}, …")
    return coco, rows


# ---------------------------------------------------------------------------------------------------------------------
# What is said
# ---------------------------------------------------------------------------------------------------------------------


def row(task: str, line: str, ours: str, theirs: str) -> str:
    """A row of the README's table: the evaluation, the encoder, our figures, and the authors', marked as theirs."""
    return f"| {task} | {line.rsplit(': ', 1)[0]} | ours: {ours} | theirs: {theirs} |"


def shrink(mask: Tensor, size: int) -> Tensor:
    """A label map (h, w) -> (size, size), by the nearest pixel."""
    return F.interpolate(mask[None, None].float(), (size, size), mode="nearest")[0, 0]


def write_json(path: str | Path, result: dict):
    text = json.dumps(result, indent=1) + "\n"
    r2o.save_atomically(path, lambda f: f.write(text.encode()))

"""What the evaluations share: the encoder under test, images and truth as files, the row of a table."""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import pickle
import struct
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
    return r2o.draw_masks(c4, regions, k, uniforms, assign=assign)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def read(reader, path: str | Path) -> Tensor:
    """reader(path), whose failure is one of the data's. Pillow raises much else than OSError for damaged files."""
    try:
        return reader(path)
    except UsageError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as e:
        raise UsageError(f"cannot read {path} ({e})") from None


def read_square(path: str | Path, size: int) -> Tensor:
    """A whole image, resized to (3, size, size) uint8 as in training, whatever its proportions."""
    return r2o.resize(read(r2o.read_image, path), size)


def add_truth_flags(p: argparse.ArgumentParser, also: str = ""):
    """--data, --split and --masks. also: what else --data may be."""
    data = f"CUB_200_2011 (with images.txt, images, segmentations), a folder of images and one of masks{also}"
    p.add_argument("--data", required=True, nargs="+", type=Path, help=data)
    split = "CUB's own test set, or a file of ids, such as ReDO's (default: %(default)s)"
    p.add_argument("--split", default="test", help=split)
    text = "what mask files hold: an object above half of white, or an id for each (default: told by their values)"
    p.add_argument("--masks", default="auto", choices=("auto", "binary", "ids"), help=text)


def read_ids(path: str | Path, kind: str = "auto") -> Tensor:
    """A mask file as ids (h, w) int64: 0 ground, -1 void, others objects.

    kind: "binary", an object above half of white; "ids", one for each object, 255 being void (16 bits: none; colours:
    ImageNet-S's red + 256 green, 1000 being void); "auto": ids for palettes, 16 bits, colours, and where all values but
    0 and 255 are below 51, CUB's lowest level; binary for 0 and white, CUB's levels (they count annotators), and soft
    edges. Raises UsageError where "auto" cannot tell, and for colours of another kind.
    """
    with Image.open(path) as file:
        mode = file.mode
        if kind == "binary":
            wide = mode.startswith("I")
            return torch.from_numpy(np.array(file if wide else file.convert("L")) > (32767 if wide else 127)).long()
        if mode.startswith("I"):
            return torch.from_numpy(np.array(file).astype(np.int64))
        if mode in ("RGB", "RGBA"):
            red, green, blue = torch.from_numpy(np.array(file.convert("RGB"))).long().unbind(-1)
            if (red != green).any() or (red != blue).any():
                ids = red + 256 * green
                if blue.any() or ids.max() > 1000:
                    raise UsageError(f"the mask {path} is coloured: expected grey, a palette or ImageNet-S's ids")
                return torch.where(ids == 1000, -1, ids)
        mask = torch.from_numpy(np.array(file if mode == "P" else file.convert("L"))).long()
    between, white = mask[(mask > 0) & (mask < 255)], mask == 255
    ids = kind == "ids" or (len(between) and (mode == "P" or between.max() < 51))
    if kind == "auto" and mode != "P" and len(between):
        edges = ids and white.sum() > 4 * len(between)  # of a binary mask, or void that outweighs all objects
        dark = not ids and mask.max() < 250 and (between % 51).any()  # ids above 50, or a mask that is not quite white
        if edges or dark:
            few = between.unique()[:4].tolist()
            raise UsageError(
                f"the mask {path} may hold ids or grey levels ({few}, …): pass --masks ids or --masks binary"
            )
    return torch.where(white, -1, mask) if ids else (mask > 127).long()


def squares(paths: list, size: int):
    """Normalised batches of at most 256 of the images, for calibrate()."""
    for i in range(0, min(len(paths), 256), 32):
        yield r2o.normalize(torch.stack([read_square(path, size) for path in paths[i : i + 32]]))


def check_outputs(*paths: str | Path | None):
    """Before hours are spent on what cannot be written."""
    for path in filter(None, paths):
        folder = Path(path).absolute().parent
        if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"cannot write {path}: expected a file in a folder that is there and can be written to")


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
    lists = [files.list_images(folder, train=False) for folder in (images, masks)]
    of = [{os.path.splitext(os.fsdecode(name))[0]: x.root / os.fsdecode(name) for name in x} for x in lists]
    for folder, listed, names in zip((images, masks), lists, of, strict=True):
        if len(names) < len(listed):
            raise UsageError(
                f"{len(listed) - len(names)} files in {folder} differ in their suffix alone: keep one of each"
            )
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
            problem = "not a folder" if folder.exists() else "no such folder"
            raise UsageError(f"{problem}: {folder}; expected CUB_200_2011, or a folder of images and one of masks")
    return list_pairs(*data) if len(data) == 2 else list_cub(data[0], split)


class Packed:
    """A list that is not changed, pickled in one string: forked workers go on sharing it, as they do not a list of
    objects, whose reference counts they write to."""

    def __init__(self, items):
        parts = [pickle.dumps(item, protocol=4) for item in items]
        self._ends, self._text = np.cumsum([0, *map(len, parts)]), b"".join(parts)

    def __len__(self):
        return len(self._ends) - 1

    def __getitem__(self, i: int):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return pickle.loads(self._text[self._ends[i] : self._ends[i + 1]])


def load_coco(folder: Path, file: Path) -> tuple:
    """pycocotools' COCO of an instances JSON, and its images, by id: dicts of COCO's, with their `path` in the folder
    and their `annotations`. Raises UsageError where there are no annotations, they name categories or images that the
    file does not list, are not whole, or images are missing."""
    if importlib.util.find_spec("pycocotools") is None:
        raise UsageError("COCO annotations need the package pycocotools: pip install pycocotools")
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(file)
        _check_coco(coco, file)
        rows = [
            image | {"path": Path(folder, image["file_name"]), "annotations": coco.imgToAnns[i]}
            for i, image in sorted(coco.imgs.items())
        ]
    except UsageError:
        raise
    except (OSError, AssertionError, TypeError, LookupError, ValueError, AttributeError) as e:
        expected = "expected COCO instances, a JSON of images, annotations, categories"
        raise UsageError(f"cannot read {file} ({type(e).__name__}: {e}): {expected}") from None
    if missing := [row["path"] for row in rows if not row["path"].exists()]:
        raise UsageError(f"{len(missing)} of the {len(rows)} images that {file} names are missing: {missing[0]}, …")
    return coco, rows


def _check_coco(coco, file):
    if not coco.dataset["annotations"]:
        raise UsageError(f"{file} has no annotations: expected objects with their segmentations")
    ids = {a["id"] for a in coco.dataset["annotations"]}
    if len(ids) < len(coco.dataset["annotations"]) or min(ids) < 1:  # pycocotools takes 0 for "unmatched"
        raise UsageError(f"ids of annotations in {file} are not all different and above 0: number them anew")
    for a in coco.dataset["annotations"]:
        for key, known in (("image_id", coco.imgs), ("category_id", coco.cats)):
            if a[key] not in known:
                raise UsageError(
                    f"annotation {a['id']} of {file} has {key} {a[key]}, none of the {len(known)} listed there"
                )
        image, shape = coco.imgs[a["image_id"]], a["segmentation"]
        size = [image["height"], image["width"]]
        whole = len(shape) > 0 and len(a["bbox"]) == 4 and a["iscrowd"] in (0, 1) and a["area"] >= 0
        if isinstance(shape, list):
            whole = whole and all(len(ring) >= 6 and len(ring) % 2 == 0 for ring in shape)
        else:
            whole = whole and list(shape["size"]) == size
        if not whole:
            raise UsageError(
                f"annotation {a['id']} of {file} is not whole: expected a bbox of 4, area, iscrowd 0 or 1, and as "
                "segmentation polygons of 3 points or more, or run lengths of the image's size"
            )


def decode(segmentation, height: int, width: int) -> Tensor:
    """A segmentation of COCO's, polygons or run lengths, as (height, width) uint8."""
    from pycocotools import mask as rle

    if isinstance(segmentation, list):
        segmentation = rle.merge(rle.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = rle.frPyObjects(segmentation, height, width)
    return torch.from_numpy(rle.decode(segmentation))


# ---------------------------------------------------------------------------------------------------------------------
# What is said
# ---------------------------------------------------------------------------------------------------------------------


def row(task: str, line: str, ours: str, theirs: str) -> str:
    """A row of the README's table: the evaluation, the encoder, our figures, and the authors', marked as theirs."""
    return f"| {task} | {line.rsplit(': ', 1)[0]} | ours: {ours} | theirs: {theirs} |"


def shrink(mask: Tensor, size: int) -> Tensor:
    """A label map (h, w) -> (size, size), by the nearest pixel."""
    return F.interpolate(mask[None, None].float(), (size, size), mode="nearest")[0, 0]


def write_json(path: str | Path, result: dict | list):
    """Once all has been printed: nothing is lost where it cannot be written."""
    text = json.dumps(result, indent=1) + "\n"
    try:
        r2o.save_atomically(path, lambda f: f.write(text.encode()))
    except OSError as e:
        raise UsageError(f"the results above could not be written to {path} ({e.strerror or e})") from None

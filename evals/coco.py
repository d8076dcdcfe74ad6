"""COCO annotations: images with their objects' masks."""

import contextlib
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from runtime.cli import UsageError, need, need_package


def load_coco(folder: Path, file: Path) -> tuple:
    """An instances JSON as pycocotools' COCO, and its images, sorted by id: COCO's dicts plus `path`, in the folder,
    and `annotations`, whose iscrowd, area, bbox and ids may be missing: they follow from the rest. Raises
    UsageError if there are no annotations, if they are incomplete or refer to categories or images that the file does
    not list, and if images are missing."""
    need_package("pycocotools", f"{file}, as COCO annotations,")
    from pycocotools.coco import COCO

    try:
        coco = COCO()
        coco.dataset = json.loads(Path(file).read_bytes())
        _complete(**{key: coco.dataset[key] for key in ("images", "annotations", "categories")}, file=file)
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        more = {
            i: {"path": Path(folder, x["file_name"]), "annotations": coco.imgToAnns[i]} for i, x in coco.imgs.items()
        }
        rows = [image | more[i] for i, image in sorted(coco.imgs.items())]
    except UsageError:
        raise
    except (OSError, AssertionError, TypeError, LookupError, ValueError, AttributeError) as e:
        expected = "expected COCO instances, a JSON of images, annotations, categories"
        raise UsageError(f"cannot read {file} ({type(e).__name__}: {e}): {expected}") from None
    if missing := [row["path"] for row in rows if not row["path"].exists()]:
        raise UsageError(f"{len(missing)} of the {len(rows)} images that {file} names are missing: {missing[0]}, …")
    return coco, rows


def _complete(images: list[dict], annotations: list[dict], categories: list[dict], file: Path):
    """Check all annotations, and fill in what follows from their segmentations."""
    from pycocotools import mask as rle

    images, categories = ({x["id"]: x for x in listed} for listed in (images, categories))
    sizes = corners = 0  # boxes that fit their polygon as x, y, width, height; as x, y, x, y
    need(annotations, f"{file} has no annotations: expected objects with their segmentations")
    for number, a in enumerate(annotations, 1):
        name = f"annotation {a.get('id', f'number {number}')} of {file}"
        for key, known in (("image_id", images), ("category_id", categories)):
            need(a[key] in known, f"{name} has {key} {a[key]}, none of the {len(known)} listed there")
        image, shape = images[a["image_id"]], a.get("segmentation")
        size = image["height"], image["width"]
        shapes = "polygons of 3 points or more, or run lengths of the image's size; boxes alone do not suffice"
        need(is_mask(shape, *size), f"{name} has no mask: expected as segmentation {shapes}")
        a.setdefault("iscrowd", 0)
        if "bbox" not in a or "area" not in a:
            encoded = run_lengths(shape, *size)
            a.setdefault("bbox", rle.toBbox(encoded).tolist())
            a.setdefault("area", float(rle.area(encoded)))
        whole = len(a["bbox"]) == 4 and a["iscrowd"] in (0, 1) and a["area"] >= 0
        need(whole, f"{name} is incomplete: expected a bbox of 4, an area, and as iscrowd 0 or 1")
        if isinstance(shape, list):
            x, y = (max(max(ring[axis::2]) for ring in shape) for axis in (0, 1))
        else:
            x, y = np.add(*np.split(rle.toBbox(run_lengths(shape, *size)), 2))
        left, top, w, h = a["bbox"]
        sizes += abs(left + w - x) <= 3 and abs(top + h - y) <= 3
        corners += abs(w - x) <= 3 and abs(h - y) <= 3
    need(corners <= sizes, f"most boxes in {file} are x, y, x, y: expected x, y, width, height, as COCO's are")
    ids = {a.get("id", 0) for a in annotations}
    if len(ids) < len(annotations) or not all(isinstance(i, int) and i > 0 for i in ids):  # 0 means "unmatched"
        for number, a in enumerate(annotations, 1):
            a["id"] = number


def is_mask(shape, height: int, width: int) -> bool:
    """Whether a COCO segmentation can be decoded to an image's size."""
    if isinstance(shape, list):
        good = (len(ring) >= 6 and len(ring) % 2 == 0 and math.isfinite(math.fsum(ring)) for ring in shape)
        return bool(shape) and all(good)
    counts = shape and tuple(shape["size"]) == (height, width) and run_lengths(shape, height, width)
    whole = not isinstance(shape and shape["counts"], list) or sum(shape["counts"]) == height * width
    return bool(counts) and whole


def run_lengths(segmentation, height: int, width: int) -> dict:
    """A COCO segmentation, polygons or run lengths, as pycocotools' compressed run lengths."""
    from pycocotools import mask as rle

    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    return segmentation


def decode(segmentation, height: int, width: int) -> Tensor:
    """A COCO segmentation as a mask (height, width) uint8."""
    from pycocotools import mask as rle

    return torch.from_numpy(rle.decode(run_lengths(segmentation, height, width)))

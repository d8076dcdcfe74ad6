"""Images with their true masks: CUB_200_2011, or two folders."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from runtime.cli import Parser, UsageError, natural, need
from runtime.images import DAMAGE, list_images, read_image
from runtime.pictures import evenly


def readable(reader, path: str | Path):
    """reader(path); raises UsageError if the file is damaged."""
    try:
        return reader(path)
    except UsageError:
        raise
    except (OSError, *DAMAGE) as e:
        raise UsageError(f"cannot read {path} ({e})") from None


def add_truth_flags(p: Parser, also: str = ""):
    """--data, --split, --masks, --foreground and --void. also: what else --data may be."""
    data = f"CUB_200_2011 (with images.txt, images, segmentations), a folder of images and one of masks{also}"
    p.add_argument("--data", required=True, nargs="+", type=Path, help=data)
    p.add_argument("--split", help="CUB's own test set, or a file of ids, such as ReDO's (default: test)")
    masks = "what mask files hold; binary: an object above 127; ids: one per object; auto: guess from the values"
    p.add_argument("--masks", default="auto", choices=("auto", "binary", "ids"), help=masks)
    foreground = "ids in mask files that are objects, all others being background (1 for Oxford-IIIT Pet's trimaps)"
    p.add_argument("--foreground", type=natural, nargs="+", metavar="ID", help=foreground)
    void = "ids in mask files to ignore (default: 255; 3 for these trimaps)"
    p.add_argument("--void", type=natural, nargs="+", metavar="ID", help=void)
    add_suffix_flag(p)


def add_suffix_flag(p: Parser):
    suffix = "ending of masks' names before the dot: _mask, if X_mask.png is the mask of X.jpg"
    p.add_argument("--mask-suffix", metavar="TEXT", help=suffix)


def open_masks(args) -> tuple[list[tuple[Path, Path]], Callable]:
    """(image, mask) files of --data, and read_ids with the flags' settings. Raises UsageError if hardly any mask has
    background, as in trimaps and class maps without it: overlap with such a foreground would mean nothing."""
    pairs = list_masks(args.data, args.split, args.mask_suffix)
    chosen = args.foreground or args.void
    need(not chosen or args.masks != "binary", "--masks binary has no ids: leave --foreground and --void out")
    both = sorted({*(args.foreground or [])} & {*(args.void or [])})
    need(not both, f"--foreground and --void both name {', '.join(map(str, both))}: name an id once")
    read = partial(read_ids, kind="ids" if chosen else args.masks, foreground=args.foreground, void=args.void)
    some = [pairs[i] for i in dict.fromkeys(evenly(len(pairs), 64))]
    maps = [readable(read, mask) for _, mask in some]
    with_ground = sum(bool((ids == 0).any()) for ids in maps)
    if with_ground < len(some) / 10:
        for (path, _), ids in zip(some, maps, strict=True):
            need_same_shape(path, readable(read_image, path), ids)
        stored = [_values(mask)[0] for _, mask in some] if chosen else maps
        seen = sorted({int(i) for ids in stored for i in ids.unique() if i >= 0})
        values = f"they hold the ids {', '.join(map(str, seen[:8]))}{', …' * (len(seen) > 8)}"
        which = "say which are objects with --foreground, and which to ignore with --void"
        raise UsageError(f"only {with_ground} of {len(some)} masks have background (0); {values}: {which}")
    return pairs, read


def need_same_shape(path: Path, image: Tensor, annotation: Tensor):
    """Raise UsageError unless the annotation (…, h, w) has the image's aspect ratio, but for rounding."""
    (h, w), (oh, ow) = image.shape[-2:], annotation.shape[-2:]
    same = abs(w * oh - h * ow) <= 0.02 * h * ow + max(h, w)
    need(same, f"the annotation of {path} is {ow} x {oh} pixels, the image {w} x {h}: expected one shape")


def read_ids(path: str | Path, kind: str = "auto", foreground=None, void=None) -> Tensor:
    """A mask file as ids (h, w) int64: 0 background, -1 void, others objects.

    kind: "binary", an object above half of white; "ids", one per object, with 255 as void (16-bit files have none;
    colors are ImageNet-S's red + 256 green, with 1000 as void); "auto", guess_kind(). foreground: for "ids", those that
    are objects and become 1, 2, …; the rest become background (default: all but 0 are objects). void: ids to ignore.
    """
    if foreground or void:
        values, default = _values(path)
        ids = torch.zeros_like(values) if foreground else values.clone()
        for i, value in enumerate(foreground or [], 1):
            ids[values == value] = i
        void = void or [i for i in default if i not in (foreground or [])]
        return torch.where(torch.isin(values, torch.tensor([-1, *void])), -1, ids)
    with Image.open(path) as file:
        if file.mode.startswith("I"):  # 16 bits
            ids = torch.from_numpy(np.array(file).astype(np.int64))
            return (ids > 32767).long() if kind == "binary" else ids
        palette = file.mode == "P"
        indices, light, colors = (np.array(x) for x in (file, file.convert("L"), file.convert("RGB")))
    if kind == "binary":
        return torch.from_numpy(light > 127).long()
    if not palette and (colors != colors[..., :1]).any():
        return _ids_of_colors(torch.from_numpy(colors).long(), path)
    gray = torch.from_numpy(indices if palette else light).long()
    if kind == "ids" or guess_kind(gray, palette, path) == "ids":
        return torch.where(gray == 255, -1, gray)
    return (gray > 127).long()


def _values(path) -> tuple[Tensor, list[int]]:
    """The values of a mask file (h, w), ImageNet-S's ids with -1 for its void; and those that are void unless others
    are named."""
    values, mode = stored_values(path)
    if values.ndim == 3:
        return _ids_of_colors(values, path), []
    return values, [] if mode.startswith("I") else [255]


def stored_values(path) -> tuple[Tensor, str]:
    """The values of a mask file as stored, and Pillow's name of its mode: indices of a palette, gray levels, 0 and 1 of
    one bit, 16 bits: (h, w) int64; colors: (h, w, 3)."""
    with Image.open(path) as file:
        kept = file.mode in ("1", "P", "L") or file.mode.startswith("I")
        pixels = torch.from_numpy(np.array(file if kept else file.convert("RGB")).astype(np.int64))
        gray = pixels.ndim == 3 and (pixels == pixels[..., :1]).all()
        return pixels[..., 0] if gray else pixels, file.mode


def _ids_of_colors(pixels: Tensor, path) -> Tensor:
    red, green, blue = pixels.unbind(-1)
    ids = red + 256 * green
    known = not blue.any() and ids.max() <= 1000
    need(known, f"the mask {path} is colored: expected gray, a palette or ImageNet-S's ids")
    return torch.where(ids == 1000, -1, ids)


def guess_kind(gray: Tensor, palette: bool, path) -> str:
    """ "ids" if a palette image holds anything but 0 and 255, or if all gray values but these are below 51; "binary"
    for 0 and 255, for CUB's levels (multiples of 51, which count annotators), and for soft edges."""
    between, white = gray[(gray > 0) & (gray < 255)], gray == 255
    if palette or not len(between):
        return "ids" if len(between) else "binary"
    ids = between.max() < 51
    edges = ids and white.sum() > 4 * len(between)  # soft edges of a binary mask, or more void than objects
    dark = not ids and gray.max() < 250 and (between % 51).any()  # ids above 50, or a mask that is not quite white
    values = f"({between.unique()[:4].tolist()}, …)"
    unclear = f"the mask {path} may hold ids or gray levels {values}: pass --masks ids or --masks binary"
    need(not edges and not dark, unclear)
    return "ids" if ids else "binary"


def list_masks(data: list[Path], split: str, suffix: str | None = None) -> list[tuple[Path, Path]]:
    """(image, mask) of --data: CUB_200_2011, or a folder of images and one of masks."""
    need(len(data) <= 2, f"--data takes one folder or two, got {len(data)}")
    for folder in data:
        problem = "not a folder" if folder.exists() else "no such folder"
        expected = "expected CUB_200_2011, or a folder of images and one of masks"
        need(folder.is_dir(), f"{problem}: {folder}; {expected}")
    need(len(data) == 2 or not suffix, "--mask-suffix is for two folders: CUB's masks are named as its images are")
    need(len(data) == 1 or not split, "--split is for CUB_200_2011: with two folders leave it out")
    return list_pairs(*data, suffix) if len(data) == 2 else list_cub(data[0], split or "test")


def list_cub(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """(image, mask) of CUB_200_2011: its test set, the ids in a file, or those with split 2 in ReDO's (id, split)."""
    expected = "expected the folder CUB_200_2011, or two folders, of images and of masks"
    need((folder / "images.txt").exists(), f"no images.txt in {folder}: {expected}")
    separate = "a separate download, segmentations.tgz at data.caltech.edu/records/65de6-vp158; unpack it there"
    need((folder / "segmentations").is_dir(), f"no segmentations in {folder}: they are {separate}")
    listed = (folder / "images.txt").read_text(errors="surrogateescape").splitlines()
    rows = [line.split(maxsplit=1) for line in listed if line.strip()]
    names = {row[0]: row[-1].strip() for row in rows}
    file = folder / "train_test_split.txt" if split == "test" else Path(split)
    need(file.is_file(), f"no such split: {file}; expected test, or a file of ids")
    rows = [line.split() for line in file.read_text(errors="replace").splitlines() if line.strip()]
    ids = [row[0] for row in rows if len(row) == 1 or row[1] == ("0" if split == "test" else "2")]
    unknown = [i for i in ids if i not in names]
    need(not unknown, f"{file} names {len(unknown)} ids, of {len(ids)}, that images.txt does not list")
    need(ids, f"{file} names no test image")
    return [(folder / "images" / names[i], (folder / "segmentations" / names[i]).with_suffix(".png")) for i in ids]


def is_cub(folder: Path) -> bool:
    """Whether a folder in CUB's layout holds CUB itself, by its number of images."""
    names = folder / "images.txt"
    return names.exists() and len(names.read_bytes().split(b"\n")) in (11_788, 11_789)


def list_pairs(images: Path, masks: Path, suffix: str | None = None) -> list[tuple[Path, Path]]:
    """(image, mask) of two folders whose files have the same relative names, apart from their endings. suffix: what
    masks' names have in addition, as in X_mask.png; both may then be in one folder."""
    together = images.resolve() == masks.resolve()
    of, marked = [], [False if together else None, True] if suffix else [None, None]
    for folder, is_mask in zip((images, masks), marked, strict=True):
        what = f"no names in {folder} {'end' if is_mask else 'do not end'} in {suffix} before the dot"
        listed = list_images(folder, train=False)
        names = [(os.path.splitext(os.fsdecode(name))[0], listed.root / os.fsdecode(name)) for name in listed]
        if is_mask is not None:
            names = [(stem.removesuffix(suffix), path) for stem, path in names if stem.endswith(suffix) == is_mask]
        need(names, f"{what}: correct --mask-suffix")
        of.append(dict(names))
        same = len(names) - len(of[-1])
        need(not same, f"{same} files in {folder} differ in their suffix alone: keep one of each")
    missing = [stem for stem in of[0] if stem not in of[1]]
    first = (
        f"of the same name{' and ' + suffix if suffix else ''} in {masks}, the first: {missing[0] if missing else ''}"
    )
    some = "; masks named like X_mask.png need --mask-suffix _mask" if not suffix else ""
    need(not missing, f"{len(missing)} of {len(of[0])} images have no mask {first}{some}")
    return [(path, of[1][stem]) for stem, path in of[0].items()]

"""Images with a class for every pixel: PASCAL VOC 2012, Cityscapes, or one's own images and labels."""

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets, tv_tensors

from evals import finetune
from evals.truth import list_pairs, readable, stored_values
from runtime import cli, distributed
from runtime.cli import UsageError, need
from runtime.images import read_image

VOID = 255


@dataclass
class Recipe:
    """A data set's classes, and how A.2 trains on it. key: identifies the data for a run. ids: a label's pixel value
    -> class or VOID. shape: what images are resized to, before scaling and for evaluation. lr: the authors' configs'.
    sweep: what --lr paper stands for. images: their numbers in training and val, by which the paper's data is
    recognized. align_corners: of interpolated scores, as in the authors' configs."""

    key: str
    title: str
    names: list[str]
    ids: dict[int, int]
    crop: int = 513
    shape: tuple[int, int] | None = None
    lr: tuple[float, ...] = (0.01,)
    sweep: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1)
    images: tuple[int, int] | None = None
    align_corners: bool = False
    paper: str = ""
    epochs: int | None = None  # A.2 counts steps


VOC = Recipe(
    "voc",
    "PASCAL VOC",
    "background aeroplane bicycle bird boat bottle bus car cat chair cow table dog horse motorbike person plant sheep "
    "sofa train tv".split(),
    {i: i for i in [*range(21), VOID]},
    images=(10_582, 1_449),  # with --sbd
    paper="77.3 (Table 1), 77.2 ± 0.15 (Table 5); after COCO 74.3 (Table 2), after ImageNet-100 72.1 (Table 4)",
)
_TOWN = datasets.Cityscapes.classes
CITYSCAPES = Recipe(
    "cityscapes",
    "Cityscapes",
    [c.name for c in _TOWN if 0 <= c.train_id < 19],
    {c.id % 256: c.train_id if 0 <= c.train_id < 19 else VOID for c in _TOWN},
    crop=769,
    shape=(1025, 2049),
    lr=(0.04,),
    sweep=(0.004, 0.01, 0.04),
    images=(2_975, 500),
    align_corners=True,
    paper="76.6 (Table 1), 76.9 ± 0.38 (Table 5); after COCO 76.4 (Table 2)",
)


def open_scenes(args) -> tuple[Recipe, list[tuple[Path, Path]], list[tuple[Path, Path]]]:
    """--data's recipe, and its (image, label) files to train on and to evaluate on."""
    first, own = args.data[0], args.classes is not None or args.void is not None or args.mask_suffix
    need(len(args.data) <= 2, f"--data takes one folder, or one of images and one of labels, got {len(args.data)}")
    splits = args.split, args.val_split
    if len(args.data) == 1 and (first / "leftImg8bit").is_dir():
        recipe, (train, val) = CITYSCAPES, (list_cityscapes(first, split) for split in splits)
    elif root := len(args.data) == 1 and find_voc(first):
        recipe, (train, val) = VOC, (list_voc(root, split) for split in splits)
        train += list_sbd(args.sbd, root) if args.sbd else []
    else:
        train, val = list_own(args.data, *splits, args.mask_suffix)
        recipe, own = own_recipe(args, train, val), False
    need(not own, f"{recipe.title} has its own classes: leave --classes, --void and --mask-suffix out")
    need(not args.sbd or recipe is VOC, f"--sbd adds to PASCAL VOC, but --data is {recipe.title}: leave it out")
    return recipe, train, val


def find_voc(data: Path) -> Path | None:
    """The folder that holds VOCdevkit, if `data` is that folder or inside it."""
    for root in (data, data.parent, data.parent.parent):
        if (root / "VOCdevkit/VOC2012").is_dir() and data.resolve().is_relative_to(root.resolve()):
            return root
    return None


def opened(what: str, kind, *args, **kwargs):
    """A torchvision data set; UsageError if it is incomplete."""
    try:
        return kind(*args, **kwargs)
    except (OSError, RuntimeError, ValueError, ImportError) as e:
        raise UsageError(f"cannot open {what} ({str(e).splitlines()[0]})") from None


def list_voc(root: Path, split: str) -> list[tuple[Path, Path]]:
    voc = opened(f"{split} of {root}", datasets.VOCSegmentation, str(root), "2012", split)
    return [(Path(i), Path(m)) for i, m in zip(voc.images, voc.masks, strict=True)]


def list_sbd(sbd: Path, root: Path) -> list[tuple[Path, Path]]:
    """SBD's images that are in neither of VOC's splits; with VOC's train they are train_aug, 10,582 images."""
    ours = {image.stem for split in ("train", "val") for image, _ in list_voc(root, split)}
    parts = [opened(f"SBD in {sbd}", datasets.SBDataset, str(sbd), s, mode="segmentation") for s in ("train", "val")]
    pairs = [(Path(i), Path(m)) for part in parts for i, m in zip(part.images, part.masks, strict=True)]
    return [(image, label) for image, label in pairs if image.stem not in ours]


def list_cityscapes(root: Path, split: str) -> list[tuple[Path, Path]]:
    town = opened(f"{split} of {root}", datasets.Cityscapes, str(root), split, target_type="semantic")
    return [(Path(i), Path(m[0])) for i, m in zip(town.images, town.targets, strict=True)]


def list_own(data: list[Path], split: str, val_split: str, suffix: str | None) -> tuple[list, list]:
    """One's own pairs to train on and to evaluate on, from ROOT/images and ROOT/labels or two folders, with or without
    the splits in each, or from ROOT/train/images and so on. Without splits every fifth image is held out."""
    images, labels = data if len(data) == 2 else (data[0] / "images", data[0] / "labels")

    def of(name):
        folders = [(images / name, labels / name)]
        folders += [(data[0] / name / "images", data[0] / name / "labels")] if len(data) == 1 else []
        return next((list_pairs(*pair, suffix) for pair in folders if pair[0].is_dir()), None)

    train, val = of(split), of(val_split)
    if train is None and val is None:
        known = "VOCdevkit/VOC2012, of leftImg8bit and gtFine, or of images and labels; or IMAGES LABELS, two folders"
        folders = images.is_dir() and labels.is_dir()
        need(folders, f"{' '.join(map(str, data))} is none of these: expected the folder of {known}")
        defaults = (split, val_split) == ("train", "val")
        need(defaults, f"neither {images / split} nor {images / val_split} exists: expected these folders")
        pairs = list_pairs(images, labels, suffix)
        need(len(pairs) > 1, f"one image in {images}: expected at least one to train on, one to evaluate on")
        train, val = [p for i, p in enumerate(pairs) if i % 5], pairs[::5]
        if distributed.place().rank == 0:
            print(f"{images} has no folders train and val: every fifth image ({len(val)}) is held out for evaluation")
            if inside := sorted(path.name for path in images.iterdir() if path.is_dir())[:9]:
                print(f"it has {', '.join(inside)}: if these are splits, name them with --split and --val-split")
        return train, val
    lacks = split if train is None else val_split
    need(train and val, f"{images} has no folder {lacks}: expected {split} and {val_split}, or neither of them")
    return train, val


def own_recipe(args, train: list, val: list) -> Recipe:
    """The recipe for your own labels, from --classes and --void. All labels are read once, so that a wrong id ends the
    program before training. Void ids are not classes, even if they are below the number of classes."""
    void, seen, rank = args.void or [], ({}, {}), distributed.place().rank
    pairs = train + val
    loader = distributed.make_loader(LabelIds(pairs), args.workers, batch_size=None)
    for i, ids in enumerate(cli.bar(distributed.iterate(loader), "reading labels", len(loader), disable=rank > 0)):
        for id_ in ids:
            seen[i >= len(train)].setdefault(id_, pairs[i][1])
    every = seen[1] | seen[0]
    holds = f"hold the ids {', '.join(map(str, sorted(every)[:40]))}{', …' * (len(every) > 40)}"
    binary = "; if 255 is the object, save it as 1" if {*every} == {0, 255} else ""
    how_many = "a file with a name per line, or their number"
    need(args.classes, f"labels of your own need --classes, {how_many}; yours {holds}{binary}")
    names = class_names(args.classes)
    known = [i for i in range(len(names)) if i not in void]
    for id_, path in sorted(every.items()):
        classes = f"the {len(names)} classes of --classes are 0 to {len(names) - 1}"
        mend = f"correct it, add the class, or pass --void {' '.join(map(str, sorted({*void, id_})))} to ignore it"
        mend = mend if 0 <= id_ < 2**16 else "ids are at most 65,535"
        need(id_ in void or id_ in known, f"the label {path} holds id {id_}, but {classes}{binary}: {mend}")
    missing = [names[i] for i in known if i not in seen[0]]
    of = f"{len(known)} classes that are not void{binary}"
    need(len(known) - len(missing) > 1, f"the labels to train on {holds}, which are less than two of the {of}")
    need({*known} & {*seen[1]}, f"all labels to evaluate on are void: {', '.join(map(str, sorted(seen[1])))}")
    if missing and rank == 0:
        cli.warn(f"no label to train on holds {', '.join(missing[:9])}{', …' * (len(missing) > 9)}")
    ids = {id_: i for i, id_ in enumerate(known)} | {id_: VOID for id_ in void}
    digest = hashlib.sha256(repr([names, void]).encode())
    for file in itertools.chain.from_iterable(train):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode(errors="surrogateescape"))
    title = " ".join(map(str, args.data))
    return Recipe(digest.hexdigest()[:16], title, [names[i] for i in known], ids, epochs=50)


def class_names(given: str) -> list[str]:
    """--classes, a number or a file, as names in the order of their ids."""
    if given.isdecimal():
        names = [f"class {i}" for i in range(min(int(given), 1000))]
    else:
        need(Path(given).is_file(), f"no such file: --classes {given}; expected one with a name per line, or a number")
        try:
            names = [line.strip() for line in Path(given).read_text("utf-8-sig").strip().splitlines()]
        except ValueError as e:
            raise UsageError(f"cannot read --classes {given} ({e}): expected UTF-8") from None
        need(all(names), f"--classes {given} has an empty line: expected a name for each id")
    need(1 < len(names) < VOID, f"--classes {given} makes {len(names)} classes: expected 2 to {VOID - 1}")
    double = [name for name in names if names.count(name) > 1]
    need(not double, f"--classes {given} names {double[:1]} twice: expected a different name for each id")
    return names


def read_label(path: Path) -> Tensor:
    """A label file's values, (h, w) int64."""
    if path.suffix == ".mat":  # SBD
        from scipy.io import loadmat

        return torch.from_numpy(loadmat(path)["GTcls"][0]["Segmentation"][0].astype(np.int64))
    lossless = "expected PNG, since JPEG changes ids: make it again from the labels it came from"
    need(path.suffix.lower() not in (".jpg", ".jpeg"), f"the label {path} is a JPEG: {lossless}")
    values, _ = stored_values(path)
    mend = "replace each color by its id, as in ids[(rgb == color).all(-1)] = 7, and save ids as a gray PNG"
    need(values.ndim == 2, f"the label {path} holds colors: expected one class id per pixel, gray or palette; {mend}")
    return values


class LabelIds(Dataset):
    """[i]: the ids in a label file. Raises UsageError if its shape differs from its image's, which is read from the
    header. pairs: (image, label) files."""

    def __init__(self, pairs: list[tuple[Path, Path]]):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i: int) -> list[int]:
        image, label = self.pairs[i]
        values = readable(read_label, label)
        need_shape(label, tuple(values.shape), readable(shape_of, image))
        return values.unique().tolist()


def shape_of(path: Path) -> tuple[int, int]:
    """An image's height and width, from its header if possible, with EXIF orientation applied."""
    with Image.open(path) as file:
        if file.format == "TIFF":  # whether its size is turned depends on Pillow's version
            return tuple(read_image(path).shape[1:])
        turned = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return file.size if turned else file.size[::-1]


def need_shape(label: Path, shape: tuple, of_image: tuple):
    need(shape == of_image, f"the label {label} has shape {shape}, the image {of_image}: expected a class id per pixel")


class Scenes(Dataset):
    """Images with a class for every pixel. pairs: (image, label) files. [i]: the unchanged image (3, h, w) and label
    (h, w), uint8. [epoch, i], for training: scaled by a random factor from its own size, or from the recipe's shape,
    mirrored or not, cropped to `crop`."""

    def __init__(self, pairs: list[tuple[Path, Path]], recipe: Recipe, crop: int = 0, scales=(1, 1), seed: int = 0):
        self.pairs, self.crop, self.scales, self.seed = pairs, crop, scales, seed
        self.shape = recipe.shape
        self.table = torch.full((2**16,), -1)
        for value, class_ in recipe.ids.items():
            self.table[value] = class_

    def __len__(self):
        return len(self.pairs)

    def whole(self, i: int) -> tuple[Tensor, Tensor]:
        (path, file), last = self.pairs[i], len(self.table) - 1
        image, values = readable(read_image, path), readable(read_label, file)
        need_shape(file, tuple(values.shape), tuple(image.shape[1:]))
        label = self.table[values.clamp(0, last)]
        if (bad := (label < 0) | (values != values.clamp(0, last))).any():
            known = ", ".join(map(str, (self.table >= 0).nonzero()[:, 0].tolist()))
            raise UsageError(f"the label {file} has class id {int(values[bad][0])}: expected {known}")
        return image, label.to(torch.uint8)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        if isinstance(key, int):
            return self.whole(key)
        epoch, i = map(int, key)
        image, label = self.whole(i)
        rng = np.random.default_rng([self.seed, epoch, i])
        scale = rng.uniform(*self.scales)
        shape = tuple(max(1, round(scale * side)) for side in self.shape or label.shape)
        sample = {"image": tv_tensors.Image(image), "label": tv_tensors.Mask(label[None])}
        sample = finetune.jitter(rng, sample, shape, self.crop, VOID)
        return sample["image"].as_subclass(Tensor), sample["label"].as_subclass(Tensor)[0]

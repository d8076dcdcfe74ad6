"""Weighted k-nearest-neighbor classification on frozen features (Table 4).

    python -m evals.knn --ckpt r2o.pth --data /imagenet --subset imagenet100.txt      # Table 4
    python -m evals.knn --ckpt r2o.pth --data /imagenet      # its train and val
    torchrun --nproc_per_node=8 -m evals.knn --ckpt r2o.pth --data train val

An image's feature is its C5, averaged over the image, of unit length. Each of its k nearest training images votes for
its class with weight exp(cosine / temperature). Features are kept in half precision: 5 GB for ImageNet-1K.
"""

import os
import re
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import r2o
from evals.common import add_encoder_flags, add_json_flag, calibrated_encoder, free_name, need_writable, table_row
from evals.measures import QUERIES, nearest, votes
from evals.truth import readable
from runtime import cli, distributed
from runtime.cli import UsageError, count, natural, need, number
from runtime.images import EXTENSIONS, read_image, read_subset
from runtime.pictures import evenly
from runtime.storage import write_json


def parse_args(argv):
    p = cli.Parser(__doc__)
    add_encoder_flags(p)
    data = "a folder with train and val, or these two folders, each with one folder per class"
    p.add_argument("--data", required=True, nargs="+", type=Path, help=data)
    p.add_argument("--subset", metavar="FILE", help="use only these classes: a folder per line, such as ImageNet-100's")
    p.add_argument("-k", type=count, nargs="+", default=[20, 10, 100, 200], help="neighbors")
    p.add_argument("--temperature", type=number(float, 0, above=True), default=0.07, help="of the votes")
    p.add_argument("--size", type=number(int, 32), default=224, help="side of the crops")
    p.add_argument("--batch-size", type=count, default=128, help="images at a time")
    p.add_argument("--workers", type=natural, default=distributed.cores_per_process(), help="per process")
    add_json_flag(p, "eval_knn")
    return p.parse_args(argv)


class Classes(ImageFolder):
    """ImageFolder of some of a folder's classes, those in `subset` (None: all)."""

    def __init__(self, folder: Path, subset: list[str] | None, *args, **kwargs):
        self.subset = subset
        super().__init__(folder, *args, **kwargs)

    def find_classes(self, directory):
        if self.subset is None:
            return super().find_classes(directory)
        folders = {entry.name for entry in os.scandir(directory) if entry.is_dir()}
        missing = [name for name in self.subset if name not in folders]
        first = f"the first: {missing[0] if missing else ''}; expected one of its folders per line"
        lines = f"{len(missing)} of the {len(self.subset)} lines of --subset"
        need(not missing, f"{lines} are no class in {directory}, {first}")
        return self.subset, {name: i for i, name in enumerate(self.subset)}


def open_folder(folder: Path, size: int, classes: list[str] | None = None, subset=None) -> ImageFolder:
    """(image (3, S, S) uint8, label): resized to 8/7 S, center cropped. classes: for the labels (default: its own).
    subset: the folders to read (default: all)."""
    resize = v2.Resize(round(size * 8 / 7), v2.InterpolationMode.BICUBIC, antialias=True)
    crop = v2.Compose([resize, v2.CenterCrop(size)])
    loader, is_image = partial(readable, read_image), lambda path: os.fsencode(path).lower().endswith(EXTENSIONS)
    try:
        data = Classes(folder, subset, crop, loader=loader, is_valid_file=is_image, allow_empty=True)
    except OSError as e:
        problem = f"{e.strerror}: {e.filename}" if e.strerror else str(e).splitlines()[0]
        raise UsageError(f"{problem}; expected a folder with one folder of images per class") from None
    need(len(data), f"no images in the folders of {folder}: expected one folder of images per class")
    if classes is not None:
        found = {data.classes[i] for i in data.targets}
        strange = sorted(found - set(classes))
        among = f"are not among the {len(classes)} of the training images, such as {''.join(strange[:1])}"
        need(not strange, f"{len(strange)} of the {len(found)} classes in {folder} {among}: expected the same folders")
        data.samples = [(path, classes.index(data.classes[i])) for path, i in data.samples]
    return data


def is_imagenet_100(classes: list[str], images: int) -> bool:
    """By its classes' names and its number of validation images."""
    return len(classes) == 100 and images == 5_000 and all(re.fullmatch(r"n\d{8}", name) for name in classes)


def crops(data: ImageFolder, indices, args) -> DataLoader:
    """Batches of (images, labels) of these indices."""
    return distributed.make_loader(Subset(data, indices), args.workers, batch_size=args.batch_size)


@torch.no_grad()
def features(encoder, data: ImageFolder, rank: int, world: int, args, device, title: str) -> tuple[Tensor, Tensor]:
    """Unit features (n, C) half, and labels (n,), of every world-th image."""
    own = range(rank, len(data), world)
    found = None
    labels = torch.tensor([label for _, label in data.samples], device=device)[rank::world]
    with cli.bar(desc=title, total=len(own), unit="img", disable=rank > 0) as bar:
        for i, (images, _) in enumerate(distributed.iterate(crops(data, own, args))):
            c5 = r2o.encode(encoder, r2o.normalize(images.to(device)))
            rows = F.normalize(c5.float().mean((2, 3)), dim=1).half()
            sound = bool(rows.isfinite().all())
            need(sound, f"the features of {args.ckpt} are not finite: it comes from a run that diverged")
            found = rows.new_empty(len(own), rows.shape[1]) if found is None else found
            found[i * args.batch_size :][: len(rows)] = rows
            bar.update(len(rows))
    return found, labels


def classify(bank, bank_labels, queries, labels, classes: int, ks: list[int], temperature: float, n: int) -> dict:
    """Top-1 and top-5 accuracy in percent, by k. Every process brings its rows of bank and queries. n: all queries."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > 1:  # equally many queries from each: pad with label -1, which no vote can hit
        share = -(-n // world)
        queries, labels = (F.pad(x, [0, 0] * (x.ndim - 1) + [0, share - len(x)], value=-1) for x in (queries, labels))
        queries, labels = (r2o.gather_from_ranks(x, 0, world) for x in (queries, labels))
    hits = {k: [0, 0] for k in ks}
    for start in range(0, len(queries), 16 * QUERIES):
        at = slice(start, start + 16 * QUERIES)
        similar, owners = nearest(queries[at], bank, bank_labels, max(ks))
        if world > 1:
            every = (r2o.gather_from_ranks(x, 0, world).view(world, -1, max(ks)) for x in (similar, owners))
            similar, owners = (x.transpose(0, 1).flatten(1) for x in every)
            similar, index = similar.topk(max(ks), dim=1)
            owners = owners.gather(1, index)
        for k in ks:
            top = votes(similar[:, :k], owners[:, :k], classes, temperature).topk(min(5, classes), dim=1)
            right = (top.indices == labels[at, None]) & (top.values > 0)
            hits[k][0] += right[:, 0].sum().item()
            hits[k][1] += right.any(1).sum().item()
    return {k: {"top-1": 100 * a / n, "top-5": 100 * b / n} for k, (a, b) in hits.items()}


def evaluate(args) -> int:
    need(len(args.data) <= 2, f"--data takes one folder (with train and val) or two, got {len(args.data)}")
    args.json = args.json or free_name("eval_knn")
    need_writable(args.json)
    folders = args.data if len(args.data) == 2 else [args.data[0] / "train", args.data[0] / "val"]
    whole = len(args.data) == 2 or all(folder.is_dir() for folder in folders)
    expected = "pass a folder that holds both, or two folders, with a folder of images for each class"
    need(whole, f"{args.data[0]} does not hold the folders train and val: {expected}")
    different = folders[0].resolve() != folders[1].resolve()
    need(different, f"--data names {folders[0]} twice: expected training images and others to test on")
    subset = sorted(map(os.fsdecode, read_subset(args.subset))) if args.subset else None
    train = open_folder(folders[0], args.size, subset=subset)
    val = open_folder(folders[1], args.size, train.classes, subset)
    need(max(args.k) <= len(train), f"-k {max(args.k)} is more than the {len(train)} training images: pass a lower -k")
    rank, world, device = distributed.place()
    need(world <= min(len(train), len(val)), f"{world} processes are more than the images: start fewer")
    distributed.join_process_group()
    batches = (r2o.normalize(images) for images, _ in crops(train, evenly(len(train), 256), args))
    encoder, line = calibrated_encoder(args.ckpt, args.arch, batches, device)
    if rank == 0:
        print(f"{line}; {len(train)} and {len(val)} images of {len(train.classes)} classes", flush=True)
    bank = features(encoder, train, rank, world, args, device, "train")
    queries = features(encoder, val, rank, world, args, device, "val")
    accuracy = classify(*bank, *queries, len(train.classes), args.k, args.temperature, len(val))
    if rank == 0:
        for k, a in accuracy.items():
            print(f"k = {k:3}: top-1 {a['top-1']:.2f} %, top-5 {a['top-5']:.2f} %")
        a = accuracy[args.k[0]]
        task = f"k-NN, {args.data[0].name}, k = {args.k[0]}, {len(val)} images of {len(train.classes)} classes"
        ours = f"top-1 {a['top-1']:.1f} %, top-5 {a['top-5']:.1f} %"
        paper = "85.5 % (Table 4: ImageNet-100, after 300 epochs on it; k, temperature and whether top-1 not given)"
        print(f"results: {args.json}")
        print(table_row(task, line, ours, paper, is_imagenet_100(train.classes, len(val))), flush=True)
        counts = {"train": len(train), "val": len(val), "classes": len(train.classes)}
        about = {"ckpt": args.ckpt, "encoder": line, "data": [str(f) for f in folders]}
        protocol = {"size": args.size, "temperature": args.temperature, "subset": args.subset}
        write_json(args.json, about | counts | protocol | {"k": accuracy})
    return 0


def main(argv=None):
    cli.run("evals.knn", lambda: evaluate(parse_args(argv)))


if __name__ == "__main__":
    main()

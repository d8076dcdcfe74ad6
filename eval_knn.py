"""Weighted k-nearest-neighbour classification on frozen features (Table 4).

    python eval_knn.py --ckpt r2o.pth --data /imagenet                  # its train and val
    torchrun --nproc_per_node=8 eval_knn.py --ckpt r2o.pth --data train val

Each image's feature is C5, averaged over the image, of unit length. Each of its k nearest training images votes for
its class with weight exp(cosine / temperature). Features are kept in half precision, shared out over the processes:
5 GB for ImageNet-1K and ResNet-50.
"""

import argparse
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import evaluation
import files
import processes
import r2o
from r2o import UsageError

BANK, QUERIES = 16384, 1024  # rows that are compared at a time


class Labelled(torch.utils.data.Dataset):
    """A folder of class folders: (image (3, S, S) uint8, label). The shorter side becomes 8/7 S, the middle is cut."""

    def __init__(self, folder: Path, size: int, classes: list[str] | None = None):
        """classes: those to find, in the order of their labels (default: the folder's)."""
        self.images, self.size = files.list_images(folder, train=False), size
        names = [os.fsdecode(name).split("/")[:-1] for name in self.images]
        loose = next((i for i, parts in enumerate(names) if not parts), None)
        if loose is not None:
            raise UsageError(
                f"{self.images.path(loose)} is in no class folder: expected {self.images.root}/CLASS/IMAGE"
            )
        own = sorted({parts[0] for parts in names})
        self.classes = classes or own
        if strange := [name for name in own if name not in set(self.classes)]:
            raise UsageError(
                f"{len(strange)} of the {len(own)} classes in {folder} are not among the {len(self.classes)} that were "
                f"trained on, such as {strange[0]}: expected the same class folders"
            )
        label = {name: i for i, name in enumerate(self.classes)}
        self.labels = np.array([label[parts[0]] for parts in names], dtype=np.int32)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = evaluation.read(r2o.read_image, self.images.path(i))
        image = TF.resize(image, [round(self.size * 8 / 7)], TF.InterpolationMode.BICUBIC, antialias=True)
        return TF.center_crop(image, [self.size, self.size]), int(self.labels[i])


def crops(data: Labelled, indices, args):
    """Batches of (images, labels) of these indices."""
    subset = torch.utils.data.Subset(data, indices)
    return torch.utils.data.DataLoader(subset, args.batch_size, num_workers=args.workers)


@torch.no_grad()
def features(encoder, data: Labelled, rank: int, world: int, args, device, title: str) -> tuple[Tensor, Tensor]:
    """Unit features (n, C) half, and labels (n,), of every world-th image."""
    own = range(rank, len(data), world)
    found, labels, start = None, torch.empty(len(own), dtype=torch.long, device=device), 0
    with tqdm(desc=title, total=len(own), unit="img", dynamic_ncols=True, disable=rank > 0) as bar:
        for images, y in crops(data, own, args):
            c5 = r2o.encode(encoder, r2o.normalize(images.to(device)))
            rows = F.normalize(c5.float().mean((2, 3)), dim=1).half()
            if not rows.isfinite().all():
                raise UsageError(
                    f"the features of {args.ckpt} are not finite: its weights are not those of a sound run"
                )
            if found is None:
                found = rows.new_empty(len(own), rows.shape[1])
            found[start : start + len(rows)], labels[start : start + len(rows)] = rows, y.to(device)
            start += len(rows)
            bar.update(len(rows))
    return found, labels


def nearest(queries: Tensor, bank: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of the bank most similar to each query: similarities (Q, k), falling, and their labels (Q, k). A bank
    of fewer rows is filled up with similarity -inf. queries: (Q, C); bank: (N, C); labels: (N,). Never holds Q x N."""
    best = queries.new_full((len(queries), k), -math.inf, dtype=torch.float32)
    whose = labels.new_zeros(len(queries), k)
    for start in range(0, len(bank), BANK):
        some, y = bank[start : start + BANK].float(), labels[start : start + BANK]
        for q in range(0, len(queries), QUERIES):
            at = slice(q, q + QUERIES)
            similar = queries[at].float() @ some.T
            both = torch.cat([best[at], similar], 1)
            owners = torch.cat([whose[at], y.expand(len(similar), -1)], 1)
            best[at], index = both.topk(k, dim=1)
            whose[at] = owners.gather(1, index)
    return best, whose


def votes(similar: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """The weight of every class: similar, labels (Q, k) -> (Q, classes)."""
    weights = ((similar - similar[:, :1]) / temperature).exp()  # a common factor, lest they overflow
    return weights.new_zeros(len(similar), classes).scatter_add_(1, labels, weights)


def classify(bank, bank_labels, queries, labels, classes: int, ks: list[int], temperature: float, n: int) -> dict:
    """Top-1 and top-5 accuracy in percent, by k. Each process brings its rows of bank and queries; n: all queries."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > 1:  # equally many queries from each: some add one of label -1, which no vote can hit
        share = -(-n // world)
        queries, labels = (F.pad(x, [0, 0] * (x.ndim - 1) + [0, share - len(x)], value=-1) for x in (queries, labels))
        queries, labels = (r2o.of_ranks(x, 0, world) for x in (queries, labels))
    hits = {k: [0, 0] for k in ks}
    for start in range(0, len(queries), 16 * QUERIES):
        at = slice(start, start + 16 * QUERIES)
        similar, whose = nearest(queries[at], bank, bank_labels, max(ks))
        if world > 1:
            every = (r2o.of_ranks(x, 0, world).view(world, -1, max(ks)) for x in (similar, whose))
            similar, whose = (x.transpose(0, 1).flatten(1) for x in every)
            similar, index = similar.topk(max(ks), dim=1)
            whose = whose.gather(1, index)
        for k in ks:
            ranked = votes(similar[:, :k], whose[:, :k], classes, temperature).topk(min(5, classes), dim=1).indices
            right = ranked == labels[at, None]
            hits[k][0] += right[:, 0].sum().item()
            hits[k][1] += right.any(1).sum().item()
    return {k: {"top-1": 100 * a / n, "top-5": 100 * b / n} for k, (a, b) in hits.items()}


def evaluate(args) -> int:
    if len(args.data) > 2:
        raise UsageError(f"--data takes one folder (with train and val) or two, got {len(args.data)}")
    for name, least in (("batch_size", 1), ("workers", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if min(args.k) < 1 or not 0 < args.temperature < math.inf:
        raise UsageError(f"-k must be at least 1 and --temperature above 0, got {min(args.k)} and {args.temperature}")
    evaluation.check_size(args.size)
    evaluation.check_outputs(args.json)
    folders = args.data if len(args.data) == 2 else [args.data[0] / "train", args.data[0] / "val"]
    if Path(folders[0]).resolve() == Path(folders[1]).resolve():
        raise UsageError(f"--data names {folders[0]} twice: expected training images and others to test on")
    train = Labelled(folders[0], args.size)
    val = Labelled(folders[1], args.size, train.classes)
    if max(args.k) > len(train):
        raise UsageError(f"-k {max(args.k)} is more than the {len(train)} training images: pass less")
    rank, world, device = processes.place()
    if world > min(len(train), len(val)):
        raise UsageError(f"{world} processes are more than the images: start fewer")
    processes.tie(rank, world, device)
    some = np.linspace(0, len(train) - 1, min(256, len(train))).astype(int)
    batches = (r2o.normalize(images) for images, _ in crops(train, some, args))
    encoder, line = evaluation.load_encoder(args, batches, device)
    if rank == 0:
        print(f"{line}; {len(train)} and {len(val)} images of {len(train.classes)} classes", flush=True)
    bank = features(encoder, train, rank, world, args, device, "train")
    queries = features(encoder, val, rank, world, args, device, "val")
    accuracy = classify(*bank, *queries, len(train.classes), args.k, args.temperature, len(val))
    if rank == 0:
        counts = {"train": len(train), "val": len(val), "classes": len(train.classes)}
        protocol = {"size": args.size, "temperature": args.temperature}
        found = {"ckpt": args.ckpt, "encoder": line, "data": [str(f) for f in folders], **counts, **protocol}
        for k, a in accuracy.items():
            print(f"k = {k:3}: top-1 {a['top-1']:.2f} %, top-5 {a['top-5']:.2f} %")
        a = accuracy[args.k[0]]
        task = f"k-NN, {args.data[0].name}, k = {args.k[0]}, {len(val)} images of {len(train.classes)} classes"
        ours = f"top-1 {a['top-1']:.1f} %, top-5 {a['top-5']:.1f} %"
        print(evaluation.row(task, line, ours, "Table 4, on ImageNet-1K; the figure is not known to us"), flush=True)
        evaluation.write_json(args.json, found | {"k": accuracy})
    return 0


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    evaluation.add_encoder_flags(p)
    data = "a folder with train and val, or these two folders, each with a folder a class"
    p.add_argument("--data", required=True, nargs="+", type=Path, help=data)
    p.add_argument("-k", type=int, nargs="+", default=[20, 10, 100, 200], help="neighbours (default: 20 10 100 200)")
    p.add_argument("--temperature", type=float, default=0.07, help="of the votes (default: %(default)s)")
    p.add_argument("--size", type=int, default=224, help="side of the crops (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=128, help="images at a time (default: %(default)s)")
    p.add_argument(
        "--workers", type=int, default=min(16, processes.own_cores()), help="per process (default: %(default)s)"
    )
    p.add_argument("--json", default="eval_knn.json", help="where the results go as well (default: %(default)s)")
    return p.parse_args(argv)


def main(argv=None):
    processes.run("eval_knn.py", lambda: evaluate(parse_args(argv)))


if __name__ == "__main__":
    main()

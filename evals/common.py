"""What the evaluations share: the encoder under test, Table 3's protocol, masks in pictures, a row of a table."""

import itertools
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import r2o
from evals.measures import match_foreground, segment_features
from evals.truth import need_same_shape, read_ids, readable
from runtime import cli
from runtime.cli import Parser, count, need
from runtime.images import read_image
from runtime.pictures import paint, resize_labels
from runtime.weights import load_encoder, random_seed, read_weights

NO_FOREGROUND = "no mask has any foreground: expected values above 127, or ids above 0"


def add_encoder_flags(p: Parser):
    ckpt = "r2o.pth, last.pth, weights of torchvision, timm, MMSegmentation or Detectron2, random, or random:SEED"
    p.add_argument("--ckpt", required=True, help=ckpt)
    p.add_argument("--arch", choices=r2o.ARCHS, help="encoder for --ckpt random (default: resnet50); files name theirs")


def add_seeds_flag(p: Parser):
    p.add_argument(
        "--kmeans-seeds", type=count, default=3, help="independent K-means runs to average over; 1: no spread"
    )


def add_network_flag(p: Parser):
    network = "network that predicts the masks; target: as in training (needs last.pth or --keep-every's epoch_*.pth)"
    p.add_argument("--network", default="online", choices=("online", "target"), help=network)


def calibrated_encoder(ckpt: str, arch, batches, device, network: str = "online") -> tuple[nn.Module, str]:
    """--ckpt's encoder on `device`, and a line about it. batches: of normalized images, to calibrate a random one."""
    encoder, line = load_encoder(ckpt, arch, network)
    encoder = encoder.to(device)
    if random_seed(ckpt) is not None:
        line += ", batch norm statistics measured on these images"
        calibrate(encoder, (images.to(device) for images in batches))
    return encoder, line


@torch.no_grad()
def calibrate(encoder: nn.Module, batches):
    """Measure an untrained encoder's batch norm statistics, so that training does not get the credit for them."""
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the plain average
    encoder.train()
    for images in batches:
        r2o.encode(encoder, images)
    encoder.eval()


def group_masks(c4: Tensor, regions: Tensor, k: int, assign: str, seed: int) -> Tensor:
    """Masks as in training, of one group of images that share K clusters. c4: (B, C, H, W). regions: (B, h, w).
    Returns (B, H, W) for assign = "pixel", (B, h, w) for "region"."""
    uniforms = r2o.seeding_uniforms(1, k, torch.Generator().manual_seed(seed)).to(c4.device)
    return r2o.predict_masks(c4, regions, k, uniforms, assign=assign)


@dataclass
class Tested:
    """A checkpoint under test; epoch, and K(t) at its end, are None if it does not say."""

    path: str
    epoch: int | None
    k: int | None
    encoder: nn.Module
    line: str  # describes it


def open_checkpoints(ckpt: str, arch, images: list, size: int, device, network: str = "online") -> list[Tested]:
    """A checkpoint, or all epoch_*.pth and r2o.pth (last.pth for the target) in a folder, one per epoch. images: files,
    for calibrate(). network: "online" or "target"."""
    paths, last = [ckpt], "r2o.pth" if network == "online" else "last.pth"
    if Path(ckpt).is_dir():
        paths = [str(p) for p in [*sorted(Path(ckpt).glob("epoch_*.pth")), Path(ckpt, last)] if p.exists()]
        need(paths, f"no epoch_*.pth or {last} in {ckpt}: train with --keep-every 10, say")
    found = {}
    for path in paths:
        file = {} if random_seed(path) is not None else read_weights(path, arch, network)
        epoch, args, k = file.get("epoch"), file.get("args"), None
        if epoch is not None and "k_start" in args and args.get("masks") != "prior":
            names = ("epochs", "k_start", "k_end", "hold_epochs", "schedule")
            k = r2o.num_clusters(epoch, *(args[name] for name in names))
        encoder, line = calibrated_encoder(path, arch, square_batches(images, size), device, network)
        print(f"{line}; {cli.describe_ops(device)}", flush=True)
        usual = {"masks": "predicted", "prior": "slic", "kmeans_group": 32}
        if unlike := [f"--{n.replace('_', '-')} {args[n]}" for n, x in usual.items() if (args or {}).get(n, x) != x]:
            print(f"note: it was trained with {' '.join(unlike)}; here masks are predicted from SLIC's regions")
        found[epoch if len(paths) > 1 else path] = Tested(path, epoch, k, encoder, line)
    return sorted(found.values(), key=lambda one: one.epoch or 0)


@torch.no_grad()
def mask_columns(wanted: list, images: Tensor, regions: Tensor, shown: list[int], device: torch.device) -> list:
    """film_strip's columns of the `shown` images: image, prior, and the masks of each (label, encoder, K) in `wanted`.
    All images, (n, 3, S, S) uint8, share their clusters. regions: (n, h, w)."""
    made = [("image", images[shown]), ("prior", paint(images[shown], regions[shown]))]
    normalized, regions = r2o.normalize(images.to(device)), regions.to(device)
    for label, encoder, k in wanted:
        masks = group_masks(r2o.encode_c4(encoder, normalized), regions, k, "pixel", seed=0).cpu()
        made.append((label, paint(images[shown], masks[shown])))
    return made


def read_square(path: str | Path, size: int) -> Tensor:
    """A whole image, resized to (3, size, size) uint8 as in training, ignoring its aspect ratio."""
    return r2o.resize(readable(read_image, path), size)


def square_batches(paths: list, size: int):
    """Normalized batches of the first 256 images, of at most 32 and nearly equal size, for calibrate()."""
    n = min(len(paths), 256)
    batches = -(-n // 32)
    for i in range(batches):
        part = paths[n * i // batches : n * (i + 1) // batches]
        yield r2o.normalize(torch.stack([read_square(path, size) for path in part]))


def add_json_flag(p: Parser, stem: str):
    p.add_argument("--json", help=f"file for the results (default: {stem}.json, or the next free {stem}-2.json, …)")


def free_name(stem: str) -> str:
    """The first of stem.json, stem-2.json, … that does not exist, so that no earlier results are overwritten."""
    numbered = (f"{stem}-{i}.json" for i in itertools.count(2))
    return next(name for name in itertools.chain([f"{stem}.json"], numbered) if not os.path.exists(name))


def need_writable(*paths: str | Path | None):
    """Fail early if an output cannot be written, or would replace another."""
    seen = set()
    for path in map(Path, filter(None, paths)):
        need(path.resolve() not in seen or path.is_char_device(), f"two outputs are named {path}: name two files")
        seen.add(path.resolve())
        writable = not path.is_dir() and os.access(path.absolute().parent, os.W_OK)
        need(writable, f"cannot write {path}: expected a file in an existing folder that can be written to")


def table_row(task: str, line: str, ours: str, paper: str, is_papers_data: bool) -> str:
    """A row of a table: the task, the encoder, our figures, and the paper's, unless it measured other data."""
    paper = paper if is_papers_data else "none for this data"
    return f"| {task} | {line.rsplit(': ', 1)[0]} | ours: {ours} | paper: {paper} |"


@torch.no_grad()
def segmented(encoder, pairs, k: int, layer: str, size: int, device, read=read_ids, seeds: int = 1):
    """Yields, for each image, (image (3, S, S) uint8, segments (h, w), foreground's id, truth (h, w) bool, metrics of
    each K-means run); segments are the first run's. read: reads a mask file, like read_ids(). seeds: number of runs."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    for start in range(0, len(pairs), 32):
        batch = pairs[start : start + 32]
        whole, masks = zip(*((readable(read_image, i), readable(read, m)) for i, m in batch), strict=True)
        for (path, _), image, ids in zip(batch, whole, masks, strict=True):
            need_same_shape(path, image, ids)
        images = torch.stack([r2o.resize(image, size) for image in whole])
        features = (r2o.encode_c4 if layer == "c4" else r2o.encode)(encoder, r2o.normalize(images.to(device)))
        maps = [segment_features(features, k, generator).cpu() for generator in generators]
        for i, ids in enumerate(masks):
            truth, found = ids > 0, []
            for scores in maps:
                segments = F.interpolate(scores[i : i + 1], ids.shape, mode="bilinear").argmax(1)[0]
                found.append((segments, *match_foreground(segments, k, truth, ids == -1)))
            yield images[i], *found[0][:2], truth, [metrics for *_, metrics in found]


def mean_scores(scores: list[list[dict]], n: int) -> tuple[dict[str, float], dict[str, float]]:
    """scores: per image with a foreground (of n images) and per K-means run. Returns the means over images and runs,
    with the numbers of images, and the standard deviations over runs, empty if there is only one."""
    need(scores, NO_FOREGROUND)
    runs = list(zip(*scores, strict=True))  # by K-means, then by image
    each = {name: [statistics.fmean(s[name] for s in run) for run in runs] for name in scores[0][0]}
    means = {name: statistics.fmean(x) for name, x in each.items()}
    spread = {name: statistics.stdev(x) for name, x in each.items()} if len(runs) > 1 else {}
    return means | {"n": len(scores), "without foreground": n - len(scores)}, spread


def pictures(image, segments, best, truth, _) -> list[Tensor]:
    """One of segmented()'s results as pictures: image, segments, foreground, truth; everything else darkened."""
    small, *masks = (resize_labels(m, image.shape[-2:]) for m in (segments, segments == best, truth))
    return [image, paint(image[None], small[None])[0], *((image * (0.2 + 0.8 * m)).to(torch.uint8) for m in masks)]


def columns(shown: list[list[Tensor]], k: int) -> list[tuple[str, Tensor]]:
    """Rows of pictures() as film_strip's columns."""
    labels = "image", f"K = {k} segments", "foreground", "truth"
    return [(label, torch.stack(column)) for label, column in zip(labels, zip(*shown, strict=True), strict=True)]

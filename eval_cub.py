"""Unsupervised object segmentation (Table 3): K-means of each image's features, one segment called the foreground.

    python eval_cub.py --ckpt r2o.pth --data CUB_200_2011
    python eval_cub.py --ckpt r2o.pth --data images masks          # any foreground dataset, files matched by name

Every image's features are clustered on their own (K = 5). The segment that best overlaps the true foreground is matched
to it (Hungarian matching, with one object) and the rest is background. The truth is used for that choice, as in the
paper, so the figures say how well some segment fits the object, not whether one could tell which.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import files
import r2o


def read_foreground(path: Path) -> torch.Tensor:
    """A mask file as bool (h, w): above half of 255 (CUB's grey levels count annotators), or, where all values but 0
    and 255 are below 51, any of these: ids of objects or classes, 255 being void."""
    with Image.open(path) as file:
        mask = torch.from_numpy(np.array(file if file.mode == "P" else file.convert("L")))
    between = mask[(mask > 0) & (mask < 255)]
    ids = between.numel() and int(between.max()) < 51  # CUB's lowest level
    return (mask > 0) & (mask < 255) if ids else mask > 127


def list_cub(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """(image, mask) of CUB_200_2011: the ids of its own test set, or of a file that has one id a line, or ids with
    ReDO's 0 = train, 1 = validation, 2 = test behind them, of which 2 is taken."""
    if not (folder / "images.txt").exists():
        raise r2o.UsageError(
            f"no images.txt in {folder}: expected the folder CUB_200_2011, or two folders, of images and of masks"
        )
    if not (folder / "segmentations").is_dir():
        raise r2o.UsageError(
            f"no segmentations in {folder}: they are a download of their own, segmentations.tgz "
            "beside CUB_200_2011.tgz at data.caltech.edu/records/65de6-vp158; unpack it there"
        )
    rows = [line.split(maxsplit=1) for line in (folder / "images.txt").read_text().splitlines() if line.strip()]
    names = {row[0]: row[-1].strip() for row in rows}
    file = folder / "train_test_split.txt" if split == "test" else Path(split)
    if not file.is_file():
        raise r2o.UsageError(f"no such split: {file}; expected test, or a file of ids")
    rows = [line.split() for line in file.read_text(errors="replace").splitlines() if line.strip()]
    wanted = "0" if split == "test" else "2"
    ids = [row[0] for row in rows if len(row) == 1 or row[1] == wanted]
    unknown = [i for i in ids if i not in names]
    if unknown or not ids:
        raise r2o.UsageError(
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
        raise r2o.UsageError(
            f"{len(missing)} of {len(of[0])} images have no mask of the same name in {masks}, the first: {missing[0]}"
        )
    return [(path, of[1][stem]) for stem, path in of[0].items()]


@torch.no_grad()
def calibrate(encoder: torch.nn.Module, batches):
    """Measures an untrained encoder's batch norm statistics on the images, with which alone it does better: without,
    a trained encoder would be credited with them. batches: of normalised images."""
    norms = [m for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the plain average
    encoder.train()
    for images in batches:
        r2o.encode(encoder, images)
    encoder.eval()


@torch.no_grad()
def segment(encoder: torch.nn.Module, images: torch.Tensor, k: int, layer: str = "c4", generator=None) -> torch.Tensor:
    """K-means of each image's own features. images: (B, 3, S, S) normalised -> scores (B, K, H, W), argmax is the
    segment. They are linear in the features, so that interpolating them interpolates the features."""
    features = (r2o.encode_c4 if layer == "c4" else r2o.encode)(encoder, images).float()
    H, W = features.shape[2:]
    points = F.normalize(features, dim=1).flatten(2).mT.contiguous()  # (B, HW, C)
    centers, _ = r2o.kmeans(points, k, generator=generator)
    return r2o.cluster_scores(points, centers).mT.unflatten(2, (H, W))


def match_foreground(segments: torch.Tensor, k: int, truth: torch.Tensor) -> tuple[int, dict[str, float]]:
    """The segment that overlaps the true foreground best, and the metrics of calling that foreground, all else not.
    segments: (h, w) ids < k; truth: (h, w) bool. With a single object, Hungarian matching is this maximum."""

    def iou(a, b):
        return ((a & b).sum() / (a | b).sum().clamp(min=1)).item()

    ious = [iou(segments == s, truth) for s in range(k)]
    best = int(np.argmax(ious))
    predicted = segments == best
    background = iou(~predicted, ~truth)
    return best, {
        "foreground IoU": ious[best],
        "mean IoU": (ious[best] + background) / 2,
        "pixel accuracy": (predicted == truth).float().mean().item(),
    }


def evaluate(encoder, pairs, k: int, layer: str, size: int, device, shown: int = 0) -> tuple[dict, list]:
    """Means over the images that have a foreground, and the columns of a picture of `shown` evenly spaced ones."""
    generator = torch.Generator().manual_seed(0)
    scores, columns = [], [("image", []), (f"K = {k} segments", []), ("foreground", []), ("truth", [])]
    show = {*np.linspace(0, len(pairs) - 1, min(shown, len(pairs))).astype(int).tolist()} if shown else set()
    with tqdm(total=len(pairs), desc="segmenting", unit="img", dynamic_ncols=True) as bar:
        for start in range(0, len(pairs), 32):
            batch = pairs[start : start + 32]
            images = load_images(batch, size)
            maps = segment(encoder, r2o.normalize(images.to(device)), k, layer, generator).cpu()
            for i, (_, mask) in enumerate(batch):
                truth = read(read_foreground, mask)
                segments = F.interpolate(maps[i : i + 1], truth.shape, mode="bilinear").argmax(1)[0]
                best, score = match_foreground(segments, k, truth)
                if truth.any():
                    scores.append(score)
                if start + i in show:
                    picture = images[i : i + 1]
                    small = [
                        F.interpolate(m[None, None].float(), (size, size), mode="nearest")[0]
                        for m in (segments, segments == best, truth)
                    ]
                    cut = [(picture * (0.2 + 0.8 * m)).to(torch.uint8) for m in small[1:]]  # all else darkened
                    for (_, column), x in zip(columns, [picture, r2o.paint(picture, small[0]), *cut], strict=True):
                        column.append(x[0])
            bar.update(len(batch))
    if not scores:
        raise r2o.UsageError("no mask has any foreground: expected one above half of 255, or ids above 0")
    means = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}
    counts = {"n": len(scores), "without foreground": len(pairs) - len(scores)}
    return means | counts, [(label, torch.stack(column)) for label, column in columns if column]


def load_images(pairs, size: int) -> torch.Tensor:
    return torch.stack([r2o.resize(read(r2o.read_image, image), size) for image, _ in pairs])


def read(reader, path: Path) -> torch.Tensor:
    try:
        return reader(path)
    except OSError as e:
        raise r2o.UsageError(f"cannot read {path} ({e})") from None


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--ckpt", required=True, help="r2o.pth, last.pth, a torchvision ResNet's state dict, or the word random"
    )
    p.add_argument(
        "--data",
        required=True,
        nargs="+",
        type=Path,
        help="CUB_200_2011 (with images.txt, images and segmentations), or a folder of images and one of masks",
    )
    p.add_argument(
        "--split", default="test", help="CUB's own test set, or a file of ids, such as ReDO's (default: %(default)s)"
    )
    p.add_argument("--arch", choices=r2o.ARCHS, help="what --ckpt holds, where it does not say (default: resnet50)")
    p.add_argument("--layer", default="c4", choices=("c4", "c5"), help="features to cluster (default: %(default)s)")
    p.add_argument(
        "--size",
        type=int,
        default=224,
        help="images are resized to this side; twice it for finer segments (default: %(default)s)",
    )
    p.add_argument("-k", type=int, default=5, help="segments per image (default: %(default)s)")
    p.add_argument("--json", default="eval_cub.json", help="where the results go as well (default: %(default)s)")
    p.add_argument(
        "--vis", metavar="PNG", help="also draw 8 images, their segments, the one called foreground, and the truth"
    )
    args = p.parse_args(argv)
    try:
        if len(args.data) > 2:
            raise r2o.UsageError(f"--data takes one folder or two, got {len(args.data)}")
        if args.k < 1 or args.size < 32:
            raise r2o.UsageError(f"-k must be at least 1 and --size at least 32, got {args.k} and {args.size}")
        for file in filter(None, (args.json, args.vis)):
            if Path(file).is_dir() or not Path(file).absolute().parent.is_dir():
                raise r2o.UsageError(f"cannot write {file}: no such folder")
        for folder in args.data:
            if not folder.is_dir():
                raise r2o.UsageError(f"no such folder: {folder}")
        pairs = list_pairs(*args.data) if len(args.data) == 2 else list_cub(args.data[0], args.split)
        encoder, line = r2o.load_encoder(args.ckpt, args.arch)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder = encoder.to(device)
        if args.ckpt == "random":
            some = [load_images(pairs[i : i + 32], args.size) for i in range(0, min(len(pairs), 256), 32)]
            line += ", batch norm statistics measured on these images"
            calibrate(encoder, (r2o.normalize(images.to(device)) for images in some))
        print(f"{line}; ops: {r2o.extension(device)}", flush=True)
        means, columns = evaluate(encoder, pairs, args.k, args.layer, args.size, device, 8 if args.vis else 0)
    except r2o.UsageError as e:
        print(f"eval_cub.py: error: {e}", file=sys.stderr)
        sys.exit(2)
    split = args.split if len(args.data) == 1 else "all"
    protocol = {"layer": args.layer, "size": args.size, "K": args.k, "split": split, "matching": "by the truth"}
    result = {"ckpt": args.ckpt, "encoder": line, "data": [str(d) for d in args.data], **protocol, **means}
    Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    if args.vis:
        r2o.film_strip(columns).save(args.vis)
    print(f"{args.k} segments of {args.layer} at {args.size} pixels, split {split}, n = {means['n']}")
    print("the foreground segment is chosen by the truth, as in the paper")
    for name in ("foreground IoU", "mean IoU", "pixel accuracy"):
        print(f"{name:15s} {means[name]:.3f}" + ("   of foreground and background" if name == "mean IoU" else ""))


if __name__ == "__main__":
    main()

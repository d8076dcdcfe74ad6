"""Unsupervised object segmentation (Table 3): K-means of each image's features, one segment called the foreground.

    python eval_cub.py --ckpt r2o.pth --data CUB_200_2011
    python eval_cub.py --ckpt r2o.pth --data images masks          # any foreground dataset, files matched by name

Every image's features are clustered on their own (K = 5). The segment that best overlaps the true foreground is matched
to it (Hungarian matching, with one object) and the rest is background. The truth is used for that choice, as in the
paper, so the figures say how well some segment fits the object, not whether one could tell which.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import evaluation
import processes
import r2o

METRICS = "foreground IoU", "mean IoU", "pixel accuracy"


def read_foreground(path: Path, kind: str = "auto") -> torch.Tensor:
    """A mask file as bool (h, w); void pixels are none of it."""
    return evaluation.read_ids(path, kind) > 0


@torch.no_grad()
def segment(encoder: torch.nn.Module, images: torch.Tensor, k: int, layer: str = "c4", generator=None) -> torch.Tensor:
    """K-means of each image's own features. images: (B, 3, S, S) normalised -> scores (B, K, H, W), argmax is the
    segment. They are linear in the features, so that interpolating them interpolates the features."""
    features = (r2o.encode_c4 if layer == "c4" else r2o.encode)(encoder, images).float()
    H, W = features.shape[2:]
    points = F.normalize(features, dim=1).flatten(2).mT.contiguous()  # (B, HW, C)
    centers, _ = r2o.kmeans(points, k, generator=generator)
    return r2o.cluster_scores(points, centers).mT.unflatten(2, (H, W))


def match_foreground(
    segments: torch.Tensor, k: int, truth: torch.Tensor, void: torch.Tensor | None = None
) -> tuple[int, dict[str, float]]:
    """The segment that overlaps the true foreground best, and the metrics of calling that foreground, all else not.
    segments: (h, w) ids < k; truth: (h, w) bool; void: (h, w) bool, pixels that are left out. With a single object,
    Hungarian matching is this maximum."""
    if void is not None:
        segments, truth = segments[~void], truth[~void]

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


def segmented(encoder, pairs, k: int, layer: str, size: int, device, kind: str = "auto"):
    """Segments images one by one. Yields (image (3, S, S) uint8, segments (h, w), the foreground's id, truth (h, w),
    metrics)."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(pairs), 32):
        batch = pairs[start : start + 32]
        images = torch.stack([evaluation.read_square(image, size) for image, _ in batch])
        maps = segment(encoder, r2o.normalize(images.to(device)), k, layer, generator).cpu()
        for i, (_, mask) in enumerate(batch):
            ids = evaluation.read(lambda path: evaluation.read_ids(path, kind), mask)
            segments, truth = F.interpolate(maps[i : i + 1], ids.shape, mode="bilinear").argmax(1)[0], ids > 0
            best, score = match_foreground(segments, k, truth, ids == -1)
            yield images[i], segments, best, truth, score


def pictures(image, segments, best, truth, _) -> list[torch.Tensor]:
    """One of segmented()'s results as pictures: image, segments, the foreground, the truth; all else darkened."""
    size = image.shape[-1]
    small, *masks = (evaluation.shrink(m, size) for m in (segments, segments == best, truth))
    return [image, r2o.paint(image[None], small[None])[0], *((image * (0.2 + 0.8 * m)).to(torch.uint8) for m in masks)]


def columns(shown: list[list[torch.Tensor]], k: int) -> list[tuple[str, torch.Tensor]]:
    """Rows of pictures() as film_strip's columns."""
    labels = "image", f"K = {k} segments", "foreground", "truth"
    return [(label, torch.stack(column)) for label, column in zip(labels, zip(*shown, strict=True), strict=True)]


def check_k(k: int):
    if not 1 <= k <= 256:
        raise r2o.UsageError(f"-k must be at least 1 and at most 256, got {k}")


def evenly(n: int, count: int) -> list[int]:
    """At most `count` evenly spaced of n indices."""
    return np.linspace(0, n - 1, min(count, n)).astype(int).tolist()


def mean_scores(scores: list[dict], n: int) -> dict[str, float]:
    """scores: of the images that have a foreground, of n in all."""
    if not scores:
        raise r2o.UsageError("no mask has any foreground: expected one above half of 255, or ids above 0")
    means = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}
    return means | {"n": len(scores), "without foreground": n - len(scores)}


def evaluate(args) -> int:
    check_k(args.k)
    evaluation.check_size(args.size)
    evaluation.check_outputs(args.json, args.vis)
    pairs = evaluation.list_masks(args.data, args.split)
    device = processes.place()[2]
    encoder, line = evaluation.load_encoder(args, evaluation.squares([p for p, _ in pairs], args.size), device)
    print(f"{line}; ops: {r2o.extension(device)}", flush=True)
    scores, shown, show = [], [], evenly(len(pairs), 8) if args.vis else []
    results = segmented(encoder, pairs, args.k, args.layer, args.size, device, args.masks)
    for i, result in enumerate(tqdm(results, "segmenting", len(pairs), unit="img", dynamic_ncols=True)):
        if result[3].any():
            scores.append(result[4])
        if i in show:
            shown.append(pictures(*result))
    means = mean_scores(scores, len(pairs))
    split = args.split if len(args.data) == 1 else "all"
    protocol = {"layer": args.layer, "size": args.size, "K": args.k, "split": split, "matching": "by the truth"}
    result = {"ckpt": args.ckpt, "encoder": line, "data": [str(d) for d in args.data], **protocol, **means}
    print(f"{args.k} segments of {args.layer} at {args.size} pixels, split {split}, n = {means['n']}")
    print("the foreground segment is chosen by the truth, as in the paper")
    for name in METRICS:
        print(f"{name:15s} {means[name]:.3f}" + ("   of foreground and background" if name == "mean IoU" else ""))
    ours = ", ".join(f"{name} {means[name]:.3f}" for name in METRICS)
    task = f"{args.data[0].name}, K = {args.k}, n = {means['n']}"
    theirs = "Table 3, CUB: mIoU 2.9 points above the best before (their abstract)"
    print(evaluation.row(task, line, ours, theirs), flush=True)
    evaluation.write_json(args.json, result)
    if args.vis:
        r2o.film_strip(columns(shown, args.k), zoom=-(-128 // args.size)).save(args.vis)
    return 0


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    evaluation.add_encoder_flags(p)
    evaluation.add_truth_flags(p)
    p.add_argument("--layer", default="c4", choices=("c4", "c5"), help="features to cluster (default: %(default)s)")
    size = "images are resized to this side; twice it for finer segments (default: %(default)s)"
    p.add_argument("--size", type=int, default=224, help=size)
    p.add_argument("-k", type=int, default=5, help="segments per image (default: %(default)s)")
    p.add_argument("--json", default="eval_cub.json", help="where the results go as well (default: %(default)s)")
    vis = "also draw 8 images, their segments, the one called foreground, and the truth"
    p.add_argument("--vis", metavar="PNG", help=vis)
    return p.parse_args(argv)


def main(argv=None):
    processes.run("eval_cub.py", lambda: evaluate(parse_args(argv)))


if __name__ == "__main__":
    main()

"""Average best overlap (Fig. 4): how well the masks that R2O trains on fit annotated objects.

    python -m evals.abo --ckpt out/r2o.pth --data CUB_200_2011
    python -m evals.abo --ckpt out --data images masks --plot abo.png      # a curve over out's checkpoints
    python -m evals.abo --ckpt random --data val2017 annotations/instances_val2017.json

The IoU of every object with the mask of its image that fits it best, averaged over all objects, for the SLIC prior, the
grid, and masks predicted as in training: `--group` random images share K clusters of their regions' C4 features; pixels
go to the nearest center, or to their region's cluster. Void pixels and crowds are ignored.
"""

import itertools
import pickle
import re
import statistics
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

import r2o
from evals.coco import decode, load_coco
from evals.common import (
    Tested,
    add_encoder_flags,
    add_json_flag,
    add_network_flag,
    add_seeds_flag,
    free_name,
    group_masks,
    need_writable,
    open_checkpoints,
    table_row,
)
from evals.measures import best_overlap, objects_of
from evals.truth import add_truth_flags, need_same_shape, open_masks, read_ids, readable
from runtime import cli, distributed
from runtime.cli import count, natural, need, need_package, side
from runtime.images import PackedList, read_image
from runtime.regions import slic_prior
from runtime.storage import write_json


def parse_args(argv):
    p = cli.Parser(__doc__)
    add_encoder_flags(p)
    add_truth_flags(p, "; or one of images and a COCO instances JSON")
    ks = "clusters (default: 128 64 16 4, or 4 for several checkpoints; also K(t), if the checkpoint records it)"
    p.add_argument("-k", type=count, nargs="+", help=ks)
    p.add_argument("--group", type=count, default=32, help="images clustered together")
    p.add_argument("--segments", type=count, default=100, help="superpixels that SLIC aims for")
    p.add_argument("--size", type=side, default=224, help="images are resized to this side, a multiple of 32")
    add_network_flag(p)
    add_seeds_flag(p)
    p.add_argument("--min-area", type=count, default=1, help="smallest object that counts, in pixels")
    p.add_argument("--workers", type=natural, default=distributed.cores_per_process(), help="that read images")
    add_json_flag(p, "eval_abo")
    p.add_argument("--plot", metavar="PNG", help="also draw the overlap over epochs, or over K")
    args = p.parse_args(argv)
    if args.plot:
        need_package("matplotlib", "--plot")
    return args


class Truth(Dataset):
    """(image (3, S, S) uint8, prior (h, w) uint8, objects (n, h, w) bool, void (h, w) bool) of every image.

    rows: (image file, annotation); an annotation is a mask file or an image of load_coco(). read: reads a mask file, as
    read_ids() does."""

    def __init__(self, rows: list[tuple[Path, object]], size: int, segments: int, read=read_ids):
        self.rows, self.size, self.segments, self.read = PackedList(map(pickle.dumps, rows)), size, segments, read

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i: int):
        path, annotation = pickle.loads(self.rows[i])
        image = readable(read_image, path)
        if isinstance(annotation, dict):
            objects, void = coco_objects(annotation)
        else:
            objects, void = objects_of(readable(self.read, annotation))
        need_same_shape(path, image, objects)
        return r2o.resize(image, self.size), slic_prior(path, image, self.segments, self.size // 4), objects, void


def coco_objects(image: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """An image of load_coco() -> objects (n, h, w) and void (h, w), bool; void: crowds, except where an object is."""
    h, w = image["height"], image["width"]
    masks = [(decode(a["segmentation"], h, w).bool(), a["iscrowd"]) for a in image["annotations"]]
    empty = torch.zeros(0, h, w, dtype=torch.bool)
    objects, crowds = ([mask for mask, crowd in masks if crowd == c] for c in (0, 1))
    objects, crowds = (torch.stack(x) if x else empty for x in (objects, crowds))
    return objects, crowds.any(0) & ~objects.any(0)


def open_truth(args) -> Truth:
    if len(args.data) == 2 and args.data[1].suffix == ".json":
        for flag in ("split", "masks", "foreground", "void", "mask_suffix"):
            usual = getattr(args, flag) in (None, "auto")
            named = f"--{flag.replace('_', '-')} is for mask files, but --data has COCO's annotations"
            need(usual, f"{named}: leave it out")
        rows = [(row["path"], row) for row in load_coco(*args.data)[1] if row["annotations"]]
        return Truth(rows, args.size, args.segments)
    pairs, read = open_masks(args)
    return Truth(pairs, args.size, args.segments, read)


def measure(tested: list[Tested], ks: list[list[int]], truth: Truth, args, device) -> tuple[dict, dict, int]:
    """ks: numbers of clusters per encoder. Returns average best overlaps by (masks, K, assign), averaged over seeds of
    K-means; their standard deviations, where there are several seeds; and the number of objects."""
    order = np.random.default_rng(0).permutation(len(truth)).tolist()  # neighboring files often share a class
    groups = [order[i : i + args.group] for i in range(0, len(order), args.group)]
    loader = distributed.make_loader(truth, args.workers, batch_sampler=groups, collate_fn=list)
    sums, total = {}, 0
    with cli.bar(total=len(truth), desc="overlap", unit="img") as bar:
        for number, group in enumerate(distributed.iterate(loader)):
            every = [objects[(objects & ~void).flatten(1).sum(1) >= args.min_area] for _, _, objects, void in group]
            for key, seed, masks in all_masks(tested, ks, group, number, args.kmeans_seeds, device):
                best = (best_overlap(m, o, row[3]) for m, o, row in zip(masks.cpu(), every, group, strict=True))
                runs = sums.setdefault(key, {})
                runs[seed] = runs.get(seed, 0) + sum(x.sum().item() for x in best)
            total += sum(map(len, every))
            bar.update(len(group))
    need(total, f"no object of {args.min_area} pixels or more in the annotations: expected ids above 0")
    each = {key: [x / total for x in runs.values()] for key, runs in sums.items()}
    means = {key: statistics.fmean(x) for key, x in each.items()}
    return means, {key: statistics.stdev(x) for key, x in each.items() if len(x) > 1}, total


@torch.no_grad()
def all_masks(tested: list[Tested], ks: list[list[int]], group: list, number: int, seeds: int, device):
    """Yield ((masks, K, assign), seed of K-means, masks (B, h, w)) of one group of Truth's samples."""
    images = r2o.normalize(torch.stack([row[0] for row in group]).to(device))
    regions = torch.stack([row[1] for row in group]).to(device)
    yield ("SLIC prior", None, None), 0, regions
    yield ("grid", None, None), 0, r2o.grid_regions(size=regions.shape[1]).expand(len(group), -1, -1)
    for one, some in zip(tested, ks, strict=True):
        c4 = r2o.encode_c4(one.encoder, images)
        for k, assign, seed in itertools.product(some, ("pixel", "region"), range(seeds)):
            yield (one.path, k, assign), seed, group_masks(c4, regions, k, assign, seed=number + 10**6 * seed)


def curves_of(scores: dict[tuple, float], tested: list[Tested]) -> tuple[dict[str, list], str]:
    """Lines of (x, score) by label, over epochs if there are several checkpoints, else over K; and the x-axis' name."""
    several, curves = len(tested) > 1, {}
    for one in tested:
        for (name, k, assign), score in scores.items():
            if name != one.path:
                continue
            for kind in [f", K = {k}"] * several + [", K(t)"] * (several and k == one.k) or [""]:
                curves.setdefault(f"{assign} masks{kind}", []).append((one.epoch if several else k, score))
    curves = {label: sorted(line) for label, line in curves.items() if not several or len(line) == len(tested)}
    xs = [x for line in curves.values() for x, _ in line]
    priors = {prior: [(x, scores[prior, None, None]) for x in (min(xs), max(xs))] for prior in ("SLIC prior", "grid")}
    return curves | priors, "epoch" if several else "K"


def plot(curves: dict[str, list[tuple[float, float]]], title: str, across: str, path: str):
    """Labeled lines as a PNG; K on a logarithmic axis."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(8.2, 4.4), layout="constrained").subplots()
    for label, line in curves.items():
        axes.plot(*zip(*line, strict=True), "o-" if "masks" in label else "--", label=label, markersize=4)
    if across == "K":
        ticks = sorted({x for line in curves.values() for x, _ in line})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set(xlabel=across, ylabel="average best overlap")
    axes.set_title(title, parse_math=False)  # a folder's name may hold $
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.figure.savefig(path, format="png", dpi=100)


def evaluate(args) -> int:
    args.json = args.json or free_name("eval_abo")
    need_writable(args.json, args.plot)
    truth, device = open_truth(args), distributed.place().device
    some = [pickle.loads(truth.rows[i])[0] for i in range(min(256, len(truth)))]
    tested = open_checkpoints(args.ckpt, args.arch, some, args.size, device, args.network)
    fixed = args.k or ([128, 64, 16, 4] if len(tested) == 1 else [4])
    ks = [sorted({*fixed, *([one.k] if one.k else [])}, reverse=True) for one in tested]
    scores, spread, total = measure(tested, ks, truth, args, device)

    print(f"average best overlap, {total} objects of {len(truth)} images")
    figures = {key: f"{x:.3f}" + (f" ± {spread[key]:.3f}" if key in spread else "") for key, x in scores.items()}
    for (name, k, assign), figure in figures.items():
        print(f"{figure}  {name}" + (f", K = {k}, {assign} masks" if k else ""))
    if spread:
        print(f"masks: mean and standard deviation over {args.kmeans_seeds} seeds of K-means, each from one start")
    last, k = tested[-1], args.k[-1] if args.k else ks[-1][-1]
    ours = f"{figures[last.path, k, 'pixel']} (pixel masks), {figures[last.path, k, 'region']} (region masks), "
    ours += f"{figures['SLIC prior', None, None]} (SLIC prior), {figures['grid', None, None]} (grid)"
    task = f"best overlap, {args.data[0].name}, K = {k}, {total} objects"
    imagenet_s = len(truth) in (12_419, 4_097, 752) and bool(re.fullmatch(r"n\d{8}", some[0].parent.name))
    print(f"results: {args.json}")
    print(table_row(task, last.line, ours, "0.49 after ImageNet, 0.46 after COCO (Sec. 4.3)", imagenet_s))
    epochs = {one.path: one.epoch for one in tested}
    rows = [
        {"masks": name, "K": k, "assign": assign, "epoch": epochs.get(name), "average best overlap": score}
        | {"standard deviation": spread.get((name, k, assign))}
        for (name, k, assign), score in scores.items()
    ]
    names = "network", "size", "segments", "group", "min_area", "kmeans_seeds"
    protocol = {name: getattr(args, name) for name in names}
    about = {"data": [str(d) for d in args.data], "images": len(truth), "objects": total, "protocol": protocol}
    write_json(args.json, about | {"encoders": {one.path: one.line for one in tested}, "rows": rows})
    if args.plot:
        curves, across = curves_of(scores, tested)
        plot(curves, f"average best overlap of {total} objects in {args.data[0].name}", across, args.plot)
    return 0


def main(argv=None):
    cli.run("evals.abo", lambda: evaluate(parse_args(argv)))


if __name__ == "__main__":
    main()

"""Average best overlap (Fig. 4): how well the masks that R2O trains on fit annotated objects.

    python eval_abo.py --ckpt out/r2o.pth --data CUB_200_2011
    python eval_abo.py --ckpt out --data images masks --plot abo.png   # a curve over all epoch_*.pth and r2o.pth in out
    python eval_abo.py --ckpt random --data val2017 annotations/instances_val2017.json

For every object the mask of its image that fits it best, by IoU; the mean over all objects. Measured are the SLIC
prior, the grid, and the masks predicted as in training: `--group` images, drawn at random, share K clusters of their
regions' C4 features; pixels go to the nearest centre, or with their region. Void and crowds count for nothing.
"""

import argparse
import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import evaluation
import processes
import r2o
from r2o import UsageError


def best_overlap(masks: torch.Tensor, objects: torch.Tensor, void: torch.Tensor | None = None) -> torch.Tensor:
    """Best overlap of each object: the largest IoU with any mask.

    masks: (h', w') integer ids, enlarged to the objects' size by the nearest pixel. objects: (n, h, w) bool, which may
    overlap. void: (h, w) bool, pixels that are left out. Returns (n,) float64.
    """
    masks = F.interpolate(masks[None, None].float(), objects.shape[1:], mode="nearest")[0, 0].long()
    counted = torch.ones_like(masks, dtype=torch.bool) if void is None else ~void
    count = int(masks.max()) + 1
    sizes = torch.bincount(masks[counted], minlength=count)
    best = []
    for o in objects & counted:
        inside = torch.bincount(masks[o], minlength=count)
        best.append((inside.double() / (sizes + o.sum() - inside).clamp(min=1)).max())
    return torch.stack(best) if best else torch.zeros(0, dtype=torch.float64)


def objects_of(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (h, w) of evaluation.read_ids -> objects (n, h, w) and void (h, w), bool."""
    names = ids[ids > 0].unique()
    return ids == names[:, None, None], ids == -1


# ---------------------------------------------------------------------------------------------------------------------
# Images and their objects
# ---------------------------------------------------------------------------------------------------------------------


class Truth(torch.utils.data.Dataset):
    """(image (3, S, S) uint8, prior (h, w) uint8, objects (n, h, w) bool, void (h, w) bool) of every image. of: one of
    its annotations: a file (kind: see evaluation.read_ids), or an image of evaluation.load_coco."""

    def __init__(self, rows: list[tuple[Path, object]], size: int, segments: int, kind: str = "auto"):
        self.rows, self.size, self.segments, self.kind = evaluation.Packed(rows), size, segments, kind

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i: int):
        path, of = self.rows[i]
        image = evaluation.read(r2o.read_image, path)
        if isinstance(of, dict):
            h, w = of["height"], of["width"]
            objects = [(evaluation.decode(a["segmentation"], h, w).bool(), a["iscrowd"]) for a in of["annotations"]]
            crowds = [mask for mask, crowd in objects if crowd]
            objects = [mask for mask, crowd in objects if not crowd]
            empty = torch.zeros(0, h, w, dtype=torch.bool)
            objects, crowds = (torch.stack(x) if x else empty for x in (objects, crowds))
            void = crowds.any(0) & ~objects.any(0)
        else:
            objects, void = objects_of(evaluation.read(lambda p: evaluation.read_ids(p, self.kind), of))
        (h, w), (oh, ow) = image.shape[1:], objects.shape[1:]
        if len(objects) and abs(w * oh - h * ow) > 0.02 * h * ow + max(h, w):
            raise UsageError(f"the annotation of {path} is {ow} x {oh} pixels, the image {w} x {h}: expected one shape")
        prior = r2o.slic_regions(image, self.segments, self.size // 4)
        return r2o.resize(image, self.size), prior, objects, void


def list_truth(args) -> Truth:
    if len(args.data) == 2 and args.data[1].suffix == ".json":
        rows = [(row["path"], row) for row in evaluation.load_coco(*args.data)[1] if row["annotations"]]
        return Truth(rows, args.size, args.segments)
    return Truth(evaluation.list_masks(args.data, args.split), args.size, args.segments, args.masks)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def list_checkpoints(ckpt: str) -> list[tuple[str, int | None, int | None]]:
    """(file, epoch, K(t) at its end) of a checkpoint, or of all that a folder keeps, one an epoch; None: not said."""
    paths = [ckpt]
    if Path(ckpt).is_dir():
        paths = [str(p) for p in [*sorted(Path(ckpt).glob("epoch_*.pth")), Path(ckpt, "r2o.pth")] if p.exists()]
        if not paths:
            raise UsageError(f"no epoch_*.pth or r2o.pth in {ckpt}: train with --keep-every 10, say")
    found = {}
    for path in paths:
        file = {} if path == "random" else r2o.load_file(path)
        epoch, args, k = file.get("epoch"), file.get("args"), None
        if isinstance(epoch, int) and isinstance(args, dict) and "k_start" in args:
            names = ("epochs", "k_start", "k_end", "hold_epochs", "schedule")
            k = r2o.num_clusters(epoch, *(args[name] for name in names))
        found[epoch if len(paths) > 1 else path] = (path, epoch, k)
    return sorted(found.values(), key=lambda row: row[1] or 0)


# ---------------------------------------------------------------------------------------------------------------------
# The measure
# ---------------------------------------------------------------------------------------------------------------------


def measure(encoders: dict, truth: Truth, ks: dict, args, device) -> tuple[dict[tuple, float], int]:
    """encoders, ks: by checkpoint, the encoder and the numbers of clusters. Returns the average best overlap, by (what,
    K, assign), and the number of objects. Every image is read once."""
    order = np.random.default_rng(0).permutation(len(truth)).tolist()  # of one class, often, are those side by side
    groups = [order[i : i + args.group] for i in range(0, len(order), args.group)]
    loader = torch.utils.data.DataLoader(truth, batch_sampler=groups, num_workers=args.workers, collate_fn=list)
    grid = r2o.grid_regions(size=truth.size // 4)
    sums, count = {}, 0
    with tqdm(total=len(truth), desc="overlap", unit="img", dynamic_ncols=True) as bar:
        for number, group in enumerate(loader):
            images = r2o.normalize(torch.stack([row[0] for row in group]).to(device))
            regions = torch.stack([row[1] for row in group]).to(device)
            masks = {("SLIC prior", None, None): regions, ("grid", None, None): grid.expand(len(group), -1, -1)}
            for name, encoder in encoders.items():
                with torch.no_grad():
                    c4 = r2o.encode_c4(encoder, images)
                for k, assign in itertools.product(ks[name], ("pixel", "region")):
                    draws = torch.Generator().manual_seed(number)
                    masks[name, k, assign] = evaluation.draw_masks(c4, regions, k, assign, draws)
            for key, m in masks.items():
                for one, (_, _, objects, void) in zip(m.cpu(), group, strict=True):
                    big = objects[(objects & ~void).flatten(1).sum(1) >= args.min_area]
                    sums[key] = sums.get(key, 0) + best_overlap(one, big, void).sum().item()
                    count += len(big) if key[0] == "grid" else 0
            bar.update(len(group))
    if not count:
        raise UsageError(f"no object of {args.min_area} pixels or more in the annotations: expected ids above 0")
    return {key: total / count for key, total in sums.items()}, count


def plot(curves: dict[str, list[tuple[float, float]]], title: str, across: str, path: str | Path):
    """Labelled lines of (x, y) as a PNG, by Pillow alone; K on a logarithmic axis."""
    width, height, left, right, top, bottom = 820, 440, 60, 220, 34, 44
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    xs, ys = zip(*(point for line in curves.values() for point in line), strict=True)
    scale = math.log if across == "K" else float
    x0, x1, y0, y1 = scale(min(xs)), scale(max(max(xs), min(xs) + 1)), min(ys) - 0.02, max(ys) + 0.02

    def at(x, y):
        u, v = (scale(x) - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return left + u * (width - left - right), height - bottom - v * (height - top - bottom)

    draw.text((left, 12), title, fill="black")
    draw.text((left + (width - left - right) / 2 - 3 * len(across), height - 18), across, fill="black")
    ticks = sorted(set(xs))
    for x in ticks[:: -(-len(ticks) // 12)]:
        draw.text((at(x, y0)[0] - 3 * len(f"{x:g}"), height - bottom + 6), f"{x:g}", fill="black")
    for y in np.linspace(y0, y1, 6):
        draw.line((*at(ticks[0], y), width - right, at(ticks[0], y)[1]), fill=(225, 225, 225))
        draw.text((12, at(ticks[0], y)[1] - 6), f"{y:.3f}", fill="black")
    for i, (label, line) in enumerate(curves.items()):
        colour = tuple((200 * r2o.palette(torch.tensor(i))).int().tolist())
        draw.line([at(*point) for point in line], fill=colour, width=2)
        for x, y in (at(*point) for point in line):
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        draw.text((width - right + 12, top + 16 * i), label, fill=colour)
    r2o.save_atomically(path, lambda f: sheet.save(f, "PNG"))


def curves_of(scores: dict[tuple, float], checkpoints: list) -> tuple[dict, str]:
    """Lines over epochs where there are several checkpoints, else over K; and what lies along the bottom."""
    several = len(checkpoints) > 1
    curves: dict[str, list] = {}
    for (name, k, assign), score in scores.items():
        if k is None:
            continue
        _, epoch, own = next(row for row in checkpoints if row[0] == name)
        if not several:
            curves.setdefault(f"{assign} masks", []).append((k, score))
        else:
            if k == own:
                curves.setdefault(f"{assign} masks, K(t)", []).append((epoch, score))
            if all((p, k, assign) in scores for p, _, _ in checkpoints):
                curves.setdefault(f"{assign} masks, K = {k}", []).append((epoch, score))
    ends = [f([x for line in curves.values() for x, _ in line]) for f in (min, max)]
    for prior in ("SLIC prior", "grid"):
        curves[prior] = [(x, scores[prior, None, None]) for x in ends]
    return {label: sorted(line) for label, line in curves.items()}, "epoch" if several else "K"


def evaluate(args) -> int:
    for name, least in (("group", 1), ("min_area", 1), ("segments", 1), ("workers", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if min(args.k or [1]) < 1:
        raise UsageError(f"-k must be at least 1, got {min(args.k)}")
    evaluation.check_size(args.size)
    evaluation.check_outputs(args.json, args.plot)
    truth = list_truth(args)
    device = processes.place()[2]
    checkpoints = list_checkpoints(args.ckpt)
    encoders, ks, lines = {}, {}, {}
    some = [truth.rows[i][0] for i in range(min(256, len(truth)))]
    for path, _, own in checkpoints:
        one = argparse.Namespace(ckpt=path, arch=args.arch)
        encoders[path], lines[path] = evaluation.load_encoder(one, evaluation.squares(some, args.size), device)
        print(f"{lines[path]}; ops: {r2o.extension(device)}", flush=True)
        fixed = args.k or ([128, 64, 16, 4] if len(checkpoints) == 1 else [4])
        ks[path] = sorted({*fixed, *([own] if own else [])}, reverse=True)
    scores, count = measure(encoders, truth, ks, args, device)

    protocol = {name: getattr(args, name) for name in ("size", "segments", "group", "min_area")}
    rows = [
        {"masks": name, "K": k, "assign": assign, "epoch": next((e for p, e, _ in checkpoints if p == name), None)}
        | {"average best overlap": score}
        for (name, k, assign), score in scores.items()
    ]
    found = {"data": [str(d) for d in args.data], "images": len(truth), "objects": count}
    found |= {"protocol": protocol, "encoders": lines, "rows": rows}
    print(f"average best overlap, {count} objects of {len(truth)} images")
    for (name, k, assign), score in scores.items():
        print(f"{score:.3f}  {name}" + (f", K = {k}, {assign} masks" if k else ""))
    if args.plot:
        curves, across = curves_of(scores, checkpoints)
        plot(curves, f"average best overlap of {count} objects in {args.data[0].name}", across, args.plot)
    path = checkpoints[-1][0]
    k = args.k[-1] if args.k else ks[path][-1]
    ours = f"{scores[path, k, 'pixel']:.3f} (pixel masks), {scores[path, k, 'region']:.3f} (region masks), "
    ours += f"{scores['SLIC prior', None, None]:.3f} (SLIC prior), {scores['grid', None, None]:.3f} (grid)"
    task = f"best overlap, {args.data[0].name}, K = {k}, {count} objects"
    print(evaluation.row(task, lines[path], ours, "Fig. 4, a curve"))
    evaluation.write_json(args.json, found)
    return 0


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    evaluation.add_encoder_flags(p)
    evaluation.add_truth_flags(p, "; or one of images and a COCO instances JSON")
    ks = "clusters (default: 128 64 16 4, for a folder 4; and what K(t) was, where the checkpoint says so)"
    p.add_argument("-k", type=int, nargs="+", help=ks)
    p.add_argument("--group", type=int, default=32, help="images that share one K-means (default: %(default)s)")
    p.add_argument("--segments", type=int, default=100, help="superpixels asked of SLIC (default: %(default)s)")
    p.add_argument("--size", type=int, default=224, help="images are resized to this side (default: %(default)s)")
    least = "smallest object that counts, in pixels (default: %(default)s)"
    p.add_argument("--min-area", type=int, default=1, help=least)
    p.add_argument(
        "--workers", type=int, default=min(16, processes.own_cores()), help="that read (default: %(default)s)"
    )
    p.add_argument("--json", default="eval_abo.json", help="where the results go as well (default: %(default)s)")
    p.add_argument("--plot", metavar="PNG", help="also draw the overlap over epochs, or over K")
    return p.parse_args(argv)


def main(argv=None):
    processes.run("eval_abo.py", lambda: evaluate(parse_args(argv)))


if __name__ == "__main__":
    main()

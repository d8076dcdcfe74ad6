"""The paper's figures from a checkpoint, as labelled PNGs.

    python figures.py --ckpt out --data CUB_200_2011 --out figures      # all epoch_*.pth and r2o.pth in out
    python figures.py --ckpt out/r2o.pth --data images masks

masks.png    masks as K falls: of every checkpoint in the folder at its own K(t), or of the one at several K (Fig. 3, 5)
objects.png  segments, the one called foreground, and the truth, of evenly spaced images (Fig. 7)
worst.png    the same of the images whose foreground fits worst, worst first (Fig. 6)
"""

import argparse
import heapq
import itertools
from pathlib import Path

import torch
from tqdm import tqdm

import eval_abo
import eval_cub
import evaluation
import processes
import r2o
from r2o import UsageError


def draw_masks(checkpoints: list, encoders: dict, images: torch.Tensor, count: int, device) -> list:
    """Columns of `count` of the images (n, 3, S, S) uint8, which share their clusters: image, prior, and the masks of
    at most 6 checkpoints (file, epoch, K(t)) at their K, or of a single one at several."""
    priors = torch.stack([r2o.slic_regions(image, size=images.shape[-1] // 4) for image in images])
    if len(checkpoints) == 1:
        wanted = [(*checkpoints[0][:2], k) for k in (128, 119, 74, 16, 4)]  # Fig. 5's, and between
    else:
        wanted = [checkpoints[i] for i in eval_cub.evenly(len(checkpoints), 6)]
    shown = eval_cub.evenly(len(images), count)
    columns = [("image", images[shown]), ("prior", r2o.paint(images[shown], priors[shown]))]
    for path, epoch, k in wanted:
        with torch.no_grad():
            c4 = r2o.encode_c4(encoders[path], r2o.normalize(images.to(device)))
        draws = torch.Generator().manual_seed(0)
        masks = evaluation.draw_masks(c4, priors.to(device), k or 4, "pixel", draws).cpu()
        label = f"K = {k or 4}" if len(checkpoints) == 1 else f"epoch {epoch}, K = {k or 4}"
        columns.append((label, r2o.paint(images[shown], masks[shown])))
    return columns


def draw(args) -> int:
    eval_cub.check_k(args.k)
    if args.count < 1:
        raise UsageError(f"--count must be at least 1, got {args.count}")
    evaluation.check_size(args.size)
    pairs = evaluation.list_masks(args.data, args.split)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"cannot make the folder {args.out} ({e.strerror}): pass another --out") from None
    device = processes.place()[2]
    checkpoints, encoders = eval_abo.list_checkpoints(args.ckpt), {}
    for path, *_ in checkpoints:
        one = argparse.Namespace(ckpt=path, arch=args.arch)
        squares = evaluation.squares([image for image, _ in pairs], args.size)
        encoders[path], line = evaluation.load_encoder(one, squares, device)
        print(line, flush=True)

    def save(name: str, columns: list, notes=None):
        r2o.film_strip(columns, zoom=-(-128 // args.size), notes=notes).save(args.out / name)
        print(f"wrote {args.out / name}", flush=True)

    some = [pairs[i][0] for i in eval_cub.evenly(len(pairs), 32)]
    images = torch.stack([evaluation.read_square(path, args.size) for path in some])
    save("masks.png", draw_masks(checkpoints, encoders, images, args.count, device))

    last = encoders[checkpoints[-1][0]]
    results = eval_cub.segmented(last, pairs, args.k, "c4", args.size, device, args.masks)
    even, worst, show, order = [], [], eval_cub.evenly(len(pairs), args.count), itertools.count()
    for i, result in enumerate(tqdm(results, "segmenting", len(pairs), unit="img", dynamic_ncols=True)):
        if i in show:
            even.append(eval_cub.pictures(*result))
        if result[3].any():
            iou = result[4]["foreground IoU"]
            heapq.heappush(worst, (-iou, -next(order), pairs[i][0], result))
            if len(worst) > args.count:
                heapq.heappop(worst)  # the best of them
    if not worst:
        raise UsageError("no mask has any foreground: expected one above half of 255, or ids above 0")
    save("objects.png", eval_cub.columns(even, args.k))
    worst.sort(reverse=True)
    notes = [f"{path.name}: IoU {-iou:.3f}" for iou, _, path, _ in worst]
    save("worst.png", eval_cub.columns([eval_cub.pictures(*result) for *_, result in worst], args.k), notes)
    return 0


def parse_args(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    evaluation.add_encoder_flags(p)
    evaluation.add_truth_flags(p)
    p.add_argument("--out", type=Path, default=Path("figures"), help="folder for the PNGs (default: %(default)s)")
    p.add_argument("-k", type=int, default=5, help="segments of an image in objects and worst (default: %(default)s)")
    p.add_argument("--count", type=int, default=8, help="images in each figure (default: %(default)s)")
    p.add_argument("--size", type=int, default=224, help="images are resized to this side (default: %(default)s)")
    return p.parse_args(argv)


def main(argv=None):
    processes.run("figures.py", lambda: draw(parse_args(argv)))


if __name__ == "__main__":
    main()

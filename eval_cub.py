"""Unsupervised object segmentation (Table 3): K-means of each image's features; one segment is taken as the foreground.

    python eval_cub.py --ckpt r2o.pth --data CUB_200_2011 --split redo.txt      # ReDO's 1,000 test images (Table 3)
    python eval_cub.py --ckpt r2o.pth --data CUB_200_2011      # CUB's own 5,794
    python eval_cub.py --ckpt r2o.pth --data images masks      # any foreground data set, files matched by name

The features of every image are clustered on their own (K = 5). The segment that best overlaps the true foreground is
called foreground (Hungarian matching with one object), the rest background. As in the paper, the truth is used for
this choice, so the figures say how well the best segment fits, not whether one could find it without the truth. ReDO
averages foreground IoU over images: compare that with the paper's "mIOU", which may or may not include the background.
"""

import runtime  # isort: skip  # noqa: F401  (says what is not installed)
from evals import common
from evals.common import (
    add_encoder_flags,
    add_json_flag,
    add_seeds_flag,
    calibrated_encoder,
    free_name,
    need_writable,
    square_batches,
    table_row,
)
from evals.truth import add_truth_flags, is_cub, open_masks
from runtime import cli, distributed
from runtime.pictures import evenly, film_strip
from runtime.storage import write_json

METRICS = "foreground IoU", "mean IoU", "pixel accuracy"


def parse_args(argv):
    p = cli.Parser(__doc__)
    add_encoder_flags(p)
    add_truth_flags(p)
    p.add_argument("--layer", default="c4", choices=("c4", "c5"), help="features to cluster")
    size = "images are resized to this side; twice it for finer segments"
    p.add_argument("--size", type=cli.number(int, 32), default=224, help=size)
    p.add_argument("-k", type=cli.number(int, 1, 256), default=5, help="segments per image")
    add_seeds_flag(p)
    add_json_flag(p, "eval_cub")
    vis = "also draw 8 images, their segments, the one called foreground, and the truth"
    p.add_argument("--vis", metavar="PNG", help=vis)
    return p.parse_args(argv)


def evaluate(args) -> int:
    args.json = args.json or free_name("eval_cub")
    need_writable(args.json, args.vis)
    pairs, read = open_masks(args)
    device = distributed.place().device
    squares = square_batches([image for image, _ in pairs], args.size)
    encoder, line = calibrated_encoder(args.ckpt, args.arch, squares, device)
    print(f"{line}; {cli.describe_ops(device)}", flush=True)
    scores, shown, show = [], [], evenly(len(pairs), 8) if args.vis else []
    results = common.segmented(encoder, pairs, args.k, args.layer, args.size, device, read, args.kmeans_seeds)
    for i, result in enumerate(cli.bar(results, "segmenting", len(pairs), unit="img")):
        if result[3].any():
            scores.append(result[4])
        if i in show:
            shown.append(common.pictures(*result))
    means, spread = common.mean_scores(scores, len(pairs))
    split = args.split or "test" if len(args.data) == 1 else "all"
    print(f"{args.k} segments of {args.layer} at {args.size} pixels, split {split}, n = {means['n']}")
    print("the foreground segment is chosen by the truth, as in the paper")
    if split == "test" and is_cub(args.data[0]):
        print("these are CUB's own test images; Table 3 uses ReDO's 1,000: to use those, pass --split FILE")
    figures = {name: f"{means[name]:.3f}" + (f" ± {spread[name]:.3f}" if spread else "") for name in METRICS}
    for name in METRICS:
        print(f"{name:15s} {figures[name]}" + ("   of foreground and background" if name == "mean IoU" else ""))
    if spread:
        print(f"mean and standard deviation over {args.kmeans_seeds} seeds of K-means, each from one start")
    ours = ", ".join(f"{name} {figures[name]}" for name in METRICS)
    task = f"{args.data[0].name}, K = {args.k}, n = {means['n']}"
    paper = "mIoU 0.716 (Table 3, ReDO's 1,000 images of CUB)"
    print(f"results: {args.json}")
    print(table_row(task, line, ours, paper, is_papers_data=split != "all" and is_cub(args.data[0])), flush=True)
    protocol = {"layer": args.layer, "size": args.size, "K": args.k, "split": split, "matching": "by the truth"}
    means |= {"K-means seeds": args.kmeans_seeds, "standard deviations": spread}
    about = {"ckpt": args.ckpt, "encoder": line, "data": [str(d) for d in args.data]}
    write_json(args.json, about | protocol | means)
    if args.vis:
        film_strip(common.columns(shown, args.k), zoom=-(-128 // args.size)).save(args.vis, "PNG")
    return 0


def main(argv=None):
    cli.run("eval_cub.py", lambda: evaluate(parse_args(argv)))


if __name__ == "__main__":
    main()

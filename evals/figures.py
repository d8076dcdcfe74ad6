"""The paper's figures from a checkpoint, as labeled PNGs.

    python -m evals.figures --ckpt out --data CUB_200_2011 --out figures      # all epoch_*.pth and r2o.pth in out
    python -m evals.figures --ckpt out/r2o.pth --data images masks

masks.png    masks as K falls: of up to six checkpoints of the folder, each at its K(t); or of one at six K (Fig. 3, 5)
objects.png  segments, the one called foreground, and the truth, of evenly spaced images (Fig. 7)
worst.png    the same of the images whose foreground fits worst, worst first
"""

import heapq
from pathlib import Path

import torch

from evals import common
from evals.common import add_encoder_flags, add_network_flag, open_checkpoints, read_square
from evals.truth import add_truth_flags, open_masks
from runtime import cli, distributed
from runtime.cli import count, need, number, side
from runtime.pictures import evenly, film_strip
from runtime.regions import slic_prior
from runtime.storage import make_folder


def parse_args(argv):
    p = cli.Parser(__doc__)
    add_encoder_flags(p)
    add_truth_flags(p)
    add_network_flag(p)
    p.add_argument("--out", type=Path, default=Path("figures"), help="folder for the PNGs")
    p.add_argument("-k", type=number(int, 1, 256), default=5, help="segments per image in objects and worst")
    p.add_argument("--count", type=count, default=8, help="images in each figure")
    p.add_argument("--size", type=side, default=224, help="images are resized to this side, a multiple of 32")
    return p.parse_args(argv)


def draw(args) -> int:
    (pairs, read), device = open_masks(args), distributed.place().device
    make_folder(args.out)
    files = [image for image, _ in pairs]
    tested = open_checkpoints(args.ckpt, args.arch, files, args.size, device, args.network)

    def save(name: str, columns: list, notes=None):
        film_strip(columns, zoom=-(-128 // args.size), notes=notes).save(args.out / name)
        print(f"wrote {args.out / name}", flush=True)

    files = [files[i] for i in evenly(len(files), 32)]
    images = torch.stack([read_square(path, args.size) for path in files])
    regions = torch.stack([slic_prior(*x, 100, args.size // 4) for x in zip(files, images, strict=True)])
    wanted = [(f"epoch {one.epoch}, K = {one.k or 4}", one.encoder, one.k or 4) for one in tested]
    if len(tested) == 1:
        wanted = [(f"K = {k}", tested[0].encoder, k) for k in (128, 64, 32, 16, 8, 4)]
    wanted, shown = [wanted[i] for i in evenly(len(wanted), 6)], evenly(len(images), args.count)
    save("masks.png", common.mask_columns(wanted, images, regions, shown, device))

    even, show = [], evenly(len(pairs), args.count)

    def with_foreground():
        results = common.segmented(tested[-1].encoder, pairs, args.k, "c4", args.size, device, read)
        for i, result in enumerate(cli.bar(results, "segmenting", len(pairs), unit="img")):
            if i in show:
                even.append(common.pictures(*result))
            if result[3].any():
                yield result[4][0]["foreground IoU"], pairs[i][0].name, result

    worst = heapq.nsmallest(args.count, with_foreground(), key=lambda one: one[0])
    need(worst, common.NO_FOREGROUND)
    save("objects.png", common.columns(even, args.k))
    notes = [f"{name}: IoU {iou:.3f}" for iou, name, _ in worst]
    save("worst.png", common.columns([common.pictures(*result) for *_, result in worst], args.k), notes)
    return 0


def main(argv=None):
    cli.run("evals.figures", lambda: draw(parse_args(argv)))


if __name__ == "__main__":
    main()

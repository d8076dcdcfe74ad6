"""r2o.pth in the layouts of other libraries, and back; the authors' released weights as r2o.pth.

    python -m evals.export --ckpt out/r2o.pth --to detectron2 --out r2o.pkl
    python -m evals.export --ckpt out/r2o.pth --to timm --out r2o.safetensors
    python -m evals.export --ckpt theirs.pth --to r2o --out r2o.pth

--ckpt may be in any of these layouts; its tensors' names tell which. The suffix of --out selects the format: .pth, also
.safetensors for torchvision and timm, and .pkl for Detectron2. Batch norm's counters become 0 if a file lacks them.
"""

from pathlib import Path

import torch

from runtime import cli
from runtime.cli import UsageError, need, need_package
from runtime.weights import LAYOUTS, read_weights, write_weights


def export(args) -> int:
    out, suffixes = args.out, LAYOUTS[args.to]
    need(out.suffix in suffixes, f"--out {out} does not go with --to {args.to}: expected {' or '.join(suffixes)}")
    if out.suffix == ".safetensors":
        need_package("safetensors", f"--out {out}")
    need(out.absolute().parent.is_dir() and not out.is_dir(), f"cannot write {out}: no such folder")
    need(out.resolve() != Path(args.ckpt).resolve(), f"--out {out} is --ckpt itself: pass another file")
    file = read_weights(args.ckpt)
    layouts = {"tiny": ["r2o", "torchvision"], "vit_b": ["r2o", "torchvision", "timm"]}.get(file["arch"], LAYOUTS)
    arch, others = file["arch"], " or ".join(layouts)
    need(args.to in layouts, f"{args.ckpt} holds the encoder {arch}, which {args.to} lacks: pass --to {others}")
    try:
        write_weights(file, args.to, out)
    except OSError as e:
        raise UsageError(f"cannot write {out} ({e.strerror or e})") from None
    back = read_weights(out)["state_dict"]
    same = all(torch.equal(x, file["state_dict"][name]) for name, x in back.items())
    need(same, f"{out} differs from what was written: is the disk failing?")
    print(f"{out}: {len(back)} tensors of a {file['arch']} in {args.to}'s layout, read back and equal")
    return 0


def main(argv=None):
    p = cli.Parser(__doc__)
    p.add_argument("--ckpt", required=True, help="r2o.pth, last.pth, or any layout that this program writes")
    p.add_argument("--to", required=True, choices=LAYOUTS, help="timm and mmseg name tensors as torchvision does")
    p.add_argument("--out", required=True, type=Path, help="file to write; its suffix selects the kind")
    cli.run("evals.export", lambda: export(p.parse_args(argv)))


if __name__ == "__main__":
    main()

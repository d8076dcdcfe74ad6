"""Which parts of the method matter on the scenes of demo.py: the second part of docs/ablations.md.

    python bench/scenes.py      # trains and measures the rows that are missing; 12 minutes of one core each

Writes the figures of every row to bench/results/scenes.json, and the table. Rerun the same command to resume.
"""

import concurrent.futures
import json
import signal
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from ablations import ROOT, call, commit, machine, stop
from ablations_doc import insert, summary

import demo
import r2o
from runtime import cli, distributed
from runtime.cli import UsageError, need
from runtime.pictures import resize_labels
from runtime.storage import make_folder, save_atomically, write_json

SEEDS = (0, 1, 2)
MEASURES = ("foreground IoU", "overlap, K = 6, pixel", "overlap, K = 6, region")  # the columns of demo.json
SMALL = demo.SIDE // 4  # the side of region maps
FULL, FIXED, LOW = "R2O, K = 32 → 6", "--schedule constant --k-start", ", --lr 1"
ROWS = {  # flags of train.py, after demo.py's own
    FULL: "",
    "masks of SLIC": "--masks prior",
    "fixed K = 40": f"{FIXED} 40",
    "fixed K = 16": f"{FIXED} 16",
    "fixed K = 6": f"{FIXED} 6",
    "BYOL": f"{FIXED} 1 --k-end 1",
}
GIVEN = {  # rows whose masks are not made from the image: true objects and background, (SIDE, SIDE) ids -> masks
    "masks of the true objects": lambda truth: resize_labels(truth, (SMALL, SMALL)),
    "masks of an 8 x 8 grid": lambda truth: r2o.grid_regions(8, SMALL),
}
ROWS |= {row + LOW: f"{flags} --lr 1".strip() for row, flags in ROWS.items()}  # half of demo.py's
ROWS |= {
    f"R2O, rate x K / 16{LOW}": "--lr 1 --lr-k 16",
    f"fixed K = 40, rate x 40 / 16{LOW}": f"{FIXED} 40 --lr 1 --lr-k 16",
    "R2O, every image clustered by itself": "--kmeans-group 1",
}
ROWS |= dict.fromkeys(GIVEN, "--masks prior")
BEGIN = "<!-- written by bench/scenes.py -->"


def measure(row: str, out: Path) -> dict:
    """Train a row with every seed and measure it, one thread; demo.py's output goes to a log."""
    folder = make_folder(out / "-".join(row.replace("/", " ").split()))
    if row in GIVEN:
        replace_regions(folder / f"train-{demo.SCENES}", GIVEN[row])
    call(["demo.py", "--out", folder, "--seeds", *SEEDS, *ROWS[row].split()], folder, "cpu")
    figures = json.loads((folder / "demo.json").read_text())
    about = {
        "demo.py": demo.RECIPE,
        "flags": ROWS[row],
        "K-means starts": demo.STARTS,
        "hardware": machine("cpu"),
        "torch": torch.__version__,
    }
    return about | {"figures": figures}


def replace_regions(scenes: Path, masks_of):
    """Make demo.py's training scenes, and save masks_of(their true objects) where train.py looks for superpixels."""
    demo.make_scenes(scenes, demo.SCENES, first=0)
    _, truth, _ = demo.load_scenes(scenes)
    masks = torch.stack([masks_of(x) for x in truth]).byte().numpy()
    save_atomically(scenes / "regions.npy", lambda f: np.save(f, masks))


def table(results: dict[str, dict]) -> list[str]:
    """Markdown: means ± sample standard deviations; the differences to R2O at the same --lr are paired by seed."""
    lines = [f"| | flags | {' | '.join(MEASURES)} | foreground IoU − R2O's |", "|---" * 6 + "|"]
    rows = {row: (results[row]["flags"], results[row]["figures"]["trained encoder"]) for row in ROWS if row in results}
    rows["untrained, batch norm calibrated"] = ("", results[FULL]["figures"]["random encoder"])
    for row, (flags, runs) in rows.items():
        cells = [row, f"`{flags}`" if flags else "", *(summary(list(x), 3) for x in zip(*runs, strict=True))]
        full = FULL + LOW * row.endswith(LOW)
        pairs = [a[0] - b[0] for a, b in zip(runs, rows[full][1], strict=True)]
        lines.append(f"| {' | '.join(cells)} | {'' if row == full else summary(pairs, 3, '+')} |")
    prior = [f"{statistics.fmean(x):.3f}" for x in zip(*results[FULL]["figures"]["SLIC prior"], strict=True)]
    return [*lines, f"| SLIC itself | | {' | '.join(prior)} | |"]


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    p = cli.Parser(__doc__)
    p.add_argument("--out", type=Path, default=Path("out/scenes"), help="folder for the runs")
    results = "the figures of every row"
    p.add_argument("--results", type=Path, default=ROOT / "bench/results/scenes.json", help=results)
    p.add_argument("--doc", type=Path, default=ROOT / "docs/ablations.md", help="document that gets the table")
    p.add_argument("--jobs", type=cli.count, default=distributed.cores(), help="rows at a time")
    args = p.parse_args()
    out, file = args.out.absolute(), args.results.absolute()
    need(BEGIN in args.doc.read_text(), f"{args.doc} lacks the line {BEGIN}: put it where the table belongs")
    done = json.loads(file.read_text()) if file.exists() else {}
    own = {row: (demo.RECIPE, flags, demo.STARTS) for row, flags in ROWS.items()}
    done = {row: x for row, x in done.items() if own.get(row) == (x["demo.py"], x["flags"], x["K-means starts"])}
    now, failed = {"r2o": commit()}, []
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = {pool.submit(measure, row, out): row for row in ROWS if row not in done}
        try:
            for job in cli.bar(concurrent.futures.as_completed(jobs), "rows", total=len(jobs)):
                if isinstance(job.exception(), UsageError):  # the others go on
                    failed.append(str(job.exception()))
                else:
                    done[jobs[job]] = job.result() | now
                    write_json(file, {row: done[row] for row in ROWS if row in done})
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    need(not failed, "; ".join(failed))
    insert(args.doc, BEGIN, table(done))


if __name__ == "__main__":
    cli.run("scenes.py", main)

"""What ablations.py compares: the rows of Tables 4, 7 and 9, scaled to images of 64 pixels; the sweep; all runs."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    title: str
    flags: str = ""  # of train.py, after BASE
    rates: str | float = "r2o"  # key in SWEPT: whose learning rate it takes; or its own


# The paper's K / 4, but at least 6. DetCon's own prior finds 1.3 segments at 64 pixels: SLIC, 5 on average, instead.
BASE = "--arch tiny --size 64 --batch-size 128 --hidden 512 --dim 64 --k-start 32 --k-end 6"
FIXED, DETCON = "--schedule constant --k-start", "--objective detcon --masks"
ODIN = f"{DETCON} odin --prior grid --kmeans-group 1 {FIXED} 5 --discovery-tau 0.99"
ROWS = {
    "untrained": Row("untrained, batch norm calibrated", "none"),
    "r2o": Row("R2O, K = 32 → 6"),
    "byol": Row("BYOL", f"{FIXED} 1 --k-end 1", "byol"),
    "fixed-16": Row("fixed K = 16", f"{FIXED} 16"),
    "prior-slic": Row("masks of SLIC", "--masks prior"),
    "prior-slic-few": Row("masks of SLIC, 15 superpixels", "--masks prior --segments 20"),
    "detcon": Row("DetCon_B, 5 superpixels", f"{DETCON} prior --segments 8", "contrastive"),
    "fixed-6": Row("fixed K = 6", f"{FIXED} 6"),
    "fixed-40": Row("fixed K = 40", f"{FIXED} 40"),
    "fixed-128": Row("fixed K = 128", f"{FIXED} 128"),
    "grid": Row("grid prior, K = 32 → 6", "--prior grid"),
    "prior-grid": Row("masks of the grid", "--masks prior --prior grid"),
    "grid-fixed-16": Row("grid prior, fixed K = 16", f"--prior grid {FIXED} 16"),
    "rising": Row("K = 6 → 32", "--k-start 6 --k-end 32"),
    "16-to-6": Row("K = 16 → 6", "--k-start 16"),
    "8-to-6": Row("K = 8 → 6", "--k-start 8"),
    "128-to-4": Row("K = 128 → 4, not scaled", "--k-start 128 --k-end 4"),
    "linear": Row("R2O, linear schedule", "--schedule linear"),
    "region": Row("R2O, --assign region", "--assign region"),
    "per-image": Row("R2O, every image clustered by itself", "--kmeans-group 1"),
    "k-rate": Row("R2O, learning rate x K / 16", rates="r2o x K"),
    "r2o-detcon": Row("R2O with DetCon's loss", "--objective detcon", "contrastive"),
    "ntxent": Row("R2O with NT-Xent", "--objective ntxent", "contrastive"),
    "odin": Row("Odin, K = 5", ODIN, "contrastive"),
}
# At other rates than the sweep's.
ROWS |= {
    f"{name}-lr-{lr:g}": Row(f"{ROWS[name].title}, --lr {lr:g}", ROWS[name].flags, lr)
    for name, rates in (("r2o", (0.5, 1, 4, 8)), ("byol", (0.5, 1, 2)), ("detcon", (1, 2)), ("r2o-detcon", (2,)))
    for lr in rates
}
RATED = {
    name: [row for row in ROWS if row.partition("-lr-")[0] == name] for name in ("r2o", "byol", "detcon", "r2o-detcon")
}
SHORT, LONG = 10, 30  # epochs
SEEDS = {SHORT: (0, 1, 2), LONG: (0,)}
MAIN = ("r2o", "byol", "fixed-16", "prior-slic", "detcon")
LONGER = ("r2o", "byol", "fixed-16", "detcon")
# Rows with seed 0 only: four variants that the paper lacks, and rates that are neither R2O's nor DetCon_B's.
ONCE = {"128-to-4", "per-image", "k-rate", "r2o-detcon"}
ONCE |= {row for row in ROWS if "-lr-" in row and row not in ("r2o-lr-8", "byol-lr-2", "detcon-lr-2")}
PRECISION = "--precision bfloat16"  # of all but the sweep: 1.4 times as fast on a CPU that computes in it

# The sweep: seed 0, SWEEP epochs, and HELD training images of each class held out for k-NN. SWEPT: for each Row.rates,
# the row and --lr-k that stand for all others.
RATES, SWEEP, HELD = (0.5, 1, 2, 4, 8), 3, 20
SWEPT = {"r2o": ("r2o", 0), "r2o x K": ("r2o", 16), "byol": ("byol", 0), "contrastive": ("detcon", 0)}

SIDE = 160  # the longer side of the photographs for fine-tuning
EVALUATIONS = {  # flags of the programs; and what else their figures depend on
    "k-NN": "-k 20 --size 64",
    "foreground": "--size 128",
    "overlap": "--size 128 -k 6 4",
    "fine-tuning": "--classes 2 --void 255 --crop 128 --scales 0.75 1.5 --steps 250 --batch-size 8 --lr 0.03 --seeds 0",
    "fine-tuning photographs": f"{SIDE} pixels, every third evaluated",
}
MEASURES = {
    "k-NN": "k-NN top-1, %",
    "fine-tuned": "fine-tuned mIoU, %",
    "foreground": "foreground IoU",
    "pixel 6": "overlap, K = 6, pixel",
    "region 6": "overlap, K = 6, region",
    "pixel 4": "overlap, K = 4, pixel",
    "region 4": "overlap, K = 4, region",
}

# The paper's k-NN on ImageNet-100, in percent, and mIoU on VOC, after 300 epochs of ImageNet-100; by table and row.
TABLES = {
    "Components (Table 4)": {
        "prior-grid": "69.0; 66.4",
        "prior-slic": "69.0; 67.0",
        "prior-slic-few": "",
        "grid-fixed-16": "74.1; 69.0",
        "grid": "77.6; 68.7",
        "fixed-16": "75.7; 68.8",
        "r2o": "85.5; 72.1",
    },
    "Curriculum (Table 9)": {
        "fixed-6": "K = 16: 76.3; 68.7",
        "fixed-16": "K = 64: 75.7; 68.8",
        "fixed-40": "K = 160: 73.9; 69.2",
        "fixed-128": "",
        "rising": "4 → 128: 80.0; 69.1",
        "8-to-6": "16 → 4: 73.8; 67.5",
        "16-to-6": "64 → 4: 84.4; 71.8",
        "r2o": "128 → 4: 85.5; 72.1",
        "128-to-4": "",
    },
    "Schedule, prior, assignment and clustering (A.6, A.7)": {
        "r2o": "85.5; 72.1",
        "linear": "85.2; 72.2",
        "grid": "83.0; 72.7",
        "region": "",
        "per-image": "",
        "k-rate": "",
    },
    "Objectives and baselines (Table 7, Sec. 4.5)": {
        "untrained": "",
        "r2o": "–; 67.5 in Table 7, 72.1 in Sec. 4.5",
        "ntxent": "–; 62.99 in Table 7",
        "odin": "–; 69.0 in Sec. 4.5",
        "byol": "",
        "detcon": "",
        "r2o-detcon": "",
    },
    "Learning rate": {row: "" for rows in RATED.values() for row in rows},
}


def digest(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


class Run(NamedTuple):
    row: str
    epochs: int
    seed: int
    lr: float
    lr_k: float
    sweep: bool = False  # on the training images that are not held out

    @property
    def name(self) -> str:
        return f"sweep-{self.row}-{self.lr:g}-{self.lr_k:g}" if self.sweep else f"{self.row}-{self.epochs}-{self.seed}"

    def settings(self, data: dict) -> dict:
        """All that the figures follow from. data: what identifies images and device."""
        rates = f"--lr {self.lr:g} --lr-k {self.lr_k:g}"
        flags = f"{BASE} {ROWS[self.row].flags} {rates} --epochs {self.epochs} --seed {self.seed}"
        flags += f" {PRECISION}" if self.epochs and not self.sweep else ""
        held = f"{HELD} training images of each class" if self.sweep else ""
        evaluations = {"k-NN": EVALUATIONS["k-NN"]} if self.sweep else EVALUATIONS
        return {"train.py": " ".join(flags.split()), "held out": held, "evaluations": evaluations} | data

    def file(self, results: Path, data: dict) -> Path:
        """Different settings give a different hash, hence a different file."""
        return results / f"{self.name}-{digest(self.settings(data))}.json"

    def folder(self, data: dict) -> str:
        """A name for the training run. It does not depend on the evaluations: other ones need no new training."""
        return f"{self.name}-{digest(self.settings(data) | {'evaluations': {}})}"


def sweep_runs() -> list[Run]:
    return [Run(row, SWEEP, 0, lr, lr_k, sweep=True) for lr in RATES for row, lr_k in SWEPT.values()]


def choose(swept: dict[Run, dict]) -> dict[str, tuple[float, float]]:
    """(lr, lr_k) by Row.rates: the best k-NN on the images held out, the first of equals. swept: the JSONs of finished
    runs of the sweep; what is not swept to the end is left out."""
    columns = {kind: [r for r in sweep_runs() if (r.row, r.lr_k) == column] for kind, column in SWEPT.items()}
    complete = {kind: runs for kind, runs in columns.items() if all(run in swept for run in runs)}
    best = {kind: max(runs, key=lambda r: swept[r]["figures"]["k-NN"]) for kind, runs in complete.items()}
    return {kind: (run.lr, run.lr_k) for kind, run in best.items()}


def programme(rates: dict[str, tuple[float, float]]) -> list[Run]:
    """All runs after the sweep whose rates are known, those that tell most first."""
    rest = [row for row in ROWS if row not in ("untrained", *MAIN)]
    more = [row for row in rest if row not in ONCE]
    seeds = SEEDS[SHORT]
    parts = [(MAIN, SHORT, seeds), (LONGER, LONG, SEEDS[LONG]), (rest, SHORT, seeds[:1]), (more, SHORT, seeds[1:])]
    each = [(row, epochs, seed) for rows, epochs, seeds in parts for seed in seeds for row in rows]
    rates = rates | {row.rates: (row.rates, 0) for row in ROWS.values() if not isinstance(row.rates, str)}
    untrained = [Run("untrained", 0, seed, 0, 0) for seed in seeds]
    return [*untrained, *(Run(*x, *rates[ROWS[x[0]].rates]) for x in each if ROWS[x[0]].rates in rates)]


def finished(runs: list[Run], results: Path, data: dict) -> dict[Run, dict]:
    """The JSONs of the runs that are finished."""
    files = {run: run.file(results, data) for run in runs}
    return {run: json.loads(file.read_text()) for run, file in files.items() if file.exists()}

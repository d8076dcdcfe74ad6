"""R2O end to end on a laptop, in minutes and without any data: what `make demo` runs.

    python demo.py                     # one run
    python demo.py --seeds 0 1 2       # three, with mean and standard deviation
    python demo.py --out region --assign region      # other flags are passed to train.py

Makes scenes of one to three patterned objects on a smooth background, pretrains a small encoder on them with train.py,
and measures on held-out scenes whether that helped: foreground IoU by the protocol of Table 3 (K = 5), and how well the
predicted masks fit the objects (average best overlap, Fig. 4), for the encoder before and after training and for the
SLIC prior. Objects and backgrounds are light or dark at random; only objects are patterned: the encoder's clue.
"""

import runtime  # isort: skip  # noqa: F401  (says what is not installed)
import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import r2o
from evals.common import calibrate, group_masks, mask_columns
from evals.measures import best_overlap, match_foreground, objects_of, segment_images
from runtime import cli
from runtime.images import list_images, read_image
from runtime.pictures import film_strip, paint, resize_labels
from runtime.regions import region_maps
from runtime.storage import make_folder
from runtime.weights import load_encoder

SIDE, SCENES, GROUP = 64, 2000, 32  # pixels of a scene; scenes to train on; images clustered together
STARTS = 3  # of K-means, to average over
K_START, K_END, EPOCHS = 32, 6, 16
RECIPE = f"--arch tiny --size {SIDE} --epochs {EPOCHS} --batch-size 64 --hidden 512 --dim 64 --workers 1 --keep-every 4"
FIXED = {*RECIPE.split()[::2], *"--data --seed --regions --prepare --dry-run --subset --prior --segments".split()}
RECIPE += f" --lr 2 --lr-k 0 --k-start {K_START} --k-end {K_END}"


def tints(rng) -> np.ndarray:
    """Two nearly gray colors of different lightness, (2, 3)."""
    while True:
        light = rng.uniform(0.1, 0.9, (2, 1))
        if abs(light[0] - light[1]) > 0.25:
            return (light + rng.uniform(-0.05, 0.05, (2, 3))).clip(0, 1)


def pattern(rng, kind: str) -> np.ndarray:
    """The share of the second tint, 0 to 1, (SIDE, SIDE): regular on objects, smooth or blotchy on backgrounds."""
    if kind in ("smooth", "blotchy"):
        cells = int(rng.integers(3, 7))
        coarse = torch.from_numpy(rng.uniform(-1, 1, (1, 1, cells, cells)))
        field = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=True)[0, 0].numpy()
        return (field > rng.uniform(-0.3, 0.3)) * 1.0 if kind == "blotchy" else ((field + 1) / 2).clip(0, 1)
    y, x = np.mgrid[:SIDE, :SIDE]
    angle, phase, period = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi, 2), rng.uniform(4, 8)
    u = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period + phase[0])
    v = np.sin((y * np.cos(angle) - x * np.sin(angle)) * 2 * np.pi / period + phase[1])
    return {"stripes": u > 0, "checks": u * v > 0, "dots": u + v > 0.8}[kind] * 1.0


def blob(rng) -> np.ndarray:
    """The inside of a random closed curve, (SIDE, SIDE) bool."""
    y, x = np.mgrid[:SIDE, :SIDE]
    (cy, cx), radius = rng.uniform(10, SIDE - 10, 2), rng.uniform(9, 17)
    turn = np.arctan2(y - cy, x - cx)
    wave = sum(rng.uniform(-0.25, 0.25) * np.cos(n * turn + rng.uniform(0, 2 * np.pi)) for n in (2, 3))
    return np.hypot(y - cy, x - cx) < radius * (1 + wave)


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image (SIDE, SIDE, 3) uint8 and its truth (SIDE, SIDE) uint8: 0 background, 1 … 3 objects."""
    rng = np.random.default_rng(seed)
    image, truth = np.zeros((SIDE, SIDE, 3)), np.zeros((SIDE, SIDE), np.uint8)
    kinds = rng.permutation(["stripes", "checks", "dots"])[: rng.integers(1, 4)]
    for i, kind in enumerate([rng.choice(["smooth", "blotchy"]), *kinds]):
        inside = blob(rng) if i else np.ones((SIDE, SIDE), bool)
        first, second = tints(rng)
        p = pattern(rng, kind)[..., None]
        image[inside] = (first * (1 - p) + second * p)[inside]
        truth[inside] = i
    return ((image + rng.normal(0, 0.03, image.shape)).clip(0, 1) * 255).round().astype(np.uint8), truth


def make_scenes(folder: Path, count: int, first: int):
    """Write `count` scenes as folder/images and folder/masks, unless they exist."""
    if (folder / "done").exists():
        return
    for name in ("images", "masks"):
        make_folder(folder / name)
    for i in cli.bar(range(count), f"scenes in {folder}"):
        image, truth = scene(first + i)
        Image.fromarray(image).save(folder / f"images/{i:05}.png")
        Image.fromarray(truth).save(folder / f"masks/{i:05}.png")
    (folder / "done").touch()


def load_scenes(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (n, 3, SIDE, SIDE) uint8, truth (n, SIDE, SIDE), and the prior's regions (n, h, w)."""
    listed = list_images(folder / "images")
    images = torch.stack([read_image(listed.path(i)) for i in range(len(listed))])
    truth = torch.stack([torch.from_numpy(np.array(Image.open(folder / "masks" / name.decode()))) for name in listed])
    maps, _ = region_maps(listed, folder / "regions.npy", size=SIDE // 4)
    return images, truth, torch.from_numpy(np.array(maps))


def mean_overlap(masks: torch.Tensor, truth: torch.Tensor) -> float:
    """Average best overlap (Fig. 4). masks: (n, h, w). truth: (n, SIDE, SIDE). Objects under 16 pixels do not count."""
    best = []
    for m, t in zip(masks, truth, strict=True):
        objects, _ = objects_of(t)
        best.append(best_overlap(m, objects[objects.flatten(1).sum(1) >= 16]))
    return float(torch.cat(best).mean())


@torch.no_grad()
def predict(encoder, images: torch.Tensor, regions: torch.Tensor, k: int, assign: str, start: int = 0) -> torch.Tensor:
    """Masks (n, h, w), in groups of 32 images as in training."""
    firsts = range(0, len(images), GROUP)
    c4 = [r2o.encode_c4(encoder, r2o.normalize(images[i : i + GROUP])) for i in firsts]
    made = (group_masks(x, regions[i : i + GROUP], k, assign, i + start) for x, i in zip(c4, firsts, strict=True))
    return torch.cat([*made])


def foreground_iou(encoder, images: torch.Tensor, truth: torch.Tensor, start: int = 0) -> float:
    """Table 3's protocol: IoU of the best of each image's own K = 5 segments with its objects."""
    generator = torch.Generator().manual_seed(start)
    scores = [segment_images(encoder, r2o.normalize(x), 5, generator=generator) for x in images.split(64)]
    return matched_iou(F.interpolate(torch.cat(scores), (SIDE, SIDE), mode="bilinear").argmax(1), truth)


def matched_iou(segments: torch.Tensor, truth: torch.Tensor) -> float:
    rows = (match_foreground(s, int(s.max()) + 1, t > 0) for s, t in zip(segments, truth, strict=True))
    return float(np.mean([scores["foreground IoU"] for _, scores in rows]))


def measure(encoder, scenes) -> list[float]:
    """Foreground IoU, and average best overlap of pixel and of region masks; averages over starts of K-means."""
    images, truth, regions = scenes
    figures = []
    for start in range(STARTS):
        masks = [predict(encoder, images, regions, K_END, assign, start) for assign in ("pixel", "region")]
        overlaps = (mean_overlap(m, truth) for m in masks)
        figures.append([foreground_iou(encoder, images, truth, start), *overlaps])
    return [statistics.fmean(column) for column in zip(*figures, strict=True)]


def run(out: Path, seed: int, count: int, flags: list[str], scenes) -> dict[str, list[float]]:
    """Train with one seed, measure, draw the film strip."""
    images, truth, regions = scenes
    scenes_at = out / f"train-{count}"
    command = [sys.executable, "train.py", "--data", scenes_at / "images", "--regions", scenes_at / "regions.npy"]
    command += ["--out", out / f"seed{seed}", "--seed", seed, *RECIPE.split(), *flags]
    print("\n" + " ".join(map(str, ["python", *command[1:]])), flush=True)
    done = subprocess.run([*map(str, command)], cwd=Path(__file__).parent)
    cli.need(done.returncode == 0, f"train.py ended with status {done.returncode}: see above")

    torch.manual_seed(seed)  # as train.py does: its initial weights
    start = r2o.R2O("tiny", hidden=512, dim=64).online["encoder"]
    calibrate(start, r2o.normalize(images).split(64))
    trained, _ = load_encoder(out / f"seed{seed}/r2o.pth")
    rows = {"random encoder": measure(start, scenes), "trained encoder": measure(trained, scenes)}

    log = [json.loads(line) for line in (out / f"seed{seed}/log.jsonl").read_text().splitlines()]
    wanted, shown = [], list(range(8))
    for epoch in range(0, EPOCHS + 1, 4):
        k = log[max(epoch - 1, 0)]["K"]
        encoder = load_encoder(out / f"seed{seed}/epoch_{epoch:04}.pth")[0] if epoch else start
        wanted.append((f"epoch {epoch}, K = {k}", encoder, k))
    wanted.insert(1, (f"epoch 0, K = {K_END}", start, K_END))  # much of what the film shows is K, not learning
    columns = mask_columns(wanted, images[:GROUP], regions[:GROUP], shown, torch.device("cpu"))
    columns.append(("truth", paint(images[shown], truth[shown])))
    film_strip(columns, zoom=2).save(out / f"seed{seed}/film.png")
    return rows


def print_table(table: dict[str, np.ndarray]):
    """table: row name -> (runs, 3): foreground IoU, overlap of pixel masks, overlap of region masks."""
    print(f"{'':16s} {'foreground IoU':>16s} {'best overlap of':>16s} {'best overlap of':>16s}")
    print(f"{'':16s} {'(Table 3, K = 5)':>16s} {f'pixel masks, K={K_END}':>16s} {f'region masks, K={K_END}':>16s}")
    for name, rows in table.items():
        cells = [f"{statistics.fmean(x):.3f}" + (f" ± {statistics.stdev(x):.3f}" if len(x) > 1 else "") for x in rows.T]
        print(f"{name:16s} " + " ".join(f"{cell:>16s}" for cell in cells))


def demo() -> int:
    p = cli.Parser(__doc__)
    p.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for scenes, runs and pictures")
    seeds = "of weights and training; the scenes stay the same"
    p.add_argument("--seeds", type=cli.seed, nargs="+", default=[0], help=seeds)
    p.add_argument("--scenes", type=cli.number(int, 64), default=SCENES, help="number of scenes to train on")
    args, flags = p.parse_known_args()
    given = [name for name in (flag.partition("=")[0] for flag in flags) if name in FIXED]
    cli.need(not given, f"demo.py fixes {', '.join(given)}: run train.py for other settings")

    make_scenes(args.out / f"train-{args.scenes}", args.scenes, first=0)
    make_scenes(args.out / "held-out", 192, first=10**6)
    scenes = images, truth, regions = load_scenes(args.out / "held-out")
    five = [resize_labels(r2o.slic_regions(image, 5, SIDE // 4), (SIDE, SIDE)) for image in images]
    prior = [matched_iou(five, truth), *[mean_overlap(regions, truth)] * 2]

    runs = [run(args.out, seed, args.scenes, flags, scenes) for seed in args.seeds]
    table = {name: np.array([rows[name] for rows in runs]) for name in runs[0]}
    table = {"SLIC prior": np.array([prior]), **table}
    (args.out / "demo.json").write_text(json.dumps({name: rows.tolist() for name, rows in table.items()}, indent=1))
    print(f"\n{len(images)} held-out scenes, {len(args.seeds)} run(s) of {EPOCHS} epochs of {args.scenes} scenes")
    print_table(table)
    print(f"\nimage, prior, masks before and during training, truth: {args.out / f'seed{args.seeds[0]}/film.png'}")
    print("how such masks come about, in 13 pictures: docs/method.md; your own images: README.md, Pretrain")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: train.py ends too
    cli.run("demo.py", demo)

"""`make demo`: R2O end to end on a laptop, in minutes and without any data.

    python demo.py                     # one run
    python demo.py --seeds 0 1 2       # three, with mean and deviation
    python demo.py --out region --assign region      # other flags go to train.py

Makes scenes of one to three textured objects on a smooth ground, pretrains a small encoder on them with train.py, and
measures on held-out scenes whether that helped: foreground IoU by the protocol of Table 3 (K = 5), and how well the
predicted masks fit the objects (average best overlap, Fig. 4), for the encoder before and after training and for the
SLIC prior. Light and dark are shared by objects and grounds at random; what objects have in common is that they carry
a pattern, which is what the encoder must find.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import eval_abo
import eval_cub
import evaluation
import files
import r2o

SIDE, GROUP = 64, 32  # pixels of a scene; images that share a K-means
K_START, K_END, EPOCHS = 32, 6, 16
RECIPE = f"--arch tiny --size {SIDE} --epochs {EPOCHS} --batch-size 64 --hidden 512 --dim 64 --workers 1 --keep-every 4"
RECIPE += f" --lr 1 --lr-k 0 --k-start {K_START} --k-end {K_END}"


# ---------------------------------------------------------------------------------------------------------------------
# Scenes
# ---------------------------------------------------------------------------------------------------------------------


def tints(rng) -> np.ndarray:
    """Two nearly grey colours that differ in lightness, (2, 3)."""
    while True:
        light = rng.uniform(0.1, 0.9, (2, 1))
        if abs(light[0] - light[1]) > 0.25:
            return (light + rng.uniform(-0.05, 0.05, (2, 3))).clip(0, 1)


def pattern(rng, kind: str) -> np.ndarray:
    """Where the second tint goes, 0 to 1, (SIDE, SIDE): fine and regular on objects, smooth or blotchy on grounds."""
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
    """An image (SIDE, SIDE, 3) uint8 and its truth (SIDE, SIDE) uint8: 0 ground, 1 … 3 objects, later ones in front."""
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
    """`count` scenes as folder/images and folder/masks; does nothing where they are there."""
    if (folder / "done").exists():
        return
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(count), f"scenes in {folder}", dynamic_ncols=True):
        image, truth = scene(first + i)
        Image.fromarray(image).save(folder / f"images/{i:05}.png")
        Image.fromarray(truth).save(folder / f"masks/{i:05}.png")
    (folder / "done").touch()


def load_scenes(folder: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (n, 3, SIDE, SIDE) uint8, truth (n, SIDE, SIDE), and the prior's regions (n, h, w)."""
    listed = files.list_images(folder / "images")
    images = torch.stack([r2o.read_image(listed.path(i)) for i in range(len(listed))])
    truth = torch.stack([torch.from_numpy(np.array(Image.open(folder / "masks" / name.decode()))) for name in listed])
    maps, _ = files.region_maps(listed, folder / "regions.npy", size=SIDE // 4)
    return images, truth, torch.from_numpy(np.array(maps))


# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------


def best_overlap(masks: torch.Tensor, truth: torch.Tensor) -> float:
    """Average best overlap (Fig. 4). masks: (n, h, w); truth: (n, SIDE, SIDE). Objects of less than 16 pixels are left
    out: the rest of them is hidden behind others."""
    best = []
    for m, t in zip(masks, truth, strict=True):
        objects, _ = eval_abo.objects_of(t)
        best.append(eval_abo.best_overlap(m, objects[objects.flatten(1).sum(1) >= 16]))
    return float(torch.cat(best).mean())


@torch.no_grad()
def predict(encoder, images: torch.Tensor, regions: torch.Tensor, k: int, assign: str) -> torch.Tensor:
    """Masks as in training, in groups of 32 images that share K clusters: (n, h, w)."""
    masks = []
    for i in range(0, len(images), GROUP):
        c4 = r2o.encode_c4(encoder, r2o.normalize(images[i : i + GROUP]))
        draws = torch.Generator().manual_seed(i)
        masks.append(evaluation.draw_masks(c4, regions[i : i + GROUP], k, assign, draws))
    return torch.cat(masks)


def enlarge(masks: torch.Tensor) -> torch.Tensor:
    return F.interpolate(masks[:, None].float(), (SIDE, SIDE), mode="nearest")[:, 0].long()


def foreground_iou(encoder, images: torch.Tensor, truth: torch.Tensor) -> float:
    """Table 3's protocol: of K = 5 segments of each image alone, the one that overlaps the objects best."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.cat([eval_cub.segment(encoder, r2o.normalize(x), 5, generator=generator) for x in images.split(64)])
    segments = F.interpolate(scores, (SIDE, SIDE), mode="bilinear").argmax(1)
    return matched_iou(segments, truth)


def matched_iou(segments: torch.Tensor, truth: torch.Tensor) -> float:
    rows = [
        eval_cub.match_foreground(s, int(s.max()) + 1, t > 0)[1]["foreground IoU"]
        for s, t in zip(segments, truth, strict=True)
    ]
    return float(np.mean(rows))


def measure(encoder, scenes) -> list[float]:
    """Foreground IoU, and average best overlap of pixel and of region masks."""
    images, truth, regions = scenes
    overlaps = [best_overlap(predict(encoder, images, regions, K_END, assign), truth) for assign in ("pixel", "region")]
    return [foreground_iou(encoder, images, truth), *overlaps]


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------


def run(out: Path, seed: int, count: int, flags: list[str], scenes) -> dict[str, list[float]]:
    """Trains with one seed, measures, draws the film strip."""
    images, truth, regions = scenes
    command = [
        sys.executable,
        "train.py",
        "--data",
        out / f"train-{count}/images",
        "--regions",
        out / f"train-{count}/regions.npy",
    ]
    command += ["--out", out / f"seed{seed}", "--seed", seed, *RECIPE.split(), *flags]
    command = [str(part) for part in command]
    print("\n" + " ".join(["python", *command[1:]]), flush=True)
    subprocess.run(command, check=True, cwd=Path(__file__).parent)

    torch.manual_seed(seed)  # train.py's: the weights it started from
    start = r2o.R2O("tiny", hidden=512, dim=64).online["encoder"]
    evaluation.calibrate(start, r2o.normalize(images).split(64))
    trained, _ = r2o.load_encoder(str(out / f"seed{seed}/r2o.pth"))
    rows = {"random encoder": measure(start, scenes), "trained encoder": measure(trained, scenes)}

    shown = slice(0, 8)
    columns = [("image", images[shown]), ("prior", r2o.paint(images[shown], regions[shown]))]
    for epoch in range(0, EPOCHS + 1, 4):
        k = r2o.num_clusters(epoch, EPOCHS, K_START, K_END, round(EPOCHS * 40 / 300))
        kept = out / f"seed{seed}/epoch_{epoch:04}.pth"
        encoder = r2o.load_encoder(str(kept))[0] if epoch else start
        m = predict(encoder, images[:GROUP], regions[:GROUP], k, "pixel")[shown]
        columns.append((f"epoch {epoch}, K = {k}", r2o.paint(images[shown], m)))
    columns.append(("truth", r2o.paint(images[shown], truth[shown])))
    r2o.film_strip(columns, zoom=2).save(out / f"seed{seed}/film.png")
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for scenes, runs and pictures")
    p.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of weights and training; the scenes stay the same"
    )
    p.add_argument("--scenes", type=int, default=2000, help="to train on")
    args, flags = p.parse_known_args()

    make_scenes(args.out / f"train-{args.scenes}", args.scenes, first=0)
    make_scenes(args.out / "held-out", 192, first=10**6)
    scenes = load_scenes(args.out / "held-out")
    images, truth, regions = scenes
    five = torch.stack([r2o.slic_regions(image, 5, SIDE // 4) for image in images])
    prior = [matched_iou(enlarge(five), truth), *[best_overlap(regions, truth)] * 2]

    runs = [run(args.out, seed, args.scenes, flags, scenes) for seed in args.seeds]
    table = {name: np.array([rows[name] for rows in runs]) for name in runs[0]}
    table = {"SLIC prior": np.array([prior]), **table}
    (args.out / "demo.json").write_text(json.dumps({name: rows.tolist() for name, rows in table.items()}, indent=1))

    print(f"\n{len(images)} held-out scenes, {len(args.seeds)} run(s) of {EPOCHS} epochs of {args.scenes} scenes")
    print(f"{'':16s} {'foreground IoU':>16s} {'best overlap of':>16s} {'best overlap of':>16s}")
    print(f"{'':16s} {'(Table 3, K = 5)':>16s} {f'pixel masks, K={K_END}':>16s} {f'region masks, K={K_END}':>16s}")
    for name, rows in table.items():
        cells = [
            f"{x:.3f} ± {s:.3f}" if len(rows) > 1 else f"{x:.3f}"
            for x, s in zip(rows.mean(0), rows.std(0), strict=True)
        ]
        print(f"{name:16s} " + " ".join(f"{cell:>16s}" for cell in cells))
    print(f"\nfilm strip: {args.out / f'seed{args.seeds[0]}/film.png'}")


if __name__ == "__main__":
    main()

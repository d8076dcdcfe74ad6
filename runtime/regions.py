"""The cache of region maps: every image's prior, computed once before training."""

import importlib.metadata
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

import r2o
from runtime import distributed
from runtime.cli import UsageError, bar, need, need_package, printable
from runtime.images import ImageList, read_image
from runtime.storage import make_folder, save_atomically, try_lock

SAVE_SECONDS = 1  # between progress flushes: the most work a kill can cost


def region_maps(
    images: ImageList,
    path: str | Path,
    prior: str = "slic",
    num_segments: int = 100,
    size: int = 56,
    workers: int = 0,
    skip_unreadable: bool = False,
) -> tuple[np.ndarray, dict]:
    """The region maps of all images, (n, size, size) uint8, memory-mapped from `path` (.npy); computed if missing.

    One of the processes that share the folder computes them while the others wait. If it is killed, it or another
    resumes from its last flush. The header beside the maps (.json) records what they were made from (prior, its
    parameters, scikit-image's version, a fingerprint of names and file sizes), num_regions (all ids are below it) and
    the unreadable images. Raises UsageError if they were made from anything else, if no image can be read, or, unless
    skip_unreadable, if over 1 % cannot.
    """
    need_package("scikit-image", "the region prior", "skimage")
    path, header_path = Path(path), Path(path).with_suffix(".json")
    need(path.suffix == ".npy" and not path.is_dir(), f"the region maps' file must end in .npy, got {path}")
    made_from = {
        "prior": prior,
        "num_segments": {"slic": num_segments, "grid": 196, "fh": "scale 1000, at least 1000 pixels"}[prior],
        "size": size,
        "images": len(images),
        "scikit-image": importlib.metadata.version("scikit-image"),
        "fingerprint": images.fingerprint,
    }
    make_folder(path.parent)
    if header_path.exists() and not path.exists():
        ours = b'"num_regions"' in header_path.read_bytes()
        need(ours, f"{header_path} is not of region maps and would be replaced: name another file with --regions")
    waited = 0
    while not path.exists():  # it appears last, complete
        if lock := try_lock(path.with_suffix(".lock")):
            with lock:
                if not path.exists():
                    _make_maps(images, path, header_path, made_from, workers, skip_unreadable)
                Path(lock.name).unlink(missing_ok=True)
            break
        if waited == 60:
            print(f"waiting for another process to make {path}", file=sys.stderr, flush=True)
        time.sleep(0.5)
        waited += 1
    try:
        header, maps = json.loads(header_path.read_text()), np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as e:
        raise UsageError(f"cannot read the region maps {path} ({e}): delete {path} and {header_path}") from None
    whole = isinstance(header, dict) and maps.shape == (header.get("images"), header.get("size"), header.get("size"))
    need(whole, f"the region maps {path} are damaged: delete {path} and {header_path}")
    for key, value in made_from.items():
        other = f"belong to other data or settings ({key} {header.get(key)}, now {value})"
        mend = f"delete {path} and {header_path}, or name another file with --regions"
        need(header.get(key) == value, f"the region maps in {path} {other}; {mend}")
    return maps, header


def _make_maps(images: ImageList, path: Path, header_path: Path, made_from: dict, workers: int, skip: bool):
    """Append map after map to path.partial. Every SAVE_SECONDS path.progress records how many are on disk."""
    partial, progress = path.with_suffix(".partial"), path.with_suffix(".progress")
    state = _load_progress(partial, progress, made_from)
    n, size, done = len(images), made_from["size"], state["done"]
    needed, free = (n - done) * size**2, shutil.disk_usage(path.parent).free
    room = f"{needed / 1e9:.2g} GB, {path.parent} has {free / 1e9:.2g} GB left"
    need(free >= needed, f"the region maps need {room}: free some, or name another file with --regions")
    priors = _Priors(images, made_from["prior"], made_from["num_segments"], size)
    ahead = 8 if workers else None
    loader = distributed.make_loader(priors, workers, batch_size=None, sampler=range(done, n), prefetch_factor=ahead)
    try:
        with open(partial, "r+b" if done else "w+b") as f:
            np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": (n, size, size)})
            f.seek(done * size**2, os.SEEK_CUR)
            f.truncate()
            saved_at = time.monotonic()
            for regions, problem in bar(distributed.iterate(loader), "region maps", n, unit="img", initial=done):
                f.write(regions.numpy().tobytes())
                state["num_regions"] = max(state["num_regions"], int(regions.max()) + 1)
                if problem:
                    state["unreadable"].append([state["done"], problem])
                    tqdm.write(f"unreadable: {problem}")
                few = skip or len(state["unreadable"]) <= n / 100
                mend = "restore them, or pass --skip-unreadable"
                need(few, f"more than 1 % of the images in {images.root} are unreadable, the last {problem}: {mend}")
                state["done"] += 1
                if time.monotonic() - saved_at >= SAVE_SECONDS or state["done"] == n:
                    saved_at = time.monotonic()
                    f.flush()
                    os.fsync(f.fileno())
                    _save_json(progress, state | {"made_from": made_from})
        need(len(state["unreadable"]) < n, f"no image in {images.root} can be read")
        _save_json(header_path, made_from | {key: state[key] for key in ("num_regions", "unreadable")})
        os.replace(partial, path)
    except (SystemExit, KeyboardInterrupt):
        kept = json.loads(progress.read_text())["done"] if progress.exists() else 0
        said = f"stopped: {kept} of {n} region maps are kept; rerun the same command to continue"
        print(said, file=sys.stderr, flush=True)
        raise
    except OSError as e:
        raise UsageError(f"cannot write {partial} ({e.strerror or e}): make room and rerun the command") from None
    progress.unlink()


def _load_progress(partial: Path, progress: Path, made_from: dict) -> dict:
    """How much of path.partial is done; nothing if it was made from anything else."""
    fresh = {"done": 0, "num_regions": 0, "unreadable": []}
    try:
        saved = json.loads(progress.read_text()) if progress.exists() else {"made_from": None}
    except ValueError:
        raise UsageError(f"{progress} is damaged: delete it to make the maps again") from None
    flushed = partial.stat().st_size if partial.exists() else 0
    if saved["made_from"] == made_from and flushed >= saved["done"] * made_from["size"] ** 2:
        return {key: saved[key] for key in fresh}
    progress.unlink(missing_ok=True)  # it describes what is about to be overwritten
    return fresh


def _save_json(path: Path, content: dict):
    save_atomically(path, lambda f: f.write(json.dumps(content).encode()))


class _Priors(Dataset):
    """Every image's region map, or what is wrong with the image. So every image is opened once before training."""

    def __init__(self, images: ImageList, prior: str, num_segments: int, size: int):
        self.images, self.prior, self.num_segments, self.size = images, prior, num_segments, size

    def __getitem__(self, i: int) -> tuple[torch.Tensor, str]:
        path = self.images.path(i)
        try:
            image = read_image(path)
        except OSError as e:
            return torch.zeros(self.size, self.size, dtype=torch.uint8), printable(f"{path} ({e})")
        if self.prior == "grid":
            return r2o.grid_regions(size=self.size), ""
        if self.prior == "fh":
            return r2o.fh_regions(image, self.size), ""
        return slic_prior(path, image, self.num_segments, self.size), ""


def slic_prior(path: str, image: torch.Tensor, num_segments: int, size: int) -> torch.Tensor:
    """r2o.slic_regions, whose ValueError becomes UsageError."""
    need_package("scikit-image", "the region prior", "skimage")
    try:
        return r2o.slic_regions(image, num_segments, size)
    except ValueError as e:
        raise UsageError(f"{path}: {e} with --segments") from None

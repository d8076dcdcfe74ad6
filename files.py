"""Files that pretraining reads and writes: lists of images, the cache of their region maps, checkpoints."""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import time
from array import array
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import r2o
from r2o import UsageError

EXTENSIONS = (b".jpg", b".jpeg", b".png", b".webp", b".gif", b".bmp", b".tif", b".tiff", b".ppm", b".pgm")


def bar(**kwargs) -> tqdm:
    """A progress bar; where nobody watches, as in a batch job's log, a line a minute."""
    return tqdm(dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 60, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Lists of images
# ---------------------------------------------------------------------------------------------------------------------


class ImageList:
    """Relative paths of the images below `root`, as bytes: one string of them all and where each ends. A list of
    millions is two objects, which forked workers go on sharing. fingerprint: of names and sizes; names: of names."""

    def __init__(self, root: Path, files):
        """files: (relative path, size in bytes) in the list's order."""
        self.root, text, ends, sizes = root, bytearray(), array("q", [0]), array("q")
        for name, size in files:
            text += name
            ends.append(len(text))
            sizes.append(size)
        digest = hashlib.sha256(text)
        digest.update(ends)
        self.names = digest.hexdigest()[:16]
        digest.update(sizes)
        self.fingerprint = digest.hexdigest()[:16]
        self._text, self._ends = bytes(text), np.array(ends)

    def __len__(self):
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> bytes:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._text[self._ends[i] : self._ends[i + 1]]

    def path(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self[i]))


def list_images(folder: str | Path, subset: str | Path | None = None, train: bool = True) -> ImageList:
    """All images below `folder`, folder by folder in alphabetical order. train: below folder/train, where that exists.

    subset: a text file that says which, a line each: a folder ("n01440764"), a file in it ("n01440764/1.JPEG"), or a
    file name alone ("n01440764_1.JPEG"). Raises UsageError where there are no images, or lines that name none.
    """
    root = Path(folder)
    if not root.is_dir():
        problem = f"not a folder: {folder}" if root.exists() else f"no such folder: {folder}"
        raise UsageError(f"{problem}; expected a folder of images, flat or nested")
    root = root / "train" if train and (root / "train").is_dir() else root
    wanted = _read_subset(subset) if subset else None
    found = set()  # of wanted
    images = ImageList(root, _scan(os.fsencode(root), b"", set(), wanted, found, wanted is None))
    if wanted and (missing := sorted(wanted - found)):
        raise UsageError(
            f"{len(missing)} of the {len(wanted)} lines of {subset} name nothing in {root}, the first: "
            f"{os.fsdecode(missing[0])}; expected folders or files below it"
        )
    if not len(images):
        raise UsageError(f"no images in {root}; expected files that end in {b' '.join(EXTENSIONS).decode()}")
    return images


def _read_subset(path) -> set[bytes]:
    try:
        lines = {line.strip().rstrip(b"/") for line in Path(path).read_bytes().splitlines()} - {b""}
    except OSError as e:
        raise UsageError(f"cannot read --subset {path} ({e.strerror}): expected a text file, a name a line") from None
    if not lines:
        raise UsageError(f"--subset {path} is empty: expected a name of a folder or an image a line")
    return lines


def _scan(folder: bytes, inside: bytes, seen: set, wanted: set | None, found: set, take: bool):
    """(relative path, size) of the images in `folder`, then of those in its folders. take: all of them."""
    if (real := os.path.realpath(folder)) in seen:  # a link to where we have been
        return
    seen.add(real)
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda e: e.name)
    except OSError as e:
        raise UsageError(f"cannot read the folder {os.fsdecode(folder)} ({e.strerror})") from None
    folders = []
    for entry in entries:
        name = entry.name
        if entry.is_dir():
            folders.append(entry)
        elif name.lower().endswith(EXTENSIONS) and (entry.is_file() or entry.is_symlink()):
            if wanted is not None and (hits := {inside + name, name} & wanted):
                found.update(hits)
            elif not take:
                continue
            try:
                yield inside + name, entry.stat().st_size
            except OSError:  # a link to nowhere: unreadable, like other damage
                yield inside + name, -1
    for entry in folders:
        name = inside + entry.name
        hits = () if wanted is None else {name, entry.name} & wanted
        found.update(hits)
        yield from _scan(entry.path, name + b"/", seen, wanted, found, take or bool(hits))


# ---------------------------------------------------------------------------------------------------------------------
# The cache of region maps
# ---------------------------------------------------------------------------------------------------------------------

SAVE_SECONDS = 1  # between two states of the cache that a killed process can go on from


def try_lock(path: Path):
    """An open file that no other process, on this machine or another, holds as long as this one lives; None where
    another holds it. A process that dies lets go."""
    try:
        file = open(path, "w")  # noqa: SIM115
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except (BlockingIOError, PermissionError) as e:
        if e.filename:  # of open()
            raise UsageError(f"cannot write {path} ({e.strerror}): pass another folder") from None
        file.close()
        return None
    except OSError as e:
        raise UsageError(f"cannot lock {path} ({e.strerror}): pass a folder on a disk that can lock files") from None


def region_maps(
    images: ImageList,
    path: str | Path,
    prior: str = "slic",
    num_segments: int = 100,
    size: int = 56,
    workers: int = 0,
) -> tuple[np.ndarray, dict]:
    """The region maps of all images, (n, size, size) uint8, memory-mapped: read from `path` (.npy, with a header beside
    it in .json) or, where there is none, computed there once.

    Of all processes that share the folder one computes them, the others wait; killed, it or another goes on from what
    was there a second before. The header says what the maps were made from (prior, its parameters, scikit-image's
    version, a fingerprint of names and file sizes), num_regions (all ids are below it) and which images are unreadable.
    Raises UsageError where the maps at `path` were made from anything else, where more than 1 % of the images cannot be
    read, and where the disk is full.
    """
    path, header_path = Path(path), Path(path).with_suffix(".json")
    if path.suffix != ".npy" or path.is_dir():
        raise UsageError(f"the region maps' file must end in .npy, got {path}")
    made_from = {
        "prior": prior,
        "num_segments": num_segments if prior == "slic" else 196,
        "size": size,
        "images": len(images),
        "scikit-image": importlib.metadata.version("scikit-image"),
        "fingerprint": images.fingerprint,
    }
    waited = 0
    while not header_path.exists():
        if lock := try_lock(path.with_suffix(".lock")):
            with lock:
                if not header_path.exists():
                    _make_maps(images, path, header_path, made_from, workers)
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
    if not isinstance(header, dict) or maps.shape != (header.get("images"), header.get("size"), header.get("size")):
        raise UsageError(f"the region maps {path} are damaged: delete {path} and {header_path}")
    for key, value in made_from.items():
        if header.get(key) != value:
            raise UsageError(
                f"the region maps in {path} belong to other data or settings ({key} {header.get(key)}, now {value}); "
                f"delete {path} and {header_path}, or name another file with --regions"
            )
    return maps, header


def _make_maps(images: ImageList, path: Path, header_path: Path, made_from: dict, workers: int):
    """Appends map after map to path.partial; every SAVE_SECONDS, once they are on the disk, path.progress says so."""
    partial, progress = path.with_suffix(".partial"), path.with_suffix(".progress")
    n, size = len(images), made_from["size"]
    state = {"done": 0, "num_regions": 0, "unreadable": []}
    try:
        saved = json.loads(progress.read_text()) if progress.exists() else {"made_from": None}
    except ValueError:
        raise UsageError(f"{progress} is damaged: delete it, the maps are then made anew") from None
    if saved["made_from"] == made_from:
        if path.exists() and not partial.exists():  # killed before the header was there
            os.replace(path, partial)
        if partial.exists() and partial.stat().st_size >= saved["done"] * size**2:
            state = {key: saved[key] for key in state}
    if path.exists():
        raise UsageError(f"{path} has no header {header_path}: delete it, or name another file with --regions")
    if not state["done"]:
        progress.unlink(missing_ok=True)  # of what is about to be overwritten
    needed = (n - state["done"]) * size**2
    if (free := shutil.disk_usage(path.parent).free) < needed:
        raise UsageError(
            f"the region maps need {needed / 1e9:.2g} GB, {path.parent} has {free / 1e9:.2g} GB left: "
            "free some, or name another file with --regions"
        )
    priors = torch.utils.data.DataLoader(
        _Priors(images, made_from["prior"], made_from["num_segments"], size),
        batch_size=None,
        sampler=range(state["done"], n),
        num_workers=workers,
        prefetch_factor=8 if workers else None,
    )
    try:
        with (
            open(partial, "r+b" if state["done"] else "w+b") as f,
            bar(desc="region maps", unit="img", total=n, initial=state["done"]) as shown,
        ):
            np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": (n, size, size)})
            f.seek(state["done"] * size**2, os.SEEK_CUR)
            f.truncate()
            saved_at = time.monotonic()
            for regions, problem in priors:
                f.write(regions.numpy().tobytes())
                state["num_regions"] = max(state["num_regions"], int(regions.max()) + 1)
                if problem:
                    state["unreadable"].append([state["done"], problem])
                    shown.write(f"unreadable: {problem}")
                if len(state["unreadable"]) > n / 100:
                    raise UsageError(f"more than 1 % of the images in {images.root} are unreadable, the last {problem}")
                state["done"] += 1
                shown.update()
                if time.monotonic() - saved_at >= SAVE_SECONDS or state["done"] == n:
                    saved_at = time.monotonic()
                    f.flush()
                    os.fsync(f.fileno())
                    saved = json.dumps(state | {"made_from": made_from}).encode()
                    r2o.save_atomically(progress, lambda f, saved=saved: f.write(saved))
        os.replace(partial, path)
        header = made_from | {key: state[key] for key in ("num_regions", "unreadable")}
        r2o.save_atomically(header_path, lambda f: f.write(json.dumps(header).encode()))
    except OSError as e:
        raise UsageError(f"cannot write {partial} ({e.strerror or e}): make room and start again, it goes on") from None
    progress.unlink()


class _Priors(torch.utils.data.Dataset):
    """The region map of every image, or what is wrong with it: every image is opened once before training starts."""

    def __init__(self, images, prior, num_segments, size):
        self.images, self.prior, self.num_segments, self.size = images, prior, num_segments, size

    def __getitem__(self, i):
        path = self.images.path(i)
        try:
            image = r2o.read_image(path)
        except OSError as e:
            return torch.zeros(self.size, self.size, dtype=torch.uint8), r2o.printable(f"{path} ({e})")
        if self.prior == "slic":
            return r2o.slic_regions(image, self.num_segments, self.size), ""
        return r2o.grid_regions(size=self.size), ""


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def load_checkpoint(out: Path, args, names: str) -> dict | None:
    """The newest checkpoint in `out` that can be loaded, None where there is none. Refuses one of other settings or of
    other images. names: the image list's."""
    damaged = []
    for path in (out / "last.pth", out / "previous.pth"):
        if not path.exists():
            continue
        try:
            checkpoint = r2o.load_file(path)
        except UsageError as e:
            damaged.append(str(e))
            continue
        break
    else:
        if damaged:
            raise UsageError(f"{'; '.join(damaged)}: delete them to start anew, or pass another --out")
        return None
    if damaged:  # out of the way, where it would become previous.pth
        os.replace(out / "last.pth", out / "last.pth.damaged")
        print(f"train.py: warning: {damaged[0]}; going on from {path}", file=sys.stderr, flush=True)
    elif path.name == "previous.pth":
        print(f"train.py: warning: there is no last.pth; going on from {path}", file=sys.stderr, flush=True)
    expected = "model optimizer step streak taken skipped sums masks args names images"
    if not set(expected.split()) <= checkpoint.keys():
        raise UsageError(f"{path} is not a checkpoint of train.py: delete it, or pass another --out")
    if checkpoint["names"] != names:
        raise UsageError(f"{path} was trained on other images than --data {args.data}: pass another --out")
    free = "data out regions workers keep_every save_every tensorboard prepare dry_run accum compile changed subset"
    free += " lr lr_k weight_decay tau" if args.changed else ""
    for key, now in vars(args).items():
        then = checkpoint["args"].get(key)
        if key not in free.split() and then != now:
            flag = "--" + key.replace("_", "-")
            raise UsageError(
                f"{path} was trained with {flag} {then}, now it is {now}: "
                f"pass {flag} {then} to go on, or another --out to start anew"
                + (" (or --changed)" if key in ("lr", "lr_k", "weight_decay", "tau") else "")
            )
    return checkpoint


def claim(out: Path):
    """The lock of OUT, kept as long as this process lives: two runs that write to one folder would spoil each other. A
    run that was killed, perhaps on another machine, may take a while to be gone."""
    for waited in range(120):
        if lock := try_lock(out / ".lock"):
            return lock
        if waited == 2:
            print(f"another run is writing to {out}: waiting for it to end", file=sys.stderr, flush=True)
        time.sleep(1)
    raise UsageError(f"another run is writing to {out}: let it end, or pass another --out")


def attempt(path: Path, write, keep: Path | None = None) -> bool:
    """save_atomically; where the disk is full says so and goes on: there may be room the next time."""
    try:
        r2o.save_atomically(path, write, keep)
    except OSError as e:
        why = e.strerror or e
        print(f"warning: cannot write {path} ({why}): the one before stays", file=sys.stderr, flush=True)
        return False
    return True

"""Checkpoints: last.pth and the one before it, from which an interrupted run resumes."""

import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import torch

from runtime import distributed
from runtime.cli import UsageError, need, warn
from runtime.storage import save_or_warn

DAMAGE = (RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError, zlib.error, zipfile.BadZipFile)
DAMAGE += (struct.error, AssertionError, TypeError)  # PyTorch's, of files in its format before 1.6


def load_file(path: str | Path) -> dict:
    """A file of tensors and plain types. Raises UsageError if it does not exist, is damaged, or holds anything else."""
    try:
        if zipfile.is_zipfile(path) and (torn := zipfile.ZipFile(path).testzip()):  # torch.load checks no checksums
            raise ValueError(torn)
        file = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"no such checkpoint: {path}; expected r2o.pth, last.pth or ResNet weights") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder: expected a file in it, such as r2o.pth") from None
    except PermissionError:
        raise
    except (OSError, *DAMAGE) as e:
        why = f"({type(e).__name__}): it is damaged, or holds more than tensors and plain types"
        raise UsageError(f"{path} is not a checkpoint that can be loaded safely {why}") from None
    return file if isinstance(file, dict) else {}


class Checkpoint:
    """last.pth in a folder, and the one before it, previous.pth: a header (settings), model, optimizer, other entries.

    Rank 0 reads and writes; the other ranks get what it has read, since their disks may hold other files.
    """

    def __init__(self, folder: Path):
        self.path, self.previous, self.found = folder / "last.pth", folder / "previous.pth", None
        self.is_rank_0 = distributed.place().rank == 0

    def read(self, keys: str) -> dict | None:
        """On rank 0, the newest checkpoint that can be loaded; None if there is none, and on the other ranks. Raises
        UsageError if none of the files can be loaded, or one lacks any of the (space-separated) keys."""
        damaged = []
        for path in (self.path, self.previous) if self.is_rank_0 else ():
            if not path.exists():
                continue
            try:
                self.found = load_file(path)
            except UsageError as e:
                damaged.append(str(e))
                continue
            if damaged:  # move it away, or the next save would make it previous.pth
                os.replace(self.path, f"{self.path}.damaged")
                warn(f"{damaged[0]}; resuming from {path}")
            elif path == self.previous:
                warn(f"there is no {self.path}; resuming from {path}")
            whole = set(keys.split()) <= self.found.keys()
            need(whole, f"{path} is not a checkpoint of this program: delete it, or pass another --out")
            return self.found
        need(not damaged, f"{'; '.join(damaged)}: delete them to start anew, or pass another --out")
        return None

    def restore(self, header: dict, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict | None:
        """Load what rank 0 has read, on all ranks; return it, or None. From now on save() writes header and state."""
        self.header, self.model, self.optimizer = header, model, optimizer
        found, self.found = distributed.of_rank_0(self.found), None
        if found:
            model.load_state_dict(found["model"])
            optimizer.load_state_dict(found["optimizer"])
        return found

    def save(self, required: bool = False, **entries):
        """Save on rank 0. A full disk keeps the previous checkpoint and warns, or raises UsageError if required."""
        if self.is_rank_0:
            file = self.header | entries | {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            saved = save_or_warn(self.path, lambda f: torch.save(file, f), keep=self.previous)
            kept = "the previous one is kept" if self.path.exists() else "nothing of this run is kept"
            need(saved or not required, f"stop requested, but {self.path} could not be saved: {kept}")


def need_same(path: Path, then: dict, now: dict, may_change=(), with_changed=()):
    """Raise UsageError for the first setting, of those not in may_change, that differs from the checkpoint's.
    with_changed: settings that the flag --changed allows to differ."""
    for name, value in now.items():
        flag, before = "--" + name.replace("_", "-"), then.get(name)
        anew = "another --out to start anew" + (" (or --changed)" if name in with_changed else "")
        before_it = f"pass {flag} {before}" if before is not None else f"leave {flag} out"
        change = f"{flag} {before}, now it is {value}: {before_it} to resume, or {anew}"
        need(name in may_change or before == value, f"{path} was trained with {change}")

"""Files that survive kills, full disks and second runs: atomic saves and locks."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from runtime.cli import UsageError, warn


def make_folder(path: str | Path) -> Path:
    """The folder, made if it does not exist. Raises UsageError if it cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"cannot make the folder {path} ({e.strerror}): pass another") from None
    return Path(path)


def save_atomically(path: str | Path, write, keep: str | Path | None = None):
    """Call write(file) on a temporary file, flush it to disk, and move it to path. What was at path before is moved to
    `keep`, if given. Raises OSError if it cannot be written; path is then as it was."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(e.__context__, OSError):  # the cause of what torch.save raises on a full disk
            raise e.__context__ from None
        raise
    if keep and os.path.exists(path):
        os.replace(path, keep)
    os.replace(temporary, path)


def save_or_warn(path: str | Path, write, keep: str | Path | None = None) -> bool:
    """Like save_atomically, but on a write error warns and returns False: there may be room the next time."""
    try:
        save_atomically(path, write, keep)
    except OSError as e:
        kept = "what was there is kept" if os.path.exists(path) else "no earlier one exists"
        warn(f"cannot write {path} ({e.strerror or e}): {kept}")
        return False
    return True


def write_json(path: str | Path, result: dict | list):
    """Write results that have already been printed, so that a full disk loses nothing. Links are followed, and results
    appended to a pipe, a device or /dev/stdout."""
    text = (json.dumps(result, indent=1) + "\n").encode()
    stream = os.path.exists(path) and (not os.path.isfile(path) or str(path).startswith("/dev/"))
    try:
        if stream:
            with open(path, "ab") as f:
                f.write(text)
        else:
            save_atomically(os.path.realpath(path), lambda f: f.write(text))
    except OSError as e:
        raise UsageError(f"the results above could not be written to {path} ({e.strerror or e})") from None


def try_lock(path: Path):
    """Try to take an exclusive lock, across machines too. Returns the open file, or None if it is taken."""
    import fcntl  # not on Windows, where torch.hub still loads weights

    try:
        file = open(path, "w")  # noqa: SIM115
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except (BlockingIOError, PermissionError) as e:
        if e.filename:  # from open()
            raise UsageError(f"cannot write {path} ({e.strerror}): pass another folder") from None
        file.close()
        return None
    except OSError as e:
        problem = f"cannot write {path}" if e.filename else f"cannot lock {path}"
        mend = "pass another folder" if e.filename else "pass a folder on a disk that supports locks"
        raise UsageError(f"{problem} ({e.strerror}): {mend}") from None


def lock_output(out: Path):
    """Prevent two runs from writing to one folder. Waits up to two minutes for a killed run, perhaps on another
    machine, to release the lock. Keep the result: the lock is released when it is garbage-collected."""
    for waited in range(120):
        if lock := try_lock(out / ".lock"):
            return lock
        if waited == 2:
            print(f"another run is writing to {out}: waiting for it to end", file=sys.stderr, flush=True)
        time.sleep(1)
    raise UsageError(f"another run is writing to {out}: let it end, or pass another --out")

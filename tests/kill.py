"""Runs train.py again and again and kills it, until it has been killed often enough and has ended: `kill.py COUNT SEED
OUT flags`. Each run is a process of its own, forked from this one, which has PyTorch already. Prints what was going on
at each kill; finished runs leave OUT-0, OUT-1, …"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from runtime import regions as cache

count, seed, out, flags = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
chance = random.Random(seed)
fsync = os.fsync


def start() -> int:
    if pid := os.fork():
        return pid
    os.setsid()
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.fsync = lambda fd: (
        time.sleep(0.02),
        fsync(fd),
    )  # a slow disk: more of the time is spent in the midst of writing
    cache.SAVE_SECONDS = 0
    status = 1
    try:
        train.main([*flags, "--out", str(out)])
        status = 0
    finally:
        os._exit(status)


def state() -> str:
    """What a process killed now is in the midst of."""
    if not (out / "regions.json").exists():
        return "maps" if (out / "regions.partial").exists() else "start"
    return "checkpoint" if (out / "last.pth.tmp").exists() else "training" if (out / "last.pth").exists() else "start"


kills, ends = 0, 0
while kills < count or ends == 0 or out.exists():
    pid = start()
    began, wanted = time.monotonic(), chance.choice(["maps", "checkpoint", "training", "any"]) if kills else "maps"
    patience = chance.uniform(0, 4)
    while not (done := os.waitpid(pid, os.WNOHANG)[0]):
        late = time.monotonic() - began
        if kills < count and (late > patience if wanted == "any" else state() == wanted and late > 0.3 * patience):
            print(state(), flush=True)
            # the process alone, whose workers must find out, or all of them
            (os.kill if chance.random() < 0.5 else os.killpg)(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
            break
        time.sleep(0.001)
    if done:
        if not (out / "r2o.pth").exists():
            sys.exit(f"a run failed:\n{Path(f'{out}.log').read_text()}")
        shutil.move(out, f"{out}-{ends}")
        ends += 1

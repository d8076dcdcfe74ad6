"""Processes that work together: how they find each other, stop, and end."""

import atexit
import contextlib
import datetime
import multiprocessing
import os
import signal
import sys
import time
import traceback
import uuid

import torch
import torch.distributed as dist

from r2o import UsageError, printable

STOPPED = 75  # exit status: EX_TEMPFAIL, try again


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def own_cores() -> int:
    """Of each process on this machine."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def place() -> tuple[int, int, torch.device]:
    """This process's rank, how many there are, and its device; torchrun says so in the environment."""
    rank, world, local = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    return rank, world, torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def tie(rank: int, world: int, device: torch.device, timeout: datetime.timedelta | None = None):
    """Ties the processes together. timeout: how long some may wait for others (default: PyTorch's)."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_meet(rank, world), rank=rank, world_size=world, timeout=timeout)


def _meet(rank: int, world: int) -> dist.Store:
    """The store through which the processes of this attempt, and no others, find each other: each asks rank 0, under a
    name of its own, for the attempt's. torchrun's workers, when it starts them anew, share a store with those that
    died, and would else read addresses of the dead in it (github.com/pytorch/pytorch/issues/135712)."""
    patience = datetime.timedelta(days=7)  # other nodes may still be making their region maps
    store = next(dist.rendezvous("env://", rank, world, timeout=patience))[0]
    attempt = name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks {rank}", name)
        store.wait([f"answer {name}"], patience)
        attempt = store.get(f"answer {name}").decode()
        store.set(f"heard {attempt} {rank}", "")
    else:
        others = range(1, world)
        while not store.check([f"heard {attempt} {r}" for r in others]):
            for r in others:
                if store.check([f"asks {r}"]):
                    store.set(f"answer {store.get(f'asks {r}').decode()}", attempt)
            time.sleep(0.05)
    return dist.PrefixStore(attempt, store)


@contextlib.contextmanager
def stop_signals():
    """The stop signals that have come in, as a list that grows."""
    told = []
    before = {n: signal.signal(n, lambda n, _: told.append(n)) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def deaf(worker: int):
    """Workers leave signals that a batch system sends to every process to the training process, which ends them."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers():
    """At exit Python ends processes that are left, such as the workers of a loop that an exception ended, by SIGTERM,
    to which they are deaf, and would wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


def stoppable():
    """For where there is nothing to save that is not saved: a stop signal ends the program with the status that says
    so; at once where other processes may be gone already."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: (os._exit if dist.is_initialized() else sys.exit)(STOPPED))


def run(program: str, work):
    """Calls work() and exits with the status that it returns; where arguments, data or memory were not good, with 2
    after one line that says what was wrong."""
    problem, status = None, 2
    try:
        status = work()
    except UsageError as e:
        problem = str(e).splitlines()[-1].removeprefix("r2o.UsageError: ")  # after a loader worker's traceback
    except torch.OutOfMemoryError as e:
        problem = f"the GPU's memory is too small ({str(e).splitlines()[0]}): lower --batch-size (or raise --accum)"
    except Exception:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        status = 1
    if problem:  # on any process: it may be the only one that knows
        print(f"{program}: error: {printable(problem)}", file=sys.stderr)
    if dist.is_initialized():
        if status in (1, 2):  # at once, for torchrun to start anew: taking leave of processes that are gone can hang
            sys.stderr.flush()
            os._exit(status)
        dist.destroy_process_group()  # after work()'s DDP is gone: were it the last to let go, gloo could deadlock
    if status:
        sys.exit(status)

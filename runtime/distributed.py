"""Processes that train together: how they meet, stop, and end."""

import atexit
import contextlib
import datetime
import multiprocessing
import os
import signal
import sys
import threading
import time
import uuid
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

# Exit statuses of a run that has saved its state: told to stop (EX_TEMPFAIL, try again), or by Ctrl-C.
STOPPED, INTERRUPTED = 75, 130
STOP_SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cores_per_process() -> int:
    """This process's share of the machine's cores, as a default for --workers."""
    return min(16, max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class Place(NamedTuple):
    rank: int
    world: int  # the number of processes
    device: torch.device


def place() -> Place:
    """Where this process is, from torchrun's environment variables."""
    rank, world, local = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    return Place(rank, world, torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu"))


def join_process_group(timeout: datetime.timedelta | None = None):
    """Join the process group, if there are several processes. timeout: of collectives (default: PyTorch's)."""
    rank, world, device = place()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = attempt_store(rank, world)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def attempt_store(rank: int, world: int) -> dist.Store:
    """A store for the processes of this attempt alone: each asks rank 0, under a random name, for the attempt's name.

    Workers restarted by torchrun share a store with the dead ones, and would otherwise read the addresses that those
    left in it (github.com/pytorch/pytorch/issues/135712)."""
    patience = datetime.timedelta(days=7)  # other nodes may still be making their region maps
    store = next(dist.rendezvous("env://", rank, world, timeout=patience))[0]
    attempt = name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks {rank}", name)
        while not store.check([f"answer {name}"]):  # not store.wait(), which would hold back stop signals
            time.sleep(0.05)
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


def to_device(model: nn.Module) -> nn.Module:
    """The model on this rank's device, its batch norm synchronized between GPUs."""
    _, world, device = place()
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(device)


def agree(finite: torch.Tensor, stop_requested: bool) -> tuple[bool, bool]:
    """Whether the step was finite on all ranks, and whether a stop was requested on any: the same answer everywhere."""
    flags = torch.stack([~finite, torch.full_like(finite, stop_requested)]).float()
    if dist.is_initialized():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    bad, stop = flags.bool().tolist()
    return not bad, stop


def of_rank_0(value):
    """Rank 0's value, on all ranks."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


class StopSignals:
    """A context in which SIGTERM and SIGUSR1 end the program with status STOPPED, and Ctrl-C with INTERRUPTED. While
    `deferred` is set they set `received` to that status instead, and the program ends itself when it has saved its
    state; a second Ctrl-C ends it at once."""

    def __init__(self, deferred: bool = False):
        self.deferred, self.received = deferred, 0

    def __enter__(self):
        self.before = {n: signal.signal(n, self._receive) for n in STOP_SIGNALS}
        return self

    def _receive(self, number, _):
        status = INTERRUPTED if number == signal.SIGINT else STOPPED
        if self.deferred and not self.received == status == INTERRUPTED:
            self.received = status
        elif dist.is_initialized():  # at once: the other processes may already be gone
            os._exit(status)
        elif status == INTERRUPTED:
            raise KeyboardInterrupt
        else:
            sys.exit(status)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def ignore_stop_signals(worker: int):
    """For loader workers, which the training process shuts down: terminals and batch systems signal all processes."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def hold_signals():
    """Delay a stop signal until the end of this context; a second one takes effect at once."""
    came, before = [], {}

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number, _):
        came.append(number)
        if len(came) > 1:
            restore()
            os.kill(os.getpid(), number)

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            before[number] = signal.signal(number, receive)
    try:
        yield
    finally:
        restore()
        if len(came) == 1:
            os.kill(os.getpid(), came[0])


def make_loader(data, workers: int, **settings) -> DataLoader:
    """A loader for iterate()."""
    return DataLoader(data, num_workers=workers, worker_init_fn=ignore_stop_signals, **settings)


def iterate(loader):
    """The batches of a loader. A stop signal is held while workers start, since they would die of it with a
    traceback, and while a batch is received, since its worker would be left with half a message."""
    with hold_signals():
        batches = iter(loader)
    while True:
        with hold_signals():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@atexit.register
def _kill_workers():
    """At exit Python sends SIGTERM to workers that an exception left, and joins them. Ours ignore it: kill them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:  # as loader workers are; a program that only imports this keeps its other processes
            process.kill()


def leave_process_group(status: int):
    """Call this after the DDP model is deleted: gloo can deadlock if DDP destroys the group. After an error, exit at
    once so that torchrun restarts the others: an orderly shutdown can hang if some are already gone."""
    if dist.is_initialized():
        if status in (1, 2, INTERRUPTED):
            sys.stderr.flush()
            os._exit(status)
        dist.destroy_process_group()

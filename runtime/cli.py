"""Command lines: errors and exit statuses, flags, progress bars."""

import argparse
import contextlib
import importlib.util
import math
import re
import signal
import sys
import traceback

import torch
import torch.distributed as dist
from tqdm import tqdm

import r2o
from runtime import distributed


class UsageError(ValueError):
    """Bad arguments or data, in one line: what was wrong; what was expected; what to do."""


def need(ok, message: str):
    """Raise UsageError unless ok."""
    if not ok:
        raise UsageError(message)


def need_package(name: str, purpose: str, module: str = ""):
    need(importlib.util.find_spec(module or name), f"{purpose} needs the package {name}: pip install {name}")


def printable(text: str) -> str:
    """Replace the surrogates that stand for the bytes of file names that are not UTF-8."""
    return text.encode(errors="replace").decode()


def run(program: str, work):
    """Exit with the status that work() returns. Bad input, too little memory or a dead loader worker: one line on
    stderr and status 2; Ctrl-C: one line and 130."""
    problem, status = None, 2
    try:
        status = work()
    except UsageError as e:  # from a loader worker, the last line of its traceback
        problem = str(e).splitlines()[-1].removeprefix(f"{UsageError.__module__}.{UsageError.__qualname__}: ")
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        status = distributed.INTERRUPTED
    except Exception as e:
        with contextlib.suppress(RuntimeError):  # PyTorch's handler may report a dead worker that e is about already
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        problem = environment_problem(e)
        if not problem:
            if not dist.is_initialized():
                raise
            traceback.print_exc()
            status = 1
    if problem:  # on every rank: this may be the only one that knows
        print(f"{program}: error: {printable(problem)}", file=sys.stderr)
    distributed.leave_process_group(status)
    if status:
        sys.exit(status)


def environment_problem(e: Exception) -> str:
    """The message for an error that the machine caused, not the program; "" for others."""
    said, lower = str(e), "lower --batch-size, or raise --accum if the program has it"
    if isinstance(e, torch.OutOfMemoryError):
        return f"the GPU's memory is too small ({said.splitlines()[0]}): {lower}"
    if isinstance(e, MemoryError) or "DefaultCPUAllocator" in said:
        return f"the memory is too small ({said.splitlines()[0] if said else 'MemoryError'}): {lower}"
    if re.search(r"workers are out of shared memory|unable to (write|open) .*/torch_", said):
        return "/dev/shm is too small for the loader's batches: enlarge it (docker: --ipc=host), or lower --workers"
    frames = [frame.filename for frame in traceback.extract_tb(e.__traceback__)]
    receiving = isinstance(e, (ConnectionError, EOFError)) and any("utils/data/dataloader.py" in f for f in frames)
    if receiving or re.search(r"DataLoader worker .*(killed|exited)", said):
        return "a loader worker was killed, perhaps for lack of memory: lower --workers, and rerun the command"
    return ""


def warn(message: str):
    print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


command_line: list[str] = []  # as it was parsed


class Parser(argparse.ArgumentParser):
    """Prints the module's docstring as its description, defaults in --help, and errors as UsageError."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=_Help)

    def parse_args(self, args=None, namespace=None):
        global command_line
        command_line = list(sys.argv[1:] if args is None else args)
        return super().parse_args(args, namespace)

    def error(self, message: str):
        raise UsageError(re.sub(r"^argument (\S+): (?=must)", r"\1 ", message))


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def number(kind: type, low: float, high: float = math.inf, above: bool = False):
    """An argparse type: an int or float from `low` (or above it) to `high`, never infinite or NaN."""

    def parse(text: str):
        try:
            x = kind(text)
        except ValueError:
            x = math.nan
        if not (low < x if above else low <= x) or not x <= high or x == math.inf:
            bounds = f"above {low}" if above else f"at least {low}"
            bounds += f" and at most {high}" if high < math.inf else ""
            bounds += ", an integer" if kind is int and math.isnan(x) else ""
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return x

    return parse


count, natural, rate = number(int, 1), number(int, 0), number(float, 0)


def describe_ops(device) -> str:
    """Which code runs the ops, and what to do if it is the slow one."""
    found = r2o.extension(device)
    build = "; python setup.py build_ext --inplace makes the mask step 5 to 9 times faster, see docs/performance.md"
    return f"ops: {found}{build if found == 'python' else ''}"


def bar(*args, **kwargs) -> tqdm:
    """A progress bar; a line a minute if stderr is no terminal, as in the log of a batch job."""
    return tqdm(*args, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 60, **kwargs)

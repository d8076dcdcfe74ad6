"""Command lines: errors and exit statuses, flags, progress bars."""

import argparse
import contextlib
import importlib.util
import math
import os
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


class Output:
    """stdout or stderr, without the errors: a run of days, and results about to be saved, survive that it is closed,
    that its reader is gone, or that its disk is full (this error is kept). What the encoding lacks becomes "?"."""

    def __init__(self, stream):
        self.stream, self.full = stream or open(os.devnull, "w"), None  # noqa: SIM115

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = self.stream.encoding or "utf-8"
        with self._no_errors():
            self.stream.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self):
        with self._no_errors():
            self.stream.flush()

    @contextlib.contextmanager
    def _no_errors(self):
        try:
            yield
        except BrokenPipeError:
            pass
        except OSError as e:
            self.full = e

    def close(self):
        """Flush for the last time; what cannot be written is dropped, or Python would end with an error of its own."""
        try:
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run(program: str, work):
    """Exit with the status that work() returns. Bad input, a path that cannot be opened, too little memory or a dead
    loader worker: one line on stderr and status 2; Ctrl-C: one line and 130."""
    out, err = Output(sys.stdout), Output(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = status_of(program, work)
        out.flush()
        if out.full:
            warn(f"{program} could not write all of its output ({out.full.strerror})")
    out.close()
    err.close()
    distributed.leave_process_group(status)
    if status:
        sys.exit(status)


def status_of(program: str, work) -> int:
    problem, status = None, 2
    try:
        status = work()
    except UsageError as e:  # from a loader worker, the end of its traceback
        problem = str(e).rpartition(f"{UsageError.__module__}.{UsageError.__qualname__}: ")[2].strip()
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
        print(f"{program}: error: {problem}".replace("\n", "\\n"), file=sys.stderr)
    return status


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
    paths = FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError
    if isinstance(e, paths) and isinstance(e.filename, (str, bytes, os.PathLike)):
        return f"cannot open {os.fsdecode(e.filename)} ({e.strerror}): correct the path, or its permissions"
    return ""


def warn(message: str):
    print(f"warning: {printable(message)}", file=sys.stderr, flush=True)


command_line: list[str] = []  # as it was parsed


class Parser(argparse.ArgumentParser):
    """Prints the module's docstring as its description, defaults in --help, and errors as UsageError."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=_Help, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        global command_line
        command_line = list(sys.argv[1:] if args is None else args)
        empty = any(re.fullmatch(r"(--[\w-]+=)?", word) for word in command_line)
        need(not empty, "an argument is empty: is a variable of the command not set?")
        return super().parse_known_args(args, namespace)

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


def side(text: str) -> int:
    """An argparse type: a multiple of 32, an encoder's largest stride, which region maps must fit too."""
    pixels = number(int, 32)(text)
    if pixels % 32:
        raise argparse.ArgumentTypeError(f"must be a multiple of 32, got {pixels}")
    return pixels


count, natural, rate, seed = number(int, 1), number(int, 0), number(float, 0), number(int, 0, 2**31 - 1)


def describe_ops(device) -> str:
    """Which code runs the ops, and what to do if it is the slow one."""
    found = r2o.extension(device)
    build = "; python setup.py build_ext --inplace makes the mask step 5 to 9 times faster, see docs/performance.md"
    return f"ops: {found}{build if found == 'python' else ''}"


def bar(*args, **kwargs) -> tqdm:
    """A progress bar; a line a minute if stderr is no terminal, as in the log of a batch job."""
    return tqdm(*args, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 60, **kwargs)

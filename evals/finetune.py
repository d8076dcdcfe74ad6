"""What segment and detect share: a sweep over learning rates and seeds, and the training loop of one run."""

import datetime
import hashlib
import itertools
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Subset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import r2o
from evals.common import add_encoder_flags, table_row
from runtime import cli, distributed
from runtime.checkpoint import Checkpoint, need_same
from runtime.cli import Parser, UsageError, count, natural, need, number, rate
from runtime.loader import Batches, load_batches, step_seed
from runtime.pictures import film_strip, paint, resize_labels
from runtime.storage import lock_output, make_folder, save_or_warn, write_json
from runtime.weights import load_encoder, random_seed, read_weights


class Stopped(Exception):
    """A stop signal was received, and the run has been saved. status: the exit status."""

    def __init__(self, message: str = "", status: int = distributed.STOPPED):
        super().__init__(message)
        self.status = status


class Diverged(Exception):
    """The loss of a run is not finite; other learning rates may work."""


@dataclass
class Run:
    """One run of a sweep. settings: what a checkpoint must match, besides the flags common to all runs. steps:
    (done, total), set by fit()."""

    args: object
    out: Path
    lr: float
    seed: int
    settings: dict
    steps: tuple[int, int] = (0, 0)


def add_flags(p: Parser, out: str, epochs: int | None, batch_size: int, lr, weight_decay: float | None, seeds: list):
    """The flags of a sweep. A default of None: the data set's recipe decides."""
    add_encoder_flags(p)
    add = p.add_argument
    add("--out", default=out, help="folder for the runs, which resume from what it holds, and results.json")
    add("--epochs", type=natural, default=epochs, help="passes over the training images; 0: evaluate only")
    add("--steps", type=count, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=count, default=batch_size, help="images per step, over all processes")
    rates = "learning rates, one run each, or the word paper: those that A.2 sweeps"
    add(
        "--lr", type=lambda x: x if x == "paper" else number(float, 0, above=True)(x), nargs="+", default=lr, help=rates
    )
    add("--seeds", type=cli.seed, default=seeds, nargs="+", help="seeds, one run each")
    add("--weight-decay", type=rate, default=weight_decay, help="for all weights")
    add("--workers", type=natural, default=distributed.cores_per_process(), help="per process")
    add("--save-every", type=count, default=500, metavar="N", help="save last.pth every N steps, and at the end")


def learning_rate(step: int, steps: int, peak: float, warmup: int, drops: tuple[float, ...]) -> float:
    """Linear up to peak over `warmup` steps, then divided by 10 at each of the drops, fractions of all steps. A.2."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return peak * rise * 0.1 ** sum(step >= int(drop * steps) for drop in drops)


def resume(run: Run, checkpoint: Checkpoint, images: int, fingerprint: str, model: nn.Module, optimizer):
    """Load what the run's folder holds, if anything, on all ranks, and set run.steps. Raises UsageError if it was
    trained on other images, from other weights, or with other settings."""
    args = run.args
    flags = {name: getattr(args, name) for name in ("epochs", "steps", "batch_size", "weight_decay")}
    settings = run.settings | flags | {"images": images, "lr": run.lr, "encoder": fingerprint, "seed": run.seed}
    if found := checkpoint.read("settings step model optimizer"):
        then, path = found["settings"], checkpoint.path
        same = then.get("encoder") == fingerprint
        need(same, f"{path} was trained from other weights than --ckpt now holds: pass another --out")
        same = then.get("images") == images
        need(same, f"{path} was trained on {then.get('images')} images, not {images}: pass another --out")
        data = run.settings.get("data")
        same = then.get("data", data) == data  # detect's older runs do not say
        need(same, f"{path} was trained on other data: pass another --out")
        ends = ("epochs", "steps", "warmup") if args.epochs == 0 else ()
        need_same(path, then, settings, may_change=("data", *ends))
    last = checkpoint.restore({"settings": settings}, model, optimizer)
    if last:
        run.steps = last["step"], steps_of(last["settings"], images)


def steps_of(settings: dict, images: int) -> int:
    """How many steps a run has in all."""
    return settings.get("steps") or settings["epochs"] * (images // settings["batch_size"])


def recipe(args, lr: list[float], sweep: list[float], epochs: int | None = None, steps: int | None = None):
    """Fill in a data set's defaults. sweep: what --lr paper stands for."""
    need(args.epochs is None or args.steps is None, "--epochs and --steps are two ways to say how long: pass one")
    if args.epochs is None and args.steps is None:
        args.epochs, args.steps = epochs, steps
    args.lr = lr if args.lr is None else sweep if args.lr == ["paper"] else args.lr
    need("paper" not in args.lr, "--lr paper stands for all learning rates of A.2: pass no others beside it")


def sgd(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)


def fit(
    run: Run, model, fingerprint: str, data: Dataset, loss_of, drops, warmup: int = 0, collate=None, optimizer_of=sgd
):
    """Train the model on its device to the end, resuming from the run's folder; --epochs 0 only loads it.

    fingerprint: of the initial encoder. data: indexed by (epoch, i); all randomness of a sample must follow from these
    and the seed, so that an interrupted run ends like an uninterrupted one. loss_of(model, batch): the mean loss of a
    batch, as `collate` made it. drops, warmup: see learning_rate(). optimizer_of(model, lr, weight_decay) may
    give its groups a `scale` of the learning rate. Raises Stopped, Diverged, UsageError.
    """
    (rank, world, device), args = distributed.place(), run.args
    make_folder(run.out)
    checkpoint = Checkpoint(run.out)
    optimizer = optimizer_of(model, run.lr, args.weight_decay)
    resume(run, checkpoint, len(data), fingerprint, model, optimizer)
    first = run.steps[0]
    if args.epochs == 0:
        need(first, f"--epochs 0 evaluates a trained run, but there is no {checkpoint.path}: pass its --out")
        return
    batch = args.batch_size
    need(batch <= len(data), f"--batch-size {batch} is larger than the data ({len(data)} images): pass a smaller one")
    need(batch % world == 0, f"{world} processes cannot share --batch-size {batch}: pass a multiple of {world}")
    steps = steps_of(vars(args), len(data))
    if rank == 0 and 0 < first < steps:
        print(f"{run.out}: resuming after step {first} of {steps}", flush=True)
    ddp = DistributedDataParallel(model) if world > 1 else model
    ddp.train()
    order = Batches(len(data), batch, range(first, steps), run.seed, rank, world)
    loader = load_batches(data, order, args.workers, device, collate)
    bar = cli.bar(total=steps, initial=first, desc=str(run.out), disable=rank > 0 or first == steps)
    with distributed.StopSignals(deferred=True) as signals, bar:
        for step, samples in enumerate(loader, first):
            lr = learning_rate(step, steps, run.lr, warmup, drops)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("scale", 1)
            torch.manual_seed(step_seed(run.seed, step, rank))  # dropout; Mask R-CNN samples proposals
            loss = loss_of(ddp, samples)
            optimizer.zero_grad()
            loss.backward()
            finite, stop = distributed.agree(loss.detach().isfinite(), bool(signals.received))
            if not finite:
                raise Diverged(f"the loss of step {step + 1} of {run.out} is not finite: lower --lr")
            optimizer.step()
            bar.set_postfix_str(f"loss {loss.item():.3f}, lr {lr:.2g}", refresh=False)
            bar.update()
            if step + 1 == steps or stop or (step + 1) % args.save_every == 0:
                checkpoint.save(required=stop, step=step + 1)
            if stop:
                said = f"stop requested: saved after step {step + 1}; rerun the same command to resume"
                raise Stopped(said, signals.received or distributed.STOPPED)
    run.steps = steps, steps
    for x in model.buffers() if world > 1 else []:  # without SyncBatchNorm every rank has its own statistics
        dist.broadcast(x, 0)


def arch_of(args) -> str:
    """What --ckpt holds."""
    untrained = random_seed(args.ckpt) is not None
    return args.arch or "resnet50" if untrained else read_weights(args.ckpt, args.arch)["arch"]


def training_encoder(args) -> tuple[nn.Module, str, str]:
    """--ckpt's encoder in training mode, the line that describes it, and a fingerprint of its weights."""
    encoder, line = load_encoder(args.ckpt, args.arch)
    if distributed.place().rank == 0:
        print(line, flush=True)
    digest = hashlib.sha256(encoder.arch.encode())
    for x in encoder.state_dict().values():
        digest.update(x.numpy().tobytes())
    return encoder.train(), line, digest.hexdigest()[:16]


def jitter(rng: np.random.Generator, sample: dict, shape: tuple[int, int], size: int, void: int = 0) -> dict:
    """Resize a sample of tv_tensors to `shape`, mirror it with p = 0.5, and crop or pad it to size x size: images with
    ImageNet's mean color, masks with `void`. Boxes of less than a pixel are removed, with labels and masks."""
    fill = {tv_tensors.Image: [124, 116, 104], tv_tensors.Mask: void, "others": 0}
    crop = v2.RandomCrop((size, size), pad_if_needed=True, fill=fill)
    steps = [v2.Resize(shape, antialias=True), v2.RandomHorizontalFlip(), crop]
    if "boxes" in sample:
        steps.append(v2.SanitizeBoundingBoxes())
    for name in [n for n, x in sample.items() if isinstance(x, tv_tensors.Mask)]:  # v2.Resize shifts them
        resized = TF.resize(sample[name].as_subclass(Tensor), shape, v2.InterpolationMode.NEAREST_EXACT)
        sample[name] = tv_tensors.Mask(resized)
    with torch.random.fork_rng(devices=[]):  # all randomness follows from rng
        torch.manual_seed(int(rng.integers(2**63)))
        return v2.Compose(steps)(sample)


def eval_samples(data: Dataset, workers: int, title: str):
    """This rank's share of a data set's unchanged samples, data[i], one by one, with a bar."""
    rank, world, _ = distributed.place()
    share = Subset(data, range(rank, len(data), world))
    samples = distributed.iterate(distributed.make_loader(share, workers, batch_size=None))
    return cli.bar(samples, title, len(share), disable=rank > 0)


def save_strip(rows: list[tuple[Tensor, Tensor, Tensor]], path: Path, names: list[str] | None = None):
    """Images (3, h, w) uint8 with predicted and true ids (h, w), -1 for unpainted pixels, as a labeled PNG. names: of
    the ids, for a legend of those that occur."""
    columns, seen = [[], [], []], set()
    for image, *maps in rows:
        square = r2o.resize(image, 224)
        columns[0].append(square)
        for column, ids in zip(columns[1:], maps, strict=True):
            small = resize_labels(ids, (224, 224))
            seen |= {*small.unique().tolist()}
            column.append(torch.where(small < 0, square, paint(square[None], small[None])[0]))
    labels = "image", "prediction", "truth"
    legend = {i: names[i] for i in sorted(seen - {-1})} if names else None
    strips = [(label, torch.stack(column)) for label, column in zip(labels, columns, strict=True)]
    sheet = film_strip(strips, names=legend)
    save_or_warn(path, lambda f: sheet.save(f, "PNG"))


def sweep(args, settings: dict, train_and_measure, task: str, paper: str, is_papers_data: bool, more: dict) -> int:
    """For every learning rate and seed, train_and_measure(run) returns metrics by name, in percent, and a line
    about the encoder. Reports the learning rate whose first metric has the best mean. Returns the exit status."""
    for name in ("lr", "seeds"):
        values = getattr(args, name)
        need(len({*values}) == len(values), f"--{name} must all be different, got {values}")
    rank = distributed.place().rank
    distributed.join_process_group(datetime.timedelta(hours=2))  # the others wait while rank 0 computes AP
    if rank == 0:
        lock = lock_output(make_folder(args.out))  # noqa: F841 (held until this function returns)
    scores: dict[float, list[dict | None]] = {lr: [] for lr in args.lr}
    unfinished, found = {}, {"ckpt": args.ckpt, "seeds": args.seeds} | more
    for lr, seed in itertools.product(args.lr, args.seeds):
        metrics = None
        run = Run(args, Path(args.out, f"lr{lr:g}-seed{seed}"), lr, seed, settings)
        try:
            metrics, line = train_and_measure(run)
        except Stopped as e:
            if rank == 0:
                print(e, flush=True)
            return e.status
        except Diverged as e:  # on all ranks
            if rank == 0:
                print(f"diverged: {e}", file=sys.stderr, flush=True)
        scores[lr].append(metrics)
        done, of = run.steps
        if metrics and done < of:
            unfinished[run.out.name] = f"{done} of {of} steps"
        if rank == 0:
            found["unfinished"] = unfinished
            found["runs"] = {f"{lr:g}": x for lr, x in scores.items()}
            write_json(Path(args.out, "results.json"), found)
    if rank == 0:
        good = {lr: x for lr, x in scores.items() if None not in x}
        if not good:
            raise UsageError(f"a run diverged at each of the learning rates {args.lr}: pass lower ones with --lr")
        for name, steps in unfinished.items():
            print(f"{name}: not finished, after {steps}")
        for lr in scores:
            print(summary(good[lr], lr) if lr in good else f"diverged (lr {lr:g})")
        best = max(good, key=lambda lr: statistics.mean(next(iter(one.values())) for one in good[lr]))
        if parts := {steps for name, steps in unfinished.items() if name.startswith(f"lr{best:g}-seed")}:
            task += f", NOT FINISHED (after {', '.join(sorted(parts))})"
        print(table_row(task, line, summary(good[best], best), paper, is_papers_data), flush=True)
        write_json(Path(args.out, "results.json"), found | {"encoder": line, "best lr": best})
    return 0


def summary(runs: list[dict], lr: float) -> str:
    """The mean of each metric over the seeds, with the standard deviation."""
    parts = []
    for name in runs[0]:
        x = [one[name] for one in runs]
        parts.append(f"{name} {statistics.mean(x):.2f}" + (f" ± {statistics.stdev(x):.2f}" if len(x) > 1 else ""))
    return ", ".join(parts) + f" (n = {len(runs)}, lr {lr:g})"

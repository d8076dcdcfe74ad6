"""The loop that segment.py and detect.py share: SGD whose learning rate falls in steps, DDP, resumption, a bar."""

import argparse
import contextlib
import datetime
import hashlib
import itertools
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import functional as TF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluation
import files
import processes
import r2o
import train
from r2o import UsageError


def add_flags(
    p: argparse.ArgumentParser, out: str, epochs: int | None, batch_size: int, lr, weight_decay: float, seeds: list
):
    """The flags of a run. None: as the data set's recipe says."""
    evaluation.add_encoder_flags(p)

    def add(flag, kind, default, text, **more):
        text += "" if default is None else " (default: %(default)s)"
        p.add_argument(flag, type=kind, default=default, help=text, **more)

    add("--out", str, out, "folder for runs, which go on from what it holds, and results.json, of the last command")
    add("--epochs", int, epochs, "passes over the training images; 0: evaluate only")
    add("--batch-size", int, batch_size, "images per step, over all processes")
    add("--lr", float, lr, "learning rates, a run each", nargs="+")
    add("--seeds", int, seeds, "a run each", nargs="+")
    add("--weight-decay", float, weight_decay, "of all parameters")
    add("--workers", int, min(16, processes.own_cores()), "that read, per process")
    add("--save-every", int, 500, "save last.pth every N steps, and at the end", metavar="N")


def check_flags(args):
    for name, least in (("epochs", 0), ("batch_size", 1), ("weight_decay", 0), ("workers", 0), ("save_every", 1)):
        if not least <= getattr(args, name) < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    if not all(0 < lr < math.inf for lr in args.lr):
        raise UsageError(f"--lr must be above 0, got {min(args.lr)}")
    if min(args.seeds) < 0 or len({*args.seeds}) < len(args.seeds) or len({*args.lr}) < len(args.lr):
        raise UsageError(f"--lr and --seeds must all be different, seeds 0 or more, got {args.lr} and {args.seeds}")


def learning_rate(step: int, steps: int, peak: float, warmup: int, drops: tuple[float, ...]) -> float:
    """Linear up to peak over `warmup` steps, then a tenth of it after each of the drops, fractions of all steps."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return peak * rise * 0.1 ** sum(step >= int(drop * steps) for drop in drops)


class Diverged(Exception):
    """The loss of a run is not finite; other learning rates may do."""


def resume(last: Path, settings: dict, model: nn.Module, optimizer) -> int:
    """Loads what rank 0's last.pth holds, where there is one, on all processes: the steps that it has. Raises
    UsageError where it was trained with other settings."""
    rank, world, _ = processes.place()
    shared = [None]  # not read by each: by now, or on another disk, it may be another
    if rank == 0 and last.exists():
        file = r2o.load_file(last)
        for key, now in settings.items():
            then = file.get("settings", {}).get(key)
            if then != now and key == "encoder":
                raise UsageError(f"{last} was trained from other weights than --ckpt now holds: pass another --out")
            if then != now and not (key == "epochs" and now == 0):
                raise UsageError(f"{last} was trained with {key} {then}, now it is {now}: pass another --out")
        shared = [file]
    if world > 1:
        dist.broadcast_object_list(shared)
    if shared[0] is None:
        return 0
    model.load_state_dict(shared[0]["model"])
    optimizer.load_state_dict(shared[0]["optimizer"])
    return shared[0]["step"]


def fit(
    model: nn.Module,
    data: torch.utils.data.Dataset,
    collate,
    loss_of,
    out: Path,
    settings: dict,
    fingerprint: str,
    args,
    lr: float,
    seed: int,
    drops: tuple[float, ...],
    warmup: int = 0,
) -> bool:
    """Trains the model, on its device, from what OUT/last.pth holds to the end. False: told to stop; it is saved.

    data: indexed by (epoch, i), all randomness of a sample following from them and its seed, so that runs that were
    interrupted end like others. loss_of(model, batch, device): the mean loss of what `collate` made of samples.
    settings, fingerprint: what a checkpoint must agree with, and the encoder's. --epochs 0 takes any number of epochs'.
    Raises UsageError where it does not, and where the batch is larger than the data or not divisible by the processes;
    Diverged where the loss is not finite.
    """
    rank, world, device = processes.place()
    last, settings = out / "last.pth", settings | {"images": len(data), "batch_size": args.batch_size, "lr": lr}
    settings |= {"encoder": fingerprint, "epochs": args.epochs, "weight_decay": args.weight_decay, "seed": seed}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=args.weight_decay)
    first = resume(last, settings, model, optimizer)
    if args.epochs == 0:
        if not first:
            raise UsageError(f"--epochs 0 evaluates what was trained, but there is no {last}: pass its --out")
        return True
    if args.batch_size > len(data):
        raise UsageError(f"--batch-size {args.batch_size} is larger than the data ({len(data)} images): pass less")
    if args.batch_size % world:
        raise UsageError(f"{world} processes cannot share --batch-size {args.batch_size}: pass a multiple of {world}")
    per_epoch = len(data) // args.batch_size
    steps = args.epochs * per_epoch
    if first == steps:
        return True
    if rank == 0 and first:
        print(f"{out}: going on after step {first} of {steps}", flush=True)
    ddp = DistributedDataParallel(model) if world > 1 else model
    ddp.train()

    def save(step):
        file = {"settings": settings, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        return files.attempt(last, lambda f: torch.save(file, f))

    order = train.Batches(len(data), args.batch_size, range(first, steps), seed, rank, world)
    loader = torch.utils.data.DataLoader(
        data,
        batch_sampler=order,
        collate_fn=collate,
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=processes.deaf,
    )
    with contextlib.ExitStack() as stack:
        told = stack.enter_context(processes.stop_signals())
        bar = stack.enter_context(files.bar(total=steps, initial=first, desc=str(out), disable=rank > 0))
        for step, batch in enumerate(loader, first):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr, warmup, drops)
            torch.manual_seed((seed << 32) + step * world + rank)  # Mask R-CNN draws proposals
            loss = loss_of(ddp, batch, device)
            optimizer.zero_grad()
            loss.backward()
            watch = torch.stack([loss.detach(), torch.tensor(float(bool(told)), device=loss.device)])
            if world > 1:
                dist.all_reduce(watch)
            mean, stop = watch[0].item() / world, watch[1].item() > 0
            if not math.isfinite(mean):
                raise Diverged(f"the loss of step {step + 1} of {out} is not finite: lower --lr")
            optimizer.step()
            bar.set_postfix_str(f"loss {mean:.3f}, lr {optimizer.param_groups[0]['lr']:.2g}", refresh=False)
            bar.update()
            done = step + 1
            saved = True
            if rank == 0 and (done == steps or stop or done % args.save_every == 0):
                saved = save(done)
            if stop:
                if not saved:
                    raise UsageError(f"told to stop, but {last} could not be saved: the one before stays")
                if rank == 0:
                    print(f"told to stop: saved after step {done}; the same command goes on", flush=True)
                return False
    for x in model.buffers() if world > 1 else []:  # where batch norm is not synchronised each has its own
        dist.broadcast(x, 0)
    return True


def crop(rng: np.random.Generator, image: Tensor, maps: Tensor, shape: tuple[int, int], size: int, void: int):
    """Resizes to `shape`, mirrors with p = 0.5, cuts a random size x size window; where the image is smaller, pads
    below and to the right with the mean colour. image: (3, h, w) uint8; maps: (n, h, w) uint8, resized by the nearest
    pixel and padded with `void`. Returns image, maps, whether mirrored, and the window's top and left."""
    image = TF.resize(image, list(shape), antialias=True)
    maps = TF.resize(maps, list(shape), TF.InterpolationMode.NEAREST_EXACT)
    mirrored = rng.random() < 0.5
    if mirrored:
        image, maps = image.flip(-1), maps.flip(-1)
    top, left = (int(rng.integers(0, max(0, side - size) + 1)) for side in shape)
    image, maps = (x[:, top : top + size, left : left + size] for x in (image, maps))
    whole = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None].repeat(1, size, size)  # ImageNet's mean
    whole[:, : image.shape[1], : image.shape[2]] = image
    return whole, F.pad(maps, [0, size - maps.shape[2], 0, size - maps.shape[1]], value=void), mirrored, top, left


def share(n: int) -> range:
    """This process's part of n images to evaluate."""
    rank, world, _ = processes.place()
    return range(rank, n, world)


def backbone(args, rank: int) -> tuple[nn.Module, str, str]:
    """--ckpt's encoder, for training, the line about it, and a fingerprint of its weights."""
    encoder, line = r2o.load_encoder(args.ckpt, args.arch)
    if rank == 0:
        print(line, flush=True)
    digest = hashlib.sha256(encoder.arch.encode())
    for x in encoder.state_dict().values():
        digest.update(x.numpy().tobytes())
    return encoder.train(), line, digest.hexdigest()[:16]


def channels(layer: nn.Module) -> int:
    """What a stage of an encoder puts out."""
    return [m for m in layer.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features


def to_device(model: nn.Module, world: int, device: torch.device) -> nn.Module:
    """On its device; with batch norm synchronised between GPUs."""
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(device)


class Whole(torch.utils.data.Dataset):
    """Some of a data set's samples as they are: data.whole(i)."""

    def __init__(self, data, indices):
        self.data, self.indices = data, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i: int):
        return self.data.whole(self.indices[i])


def folder(args, lr: float, seed: int) -> Path:
    """Of one run."""
    path = Path(args.out) / f"lr{lr:g}-seed{seed}"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UsageError(f"cannot make the folder {path} ({e.strerror}): pass another --out") from None
    return path


def strip(rows: list[tuple[Tensor, Tensor, Tensor]], path: Path):
    """Images (3, h, w) uint8 with predicted and true ids (h, w), -1 where nothing is painted, as a labelled PNG."""
    columns = [[], [], []]
    for image, *maps in rows:
        square = r2o.resize(image, 224)
        columns[0].append(square)
        for column, ids in zip(columns[1:], maps, strict=True):
            small = evaluation.shrink(ids, 224)
            column.append(torch.where(small < 0, square, r2o.paint(square[None], small[None])[0]))
    labels = "image", "prediction", "truth"
    sheet = r2o.film_strip([(label, torch.stack(column)) for label, column in zip(labels, columns, strict=True)])
    files.attempt(path, lambda f: sheet.save(f, "PNG"))


def sweep(args, run, task: str, theirs: str, more: dict) -> int:
    """run(lr, seed) for every learning rate and seed, each giving metrics by name, in percent, and a line about the
    encoder. Reports the learning rate that is best by the first metric's mean, in OUT/results.json and in a row.
    Returns the exit status."""
    rank, world, device = processes.place()
    processes.tie(rank, world, device, datetime.timedelta(hours=2))  # some wait while rank 0 counts AP
    if rank == 0:
        folder(args, args.lr[0], args.seeds[0])
        lock = files.claim(Path(args.out))  # noqa: F841
    scores: dict[float, list[dict | None]] = {lr: [] for lr in args.lr}
    found = {"ckpt": args.ckpt, "seeds": args.seeds} | more
    for lr, seed in itertools.product(args.lr, args.seeds):
        try:
            metrics, line = run(lr, seed)
        except Diverged as e:  # alike on all processes
            metrics = {}
            if rank == 0:
                print(f"diverged: {e}", file=sys.stderr, flush=True)
        if metrics is None:
            return processes.STOPPED
        scores[lr].append(metrics or None)
        if rank == 0:
            runs = {f"{lr:g}": x for lr, x in scores.items()}
            evaluation.write_json(Path(args.out) / "results.json", found | {"runs": runs})
    if rank > 0:
        return 0
    good = {lr: x for lr, x in scores.items() if None not in x}
    if not good:
        raise UsageError(f"a run diverged at each of the learning rates {args.lr}: pass lower ones with --lr")

    def said(lr: float) -> str:
        parts = []
        for name in good[lr][0]:
            x = [one[name] for one in good[lr]]
            spread = f" ± {statistics.stdev(x):.2f}" if len(x) > 1 else ""
            parts.append(f"{name} {statistics.mean(x):.2f}{spread}")
        return ", ".join(parts) + f" (n = {len(good[lr])}, lr {lr:g})"

    for lr in scores:
        print(said(lr) if lr in good else f"diverged (lr {lr:g})")
    best = max(good, key=lambda lr: statistics.mean(next(iter(one.values())) for one in good[lr]))
    print(evaluation.row(task, line, said(best), theirs), flush=True)
    evaluation.write_json(Path(args.out) / "results.json", found | {"encoder": line, "best lr": best, "runs": runs})
    return 0

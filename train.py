"""Pretrain an encoder with R2O on any folder of images (arXiv 2208.11821).

    torchrun --nproc_per_node=8 train.py --data /imagenet      # the paper's: ResNet-50, 300 epochs, batches of 4096
    python train.py --data photos --arch resnet18 --epochs 20 --batch-size 64      # one process, CPU or GPU
    python train.py --data photos --batch-size 64 --dry-run      # the plan, and what a few steps take

OUT gets last.pth (training goes on from it by itself) and the one before, previous.pth, log.jsonl, strip.png and, at
the end, r2o.pth: the online encoder under torchvision's parameter names.

Exit status: 0 done; 2 bad arguments, data or disk, said in one line; 75 stopped by SIGTERM or SIGUSR1 after saving: the
same command goes on. Under torchrun the status is torchrun's own, 1 for both.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import files
import processes
import r2o

BAD_STEPS = 10  # in a row, after which a run ends


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    add = p.add_argument_group("data and output").add_argument
    add("--data", required=True, help="folder of images, flat or nested; its subfolder train, where there is one")
    add("--subset", metavar="FILE", help="train on some of them: a line each, a folder, file, or file name")
    add("--out", default="out", help="folder for checkpoints, log and pictures; training goes on from what it holds")
    add("--regions", help="file of the region maps (default OUT/regions.npy); name one to share it between runs")
    add("--workers", type=int, default=min(16, processes.own_cores()), help="per process; raise while the GPU waits")
    keep = "also keep the encoder of every N-th epoch, as epoch_0100.pth (0: none)"
    add("--keep-every", type=int, default=0, metavar="N", help=keep)
    save = "save last.pth every N steps too, not only after epochs (0); lower where epochs take hours"
    add("--save-every", type=int, default=500, metavar="N", help=save)
    add("--tensorboard", action="store_true", help="also log to OUT/tensorboard")
    add = p.add_argument_group("instead of training").add_argument
    add("--prepare", action="store_true", help="make the region maps and end")
    add("--dry-run", action="store_true", help="print the plan, time a few steps, write nothing")
    add = p.add_argument_group("training (A.1)").add_argument
    add("--arch", default="resnet50", choices=r2o.ARCHS, help="resnet18 for small data, tiny for 64-pixel images")
    add("--epochs", type=int, default=300, help="passes over the data; small data wants more")
    add("--batch-size", type=int, default=4096, help="images per step, over all processes; lower for small data")
    accum = "each process takes its share of a batch in N parts, one after another; raise to fit the memory"
    add("--accum", type=int, default=1, metavar="N", help=accum)
    add("--size", type=int, default=224, help="side of the views in pixels; lower only for small images")
    add("--lr", type=float, default=0.3, help="peak for a batch of 256 and K = --lr-k; raise for very short runs")
    add("--lr-k", type=float, default=16, help="the learning rate is multiplied by K / this; 0: by nothing")
    add("--weight-decay", type=float, default=1e-6, help="of weight matrices; biases and batch norm have none")
    add("--tau", type=float, default=0.99, help="momentum of the target at the start; lower for very short runs")
    add("--hidden", type=int, default=4096, help="width of projector and predictor; lower for tiny")
    add("--dim", type=int, default=256, help="width of projections; lower for tiny")
    add("--seed", type=int, default=0, help="of weights, order, crops, colours and clusters")
    add("--compile", action="store_true", help="the encoders, by torch.compile; see with --dry-run whether it helps")
    add("--changed", action="store_true", help="go on with another --lr, --lr-k, --weight-decay or --tau than before")
    add = p.add_argument_group("masks (Sec. 3.1, 3.3)").add_argument
    add("--prior", default="slic", choices=("slic", "grid"), help="region-level prior; grid needs no image (A.7)")
    add("--segments", type=int, default=100, help="superpixels asked of SLIC; fewer for small images")
    add("--k-start", type=int, default=128, help="clusters at first; fewer for small groups of images")
    add("--k-end", type=int, default=4, help="clusters at the end; above --k-start for a rising schedule")
    add("--hold-epochs", type=int, help="epochs at --k-start (default 40 in 300; COCO: 8)")
    add("--schedule", default="cosine", choices=("cosine", "linear", "constant"), help="how K changes (Table 9)")
    add("--kmeans-group", type=int, default=32, help="images that share one K-means; fewer where masks should not")
    add("--assign", default="pixel", choices=("pixel", "region"), help="what clusters own; region: sharper outlines")
    args = p.parse_args(argv)
    if args.hold_epochs is None:
        args.hold_epochs = round(args.epochs * 40 / 300)
    for name in ("epochs", "batch_size", "accum", "segments", "k_start", "k_end", "kmeans_group", "hidden", "dim"):
        if getattr(args, name) < 1:
            raise r2o.UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("workers", "keep_every", "save_every", "hold_epochs", "lr", "lr_k", "weight_decay", "tau", "seed"):
        if not 0 <= getattr(args, name) < math.inf:
            raise r2o.UsageError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(args, name)}")
    if args.tau > 1 or args.seed >= 2**31:
        raise r2o.UsageError(f"--tau must be at most 1 and --seed below 2^31, got {args.tau} and {args.seed}")
    if args.size < 32 or args.size % 32:
        raise r2o.UsageError(f"--size {args.size} does not fit the encoder's strides: pass a multiple of 32")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise r2o.UsageError("--tensorboard needs the package tensorboard: pip install tensorboard")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


class Batches:
    """Sampler of this process's share of every batch, from optimiser step `first` to the end of training: each epoch is
    a new permutation, each batch a slice of it, given in `accum` parts, of which each process has a slice. The
    remainder of an epoch is dropped."""

    def __init__(self, images: int, batch: int, steps: range, seed: int, rank: int = 0, world: int = 1, accum: int = 1):
        self.images, self.batch, self.steps, self.seed = images, batch, steps, seed
        self.rank, self.world, self.accum = rank, world, accum

    def __iter__(self):
        per_epoch, share = self.images // self.batch, self.batch // self.accum // self.world
        order, epoch = None, None
        for step in self.steps:
            if epoch != step // per_epoch:
                epoch = step // per_epoch
                order = np.random.default_rng([self.seed, epoch]).permutation(self.images)
            for part in range(self.accum):
                start = step % per_epoch * self.batch + (part * self.world + self.rank) * share
                yield [(epoch, i) for i in order[start : start + share]]


def check(args, world: int, images: int, num_regions: int):
    """Refuses what cannot work: once before the region maps are made, and again when they are there."""
    batch, parts = args.batch_size, world * args.accum
    group = min(args.kmeans_group, max(min(batch, images) // args.accum, 1))
    k = max(args.k_start, args.k_end)
    if batch > images:
        fits = max(images // (parts * group) * parts * group, 1)
        raise r2o.UsageError(f"--batch-size {batch} is larger than the data ({images} images): pass at most {fits}")
    if batch % parts:
        accum = f" in {args.accum} parts" if args.accum > 1 else ""
        raise r2o.UsageError(f"{world} processes cannot share --batch-size {batch}{accum}: pass a multiple of {parts}")
    if batch // parts % group and (group % (batch // parts) or batch // args.accum % group):
        raise r2o.UsageError(
            f"{batch // parts} images per process do not divide into K-means groups of {group}: "
            f"pass --batch-size a multiple of {parts * group}, or another --kmeans-group"
        )
    if k > group * num_regions:
        raise r2o.UsageError(
            f"{k} clusters are more than the regions of one K-means ({group} images of at most {num_regions}): "
            "lower --k-start and --k-end, or raise --batch-size"
        )


def to_device(batches, device: torch.device):
    """Batches, moved to `device` but for their factors; on a GPU each is copied while the one before is trained on."""
    if device.type == "cpu":
        yield from batches
        return
    stream, ahead = torch.cuda.Stream(device), None
    for batch in itertools.chain(batches, [None]):
        coming = None
        if batch is not None:
            with torch.cuda.stream(stream):
                moved = {n: x if n == "factors" else x.to(device, non_blocking=True) for n, x in batch.items()}
                coming = moved, stream.record_event()
        if ahead is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(ahead[1])
            for x in ahead[0].values():
                if x.is_cuda:
                    x.record_stream(current)
            yield ahead[0]
        ahead = coming


# ---------------------------------------------------------------------------------------------------------------------
# What is written
# ---------------------------------------------------------------------------------------------------------------------


def export(path: Path, model: r2o.R2O, args, epoch: int) -> bool:
    """The online encoder under torchvision's parameter names, with plain-typed metadata."""
    weights = {name: x.cpu().contiguous() for name, x in model.online["encoder"].state_dict().items()}
    file = {"arch": args.arch, "epoch": epoch, "args": vars(args), "state_dict": weights}
    return files.attempt(path, lambda f: torch.save(file, f))


def film_images(data: r2o.ImageRegions, count: int) -> dict[str, torch.Tensor]:
    """`count` whole images, evenly spaced, with their regions: the same ones after every epoch."""
    samples = [data[0, i] for i in np.linspace(0, len(data) - 1, count).astype(int)]
    film = {key: torch.stack([s[key] for s in samples]) for key in ("image", "regions")}
    return film | {"image": film["image"].movedim(-1, 1)}  # (n, 3, S, S)


@torch.no_grad()
def draw_strip(path: Path, model: r2o.R2O, film: dict, masks: list, k: int, epoch: int, seed: int, device):
    """Adds the film's masks after this epoch to `masks`; paints image, prior, and up to six of the epochs so far."""
    images, regions = (film[key].to(device) for key in ("image", "regions"))
    uniforms = r2o.seeding_uniforms(1, k, torch.Generator().manual_seed(seed)).to(device)
    encoder = model.online["encoder"].eval()
    rows = torch.linspace(0, len(images) - 1, min(8, len(images))).long()  # of the film, evenly
    m = model.predict_masks(encoder, r2o.normalize(images), regions, k, uniforms).cpu()[rows]
    encoder.train()
    masks.append([epoch, k, m.to(torch.int16)])
    shown = [masks[i] for i in sorted({*np.linspace(0, len(masks) - 1, 6).astype(int)})]
    image, prior = film["image"][rows], film["regions"][rows]
    columns = [("image", image), (f"prior, R = {int(prior.max()) + 1}", r2o.paint(image, prior))]
    columns += [(f"epoch {e}, K = {k}", r2o.paint(image, m)) for e, k, m in shown]
    strip = r2o.film_strip(columns, zoom=max(1, 128 // image.shape[-1]))
    files.attempt(path, lambda f: strip.save(f, "PNG"))
    return strip


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------


def telling_epochs(args) -> list[int]:
    """The first, the last of the warm-up and of the plateau, thirds, and the last."""
    thirds = {round(args.epochs * i / 3) for i in (1, 2, 3)}
    return sorted(e for e in {1, round(args.epochs / 100), args.hold_epochs} | thirds if 1 <= e <= args.epochs)


def amount(x: float, units: tuple) -> str:
    """x in the largest of the units, ((size, name), ...), that it fills."""
    size, name = next((unit for unit in units if x >= unit[0]), units[-1])
    return f"{x / size:.3g} {name}"


def duration(seconds: float) -> str:
    return amount(seconds, ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds")))


def size_of(count: float) -> str:
    return amount(count, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")))


def print_plan(args, world: int, images: int, maps_file: Path, seconds_per_map: float):
    per_epoch, parts = images // args.batch_size, world * args.accum
    steps = args.epochs * per_epoch
    group = min(args.kmeans_group, args.batch_size // args.accum)
    print(f"{images:,} images: {args.epochs} epochs of {per_epoch:,} steps, {steps:,} in all")
    print(
        f"batches of {args.batch_size}: {world} process(es) x {args.accum} part(s) x {args.batch_size // parts} images,"
        f" {args.batch_size // group} K-means of {group} images a step"
    )
    maps = f"region maps: {size_of(images * (args.size // 4) ** 2)}"
    if maps_file.with_suffix(".json").exists():
        print(f"{maps}, there, in {maps_file}")
    else:
        cores = processes.cores()
        print(f"{maps}, to be made in {maps_file}: {duration(images * seconds_per_map / cores)} on {cores} cores")
    print("epoch    K  learning rate      tau   (at its end)")
    for epoch in telling_epochs(args):
        k, lr, tau = schedule(args, epoch * per_epoch - 1, per_epoch)
        print(f"{epoch:5} {k:4} {lr:14.4g} {tau:8.5f}")


def memory(model: r2o.R2O, images: int, size: int, device) -> float:
    """Bytes that training takes on `device` with so many images at a time, about: weights, gradients, momentum and the
    update; views in full precision; and what the encoder keeps of them for the way back, measured on 2 and 4 views."""
    kept = []
    for views in (2, 4):
        x = torch.zeros(views, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        storages = {}

        def keep(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast(device):
            c5 = r2o.encode(model.online["encoder"], x)
        kept.append(sum(storages.values()))
        del c5
    weights = sum(p.nbytes for p in model.parameters())
    weights += 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return weights + images * ((kept[1] - kept[0]) + 6 * 12 * size**2)  # 2 views: kept; 6 images in float32


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


def schedule(args, step: int, per_epoch: int) -> tuple[int, float, float]:
    """K, learning rate and tau of an optimiser step, counted from 0."""
    steps = args.epochs * per_epoch
    k = r2o.num_clusters(step // per_epoch + 1, args.epochs, args.k_start, args.k_end, args.hold_epochs, args.schedule)
    peak = args.lr * args.batch_size / 256 * (k / args.lr_k if args.lr_k else 1)
    return k, r2o.learning_rate(step, steps, steps // 100, peak), r2o.target_momentum(step, steps, args.tau)


def autocast(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def gradients(ddp, batches, parts: int, k: int, generator: torch.Generator) -> tuple[dict, list]:
    """Leaves the gradients of the mean loss over a whole batch, the next `parts` of batches, in the parameters. Returns
    what `R2O` reports, averaged over the parts (the loss: over all pairs), and the gradients."""
    reports, total = [], 0
    for part in range(parts):
        batch = next(batches)
        images = r2o.normalize(batch["image"].movedim(-1, 1)).contiguous(memory_format=torch.channels_last)
        views, flips, factors = (batch[n].transpose(0, 1).flatten(0, 1) for n in ("views", "flips", "factors"))
        views = r2o.augment(views.movedim(-1, 1), flips, factors)  # (2B, 3, S, S): first views, then second
        views = views.contiguous(memory_format=torch.channels_last)
        more = part < parts - 1 and isinstance(ddp, DistributedDataParallel)
        with ddp.no_sync() if more else contextlib.nullcontext():
            with autocast(images.device):
                loss, report = ddp(images, views, batch["regions"], batch["boxes"], batch["flips"], k, generator)
            pairs = report.pop("total")  # of all ranks
            (loss * pairs).backward()  # a sum over pairs: how many there are in all is known after the last part
        total = total + pairs
        report |= {"loss": loss.detach() * pairs, "unreadable": batch["unreadable"].float().mean()}
        reports.append({name: x.to(pairs.device, non_blocking=True) for name, x in report.items()})
    grads = [p.grad for p in ddp.parameters() if p.grad is not None]
    torch._foreach_mul_(grads, 1 / total.clamp(min=1))
    means = {name: sum(r[name] for r in reports) / parts for name in reports[0]}
    return means | {"loss": means["loss"] * parts / total.clamp(min=1)}, grads


def take_step(ddp, optimizer, batches, args, step: int, per_epoch: int, told: bool) -> tuple[dict, bool, bool]:
    """One step of optimiser and target, or none where the loss or a gradient is not finite. Returns what to watch,
    whether the step was skipped, and whether any process was told to stop: alike on all of them."""
    model = ddp.module if isinstance(ddp, DistributedDataParallel) else ddp
    k, lr, tau = schedule(args, step, per_epoch)
    generator = torch.Generator().manual_seed((args.seed << 32) + step)  # alike on all ranks
    statistics = [b for b in model.buffers() if b.is_floating_point()]  # of batch norm
    before = torch._foreach_add(statistics, 0)
    optimizer.zero_grad()
    watch, grads = gradients(ddp, batches, args.accum, k, generator)
    finite = torch.stack(torch._foreach_norm(grads)).isfinite().all() & watch["loss"].isfinite()
    flags = torch.stack([~finite, torch.tensor(told, device=finite.device)]).float()
    if ddp is not model:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    skip, stop = flags.bool().tolist()
    if skip:
        torch._foreach_copy_(statistics, before)
    else:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        model.update_target(tau)
    return watch, skip, stop


def build(args, num_regions: int, rank: int, world: int, device, checkpoint: dict | None = None):
    """Ties the processes together: model, the same under DDP, optimiser, and rank 0's checkpoint, loaded everywhere."""
    processes.tie(rank, world, device)
    torch.backends.cudnn.benchmark = True
    if world > 1:
        shared = [checkpoint]  # not read by each: their folders, or what they hold by now, may differ
        dist.broadcast_object_list(shared)
        checkpoint = shared[0]
    torch.manual_seed(args.seed)  # all processes start from the same weights
    settings = {"assign": args.assign, "hidden": args.hidden, "dim": args.dim, "compile": args.compile}
    model = r2o.R2O(args.arch, num_regions, args.kmeans_group, **settings)
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = r2o.LARS([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=args.weight_decay)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group in optimizer.param_groups:
            group["weight_decay"] = args.weight_decay
    ddp = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    return model, ddp, optimizer, checkpoint


def load_batches(data: r2o.ImageRegions, batches, args, device):
    """One loader over all epochs: its workers fetch across their ends."""
    settings = {"num_workers": args.workers, "pin_memory": device.type == "cuda", "worker_init_fn": processes.deaf}
    return to_device(torch.utils.data.DataLoader(data, batch_sampler=batches, **settings), device)


def dry_run(args, images: files.ImageList, maps_file: Path, rank: int, world: int, device) -> int:
    """Prints the plan, and times a few steps on at most 256 of the images, over and over."""
    names = (images[i] for i in np.linspace(0, len(images) - 1, min(256, len(images))).astype(int))
    sample = files.ImageList(images.root, ((name, 0) for name in names))
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        maps_of_sample = Path(folder) / "regions.npy"
        settings = args.prior, args.segments, args.size // 4, args.workers
        maps, header = files.region_maps(sample, maps_of_sample, *settings)
        seconds = (time.perf_counter() - began) * max(args.workers, 1) / len(sample)
        check(args, world, len(images), header["num_regions"])
        if rank == 0:
            print_plan(args, world, len(images), maps_file, seconds)
        model, ddp, optimizer, _ = build(args, header["num_regions"], rank, world, device)
        share = args.batch_size // world // args.accum
        need = memory(model, share, args.size, device)
        if device.type == "cuda":
            have = torch.cuda.mem_get_info(device)[1]
        else:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / here
        fits = f"about {size_of(need)} for {share} images at a time, of {size_of(have)} that there are"
        if rank == 0:
            print(f"memory of each process: {fits}", flush=True)
        if need > have:
            raise r2o.UsageError(
                f"too little memory ({fits}): raise --accum, lower --batch-size, or take more processes"
            )
        data = r2o.ImageRegions(sample, maps, header, args.size, args.seed)
        warm, timed = 1, 3
        order = itertools.cycle(range(len(data)))
        keys = [[(rank, next(order)) for _ in range(share)] for _ in range((warm + timed) * args.accum)]
        batches, taken = load_batches(data, keys, args, device), []
        per_epoch = len(images) // args.batch_size
        for step in range(warm + timed):
            began = time.perf_counter()
            take_step(ddp, optimizer, batches, args, step, per_epoch, told=False)
            taken.append(time.perf_counter() - began)
    if rank == 0:
        each = statistics.median(taken[warm:])
        print(
            f"{timed} steps took {each:.3g} s each ({min(taken[warm:]):.3g} to {max(taken[warm:]):.3g}) on {world} x "
            f"{device.type}, ops: {r2o.extension(device)}: {args.batch_size / each:.4g} images/s, "
            f"{duration(each * args.epochs * per_epoch)} in all"
        )
        if device.type == "cuda":
            print(f"memory of rank 0, at most: {size_of(torch.cuda.max_memory_allocated(device))}")
    return 0


def alarms(record: dict) -> list[str]:
    """What in an epoch's record says that training goes wrong."""
    said = []
    if record["spread"] < 0.1:
        said.append("the projections have collapsed to a point (spread near 0): lower --lr, or raise --tau")
    if record["pairs"] == 0:
        said.append("no mask is seen by both views: nothing is learned; are the images larger than a few pixels?")
    if record["K"] > 1 and record["largest"] > 0.95:
        said.append("one cluster owns almost everything: the features have collapsed")
    if record["skipped"]:
        said.append(f"{record['skipped']} steps were skipped, loss or gradients were not finite: consider a lower --lr")
    return said


def train(args) -> int:
    """Returns the exit status."""
    rank, world, device = processes.place()
    out = Path(args.out)
    maps_file = Path(args.regions or out / "regions.npy")
    images = files.list_images(args.data, args.subset)
    check(args, world, len(images), num_regions=256)
    if args.dry_run:
        return dry_run(args, images, maps_file, rank, world, device)
    for folder in (out, maps_file.parent):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise r2o.UsageError(f"cannot make the folder {folder} ({e.strerror}): pass another") from None
    checkpoint = None
    if rank == 0 and not args.prepare:
        lock = files.claim(out)  # noqa: F841
        checkpoint = files.load_checkpoint(out, args, images.names)

    # The region maps are made once, before the processes are tied together: the others wait without a timeout.
    settings = args.prior, args.segments, args.size // 4, processes.cores() if args.workers else 0
    maps, header = files.region_maps(images, maps_file, *settings)
    data = r2o.ImageRegions(images, maps, header, args.size, args.seed)
    check(args, world, len(data), header["num_regions"])
    if checkpoint and checkpoint["images"] != len(data):
        raise r2o.UsageError(
            f"{out / 'last.pth'} was trained on {checkpoint['images']} images, of which {len(data)} can be read now: "
            "mend them and make the region maps anew, or pass another --out"
        )
    found = f"{len(data)} images of at most {header['num_regions']} regions ({len(header['unreadable'])} unreadable)"
    if args.prepare:
        if rank == 0:
            print(f"{maps_file}: {found}")
        return 0

    stack = contextlib.ExitStack()
    told = stack.enter_context(processes.stop_signals())  # from here on all processes stop together, after a step
    model, ddp, optimizer, checkpoint = build(args, header["num_regions"], rank, world, device, checkpoint)
    parameters = list(model.parameters())
    per_epoch = len(data) // args.batch_size
    steps = args.epochs * per_epoch
    state = {"step": 0, "streak": 0, "taken": 0, "skipped": 0, "sums": {}, "masks": []}
    if checkpoint:
        state = {key: checkpoint[key] for key in state}
    del checkpoint
    if args.changed:
        state["streak"] = 0
    first, streak, skipped, taken, masks = (state[key] for key in ("step", "streak", "skipped", "taken", "masks"))
    order = Batches(len(data), args.batch_size, range(first, steps), args.seed, rank, world, args.accum)
    batches = load_batches(data, order, args, device)

    if rank == 0:
        film = film_images(data, min(32, len(data)))
        print(f"{args.arch} on {world} x {device.type}, ops: {r2o.extension(device)}")
        print(found)
        print(f"{args.epochs} epochs of {per_epoch} steps of {args.batch_size} images")
        if (part := args.batch_size // args.accum) < min(args.kmeans_group, args.batch_size):
            print(f"train.py: warning: K-means of {part} images, all that --accum leaves at a time", file=sys.stderr)
        if first == steps:
            print(f"done already, after step {first}")
        elif first:
            print(f"going on after step {first}, {first % per_epoch} of {per_epoch} in epoch {first // per_epoch + 1}")
        sys.stdout.flush()
        log = []  # an epoch that was logged but not saved is done again
        if (out / "log.jsonl").exists():
            log = [r for r in (out / "log.jsonl").read_bytes().splitlines(keepends=True) if r.endswith(b"\n")]
            log = log[: first // per_epoch]  # a row an epoch
            files.attempt(out / "log.jsonl", lambda f: f.writelines(log))
        board = None
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(out / "tensorboard", purge_step=first // per_epoch + 1)

    sums: dict[str, torch.Tensor] = {}  # of this epoch and process, since they were last gathered
    bar, stop = None, False
    with stack:
        for step in range(first, steps):
            epoch, done = step // per_epoch, step % per_epoch
            k, lr, tau = schedule(args, step, per_epoch)
            if bar is None:
                title = f"epoch {epoch + 1}/{args.epochs}"
                bar = files.bar(total=per_epoch, initial=done, desc=title, disable=rank > 0)
                began, began_at = time.perf_counter(), done
            watch, skip, stop = take_step(ddp, optimizer, batches, args, step, per_epoch, bool(told))
            if skip:
                streak, skipped = streak + 1, skipped + 1
            else:
                streak, taken = 0, taken + 1
                for name, value in watch.items():
                    sums[name] = sums.get(name, 0) + value.double()
            if streak == BAD_STEPS:
                raise r2o.UsageError(
                    f"{BAD_STEPS} steps in a row, up to step {step + 1}, gave a loss or gradients that are not finite: "
                    f"{out / 'last.pth'} is from before; go on from it with a lower --lr and --changed"
                )
            bar.update()
            if done % 10 == 0:
                speed = (done + 1 - began_at) * args.batch_size / (time.perf_counter() - began)
                shown = f"loss {watch['loss']:.3f}, K {k}, lr {lr:.2g}, tau {tau:.4f}, {speed:.0f} images/s"
                bar.set_postfix_str(shown, refresh=False)
            ends = done + 1 == per_epoch
            if not (ends or stop or (args.save_every and (step + 1) % args.save_every == 0)):
                continue

            # Gather, look, save.
            if sums:
                total = torch.stack(list(sums.values()))
                if world > 1:
                    dist.all_reduce(total)
                for name, value in zip(sums, total.tolist(), strict=True):
                    state["sums"][name] = state["sums"].get(name, 0) + value / world
                sums = {}
            if not torch.stack(torch._foreach_norm(parameters)).isfinite().all():
                raise r2o.UsageError(
                    f"the weights are not finite after step {step + 1}: {out / 'last.pth'} is from before; "
                    "go on from it with a lower --lr and --changed"
                )
            lost = 0
            if ends:
                bar.close()
                speed = (done + 1 - began_at) * args.batch_size / (time.perf_counter() - began)
                record = {"epoch": epoch + 1, "K": k, "lr": lr, "tau": tau}
                record |= {name: value / max(taken, 1) for name, value in state["sums"].items()}
                lost = record["unreadable"] = round(record.get("unreadable", 0) * taken * args.batch_size)
                record |= {"skipped": skipped, "images/s": speed}
                if rank == 0:
                    end_epoch(record, model, film, masks, log, board, args, device)
                bar, state["sums"], taken, skipped = None, {}, 0, 0
            if rank == 0 and (streak == 0 or stop):  # within a streak what is there is kept
                state |= {"step": step + 1, "streak": streak, "taken": taken, "skipped": skipped, "masks": masks}
                file = {
                    "epoch": (step + 1) // per_epoch,
                    "args": vars(args),
                    "names": images.names,
                    "images": len(data),
                }
                file |= state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                saved = files.attempt(out / "last.pth", lambda f: torch.save(file, f), keep=out / "previous.pth")
                if stop and not saved:
                    raise r2o.UsageError(
                        f"told to stop, but {out / 'last.pth'} could not be saved: the one before stays"
                    )
            if lost > per_epoch * args.batch_size / 100:
                raise r2o.UsageError(
                    f"{lost} images of epoch {epoch + 1}, more than 1 %, can no longer be read: mend that, start again"
                )
            if stop and step + 1 < steps:
                if rank == 0:
                    print(f"told to stop: saved after step {step + 1}; the same command goes on", flush=True)
                return processes.STOPPED

    if rank == 0:
        if board:
            with contextlib.suppress(OSError):  # said after the epoch
                board.close()
        if not export(out / "r2o.pth", model, args, args.epochs):
            raise r2o.UsageError(
                f"training is done, but {out / 'r2o.pth'} could not be written: make room, start again"
            )
        print(f"wrote {out / 'r2o.pth'}")
    return 0


def end_epoch(record: dict, model, film: dict, masks: list, log: list, board, args, device):
    """Rank 0's: the epoch's health in a line, log.jsonl, strip.png, epoch_0100.pth."""
    out, epoch = Path(args.out), record["epoch"]
    strip = draw_strip(out / "strip.png", model, film, masks, record["K"], epoch, args.seed, device)
    if args.keep_every and epoch % args.keep_every == 0:
        export(out / f"epoch_{epoch:04}.pth", model, args, epoch)
    log.append(json.dumps(record).encode() + b"\n")
    files.attempt(out / "log.jsonl", lambda f: f.writelines(log))
    if board:
        try:
            for name, value in record.items():
                board.add_scalar(name, value, epoch)
            board.add_image("strip", np.asarray(strip), epoch, dataformats="HWC")
            board.flush()
        except OSError as e:
            print(f"train.py: warning: TensorBoard's log is incomplete ({e.strerror})", file=sys.stderr)
    if "loss" not in record:
        print(f"epoch {epoch}: all {record['skipped']} steps were skipped, loss or gradients were not finite")
    else:
        print(
            "epoch {epoch}: loss {loss:.3f}, spread {spread:.2f}, {masks:.1f} masks and {pairs:.1f} pairs an image, "
            "{clusters:.1f} of {K} clusters used, the largest {largest:.1%}, {skipped} steps skipped, "
            "{unreadable} images unreadable, {images/s:.0f} images/s".format(**record)
        )
        for alarm in alarms(record):
            print(f"train.py: warning: epoch {epoch}: {alarm}", file=sys.stderr)
    sys.stdout.flush()


def main(argv=None):
    processes.run("train.py", lambda: train(parse_args(argv)))


if __name__ == "__main__":
    processes.stoppable()
    main()

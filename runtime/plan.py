"""What a run will do and need: whether its flags suit each other and the data, its schedule, region maps, memory."""

import contextlib
import functools
import itertools
import math
import os
import shlex
from pathlib import Path

import torch
from tqdm import tqdm

import r2o
import r2o_ops
from runtime import cli, distributed
from runtime.cli import UsageError, need, need_package, warn
from runtime.folders import median_side
from runtime.images import ImageList

duration = tqdm.format_interval  # of seconds, H:MM:SS
size_of = functools.partial(tqdm.format_sizeof, suffix="B")


def check_flags(args):
    """Refuse flags that do not go together, whatever the data."""
    cells = f"--arch vit_b makes {args.size // 16} x {args.size // 16} cells of --size {args.size}, too few for masks"
    need(args.arch != "vit_b" or args.size >= 128, f"{cells}: pass --size 128 or more, or --arch tiny")
    if args.masks == "prior":
        k = "--masks prior --prior fh has no fixed K to multiply the learning rate by: pass --lr-k 0"
        need(args.prior != "fh" or args.lr_k == 0, k)
        cells = "--prior grid has 14 x 14 cells, of at least 4 x 4 pixels: pass --size 64 or more"
        need(args.prior != "grid" or args.size >= 56, cells)
        need(args.assign == "pixel", "--masks prior has no clusters to assign: leave --assign out")
    if args.objective != "byol":
        fewest = args.k_start if args.schedule == "constant" else min(args.k_start, args.k_end)
        need(
            fewest > 1,
            f"--objective {args.objective} compares masks, but K reaches 1: pass 2 or more clusters",
        )
    if args.masks == "odin":
        need(args.objective == "detcon", "--masks odin goes with DetCon's loss: pass --objective detcon")
        alone = "--masks odin clusters the cells of single images: pass --prior grid --kmeans-group 1"
        need(args.prior == "grid" and args.kmeans_group == 1, alone)
        momentum = "--masks odin needs the momentum of its second network: pass --discovery-tau 0.99, say"
        need(args.discovery_tau is not None, momentum)
    else:
        need(args.discovery_tau is None, "--discovery-tau is only for --masks odin: leave it out")
    if args.tensorboard:
        need_package("tensorboard", "--tensorboard")


def check_batches(args, images: ImageList, readable: int, num_regions: int):
    """Refuse batches that cannot work: before the region maps are computed, and again when num_regions is known.
    readable: the number of readable images."""
    world = distributed.place().world
    batch, parts = args.batch_size, world * args.accum
    if batch > readable:
        larger = f"--batch-size {batch} is larger than the data ({readable} images): pass a smaller one"
        suits = command_for(args, images, readable)
        raise UsageError(f"{larger}. A command that suits these images and this machine: {suits}")
    accum = f" in {args.accum} micro-batches" if args.accum > 1 else ""
    need(batch % parts == 0, f"{world} processes cannot share --batch-size {batch}{accum}: pass a multiple of {parts}")
    k, group = max(args.k_start, args.k_end), group_size(args)
    larger = "--kmeans-group" if group == args.kmeans_group else "--batch-size"
    regions = f"the regions of one K-means ({group} images of at most {num_regions})"
    few = args.masks == "prior" or k <= group * num_regions
    need(few, f"{k} clusters are more than {regions}: lower --k-start and --k-end, or raise {larger}")


def group_size(args) -> int:
    """How many images are clustered together."""
    world = distributed.place().world
    share = args.batch_size // world // args.accum
    groups, ranks = r2o.kmeans_groups(share, world, args.kmeans_group)
    return -(-share * ranks // groups)


def command_for(args, images: ImageList, n: int) -> str:
    """The command line, with values that suit n such images and this machine in place of those that do not. It takes
    minutes for hundreds of images on a CPU."""
    _, world, device = distributed.place()
    side, cpu, world = median_side(images), device.type == "cpu", min(world, n)
    tiny = cpu or side <= 96
    arch, size = ("tiny", 64 if side <= 64 else 96) if tiny else ("resnet18" if n < 100_000 else "resnet50", 224)
    batch = world * 2 ** int(math.log2(max(min(128 if tiny else 256, n / 6) / world, 1)))
    epochs = min(300, max(10, round((12_000 if cpu else 2_000_000) / n)))
    k = max(8, (32 if tiny else 128) * min(batch, 32) // 32), 6 if tiny else 4
    chosen = {"arch": arch, "size": size, "epochs": epochs, "batch-size": batch, "k-start": k[0], "k-end": k[1]}
    chosen |= {"hidden": 512, "dim": 64, "lr": 1, "lr-k": 0} if tiny else {}
    model = r2o.R2O(arch, hidden=512 if tiny else 4096, dim=64 if tiny else 256).to(device)
    accum = fitting_accum(model, batch // world, size, device) or batch // world
    chosen |= {"accum": accum} if accum > 1 else {}

    names = itertools.chain([args.out], (f"{args.out}-{i}" for i in itertools.count(2)))
    out = next(o for o in names if not any(Path(o, file).exists() for file in ("regions.npy", "last.pth")))
    chosen |= {"out": out} if out != args.out else {}

    given, words = iter(cli.command_line), []
    for word in given:
        name, equals, _ = word.partition("=")
        if name.removeprefix("--") not in chosen.keys() | {"accum", "regions"}:
            words.append(word)
        elif not equals:
            next(given)  # its value
    launch = f"torchrun --nproc_per_node={world} train.py" if world > 1 else "python train.py"
    words += [str(word) for name, value in chosen.items() for word in (f"--{name}", value)]
    return shlex.join([*launch.split(), *words])


def cells(arch: str, size: int) -> tuple[int, int]:
    """The sides of C4 and C5 for images of this size."""
    with torch.device("meta"):
        net, x = r2o.build_encoder(arch), torch.empty(2, 3, size, size)
        return r2o.encode_c4(net, x).shape[-1], r2o.encode(net, x).shape[-1]


def check_cells(args):
    """Warn where masks are too coarse to follow objects."""
    c4, _ = cells(args.arch, args.size)
    if c4 < 8 and args.masks != "prior" and args.assign == "pixel":
        grid = f"masks have {c4} x {c4} cells (C4 of --arch {args.arch} at --size {args.size}), few for an object"
        warn(f"{grid}: pass a larger --size, --arch tiny, or --assign region")


def print_plan(args, schedule: r2o.Schedule):
    """Steps, batches, grids, and the schedule at its milestones."""
    batch, epochs, world = schedule.batch_size, schedule.epochs, distributed.place().world
    print(f"{epochs} epochs of {schedule.steps_per_epoch:,} steps, {schedule.steps:,} in all")
    share = batch // world // args.accum
    groups, ranks = r2o.kmeans_groups(share, world, args.kmeans_group)
    clusters = f"{groups * world // ranks * args.accum} K-means of {group_size(args)} images per step"
    clusters = "no K-means" if args.masks == "prior" else clusters
    parts = f"{world} process(es) x {args.accum} micro-batch(es) x {share} images"
    print(f"batches of {batch}: {parts}, {clusters}")
    c4, c5 = cells(args.arch, args.size)
    print(f"grids: C4, of masks, {c4} x {c4} cells; C5, of features, {c5} x {c5}")
    print("epoch    K  learning rate      tau   (at its end)")
    milestones = {1, round(epochs / 100), schedule.hold_epochs, *(round(epochs * i / 3) for i in (1, 2, 3))}
    for epoch in sorted(e for e in milestones if 1 <= e <= epochs):
        k, lr, tau = schedule(epoch * schedule.steps_per_epoch - 1)
        print(f"{epoch:5} {k:4} {lr:14.4g} {tau:8.5f}")


def print_maps_plan(maps_file: Path, images: int, size: int, seconds_per_map: float):
    cores = distributed.cores()
    took = f"to be computed into {maps_file}: {duration(images * seconds_per_map / cores)} on {cores} cores"
    print(f"region maps: {size_of(images * size**2)}, {f'already in {maps_file}' if maps_file.exists() else took}")


def memory_of(device: torch.device) -> float:
    """Bytes of memory: the GPU's; or the machine's or its container's, whichever is less, divided among processes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # another system's, or no limit
            have = min(have, int(Path(file).read_text()))
    return have / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_memory(model: r2o.R2O, args, started: bool = False, quiet: bool = False):
    """Raise UsageError if a micro-batch needs more memory than there is; only warn if the run has started, since this
    is an estimate. Otherwise print it, unless quiet."""
    rank, world, device = distributed.place()
    share, have = args.batch_size // world // args.accum, memory_of(device)
    needed = training_memory(model, share, args.size, device)
    fits = f"about {size_of(needed)} for {share} images at a time, and a tenth to spare, of {size_of(have)}"
    if needed > 0.9 * have:  # of which other programs, and fragments, take some
        accum = fitting_accum(model, share, args.size, device)
        mend = f"pass --accum {args.accum * accum}" if accum else "pass a lower --size or another --arch"
        need(started, f"too little memory for each process ({fits}): {mend}, or use more machines")
        if rank == 0:
            warn(f"there may be too little memory ({fits})")
    elif rank == 0 and not quiet:
        print(f"memory of each process: {fits}", flush=True)


def fitting_accum(model: r2o.R2O, share: int, size: int, device: torch.device) -> int | None:
    """How many micro-batches a process must split `share` images into; None if even one image is too much."""
    have = memory_of(device)
    parts = (n for n in range(1, share + 1) if share % n == 0)
    return next((n for n in parts if training_memory(model, share // n, size, device) <= 0.9 * have), None)


def training_memory(model: r2o.R2O, images: int, size: int, device: torch.device) -> float:
    """Estimate the bytes that a micro-batch of so many images takes on `device`: weights, gradients, momentum and
    update; views in float32; the activations that the encoder keeps for the backward pass, measured; in the target's
    passes, of two views and of the image, three of the largest; and a contrastive objective's matrices of sampled masks
    by keys."""
    kept = []
    with torch.random.fork_rng(devices=[]):  # not the model's encoder: synchronized batch norm would wait
        encoder = r2o.build_encoder(model.online["encoder"].arch)
    encoder.to(device, memory_format=torch.channels_last)
    for views in (2, 4):
        x = torch.zeros(views, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        storages = {}

        def keep(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            c5 = r2o.encode(encoder, x)
        kept.append(sum(t.untyped_storage().nbytes() for t in storages.values()))
        largest = max(t.nbytes for t in storages.values() if t.shape[:1] == (views,)) / views
        del c5
    weights = sum(p.nbytes for p in model.parameters())
    weights += 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    rows = images * getattr(model, "samples", 0)  # of each view
    weights += 28 * rows**2 * distributed.place().world  # per direction two cosines, two masks; and the backward pass
    if r2o.extension(device) == "cuda" and model.masks == "predicted":  # K-means keeps dot products of groups' points
        points = min(images, model.kmeans_group) * model.num_regions
        groups = min(images * model.num_regions / points, max(1, r2o_ops.r2o_C.gram_bytes_cuda // (4 * points**2)))
        weights += groups * 4 * points * (points + r2o.channels(encoder.layer3))  # and the points' two halves
    each = kept[1] - kept[0] + 3 * 3 * largest + 6 * 12 * size**2  # of 2 views; 2 and the image; 6 images in float32
    return weights + images * each

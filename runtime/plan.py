"""What a run will do and need: whether its flags suit each other and the data, its schedule, region maps, memory."""

import functools
import os
from pathlib import Path

import torch
from tqdm import tqdm

import r2o
from runtime import distributed
from runtime.cli import need, need_package

duration = tqdm.format_interval  # of seconds, H:MM:SS
size_of = functools.partial(tqdm.format_sizeof, suffix="B")


def check_flags(args):
    """Refuse flags that do not go together, whatever the data."""
    need(args.size % 32 == 0, f"--size {args.size} does not fit the encoder's strides: pass a multiple of 32")
    cells = f"--arch vit_b makes {args.size // 16} x {args.size // 16} cells of --size {args.size}, too few for masks"
    need(args.arch != "vit_b" or args.size >= 128, f"{cells}: pass --size 128 or more, or --arch tiny")
    if args.masks == "prior":
        k = "--masks prior --prior fh has no fixed K to multiply the learning rate by: pass --lr-k 0"
        need(args.prior != "fh" or args.lr_k == 0, k)
        need(args.assign == "pixel", "--masks prior has no clusters to assign: leave --assign out")
    if args.objective != "byol":
        fewest = args.k_start if args.schedule == "constant" else min(args.k_start, args.k_end)
        need(fewest > 1, f"--objective {args.objective} tells masks apart, but K falls to 1: pass 2 or more clusters")
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


def check_batches(args, images: int, num_regions: int):
    """Refuse batches that cannot work: before the region maps are computed, and again when num_regions is known."""
    world = distributed.place()[1]
    batch, parts = args.batch_size, world * args.accum
    group = min(args.kmeans_group, max(min(batch, images) // args.accum, 1))
    fits = max(images // (parts * group) * parts * group, 1)
    need(batch <= images, f"--batch-size {batch} is larger than the data ({images} images): pass at most {fits}")
    accum = f" in {args.accum} micro-batches" if args.accum > 1 else ""
    need(batch % parts == 0, f"{world} processes cannot share --batch-size {batch}{accum}: pass a multiple of {parts}")
    share, k = batch // parts, max(args.k_start, args.k_end)
    divides = share % group == 0 or (group % share == 0 and batch // args.accum % group == 0)
    mend = f"pass --batch-size a multiple of {parts * group}, or another --kmeans-group"
    need(divides, f"{share} images per process do not divide into K-means groups of {group}: {mend}")
    larger = "--kmeans-group" if group == args.kmeans_group else "--batch-size"
    regions = f"the regions of one K-means ({group} images of at most {num_regions})"
    few = args.masks == "prior" or k <= group * num_regions
    need(few, f"{k} clusters are more than {regions}: lower --k-start and --k-end, or raise {larger}")


def print_plan(schedule: r2o.Schedule, images: int, world: int, accum: int, group: int):
    """Steps, batches, and the schedule at its milestones. group: images clustered together; 0: no K-means."""
    batch, epochs = schedule.batch_size, schedule.epochs
    print(f"{images:,} images: {epochs} epochs of {schedule.steps_per_epoch:,} steps, {schedule.steps:,} in all")
    clusters = f"{batch // group} K-means of {group} images per step" if group else "no K-means"
    parts = f"{world} process(es) x {accum} micro-batch(es) x {batch // world // accum} images"
    print(f"batches of {batch}: {parts}, {clusters}")
    print("epoch    K  learning rate      tau   (at its end)")
    milestones = {1, round(epochs / 100), schedule.hold_epochs, *(round(epochs * i / 3) for i in (1, 2, 3))}
    for epoch in sorted(e for e in milestones if 1 <= e <= epochs):
        k, lr, tau = schedule(epoch * schedule.steps_per_epoch - 1)
        print(f"{epoch:5} {k:4} {lr:14.4g} {tau:8.5f}")


def print_maps_plan(maps_file: Path, images: int, size: int, seconds_per_map: float):
    cores = distributed.cores()
    took = f"to be computed into {maps_file}: {duration(images * seconds_per_map / cores)} on {cores} cores"
    print(f"region maps: {size_of(images * size**2)}, {f'already in {maps_file}' if maps_file.exists() else took}")


def check_memory(model: r2o.R2O, images: int, size: int, device: torch.device):
    """Print an estimate of the memory that a micro-batch of so many images takes. Raise UsageError if there is less."""
    if device.type == "cuda":
        have = torch.cuda.mem_get_info(device)[1]
    else:
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = training_memory(model, images, size, device)
    fits = f"about {size_of(needed)} for {images} images at a time, of {size_of(have)}"
    if distributed.place()[0] == 0:
        print(f"memory of each process: {fits}", flush=True)
    need(needed <= have, f"too little memory ({fits}): raise --accum, lower --batch-size, or use more processes")


def training_memory(model: r2o.R2O, images: int, size: int, device: torch.device) -> float:
    """Estimate the bytes that a micro-batch of so many images takes on `device`: weights, gradients, momentum and
    update; views in float32; the activations that the encoder keeps for the backward pass, measured; and a contrastive
    objective's matrices of sampled masks by keys."""
    kept = []
    for views in (2, 4):
        x = torch.zeros(views, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        storages = {}

        def keep(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            c5 = r2o.encode(model.online["encoder"], x)
        kept.append(sum(storages.values()))
        del c5
    weights = sum(p.nbytes for p in model.parameters())
    weights += 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    rows = images * getattr(model, "samples", 0)  # of each view
    weights += 28 * rows**2 * distributed.place()[1]  # for both directions two cosines, two masks; and a backward pass
    return weights + images * ((kept[1] - kept[0]) + 6 * 12 * size**2)  # activations of 2 views; 6 images in float32

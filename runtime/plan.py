"""What a run will do and need: its schedule, its region maps, its memory."""

import functools
import os
from pathlib import Path

import torch
from tqdm import tqdm

import r2o
from runtime import distributed
from runtime.cli import need

duration = tqdm.format_interval  # of seconds, H:MM:SS
size_of = functools.partial(tqdm.format_sizeof, suffix="B")


def print_plan(schedule: r2o.Schedule, images: int, world: int, accum: int, group: int):
    """Steps, batches, and the schedule at its milestones. group: images clustered together."""
    batch, epochs = schedule.batch_size, schedule.epochs
    print(f"{images:,} images: {epochs} epochs of {schedule.steps_per_epoch:,} steps, {schedule.steps:,} in all")
    print(
        f"batches of {batch}: {world} process(es) x {accum} micro-batch(es) x {batch // world // accum} images, "
        f"{batch // group} K-means of {group} images per step"
    )
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
    update; views in float32; and the activations that the encoder keeps for the backward pass, measured."""
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
    return weights + images * ((kept[1] - kept[0]) + 6 * 12 * size**2)  # activations of 2 views; 6 images in float32

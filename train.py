"""Pretrain an encoder with R2O on any folder of images (arXiv 2208.11821).

    torchrun --nproc_per_node=8 train.py --data /imagenet      # the paper's: ResNet-50, 300 epochs, batches of 4096
    python train.py --data photos --arch resnet18 --epochs 20 --batch-size 64      # one process, CPU or GPU

OUT gets last.pth after every epoch (training goes on from it by itself), log.jsonl, strip.png and, at the end, r2o.pth:
the online encoder under torchvision's parameter names.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import r2o


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def parse_args(argv=None):
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of this process
    p = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    add = p.add_argument_group("data and output").add_argument
    add("--data", required=True, help="folder of images, flat or nested; its subfolder train, where there is one")
    add("--out", default="out", help="folder for checkpoints, log and pictures; training goes on from what it holds")
    add(
        "--keep-every",
        type=int,
        default=0,
        metavar="N",
        help="also keep the encoder of every N-th epoch, as epoch_0100.pth (0: none)",
    )
    add("--regions", help="file of the region maps (default OUT/regions.npy); name one to share it between runs")
    add("--workers", type=int, default=min(16, max(1, cores)), help="per process; raise while the GPU waits for data")
    add = p.add_argument_group("training (A.1)").add_argument
    add("--arch", default="resnet50", choices=r2o.ARCHS, help="resnet18 for small data, tiny for 64-pixel images")
    add("--epochs", type=int, default=300, help="passes over the data; small data wants more")
    add("--batch-size", type=int, default=4096, help="images per step, over all processes; lower to fit the memory")
    add("--size", type=int, default=224, help="side of the views in pixels; lower only for small images")
    add("--lr", type=float, default=0.3, help="peak for a batch of 256 and K = --lr-k; raise for very short runs")
    add("--lr-k", type=float, default=16, help="the learning rate is multiplied by K / this; 0: by nothing")
    add("--weight-decay", type=float, default=1e-6, help="of weight matrices; biases and batch norm have none")
    add("--tau", type=float, default=0.99, help="momentum of the target at the start; lower for very short runs")
    add("--hidden", type=int, default=4096, help="width of projector and predictor; lower for tiny")
    add("--dim", type=int, default=256, help="width of projections; lower for tiny")
    add("--seed", type=int, default=0, help="of weights, order, crops, colours and clusters")
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
    for name in ("epochs", "batch_size", "segments", "k_start", "k_end", "kmeans_group", "hidden", "dim"):
        if getattr(args, name) < 1:
            raise r2o.UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("workers", "keep_every", "hold_epochs", "lr", "lr_k", "weight_decay", "tau", "seed"):
        if getattr(args, name) < 0:
            raise r2o.UsageError(f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}")
    if args.tau > 1 or args.seed >= 2**31:
        raise r2o.UsageError(f"--tau must be at most 1 and --seed below 2^31, got {args.tau} and {args.seed}")
    if args.size < 32 or args.size % 32:
        raise r2o.UsageError(f"--size {args.size} does not fit the encoder's strides: pass a multiple of 32")
    return args


class Batches:
    """Sampler of this process's share of every batch, from `epoch` to the end of training: each epoch is a new
    permutation, each batch a slice of it, each process's share a slice of the batch. The remainder is dropped."""

    def __init__(self, images: int, batch: int, epoch: int, epochs: int, seed: int, rank: int, world: int):
        self.images, self.batch, self.epochs = images, batch, range(epoch, epochs)
        self.seed, self.rank, self.share = seed, rank, batch // world

    def __iter__(self):
        for epoch in self.epochs:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.images)
            for start in range(0, self.images - self.batch + 1, self.batch):
                start += self.rank * self.share
                yield [(epoch, i) for i in order[start : start + self.share]]


def check(args, world: int, images: int, num_regions: int):
    """Refuses what cannot work: once before the region maps are made, and again when they are there."""
    batch, share = args.batch_size, args.batch_size // world
    group = min(args.kmeans_group, max(min(batch, images) // world, 1))
    k = max(args.k_start, args.k_end)
    if batch > images:
        fits = max(images // (world * group) * world * group, 1)
        raise r2o.UsageError(f"--batch-size {batch} is larger than the data ({images} images): pass at most {fits}")
    if batch % world:
        raise r2o.UsageError(f"{world} processes cannot share --batch-size {batch}: pass a multiple of {world}")
    if share % group:
        raise r2o.UsageError(
            f"{share} images per process do not divide into K-means groups of {group}: "
            f"pass --batch-size a multiple of {world * group}, or another --kmeans-group"
        )
    if k > group * num_regions:
        raise r2o.UsageError(
            f"{k} clusters are more than the regions of one K-means ({group} images of at most {num_regions}): "
            "lower --k-start and --k-end, or raise --batch-size"
        )


def load_checkpoint(path: Path, args) -> dict | None:
    """The checkpoint to go on from, None where there is none. Refuses one that was made with other settings."""
    if not path.exists():
        return None
    checkpoint = r2o.load_file(path)
    if not {"model", "optimizer", "epoch", "masks", "args"} <= checkpoint.keys():
        raise r2o.UsageError(f"{path} is not a checkpoint of train.py: delete it, or pass another --out")
    for key, now in vars(args).items():
        then = checkpoint["args"].get(key)
        if key not in ("data", "out", "regions", "workers", "keep_every") and then != now:
            flag = "--" + key.replace("_", "-")
            raise r2o.UsageError(
                f"{path} was trained with {flag} {then}, now it is {now}: "
                f"pass {flag} {then} to go on, or another --out to start anew"
            )
    return checkpoint


def export(path: Path, model: r2o.R2O, args, epoch: int):
    """The online encoder under torchvision's parameter names, with plain-typed metadata."""
    weights = {name: x.cpu().contiguous() for name, x in model.online["encoder"].state_dict().items()}
    file = {"arch": args.arch, "epoch": epoch, "args": vars(args), "state_dict": weights}
    r2o.save_atomically(path, lambda f: torch.save(file, f))


def film_images(data: r2o.ImageRegions, count: int) -> dict[str, torch.Tensor]:
    """`count` whole images, evenly spaced, with their regions: the same ones after every epoch."""
    samples = [data[0, i] for i in np.linspace(0, len(data) - 1, count).astype(int)]
    return {key: torch.stack([s[key] for s in samples]) for key in ("image", "regions")}


@torch.no_grad()
def draw_strip(path: Path, model: r2o.R2O, film: dict, masks: list, k: int, epoch: int, seed: int, device):
    """Adds the film's masks after this epoch to `masks`; paints image, prior, and up to six of the epochs so far."""
    images, regions = (film[key].to(device) for key in ("image", "regions"))
    uniforms = r2o.seeding_uniforms(1, k, torch.Generator().manual_seed(seed)).to(device)
    encoder = model.online["encoder"].eval()
    m = model.predict_masks(encoder, r2o.normalize(images), regions, k, uniforms)[:8]
    encoder.train()
    masks.append([epoch, k, m.to("cpu", torch.int16)])
    shown = [masks[i] for i in sorted({*np.linspace(0, len(masks) - 1, 6).astype(int)})]
    image, prior = film["image"][:8], film["regions"][:8]
    columns = [("image", image), (f"prior, R = {int(prior.max()) + 1}", r2o.paint(image, prior))]
    columns += [(f"epoch {e}, K = {k}", r2o.paint(image, m)) for e, k, m in shown]
    strip = r2o.film_strip(columns, zoom=max(1, 128 // image.shape[-1]))
    r2o.save_atomically(path, lambda f: strip.save(f, "PNG"))


def train(args):
    env = os.environ.get
    rank, world, local = int(env("RANK", "0")), int(env("WORLD_SIZE", "1")), int(env("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    out = Path(args.out)

    # Data. The region maps are made once, before the processes are tied together: the others wait without a timeout.
    root, names = r2o.list_images(args.data)
    check(args, world, len(names), num_regions=256)
    maps_file = Path(args.regions or out / "regions.npy")
    for folder in (out, maps_file.parent):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise r2o.UsageError(f"cannot make the folder {folder} ({e.strerror}): pass another") from None
    checkpoint = load_checkpoint(out / "last.pth", args)
    waited = 0
    while rank > 0 and not maps_file.with_suffix(".json").exists():
        time.sleep(0.5)
        waited += 1
        if waited == 120:
            print(f"rank {rank} waits for rank 0 to make {maps_file}, which all must see", file=sys.stderr, flush=True)
    maps, header = r2o.region_maps(root, names, maps_file, args.prior, args.segments, args.size // 4, args.workers)
    data = r2o.ImageRegions(root, names, maps, header, args.size, args.seed)
    check(args, world, len(data), header["num_regions"])
    first_epoch = checkpoint["epoch"] if checkpoint else 0
    masks = checkpoint["masks"] if checkpoint else []  # the film so far

    # Processes, networks, optimiser.
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(args.seed)  # all processes start from the same weights
    model = r2o.R2O(
        args.arch, header["num_regions"], args.kmeans_group, assign=args.assign, hidden=args.hidden, dim=args.dim
    )
    if world > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device, memory_format=torch.channels_last)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = r2o.LARS(parameters, lr=0.0, weight_decay=args.weight_decay)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    ddp = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model

    # One loader over all epochs: its workers fetch across their ends.
    pin = device.type == "cuda"
    batches = Batches(len(data), args.batch_size, first_epoch, args.epochs, args.seed, rank, world)
    loader = torch.utils.data.DataLoader(data, batch_sampler=batches, num_workers=args.workers, pin_memory=pin)
    fetch = iter(loader)
    steps_per_epoch = len(data) // args.batch_size
    steps = args.epochs * steps_per_epoch
    peak = args.lr * args.batch_size / 256

    if rank == 0:
        film = film_images(data, min(32, len(data)))
        print(f"{args.arch} on {world} x {device.type}, ops: {r2o.extension(device)}")
        print(f"{len(data)} images of at most {header['num_regions']} regions ({len(header['unreadable'])} unreadable)")
        print(f"{args.epochs} epochs of {steps_per_epoch} steps of {args.batch_size} images")
        if checkpoint:
            print(f"going on after epoch {first_epoch} from {out / 'last.pth'}")
        if (out / "log.jsonl").exists():  # an epoch that was logged but not saved is done again
            rows = (out / "log.jsonl").read_bytes().splitlines(keepends=True)
            rows = [row for row in rows if row.endswith(b"\n") and json.loads(row)["epoch"] <= first_epoch]
            r2o.save_atomically(out / "log.jsonl", lambda f: f.writelines(rows))
        sys.stdout.flush()

    for epoch in range(first_epoch, args.epochs):
        k = r2o.num_clusters(epoch + 1, args.epochs, args.k_start, args.k_end, args.hold_epochs, args.schedule)
        factor = k / args.lr_k if args.lr_k else 1.0
        sums: dict[str, torch.Tensor] = {}
        began = time.perf_counter()
        bar = tqdm(total=steps_per_epoch, desc=f"epoch {epoch + 1}/{args.epochs}", disable=rank > 0, dynamic_ncols=True)
        for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            batch = next(fetch)
            factors = batch.pop("factors").transpose(0, 1).flatten(0, 1)  # (2B, 11): first views, then second
            batch = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
            images = r2o.normalize(batch["image"]).contiguous(memory_format=torch.channels_last)
            views = r2o.augment(batch["views"].transpose(0, 1).flatten(0, 1), factors)
            views = views.contiguous(memory_format=torch.channels_last)

            lr = r2o.learning_rate(step, steps, steps // 100, peak) * factor
            tau = r2o.target_momentum(step, steps, args.tau)
            generator = torch.Generator().manual_seed((args.seed << 32) + step)  # alike on all ranks
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, stats = ddp(images, views, batch["regions"], batch["boxes"], batch["flips"], k, generator)
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            model.update_target(tau)

            for name, value in {"loss": loss.detach(), **stats}.items():
                sums[name] = sums.get(name, 0) + value.to(device, non_blocking=True)
            bar.update()
            if bar.n % 10 == 1:
                speed = bar.n * args.batch_size / (time.perf_counter() - began)
                bar.set_postfix_str(f"loss {loss:.3f}, K {k}, lr {lr:.2g}, tau {tau:.4f}, {speed:.0f} images/s")
        bar.close()

        means = torch.stack(list(sums.values())) / steps_per_epoch / world
        if world > 1:
            dist.all_reduce(means)
        seconds = time.perf_counter() - began
        record = {"epoch": epoch + 1, **dict(zip(sums, means.tolist(), strict=True)), "K": k, "lr": lr, "tau": tau}
        record["images/s"] = steps_per_epoch * args.batch_size / seconds
        if not (np.isfinite(record["loss"]) and all(p.isfinite().all() for p in parameters)):
            raise r2o.UsageError(f"epoch {epoch + 1} ends in NaN or infinity: lower --lr; the epoch before is kept")
        if rank == 0:
            draw_strip(out / "strip.png", model, film, masks, k, epoch + 1, args.seed, device)
            state = {"epoch": epoch + 1, "args": vars(args), "masks": masks}
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            if args.keep_every and (epoch + 1) % args.keep_every == 0:
                export(out / f"epoch_{epoch + 1:04}.pth", model, args, epoch + 1)
            with open(out / "log.jsonl", "a") as log:
                print(json.dumps(record), file=log)
            r2o.save_atomically(out / "last.pth", lambda f: torch.save(state, f))  # last: what precedes can be redone

    if rank == 0:
        export(out / "r2o.pth", model, args, args.epochs)
        print(f"wrote {out / 'r2o.pth'}")


def main(argv=None):
    problem = None
    try:
        train(parse_args(argv))
    except r2o.UsageError as e:
        problem = str(e).splitlines()[-1]  # a loader worker's traceback comes before it
    if dist.is_initialized():  # after train()'s DDP is gone: were it the last to let go of gloo, it could deadlock
        dist.destroy_process_group()
    if problem:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"train.py: error: {problem}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""Pretrain an encoder with R2O on any folder of images (arXiv 2208.11821).

    torchrun --nproc_per_node=8 train.py --data /imagenet      # the paper's run: ResNet-50, 300 epochs, batches of 4096
    python train.py --data photos --arch resnet18 --epochs 20 --batch-size 64      # one process, CPU or GPU
    python train.py --data photos --batch-size 64 --dry-run      # print the plan and time a few steps

OUT receives last.pth (from which training resumes automatically), previous.pth, log.jsonl, strip.png and, at the end,
r2o.pth: the online encoder under torchvision's parameter names.

Exit status: 0 finished; 2 an error, which one line explains; 75 (SIGTERM, SIGUSR1) or 130 (Ctrl-C) stopped after
saving: rerun the same command to resume. torchrun turns every status but 0 into 1.
"""

import runtime  # isort: skip  # noqa: F401  (says what is not installed)
import contextlib
import itertools
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import r2o
from r2o_baselines import Contrastive, Odin
from runtime import cli, distributed, plan
from runtime.checkpoint import Checkpoint, need_same
from runtime.cli import count, natural, need, number, rate, side
from runtime.folders import print_images
from runtime.images import ImageList, list_images
from runtime.loader import Batches, ImageRegions, copy_ahead, load_batches, network_input, step_seed
from runtime.pictures import evenly
from runtime.progress import NonFiniteGuard, Progress
from runtime.regions import region_maps
from runtime.report import Report
from runtime.storage import lock_output, make_folder, save_or_warn


def parse_args(argv=None):
    p, width = cli.Parser(__doc__), number(int, 1, 2**16)
    add = p.add_argument_group("data and output").add_argument
    add("--data", required=True, help="folder of images, flat or nested; its subfolder train is used if it exists")
    add("--subset", metavar="FILE", help="file that selects images: a folder, path or file name per line")
    add("--out", default="out", help="folder for checkpoints, log and pictures; training resumes from what it holds")
    add("--skip-unreadable", action="store_true", help="leave out unreadable images even if they are more than 1 %%")
    add("--regions", help="file of the region maps (default: OUT/regions.npy); name one to share it between runs")
    add("--workers", type=natural, default=distributed.cores_per_process(), help="per process; raise if a GPU waits")
    keep = "also keep the encoders of every N-th epoch, as epoch_0100.pth (0: none)"
    add("--keep-every", type=natural, default=0, metavar="N", help=keep)
    save = "also save last.pth every N steps (0: only after epochs); lower if an epoch takes hours"
    add("--save-every", type=natural, default=500, metavar="N", help=save)
    add("--tensorboard", action="store_true", help="also log to OUT/tensorboard")
    add = p.add_argument_group("instead of training").add_mutually_exclusive_group().add_argument
    add("--prepare", action="store_true", help="compute the region maps and exit")
    add("--dry-run", action="store_true", help="print the plan, time a few steps, write nothing")
    add = p.add_argument_group("training (A.1)").add_argument
    add("--arch", default="resnet50", choices=r2o.ARCHS, help="resnet18 for small data, tiny up to 96 pixels")
    objectives = ("byol", "detcon", "ntxent")
    add("--objective", default="byol", choices=objectives, help="loss; the others are of Table 1 and A.4")
    add("--epochs", type=count, default=300, help="passes over the data; raise for small data")
    add("--batch-size", type=count, default=4096, help="images per step, over all processes; lower for small data")
    add("--accum", type=count, default=1, metavar="N", help="micro-batches per step; raise to fit the memory")
    size = "side of the views in pixels, a multiple of 32; lower only for small images"
    add("--size", type=side, default=224, help=size)
    add("--lr", type=rate, default=0.3, help="peak for a batch of 256 and K = --lr-k; raise for very short runs")
    lr_k = "multiply the learning rate by K / this; 0: do not (default: 16; 0 unless --objective byol)"
    add("--lr-k", type=rate, help=lr_k)
    add("--weight-decay", type=rate, default=1e-6, help="of weight matrices; biases and batch norm have none")
    add("--tau", type=number(float, 0, 1), default=0.99, help="initial target momentum; lower for very short runs")
    add("--hidden", type=width, default=4096, help="width of projector and predictor; lower for tiny")
    add("--dim", type=width, default=256, help="width of projections; lower for tiny")
    add("--seed", type=cli.seed, default=0, help="of weights, order, crops, colors and clusters")
    bf16 = "of the networks; default: bfloat16 on GPUs that have it; speeds up CPUs with avx512_bf16 or amx_bf16"
    add("--precision", choices=("float32", "bfloat16"), help=bf16)
    add("--compile", action="store_true", help="compile the encoders with torch.compile; --dry-run shows if it helps")
    add("--changed", action="store_true", help="allow other --lr, --lr-k, --weight-decay and taus than before")
    add = p.add_argument_group("masks (Sec. 3.1, 3.3)").add_argument
    masks = "where masks come from; prior: the regions themselves (Table 4); odin: A.9, with --discovery-tau"
    add("--masks", default="predicted", choices=("predicted", "prior", "odin"), help=masks)
    prior = "region-level prior; grid needs no image (A.7), fh is DetCon's"
    add("--prior", default="slic", choices=("slic", "grid", "fh"), help=prior)
    add("--segments", type=count, default=100, help="superpixels that SLIC aims for; lower for small images")
    add("--k-start", type=count, default=128, help="initial clusters; lower for small K-means groups")
    add("--k-end", type=count, default=4, help="clusters at the end; above --k-start for a rising schedule")
    add("--hold-epochs", type=natural, help="epochs at --k-start (default: 40/300 of --epochs; the paper on COCO: 8)")
    add("--schedule", default="cosine", choices=("cosine", "linear", "constant"), help="how K changes (A.6, Table 9)")
    add("--kmeans-group", type=count, default=32, help="images clustered together, at most; 1: each alone")
    assign = "what is assigned to a cluster: C4's pixels, or the prior's regions, which have sharper outlines"
    add("--assign", default="pixel", choices=("pixel", "region"), help=assign)
    add("--discovery-tau", type=number(float, 0, 1), help="momentum of the network that draws Odin's masks")
    args = p.parse_args(argv)
    args.hold_epochs = round(args.epochs * 40 / 300) if args.hold_epochs is None else args.hold_epochs
    args.regions = args.regions or f"{args.out}/regions.npy"
    args.precision = args.precision or ("bfloat16" if has_bfloat16() else "float32")
    args.lr_k = (16 if args.objective == "byol" else 0) if args.lr_k is None else args.lr_k
    if args.masks == "prior":  # no K-means; K is the number of segments
        args.kmeans_group, args.schedule, args.hold_epochs = 1, "constant", 0
        args.k_start = args.k_end = {"slic": args.segments, "grid": 14**2, "fh": 256}[args.prior]
    plan.check_flags(args)
    return args


def has_bfloat16() -> bool:
    """Whether there is a GPU that computes in bfloat16, and not one before Ampere, which emulates it."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


# Flags that may differ when a run resumes; those in WITH_CHANGED only with --changed.
MAY_CHANGE = "data subset skip_unreadable out regions workers keep_every save_every tensorboard prepare dry_run"
MAY_CHANGE += " accum precision compile changed"
WITH_CHANGED = "lr lr_k weight_decay tau discovery_tau"
OLDER = {"masks": "predicted", "objective": "byol", "discovery_tau": None}  # of checkpoints without these flags


# ---- Before the loop -------------------------------------------------------------------------------------------------


def open_images(args) -> ImageList:
    """The images, after a check that the flags suit their number."""
    images, out = list_images(args.data, args.subset), Path(args.out).resolve()
    inside = f"--out {args.out} is inside --data, so that its pictures would become training images"
    safe = args.subset or args.prepare or args.dry_run or not out.is_relative_to(images.root.resolve())
    need(safe, f"{inside}: pass a folder elsewhere")
    part = args.batch_size // args.accum
    if distributed.place().rank == 0:
        print_images(images)
        plan.check_cells(args)
    plan.check_batches(args, images, len(images), 14**2 if args.prior == "grid" else 256)
    if distributed.place().rank == 0:
        if part < min(args.kmeans_group, args.batch_size):
            cli.warn(f"--accum limits K-means to the {part} images of a micro-batch")
        if args.accum > 1 and args.objective != "byol":
            cli.warn(f"--accum limits negatives to the {part} images of a micro-batch")
    return images


def read_checkpoint(args, images: ImageList) -> Checkpoint:
    """OUT's checkpoint. Rank 0 reads it, if there is one, and refuses one of other settings or other images."""
    checkpoint = Checkpoint(Path(args.out))
    found = checkpoint.read("model optimizer step streak taken skipped sums masks args names images")
    if found:
        same = found["names"] == images.names_hash
        need(same, f"{checkpoint.path} was trained on other images than --data {args.data}: pass another --out")
        may_change = f"{MAY_CHANGE} {WITH_CHANGED if args.changed else ''}".split()
        need_same(checkpoint.path, OLDER | found["args"], vars(args), may_change, WITH_CHANGED.split())
    return checkpoint


def open_data(args, images: ImageList, maps_file: str, sample_of: ImageList | None = None) -> ImageRegions:
    """The images with their region maps, which one process computes if they are missing while the others wait.
    sample_of: all images, which the flags must suit, if `images` is a sample of them."""
    workers = distributed.cores() if args.workers and not sample_of else args.workers  # ranks of a dry run map alone
    made_from = args.prior, args.segments, args.size // 4
    maps, header = region_maps(images, maps_file, *made_from, workers, args.skip_unreadable)
    policy = "simclr" if args.objective == "ntxent" else "byol"
    data = ImageRegions(images, maps, header, args.size, args.seed, policy, spanning=args.masks == "odin")
    every = sample_of or images
    plan.check_batches(args, every, len(every) if sample_of else len(data), data.num_regions)
    return data


def make_schedule(args, images: int, num_regions: int = 256) -> r2o.Schedule:
    clusters = args.k_start, args.k_end, args.hold_epochs, args.schedule
    if args.masks == "prior" and args.prior == "fh":  # K is the largest number of segments
        clusters = num_regions, num_regions, *clusters[2:]
    rates = args.lr, args.lr_k, args.tau
    return r2o.Schedule(images // args.batch_size, args.epochs, args.batch_size, *rates, *clusters)


def build(args, num_regions: int) -> tuple[r2o.R2O, nn.Module, r2o.LARS]:
    """Join the process group; build model, DDP wrapper (or the model again) and optimizer, alike on all ranks."""
    distributed.join_process_group()
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(args.seed)
    kind, settings = r2o.R2O, {name: getattr(args, name) for name in ("assign", "hidden", "dim", "compile")}
    if args.masks == "odin":
        kind = partial(Odin, discovery_tau=args.discovery_tau)
    elif args.objective != "byol":
        kind = partial(Contrastive, objective=args.objective)
    masks = "prior" if args.masks == "prior" else "predicted"
    model = kind(args.arch, num_regions, args.kmeans_group, masks=masks, **settings)
    model = distributed.to_device(model).to(memory_format=torch.channels_last)
    optimizer = r2o.LARS([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=args.weight_decay)
    several = distributed.place().world > 1
    ddp = DistributedDataParallel(model, broadcast_buffers=False) if several else model
    return model, ddp, optimizer


def resume(checkpoint: Checkpoint, args, data: ImageRegions, model, optimizer, progress: Progress, report: Report):
    """Load what OUT holds, if anything, on all ranks; refuse images that are not rank 0's."""
    header = {"args": vars(args), "names": data.images.names_hash, "images": len(data)}
    own = header["names"], len(data), data.num_regions
    others = f"rank {distributed.place().rank} sees other images than rank 0, or {len(data)} that can be read"
    need(distributed.of_rank_0(own) == own, f"{others}: give all machines the same --data and --regions")
    last = checkpoint.restore(header, model, optimizer)
    if not last:
        return
    same, readable = last["images"] == len(data), f"{last['images']} images, of which {len(data)} can be read now"
    mend = "restore the rest and compute the region maps again, or pass another --out"
    need(same, f"{checkpoint.path} was trained on {readable}: {mend}")
    progress.load_state_dict(last)
    report.masks = last["masks"]
    if args.changed:
        same = all(last["args"].get(name) == vars(args)[name] for name in WITH_CHANGED.split())
        finished = f"{checkpoint.path} is of a finished run: pass its own rates, or another --out to start anew"
        need(same or progress.step < report.schedule.steps, finished)
        progress.skipped_in_a_row = 0
        for group in optimizer.param_groups:
            group["weight_decay"] = args.weight_decay


# ---- Training --------------------------------------------------------------------------------------------------------


def autocast(device: torch.device, precision: str):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def forward_backward(ddp: nn.Module, batches, accum: int, k: int, seed: int, precision: str) -> dict[str, Tensor]:
    """Set .grad for the mean loss over the next batch's pairs. Returns R2O's statistics, means over micro-batches."""
    generator = torch.Generator().manual_seed(seed)  # the same on all ranks
    reports, total = [], 0
    ddp.zero_grad()
    for part in range(accum):
        batch = next(batches)
        images, views = network_input(batch)
        syncs = part == accum - 1 or not isinstance(ddp, DistributedDataParallel)
        with contextlib.nullcontext() if syncs else ddp.no_sync():
            with autocast(images.device, precision):
                inputs = images, views, batch["regions"], batch["boxes"], batch["flips"]
                loss, stats = ddp(*inputs, k, generator, int(batch["num_regions"].max()))
            pairs = stats.pop("total")  # of all ranks
            (loss * pairs).backward()  # the sum over pairs; divided by their number after the last micro-batch
        total = total + pairs
        stats |= {"loss": loss.detach() * pairs, "unreadable": batch["unreadable"].float().mean()}
        reports.append({name: x.to(pairs.device, non_blocking=True) for name, x in stats.items()})
    torch._foreach_mul_([p.grad for p in ddp.parameters() if p.grad is not None], 1 / total.clamp(min=1))
    means = {name: sum(r[name] for r in reports) / accum for name in reports[0]}
    return means | {"loss": means["loss"] * accum / total.clamp(min=1)}


def update(model: r2o.R2O, optimizer: r2o.LARS, lr: float, tau: float):
    """Step the optimizer, then the target network."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    model.update_target(tau)


def export(path: Path, model: r2o.R2O, args, epoch: int, target: bool = False) -> bool:
    """Write the online encoder under torchvision's names, with plain-typed metadata, and on request the
    target encoder, as `target`. Returns False if the disk is full."""

    def weights(net):
        return {name: x.cpu().contiguous() for name, x in net["encoder"].state_dict().items()}

    file = {"arch": args.arch, "epoch": epoch, "args": vars(args), "state_dict": weights(model.online)}
    file |= {"target": weights(model.target)} if target else {}
    return save_or_warn(path, lambda f: torch.save(file, f))


def train(args, signals: distributed.StopSignals) -> int:
    """Pretrain from what OUT holds to the end. Returns the exit status."""
    rank, world, device = distributed.place()
    images, out = open_images(args), make_folder(args.out)
    lock = lock_output(out) if rank == 0 else None  # noqa: F841 (held until this function returns)
    checkpoint = read_checkpoint(args, images)
    data = open_data(args, images, args.regions)
    schedule = make_schedule(args, len(data), data.num_regions)
    model, ddp, optimizer = build(args, data.num_regions)
    signals.deferred = True  # from here on all ranks stop together, after a step
    progress, report = Progress(), Report(out, schedule, args.tensorboard)
    guard = NonFiniteGuard(model, progress)
    resume(checkpoint, args, data, model, optimizer, progress, report)
    with autocast(device, args.precision):
        plan.check_memory(model, args, started=progress.step > 0, quiet=True)
    steps = range(progress.step, schedule.steps)
    order = Batches(len(data), args.batch_size, steps, args.seed, rank, world, args.accum)
    batches = copy_ahead(load_batches(data, order, args.workers, device), device)
    report.start(f"{args.arch} on {world} x {device.type}, {cli.describe_ops(device)}", data, progress.step)

    for step in steps:
        k, lr, tau = schedule(step)
        guard.remember()  # batch norm's statistics
        stats = forward_backward(ddp, batches, args.accum, k, step_seed(args.seed, step), args.precision)
        finite, stop = distributed.agree(guard.finite(stats["loss"]), bool(signals.received))  # the same on all ranks
        if finite:
            update(model, optimizer, lr, tau)
        else:
            guard.undo()  # an error after 10 skipped steps in a row
        progress.add(stats, finite)
        report.step(progress.step, stats, k, lr, tau)

        epoch, rest = divmod(progress.step, schedule.steps_per_epoch)
        save_due = args.save_every and progress.step % args.save_every == 0
        if not (rest == 0 or stop or save_due):
            continue
        guard.check_weights()  # weights that are not finite are never saved
        progress.gather()
        if rest == 0:
            record = {"epoch": epoch, "K": k, "lr": lr, "tau": tau} | progress.close_epoch(args.batch_size)
            report.epoch(record, model, args.seed)  # health line, log.jsonl, strip.png
            if rank == 0 and args.keep_every and epoch % args.keep_every == 0:
                export(out / f"epoch_{epoch:04}.pth", model, args, epoch, target=True)
        last = progress.step == schedule.steps
        if stop or last or not progress.skipped_in_a_row:  # within a streak, keep the checkpoint before it
            checkpoint.save(required=stop, epoch=epoch, masks=report.masks, **progress.state_dict())
        if rest == 0 and not args.skip_unreadable:
            check_readable(record, schedule)
        if stop and not last:
            if rank == 0:
                print(f"stop requested: saved after step {progress.step}; rerun the same command to resume", flush=True)
            return signals.received or distributed.STOPPED  # received by another rank

    if rank == 0:
        path = out / "r2o.pth"
        done = export(path, model, args, args.epochs)
        need(done, f"training is done, but {path} could not be written: make room and rerun the command")
        print(f"wrote {path}")
    return 0


def check_readable(record: dict, schedule: r2o.Schedule):
    """Raise UsageError if more than 1 % of an epoch's images could no longer be read."""
    few = record["unreadable"] <= schedule.steps_per_epoch * schedule.batch_size / 100
    lost = f"{record['unreadable']} images of epoch {record['epoch']}, more than 1 %,"
    need(few, f"{lost} can no longer be read: restore them and rerun the command, or pass --skip-unreadable")


# ---- Instead of training ---------------------------------------------------------------------------------------------


def prepare(args) -> int:
    """Compute the region maps and exit."""
    data = open_data(args, open_images(args), args.regions)
    if distributed.place().rank == 0:
        print(f"{args.regions}: {data}")
    return 0


def dry_run(args) -> int:
    """Print the plan, and time some images. Writes nothing, and takes seconds."""
    rank, world, device = distributed.place()
    images = open_images(args)
    sample = ImageList(images.root, ((images[i], 0) for i in evenly(len(images), 64)))
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        data = open_data(args, sample, f"{folder}/regions.npy", images)
        seconds = (time.perf_counter() - began) * max(args.workers, 1) / len(sample)
        schedule = make_schedule(args, len(images), data.num_regions)
        if rank == 0:
            plan.print_plan(args, schedule)
            plan.print_maps_plan(Path(args.regions), len(images), args.size // 4, seconds)
        model, ddp, optimizer = build(args, data.num_regions)
        with autocast(device, args.precision):
            plan.check_memory(model, args)
        order = itertools.cycle(range(len(data)))

        def time_steps(images: int, steps: int) -> list[float]:
            keys = [[(rank, next(order)) for _ in range(images)] for _ in range(steps)]
            batches, taken = copy_ahead(load_batches(data, keys, args.workers, device), device), []
            for step in range(steps):
                began = time.perf_counter()
                k, lr, tau = schedule(step)
                stats = forward_backward(ddp, batches, 1, k, step, args.precision)
                update(model, optimizer, lr, tau)
                stats["loss"].item()  # wait for the GPU
                taken.append(time.perf_counter() - began)
            return taken

        share, n, slow = args.batch_size // world // args.accum, 2, device.type != "cpu"
        while not slow and n < share:  # a CPU's speed hardly depends on the number of images
            slow = distributed.agree(torch.ones((), dtype=torch.bool), time_steps(n, 2)[1] > 0.5)[1]  # on any rank
            n *= 1 if slow else 2
        n = min(n, share) if device.type == "cpu" else share
        least, median, most = sorted(time_steps(n, 4)[1:])  # the first warms up
        began = time.perf_counter()
        for i in range(len(data)):
            data[0, i]
        loaded = len(data) * max(args.workers, 1) * world / (time.perf_counter() - began)
    if rank == 0:
        speed = n * world / median
        whole = plan.duration(schedule.steps * args.batch_size / min(speed, loaded))
        took = f"3 steps of {n * world} of {args.batch_size} images took {median:.3g} s each"
        took += f" ({least:.3g} to {most:.3g})"
        print(f"{took} on {world} x {device.type}, {cli.describe_ops(device)}: {speed:.4g} images/s")
        print(f"loading: {loaded:.4g} images/s with --workers {args.workers}, if each has a core; {whole} in all")
        if device.type == "cuda":
            print(f"peak memory of rank 0: {plan.size_of(torch.cuda.max_memory_allocated(device))}")
    return 0


def main(argv=None):
    def work() -> int:
        args = parse_args(argv)
        return dry_run(args) if args.dry_run else prepare(args) if args.prepare else train(args, signals)

    with distributed.StopSignals() as signals:
        cli.run("train.py", work)


if __name__ == "__main__":
    main()

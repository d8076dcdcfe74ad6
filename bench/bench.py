"""What each op, the mask step and the train step cost beside other ways to do the same, in one process and one run:

    make bench                    # or: make bench DEVICE=cuda
    python bench/bench.py --images photos --authors KKallidromitis-r2o

Contestants take turns, so that a noisy machine is noisy for all of them. Writes a table and its figures to
bench/results/. Peers take part where they are installed (scikit-learn, faiss-cpu, fast-pytorch-kmeans, flash-kmeans),
the authors' code where --authors names a checkout of it.

Floor: the bytes or the FLOPs of the plain algorithm at the rates that this device reaches in a copy and in a matrix
product, whichever takes longer. Skipping work, as the C++ K-means does, goes below it.
"""

import argparse
import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import math
import platform
import re
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import datasets
from torchvision.ops import roi_align
from torchvision.transforms import v2 as transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import r2o
import r2o_ops
from runtime.cli import UsageError
from runtime.images import ImageList, list_images, read_image
from runtime.loader import ImageRegions
from runtime.regions import region_maps

GROUP, ITERS, LLOYD = 32, 20, 5  # images in a K-means; Lloyd iterations in training; those timed on their own
CLUSTERS = (128, 64, 16, 4)
PARTS = "pooling clustering masks train evaluation loading listing".split()
PEERS = {"scikit-learn": "sklearn", "faiss-cpu": "faiss", "fast-pytorch-kmeans": "fast_pytorch_kmeans"}
PEERS["flash-kmeans"] = "flash_kmeans"
EVALUATION = [(64, 196, 1024), (16, 784, 2048), (4, 3136, 2048)]  # problems, points, dimensions at K = 5


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Counts operator calls, and those after which the host must wait for a GPU."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")

    def __init__(self):
        super().__init__()
        self.calls = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        self.waits += func.overloadpacket.__name__ in self.WAITS
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("_to_copy", "copy_"):  # of memory that is not pinned, to a GPU
            source = args[func.overloadpacket.__name__ == "copy_"]
            self.waits += out.is_cuda and not source.is_cuda and not source.is_pinned()
        return out


def count(f, device) -> tuple:
    """f's output; operator calls on a CPU, kernels on a GPU; host synchronizations."""
    with Calls() as mode:
        out = f()
    if device.type == "cpu":
        return out, mode.calls, mode.waits
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        f()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return out, len(kernels), mode.waits


def peak_memory(f, device) -> float | None:
    """Peak MB of f above what was in use before. On a CPU, the resident memory that Linux reports."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if sys.platform != "linux":
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak

    def status(key):
        return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

    before = status("VmRSS")
    f()
    return status("VmHWM") - before


def once(f, device) -> float:
    """Milliseconds. On a CPU, after an untimed run, which wakes the cores and warms the caches. On a GPU, between
    events, after a millisecond of idling in which the host can run ahead, as it does in training."""
    if device.type == "cpu":
        time.sleep(0.15)  # until the threads of the contestant before stop spinning
        for _ in range(2):
            start = time.perf_counter()
            f()
            ms = 1e3 * (time.perf_counter() - start)
            if ms > 1000:  # long enough to be its own warm-up
                break
        return ms
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)
    start.record()
    f()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def rates(device) -> dict[str, float]:
    """What the device reaches: bytes read and written per second by a copy, FLOP/s by a matrix product."""
    found = {}
    a = torch.rand(64 << 20, device=device)
    b = torch.empty_like(a)
    found["copy GB/s"] = 2 * a.nbytes / min(once(lambda: b.copy_(a), device) for _ in range(9)) / 1e6
    for dtype in [torch.float32] + [torch.bfloat16] * (device.type == "cuda"):
        x = torch.rand(4096 if device.type == "cuda" else 2048, 4096, device=device, dtype=dtype)
        ms = min(once(lambda x=x: x @ x.mT, device) for _ in range(9))
        found[f"GEMM {str(dtype)[6:]} GFLOP/s"] = 2 * len(x) ** 2 * 4096 / ms / 1e6
    return found


class Bench:
    def __init__(self, device: torch.device, seconds: float):
        self.device, self.seconds, self.rows, self.rates = device, seconds, [], rates(device)

    def race(self, what, contestants: dict, bytes_moved=0.0, flop=0.0, inertia=None, less=None, amp=False, timer=once):
        """Times contestants[name](), the first being ours, in turns. less: {name: f}, whose median time is taken off,
        for a part that has no function of its own. inertia: output -> what K-means minimizes. timer: (f, device) ->
        milliseconds."""
        gemm = "GEMM bfloat16 GFLOP/s" if amp and self.device.type == "cuda" else "GEMM float32 GFLOP/s"
        floor = max(bytes_moved / self.rates["copy GB/s"], flop / self.rates[gemm]) / 1e6
        taken = {name: [] for name in contestants}
        quality, costs = {}, {}
        for name, f in contestants.items():  # warms up, and measures what need be measured only once
            if "compile" in name:  # before calls are counted: what runs first in that mode is never compiled again
                f()
            result, calls, waits = count(f, self.device)
            quality[name] = float(inertia(result)) if inertia else None
            del result
            if "compile" in name:  # it ran uncompiled
                calls = waits = None
            costs[name] = (calls, waits, peak_memory(f, self.device))
        began, turns = time.perf_counter(), 0
        off = {name: [] for name in less or ()}
        while turns < 3 or (turns < 50 and time.perf_counter() - began < self.seconds):
            for name, f in contestants.items():
                taken[name].append(timer(f, self.device))
                if name in off:
                    off[name].append(once(less[name], self.device))
            turns += 1
        for name, ms in off.items():
            taken[name] = [t - statistics.median(ms) for t in taken[name]]
        ours = next(iter(contestants))
        print(f"\n{what}  (floor {floor:.3f} ms, n = {turns})", flush=True)
        for name, ms in taken.items():
            deciles = statistics.quantiles(ms, n=10)
            row = {"what": what, "who": name, "n": turns, "median ms": statistics.median(ms)}
            row |= {"p10 ms": max(deciles[0], min(ms)), "p90 ms": min(deciles[-1], max(ms)), "floor ms": floor}
            row["times floor"] = row["median ms"] / floor if floor else None
            row["time / first"] = row["median ms"] / statistics.median(taken[ours])
            row["calls"], row["waits"], row["extra MB"] = costs[name]
            row["inertia / ours"] = quality[name] / quality[ours] if inertia else None
            self.rows.append(row)
            print("   " + cells(row), flush=True)


COLUMNS = {
    "who": "{}",
    "median ms": "{:.3f}",
    "p10 ms": "{:.3f}",
    "p90 ms": "{:.3f}",
    "times floor": "{:.1f}",
    "time / first": "{:.2f}",
    "calls": "{}",
    "waits": "{}",
    "extra MB": "{:.0f}",
    "inertia / ours": "{:.5f}",
}


def cells(row: dict) -> str:
    return " | ".join("" if row[c] is None else form.format(row[c]) for c, form in COLUMNS.items())


# ---------------------------------------------------------------------------------------------------------------------
# Input: pictures, their superpixels, the features of a random ResNet-50
# ---------------------------------------------------------------------------------------------------------------------


def pictures(folder: str | None, count: int) -> list[Image.Image]:
    """The first `count` images under `folder`, or smooth random ones, 224 x 224."""
    if folder is None:
        low = torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(0))
        smooth = F.interpolate(low, size=224, mode="bicubic").clamp(0, 1)
        return [Image.fromarray((x.permute(1, 2, 0) * 255).byte().numpy()) for x in smooth]
    found = list_images(folder)
    if len(found) < count:
        raise UsageError(f"{folder} holds {len(found)} images: at least {count} are needed")
    paths = [found.path(i) for i in range(count)]
    return [Image.open(f).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC) for f in paths]


@torch.no_grad()
def make_input(images: list[Image.Image], device) -> types.SimpleNamespace:
    """pixels: SLIC at full size; regions: every 4th pixel of it; c4 of the images, c5 of two views."""
    from skimage.segmentation import slic

    def segments(image):
        return slic(np.asarray(image, np.float32) / 255, n_segments=100, start_label=0)

    maps = {key: segments(image) for key, image in {id(i): i for i in images}.items()}  # images may recur
    pixels = torch.stack([torch.from_numpy(maps[id(i)]) for i in images]).long()
    x = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images])
    torch.manual_seed(0)
    net = r2o.build_encoder("resnet50").to(device, memory_format=torch.channels_last)  # batch norm of the batch
    x = r2o.normalize(x.to(device)).contiguous(memory_format=torch.channels_last)
    batches = [r2o.encode_c4(net, b) for b in x.split(GROUP)]
    c4 = torch.cat(batches)
    c5 = torch.cat([net.layer4(b) for b in batches])
    c5 = torch.cat([c5, c5.flip(-1)]).contiguous(memory_format=torch.channels_last)  # two views
    random = torch.Generator().manual_seed(0)
    n = len(images)
    side = torch.rand(n, 2, 2, generator=random) * 0.7 + 0.28
    low = torch.rand(n, 2, 2, generator=random) * (1 - side).clamp(min=0)
    boxes = torch.cat([low, (low + side).clamp(max=1)], -1).to(device)  # (n, 2, 4)
    flips = (torch.rand(n, 2, generator=random) < 0.5).to(device)
    regions = pixels[:, 2::4, 2::4].to(torch.uint8)
    data = types.SimpleNamespace(B=n, R=int(regions.max()) + 1, c4=c4, c5=c5, images=x, boxes=boxes, flips=flips)
    data.regions, data.pixels = regions.to(device), pixels.to(device)
    return data


# ---------------------------------------------------------------------------------------------------------------------
# Contestants
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def plain():
    """r2o with its references instead of its compiled ops."""
    extension, r2o_ops.extension = r2o_ops.extension, lambda device=None: "python"
    try:
        yield
    finally:
        r2o_ops.extension = extension


def in_plain(f):
    def run():
        with plain():
            return f()

    return run


def graphed(f):
    """f as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = f()

    def run():
        graph.replay()
        return out

    return run


def authors_code(folder: Path, device):
    """The authors' mask step, from a checkout: imported unchanged but for the device, which they hard-code. The
    functions are theirs; the lines that tie them together are ours, since theirs are inside a forward pass."""
    source = (folder / "utils/mask_utils.py").read_text()
    masks = types.ModuleType("mask_utils")
    exec(compile(source.replace("'cuda'", repr(device.type)), "mask_utils.py", "exec"), masks.__dict__)
    sys.path.insert(0, str(folder))
    from utils.kmeans.kmeans import KMeans

    def pool(c4, pixels):
        return masks.maskpool(masks.to_binary_mask(pixels, -1, resize_to=(14, 14)), c4)[0]

    def step(data, K):
        p = pool(data.c4, data.pixels)
        ids = KMeans(K, max_iter=ITERS).fit_transform(F.normalize(p.reshape(-1, p.shape[2]), dim=-1)).view(data.B, -1)
        one_hot = masks.to_binary_mask(data.pixels, -1, (56, 56))
        m = torch.einsum("bchw,bc->bchw", one_hot, ids).sum(1).long()
        one_hot = masks.to_binary_mask(m, K)
        views = []
        for v in (0, 1):
            w = roi_align(one_hot, list((data.boxes[:, v, None] * 56).unbind()), 7)
            views.append(torch.where(data.flips[:, v, None, None, None], w.flip(-1), w))
        w = torch.cat(views).flatten(2)
        w = w / w.sum(-1, keepdim=True).clamp(min=1)
        return w @ data.c5.permute(0, 2, 3, 1).flatten(1, 2)

    def lloyd(x, centers, iters):
        kmeans = KMeans(len(centers), init=lambda x: centers.clone(), max_iter=iters, eps=-1)
        kmeans.fit(x)
        return kmeans.cluster_centers_

    def kmeans(x, K):
        fit = KMeans(K, max_iter=ITERS)
        fit.fit(x)
        return fit.cluster_centers_

    return types.SimpleNamespace(pool=pool, step=step, lloyd=lloyd, kmeans=kmeans)


def lloyd_peers(device) -> dict:
    """name -> f(x (n, D) tensor, centers (K, D), iters) -> centers, numpy or tensor."""
    peers = {}
    if installed("faiss") and device.type == "cpu":
        import faiss

        def with_faiss(x, centers, iters):
            many = {"max_points_per_centroid": 10**9, "min_points_per_centroid": 1}
            kmeans = faiss.Kmeans(x.shape[1], len(centers), niter=iters, **many)
            kmeans.train(x.numpy(), init_centroids=centers.numpy())
            return kmeans.centroids

        faiss.omp_set_num_threads(torch.get_num_threads())
        peers["faiss-cpu"] = with_faiss
    if installed("sklearn") and device.type == "cpu":
        from sklearn.cluster import KMeans

        def with_sklearn(x, centers, iters):
            kmeans = KMeans(len(centers), init=centers.numpy(), n_init=1, max_iter=iters, tol=0, algorithm="lloyd")
            return kmeans.fit(x.numpy()).cluster_centers_

        peers["scikit-learn"] = with_sklearn
    if installed("fast_pytorch_kmeans"):
        import fast_pytorch_kmeans

        def with_fast(x, centers, iters):
            kmeans = fast_pytorch_kmeans.KMeans(len(centers), max_iter=iters, tol=-1)
            kmeans.fit_predict(x, centers.clone())
            return kmeans.centroids

        peers["fast_pytorch_kmeans"] = with_fast
    if installed("flash_kmeans") and device.type == "cuda":
        from flash_kmeans import batch_kmeans_Euclid

        def with_flash(x, centers, iters):
            return batch_kmeans_Euclid(x[None].half(), len(centers), iters, -1, centers[None].half())[1][0].float()

        peers["flash-kmeans (fp16)"] = with_flash
    return peers


# ---------------------------------------------------------------------------------------------------------------------
# What is timed
# ---------------------------------------------------------------------------------------------------------------------


def pooling(bench: Bench, data, theirs):
    B, C, H, W = data.c4.shape
    R, cells = data.R, H * W

    def index_add():  # every pixel on its own: the usual way, 16 times the reads
        x = F.interpolate(data.c4, scale_factor=4, mode="nearest").permute(0, 2, 3, 1).reshape(-1, C)
        index = (data.regions.long() + torch.arange(B, device=x.device)[:, None, None] * R).flatten()
        return x.new_zeros(B * R, C).index_add_(0, index, x)

    contestants = {
        "r2o": lambda: r2o.region_pool(data.c4, data.regions, R),
        "plain PyTorch": in_plain(lambda: r2o.region_pool(data.c4, data.regions, R)),
        "torch.compile of it": lambda: compiled(data.c4, data.regions, R),
        "index_add of pixels": index_add,
    }
    compiled = torch.compile(r2o.region_pool_ref)
    if theirs and B <= GROUP:
        contestants["authors"] = lambda: theirs.pool(data.c4, data.pixels)
    moved = 4 * (B * cells * C + B * R * C) + data.regions.numel()
    bench.race(f"region_pool, B = {B}, C = {C}, R = {R}", contestants, moved, 2 * B * cells * C)


def points_of(data):
    p, area = r2o.region_pool(data.c4, data.regions, data.R)
    G = data.B // GROUP
    return F.normalize(p, dim=-1).view(G, -1, p.shape[2]), (area > 0).view(G, -1)


def total_distance(x: torch.Tensor, valid: torch.Tensor):
    """centers (G, K, D), or (centers, …) -> the inertia of the valid points."""

    def inertia(out):
        centers = out[0] if isinstance(out, tuple) else out
        if isinstance(centers, list):
            centers = torch.stack([torch.as_tensor(c) for c in centers])
        centers = torch.as_tensor(centers).to(x).view(len(x), -1, x.shape[2])
        groups = zip(x, valid, centers, strict=True)
        return sum((torch.cdist(a[v].double(), c.double()).amin(1) ** 2).sum() for a, v, c in groups)

    return inertia


def clustering(bench: Bench, data, theirs):
    """The whole of it, seeding and 20 iterations; and 5 Lloyd iterations from the same seeds."""
    x, valid = points_of(data)
    separate = [a[v].contiguous() for a, v in zip(x, valid, strict=True)]
    G, D, n = len(x), x.shape[2], sum(map(len, separate))
    for K in CLUSTERS:
        u = r2o.seeding_uniforms(G, K, torch.Generator().manual_seed(1)).to(x.device)

        def ours(iters, u=u):
            return r2o.kmeans_seeded(x, valid, u, iters)

        contestants = {"r2o": lambda: ours(ITERS), "plain PyTorch": in_plain(lambda: ours(ITERS))}
        if bench.device.type == "cuda":
            contestants["plain PyTorch as a CUDA graph"] = graphed(in_plain(lambda: ours(ITERS)))
        if K <= 4 and G == 1 and bench.device.type == "cpu":  # otherwise compiling takes longer than all the rest
            compiled = torch.compile(r2o.kmeans_ref)
            contestants["torch.compile of it"] = lambda c=compiled, u=u: c(x, valid, u, ITERS)
        if theirs and G == 1:
            contestants["authors"] = lambda K=K: [theirs.kmeans(a, K) for a in separate]
        if installed("sklearn") and bench.device.type == "cpu" and G == 1:
            from sklearn.cluster import KMeans

            def sklearn(K=K):
                fit = KMeans(K, n_init=1, max_iter=ITERS, tol=0, random_state=0)
                return [fit.fit(a.numpy()).cluster_centers_ for a in separate]

            contestants["scikit-learn, its seeding"] = sklearn
        inertia = total_distance(x, valid)
        flop = 2 * n * D * K * ((2 + int(math.log(K))) + ITERS)
        what = f"kmeans, G = {G}, n = {n // G}, D = {D}, K = {K}, {ITERS} iterations"
        bench.race(what, contestants, 4 * n * D * 2, flop, inertia)
        lloyd(bench, f"G = {G}, n = {n // G}", x, valid, separate, K, u, theirs if G == 1 else None)


def lloyd(bench: Bench, where: str, x, valid, separate, K: int, u, theirs):
    """Iterations only: each contestant's time for one iteration more than asked for, minus its time for one, so that
    what is done once (checks, copies, norms, seeding) is not counted."""
    seeds = [c.contiguous() for c in r2o.kmeans_seeded(x, valid, u, 0)[0]]
    n, D = sum(map(len, separate)), x.shape[2]
    iters = LLOYD
    while iters > 1 and torch.equal(
        r2o.kmeans_seeded(x, valid, u, iters)[1], r2o.kmeans_seeded(x, valid, u, iters + 1)[1]
    ):
        iters -= 1  # ours would stop

    def contestant(f):
        return lambda: f(iters + 1), lambda: f(1)

    def ours(iters):
        return r2o.kmeans_seeded(x, valid, u, iters)

    def plainly(iters):
        with plain():
            return ours(iters)

    pairs = {"r2o": contestant(ours), "plain PyTorch": contestant(plainly)}
    peers = lloyd_peers(bench.device) | ({"authors": theirs.lloyd} if theirs else {})
    for name, f in peers.items():
        pairs[name] = contestant(lambda i, f=f: [f(a, c, i) for a, c in zip(separate, seeds, strict=True)])
    what = f"Lloyd, {where}, D = {D}, K = {K}, {iters} iterations after the first"
    contestants, less = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    bench.race(what, contestants, 4 * n * D * iters, 2 * n * D * K * iters, total_distance(x, valid), less)


def evaluation(bench: Bench):
    """Many small problems, as eval_cub.py has: K = 5, features on a low-dimensional surface."""
    for G, N, D in EVALUATION:
        random = torch.Generator().manual_seed(0)
        x = torch.randn(G, N, 32, generator=random) @ torch.randn(32, D, generator=random)
        x = F.normalize(x.relu(), dim=-1).to(bench.device)
        valid = torch.ones(G, N, dtype=torch.bool, device=bench.device)
        u = r2o.seeding_uniforms(G, 5, random).to(bench.device)
        lloyd(bench, f"evaluation, G = {G}, n = {N}", x, valid, list(x), 5, u, None)


def mask_step(bench: Bench, data, theirs):
    """Pool, cluster, masks, crops, pooling: everything between C4 of the image, C5 of the views, and the heads."""
    layers = "conv1 bn1 relu maxpool layer1 layer2 layer3".split()
    identity = types.SimpleNamespace(**dict.fromkeys(layers, lambda x: x))
    B, R = data.B, data.R
    G, (_, C, H, W) = B // GROUP, data.c4.shape
    parts = []
    for i in range(0, B, GROUP):
        part = types.SimpleNamespace(B=GROUP, c5=torch.cat([data.c5[i : i + GROUP], data.c5[B + i : B + i + GROUP]]))
        part.c4, part.pixels, part.boxes, part.flips = (
            x[i : i + GROUP] for x in (data.c4, data.pixels, data.boxes, data.flips)
        )
        parts.append(part)
    for K in CLUSTERS:
        u = r2o.seeding_uniforms(G, K, torch.Generator().manual_seed(1)).to(bench.device)

        def step(assign, K=K, u=u):
            model = r2o.R2O("tiny", R, GROUP, ITERS, assign, hidden=1, dim=1)
            size = data.c5.shape[-1]

            @torch.no_grad()
            def run():
                m = model.predict_masks(identity, data.c4, data.regions, K, u)
                return r2o.pool_pairs(data.c5, *r2o.masks_in_views(m, data.boxes, data.flips, K, size))

            return run

        contestants = {"r2o, --assign region": step("region"), "r2o, --assign pixel": step("pixel")}
        contestants["plain PyTorch, region"] = in_plain(step("region"))
        if theirs:  # 32 images at a time, the batch of one of their GPUs
            contestants["authors (region)"] = lambda K=K: [theirs.step(part, K) for part in parts]
        n = B * R
        flop = 2 * n * C * K * (2 + int(math.log(K)) + ITERS)
        moved = 4 * (B * H * W * C + 2 * n * C + data.c5.numel())
        bench.race(f"mask step, B = {B}, K = {K}", contestants, moved, flop)

        weights = r2o.crop_masks(data.regions % K, data.boxes[:, 0], data.flips[:, 0], K, 7)
        contestants = {"r2o": lambda K=K: r2o.crop_masks(data.regions % K, data.boxes[:, 0], data.flips[:, 0], K, 7)}
        contestants["roi_align of one-hot"] = in_plain(contestants["r2o"])
        bench.race(f"crop_masks, B = {B}, K = {K}", contestants, data.regions.numel() + weights.nbytes)

        pairs = (weights.sum((2, 3)) > 1e-3).nonzero()
        c5 = data.c5[:B].clone(memory_format=torch.preserve_format).requires_grad_()
        grad = torch.rand(len(pairs), c5.shape[1], device=bench.device)

        def there_and_back(c5=c5, weights=weights, pairs=pairs, grad=grad):
            return torch.autograd.grad(r2o.mask_pool(c5, weights, pairs), c5, grad)[0]

        contestants = {"r2o": there_and_back, "bmm": in_plain(there_and_back)}
        moved = 2 * (4 * data.c5.numel() // 2 + grad.nbytes)
        bench.race(f"mask_pool and its gradient, B = {B}, K = {K}, {len(pairs)} rows", contestants, moved)


def train_step(bench: Bench, data, K: int, compiled: bool = False):
    """ResNet-50, two views, loss, gradients, LARS, moving average; with masks predicted, and with masks given."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # as train.py does
    model = r2o.R2O("resnet50", data.R, GROUP).to(bench.device, memory_format=torch.channels_last)
    optimizer = r2o.LARS([p for p in model.parameters() if p.requires_grad], lr=0.1)
    views = torch.cat([data.images, data.images.flip(-1)]).contiguous(memory_format=torch.channels_last)
    predict = model.predict_masks
    with torch.no_grad():
        u = r2o.seeding_uniforms(data.B // GROUP, K, torch.Generator().manual_seed(1)).to(bench.device)
        given = predict(model.target["encoder"], data.images, data.regions, K, u)

    def only_c4(encoder, images, *_):
        r2o.encode_c4(encoder, images)
        return given

    plain = model.encode_c4, model.encode

    def step(predict_masks, overlap, encoders=plain):
        def run():
            model.predict_masks, model.overlap = predict_masks, overlap
            model.encode_c4, model.encode = encoders
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.device.type == "cuda"):
                loss, _ = model(data.images, views, data.regions, data.boxes, data.flips, K)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            model.update_target(0.99)

        return run

    contestants = {"masks predicted": step(predict, True)}
    if bench.device.type == "cuda":  # a CPU's spread is larger than these differences
        contestants["masks predicted, one stream"] = step(predict, False)
        contestants["C4 forward, masks given"] = step(only_c4, False)
    if compiled:
        contestants["masks predicted, torch.compile"] = step(predict, True, tuple(map(torch.compile, plain)))
    contestants["masks given"] = step(lambda *_: given, False)
    bench.race(f"train step, ResNet-50, B = {data.B}, K = {K}", contestants, flop=71.5e9 * data.B, amp=True)


def by_itself(f, device) -> float:
    """For contestants that return their own time, in ms, without what must not be counted."""
    return f()


def authors_samples(folder: Path, images: list[str]):
    """Their dataset, which computes SLIC anew for every sample, on these files."""
    sys.modules.setdefault("imp", types.ModuleType("imp"))  # gone since Python 3.12; they import it, unused
    spec = importlib.util.spec_from_file_location("r2o_transform", folder / "data/r2o_transform.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    views = theirs.get_transform("train"), theirs.get_transform("train", gb_prob=0.1, solarize_prob=0.2)
    transform = theirs.MultiViewDataInjector([*views, theirs.get_transform("raw")], 100)
    dataset = theirs.SSLMaskDataset.__new__(theirs.SSLMaskDataset)  # __init__ would look for class folders
    dataset.samples, dataset.transform, dataset.loader = [(p, None) for p in images], transform, theirs.default_loader
    return dataset


def photographs(folder: str | None, where: str) -> ImageList:
    """At most 256 images of `folder`, or smooth random ones of 500 x 375."""
    if folder is None:
        for i in range(64):
            low = torch.rand(1, 3, 7, 9, generator=torch.Generator().manual_seed(i))
            x = F.interpolate(low, size=(375, 500), mode="bicubic").clamp(0, 1)[0]
            Image.fromarray((x.permute(1, 2, 0) * 255).byte().numpy()).save(f"{where}/{i:03}.jpg", quality=95)
        folder = where
    found = list_images(folder)
    return ImageList(found.root, ((found[i], 0) for i in range(min(256, len(found)))))


def loading(bench: Bench, folder: str | None, authors: Path | None):
    """Samples from files: in one thread, and from a running DataLoader with 2 workers; then the device's part."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as where:
        images = photographs(folder, where)
        maps, header = region_maps(images, f"{where}/maps.npy", "grid")
        data = ImageRegions(images, maps, header)
        n, paths = len(data), [images.path(i) for i in range(len(images))]
        print(f"{n} images, {np.mean([Path(p).stat().st_size for p in paths]) / 1e3:.0f} kB each on average")
        keys = [(0, i) for i in range(n)]
        sets = {"r2o": (data, keys)}
        if authors:
            sets["authors"] = authors_samples(authors, paths), range(n)
        torch.set_num_threads(1)

        def samples(dataset, keys):
            return lambda: [dataset[key] for key in keys[:GROUP]] and None

        contestants = {name: samples(*d) for name, d in sets.items()}
        contestants["decoding alone"] = lambda: [read_image(p) for p in paths[:GROUP]] and None
        bench.race(f"{GROUP} samples in one thread", contestants)

        def stream(dataset, keys):
            def run():
                batches = [[keys[(i + j) % n] for j in range(GROUP)] for i in range(0, (2 + 16) * GROUP, GROUP)]
                loader = iter(torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=2))
                next(loader), next(loader)
                start = time.perf_counter()
                count = sum(1 for _ in loader)
                return 1e3 * (time.perf_counter() - start) / count

            return run

        contestants = {name: stream(*d) for name, d in sets.items()}
        bench.race(f"{GROUP} samples from 2 workers", contestants, timer=by_itself)
        torch.set_num_threads(threads)

        batch = torch.utils.data.default_collate([data[key] for key in keys[:GROUP]])
        mb = sum(x.nbytes for x in batch.values()) / GROUP / 1e6
        print(f"{mb:.3f} MB a sample to the device")
        views, flips, factors = (batch[name].transpose(0, 1).flatten(0, 1) for name in ("views", "flips", "factors"))
        views, flips = views.movedim(-1, 1).to(bench.device), flips.to(bench.device)
        jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
        blur = transforms.RandomApply([transforms.GaussianBlur(23, (0.1, 2.0))], 0.55)
        rest = [transforms.RandomGrayscale(0.2), blur, transforms.RandomSolarize(0.5, 0.1), r2o.normalize]
        theirs = transforms.Compose([transforms.ToDtype(torch.float32, scale=True), jitter, *rest])
        contestants = {"r2o": lambda: r2o.augment(views, flips, factors)}
        contestants["torchvision v2, image by image"] = lambda: torch.stack([theirs(x) for x in views])
        bench.race(f"augmentation on the device, {len(views)} views", contestants, 5 * views.numel())


def listing(bench: Bench):
    """A data set of ImageNet's size: 1,000 folders, 1,281,000 (empty) files."""
    with tempfile.TemporaryDirectory() as where:
        for c in range(1000):
            Path(where, f"n{c:08}").mkdir()
            for i in range(1281):
                open(f"{where}/n{c:08}/n{c:08}_{i * 37 % 50000}.JPEG", "wb").close()
        kept = []
        contestants = {"r2o": lambda: kept.append(list_images(where))}
        contestants["torchvision ImageFolder"] = lambda: kept.append(datasets.ImageFolder(where))
        bench.race("listing 1,281,000 files", contestants, timer=lambda f, device: kept.clear() or once(f, device))


# ---------------------------------------------------------------------------------------------------------------------


def machine(device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    if sys.platform == "linux":
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return f"{model}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def write(bench: Bench, args):
    date = datetime.date.today().isoformat()
    peers = [
        d for d, module in PEERS.items() if installed(module) and (d != "flash-kmeans" or bench.device.type == "cuda")
    ]
    about = {
        "machine": machine(bench.device),
        "date": date,
        "torch": torch.__version__,
        "ops": r2o.extension(bench.device),
        "input": f"32 {'photographs' if args.images else 'smooth random images'}; evaluation: random points",
        "peers": ", ".join(f"{p} {importlib.metadata.version(p)}" for p in peers) or "none",
        **bench.rates,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", f"{about['machine']} {date} {args.only}".lower()).strip("-")
    (args.out / f"{name}.json").write_text(json.dumps({"about": about, "rows": bench.rows}, indent=1) + "\n")
    lines = ["# " + about["machine"] + ", " + date, ""]
    lines += [f"* {key}: {value if isinstance(value, str) else round(value)}" for key, value in about.items()]
    lines += [
        "",
        "All times in ms, ours first; p10 and p90 of 3 runs are the least and the most. Floor: the plain algorithm's",
    ]
    lines += [
        "bytes or FLOPs at the rates above; skipping work goes below it. calls: operators that PyTorch sees on a CPU,"
    ]
    lines += [
        "kernels on a GPU; waits: results that the host reads, for which it waits if they are on a GPU (on a CPU this"
    ]
    lines += ["includes r2o's checks of its input)."]
    for row in bench.rows:
        if f"## {row['what']}" not in lines:
            lines += ["", f"## {row['what']}", "", f"Floor {row['floor ms']:.3f} ms, n = {row['n']}.", ""]
            lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        lines.append("| " + cells(row) + " |")
    (args.out / f"{name}.md").write_text("\n".join(lines) + "\n")
    print(f"\nwrote {args.out / name}.md and .json")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--images", help="folder of photographs (default: smooth random images)")
    p.add_argument("--authors", type=Path, help="a checkout of github.com/KKallidromitis/r2o")
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    p.add_argument(
        "--only", default="", help="some of: pooling clustering masks train evaluation loading listing (default: all)"
    )
    p.add_argument("--batches", type=int, nargs="+", default=[32, 256], help="multiples of 32")
    p.add_argument("--seconds", type=float, default=10, help="duration of each comparison, unless 3 turns take longer")
    args = p.parse_args()
    if args.authors and not (args.authors / "utils/mask_utils.py").exists():
        p.error(f"--authors {args.authors} holds no utils/mask_utils.py: pass a checkout of KKallidromitis/r2o")
    if any(b < GROUP or b % GROUP for b in args.batches):
        p.error(f"--batches must be multiples of {GROUP}, got {args.batches}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        p.error("--device cuda, but PyTorch sees no GPU: pass --device cpu")
    device = torch.device(args.device)
    only = args.only.split() or PARTS
    if not set(only) <= set(PARTS):
        p.error(f"--only {args.only!r}: pass some of {' '.join(PARTS)}")
    try:
        images = pictures(args.images, GROUP)
    except UsageError as e:
        p.error(str(e))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and streams below use the current device
    bench = Bench(device, args.seconds)
    theirs = authors_code(args.authors, device) if args.authors else None
    print(f"{machine(device)}, ops: {r2o.extension(device)}, {bench.rates}\n{' | '.join(COLUMNS)}")
    try:
        for B in args.batches if set(only) - {"evaluation", "loading", "listing"} else []:
            data = make_input(images * (B // GROUP), device)
            if "pooling" in only:
                pooling(bench, data, theirs)
            if "clustering" in only:
                clustering(bench, data, theirs)
            if "masks" in only:
                mask_step(bench, data, theirs)
            if "train" in only and (B == GROUP or device.type == "cuda"):
                train_step(bench, data, 128)
        if "evaluation" in only:
            evaluation(bench)
        if "loading" in only:
            loading(bench, args.images, args.authors)
        if "listing" in only:
            listing(bench)
    finally:  # what was measured before an interruption is kept
        write(bench, args)


if __name__ == "__main__":
    main()

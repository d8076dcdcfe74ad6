"""The four ops of csrc/, each beside the plain PyTorch code that defines it; r2o.py re-exports them.

`<op>_ref` is the definition, and runs where nothing was compiled. The C++ and CUDA versions must agree with it. `<op>`
checks its input and calls whichever is available; `extension()` tells which. All compute in float32 (float64 for
float64 input), even for half-precision input and inside autocast. Letters as in r2o.py.
"""

import contextlib
import importlib.util
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

if importlib.util.find_spec("r2o_C") is None:
    r2o_C = None  # not built: the references run
else:
    try:
        import r2o_C
    except ImportError as e:  # built for another PyTorch version, or interrupted: fail loudly
        raise ImportError(f"r2o_C exists but does not load ({e}); rebuild: python setup.py build_ext --inplace") from e


def extension(device: str | torch.device | None = None) -> str:
    """Which code runs the ops on `device` (default: the GPU if there is one): "cuda", "cpp" or "python"."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if r2o_C is not None and kind == "cpu":
        return "cpp"
    return "cuda" if r2o_C is not None and kind == "cuda" and r2o_C.with_cuda else "python"


def upcast(x: Tensor) -> Tensor:
    """x in the precision that the ops compute in."""
    return x if x.dtype == torch.float64 else x.float()


@contextlib.contextmanager
def full_precision(device: torch.device):
    """Disable autocast and compute float32 products in float32, whatever the caller allows (TF32, bfloat16)."""
    with torch.autocast(device.type, enabled=False):
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # PyTorch 2.9
            matmul = (torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn).matmul
            before, matmul.fp32_precision = matmul.fp32_precision, "ieee"
        else:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
                matmul.fp32_precision = before
            else:
                torch.set_float32_matmul_precision(before)


def _run(reference, *args):
    """Call the compiled op, or its reference if none was built for this device, in full precision."""
    device = args[0].device
    compiled = extension(device) != "python"
    op = getattr(torch.ops.r2o, reference.__name__.removesuffix("_ref")) if compiled else reference
    with full_precision(device):
        return op(*args)


def _check(ok: bool, message: str):
    if not ok:
        raise ValueError(message)


def _expect(name: str, x: Tensor, kind: str, *shape: int | None, device: torch.device | None = None):
    """Check that x holds `kind` ("float", "integer" or "bool"), has this shape (None: any size), and is on `device`."""
    got = "float" if x.is_floating_point() else "bool" if x.dtype == torch.bool else "integer"
    fits = x.ndim == len(shape) and all(want in (None, n) for n, want in zip(x.shape, shape, strict=True))
    wanted = ", ".join("any" if n is None else str(n) for n in shape)
    _check(got == kind and fits, f"{name} must be {kind} of shape ({wanted}), got {x.dtype} {tuple(x.shape)}")
    _check(device in (None, x.device), f"{name} is on {x.device}, the rest on {device}")


def _check_ids(name: str, ids: Tensor, count: int):
    """Check that ids lie in [0, count); not on a GPU, where reading them would stall and kernels ignore such ids."""
    if ids.device.type == "cpu" and ids.numel():
        low, high = (int(v) for v in torch.aminmax(ids))
        _check(0 <= low and high < count, f"{name} must lie in [0, {count}), got {low} to {high}")


# ---- region_pool -----------------------------------------------------------------------------------------------------


def region_pool_ref(features: Tensor, regions: Tensor, num_regions: int) -> tuple[Tensor, Tensor]:
    B, _, H, W = features.shape
    h, w = regions.shape[1:]
    y, x = (torch.arange(n, device=regions.device) for n in (h, w))
    cell = (y // (h // H))[:, None] * W + x // (w // W)  # (h, w)
    ids = regions.long()
    ids = torch.where((ids < 0) | (ids >= num_regions), num_regions, ids)  # an extra bin, dropped below
    index = (ids * (H * W) + cell).flatten(1)  # (B, h w)
    pixels = features.new_zeros(B, (num_regions + 1) * H * W, dtype=upcast(features[:0]).dtype)
    pixels.scatter_add_(1, index, torch.ones_like(index, dtype=pixels.dtype))
    share = pixels.view(B, num_regions + 1, H * W)[:, :num_regions] / (h * w / (H * W))  # (B, R, HW)
    area = share.sum(2)  # (B, R)
    p = torch.einsum("brn,bcn->brc", share, upcast(features).flatten(2))
    return p / torch.where(area > 0, area, 1)[..., None], area


def region_pool(features: Tensor, regions: Tensor, num_regions: int) -> tuple[Tensor, Tensor]:
    """Mean feature of every region; a feature cell's weight is the share of it that the region covers. Sec. 3.1.

    features: (B, C, H, W) floating point. regions: (B, h, w) integer ids < num_regions, with H | h and W | w.
    Returns embeddings (B, R, C), zero for an absent region, and area (B, R) in feature cells, 0 if absent.
    No gradient: only the target network is pooled. Raises ValueError for input that does not fit.
    Equivalent to: the mean over each region of the features, upsampled by repetition to the region map.
    """
    _expect("features", features, "float", None, None, None, None)
    _expect("regions", regions, "integer", len(features), None, None, device=features.device)
    (H, W), (h, w) = features.shape[2:], regions.shape[1:]
    _check(H * W * h * w > 0 and h % H == w % W == 0, f"a region map of {h} x {w} does not tile features of {H} x {W}")
    _check(num_regions > 0, f"num_regions must be positive, got {num_regions}")
    _check_ids("region ids", regions, num_regions)
    with torch.no_grad():
        return _run(region_pool_ref, features, regions, num_regions)


# ---- kmeans ----------------------------------------------------------------------------------------------------------


def cluster_scores(points: Tensor, centers: Tensor) -> Tensor:
    """(G, N, D), (G, K, D) -> (G, N, K): x·mu - |mu|²/2, largest for the nearest center; |x - mu|² = |x|² - 2 score."""
    return torch.baddbmm(-centers.square().sum(-1)[:, None] / 2, points, centers.mT)


def seeding_uniforms(groups: int, num_clusters: int, generator=None, device=None) -> Tensor:
    """The random numbers that K-means consumes, drawn in one call so that every implementation picks the same seeds:
    (G, K, T), with T = 2 + floor(ln K) candidates per seed (greedy k-means++)."""
    device = generator.device if generator is not None else device
    shape = groups, num_clusters, 2 + int(math.log(num_clusters))
    return torch.rand(shape, dtype=torch.float64, generator=generator, device=device)


def kmeans_ref(points: Tensor, valid: Tensor, uniforms: Tensor, max_iters: int) -> tuple[Tensor, Tensor]:
    (G, N, D), K = points.shape, uniforms.shape[1]
    if N == 0:
        return points.new_zeros(G, K, D), valid.new_zeros(G, 0, dtype=torch.long)
    points = torch.where(valid[..., None], points, 0)  # invalid points may hold NaN
    # Center first: distances from dot products lose precision when all points are far from the origin, as ReLU features
    # are.
    mean = points.sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None]  # (G, 1, D)
    points = torch.where(valid[..., None], points - mean, 0)
    g = torch.arange(G, device=points.device)[:, None]
    sq = points.square().sum(-1, keepdim=True)  # (G, N, 1)
    spare = torch.arange(K, device=points.device) >= valid.sum(1, keepdim=True)  # (G, K): more clusters than points

    # Greedy k-means++: a point becomes a candidate with probability proportional to its squared distance from the seeds
    # so far; of T candidates, the one that leaves the smallest total distance becomes the next seed.
    weight = valid.double()  # (G, N)
    distance = torch.full_like(sq[..., 0], math.inf)  # (G, N)
    seeds = []
    for k in range(K):
        mass = weight.cumsum(1)
        total = mass[:, -1:]
        u = torch.minimum(uniforms[:, k] * total, torch.nextafter(total, torch.zeros_like(total)))
        pick = torch.searchsorted(mass, u, right=True)  # (G, T), never a point of weight 0 …
        pick = torch.where(total > 0, pick, seeds[0][:, None] if seeds else 0)  # … unless no other is left
        d = (sq - 2 * cluster_scores(points, points[g, pick])).clamp(min=0).minimum(distance[..., None])  # (G, N, T)
        best = (d.double() * valid[..., None]).sum(1).argmin(1)  # (G,)
        distance = d[g[:, 0], :, best]
        weight = distance.double() * valid
        seeds.append(pick[g[:, 0], best])
    centers = points[g, torch.stack(seeds, 1)]  # (G, K, D)

    # Lloyd. After an iteration in which no point changes cluster, further ones change nothing.
    for i in range(max_iters + 1):
        assign = cluster_scores(points, centers).masked_fill(spare[:, None], -math.inf).argmax(2)  # (G, N)
        if i < max_iters:
            member = F.one_hot(assign, K).to(points.dtype) * valid[..., None]  # (G, N, K)
            size = member.sum(1)[..., None]  # (G, K, 1)
            centers = torch.where(size > 0, (member.mT @ points) / size.clamp(min=1), centers)  # an emptied one stays
    centers = torch.where(spare[..., None], centers[:, :1], centers)
    return centers + mean, torch.where(valid, assign, -1)


def kmeans(
    points: Tensor, num_clusters: int, valid: Tensor | None = None, max_iters: int = 20, generator=None
) -> tuple[Tensor, Tensor]:
    """Lloyd's K-means from greedy k-means++ seeds, one problem per group. Eq. (3).

    points: (G, N, D) floating point. valid: (G, N) bool, the points that count (default: all; rows that are not finite
    never count). Stops when no point changes cluster, at the latest after max_iters. generator: torch.Generator.
    Returns centers (G, K, D), float32 or float64, and assignment (G, N), the id of the nearest center, -1 if not valid.
    An emptied cluster keeps its center. A group of n < K valid points gets n clusters; its spare centers repeat
    center 0 and own no point. Nothing is NaN if squared distances are finite. Raises ValueError for invalid input.
    """
    _expect("points", points, "float", None, None, None)
    _check(points.shape[2] >= 1, "points must have at least one dimension")
    _check(num_clusters >= 1, f"num_clusters must be at least 1, got {num_clusters}")
    _check(max_iters >= 0, f"max_iters must not be negative, got {max_iters}")
    finite = points.isfinite().all(-1)
    valid = finite if valid is None else valid
    _expect("valid", valid, "bool", *points.shape[:2], device=points.device)
    uniforms = seeding_uniforms(len(points), num_clusters, generator, points.device)
    return kmeans_seeded(points.detach(), valid & finite, uniforms.to(points.device), max_iters)


def kmeans_seeded(points: Tensor, valid: Tensor, uniforms: Tensor, max_iters: int) -> tuple[Tensor, Tensor]:
    """kmeans() with its random numbers given (seeding_uniforms) and without its checks. On a GPU the compiled op keeps
    N² dot products per group; above r2o_C.max_points_cuda points the reference runs."""
    points = upcast(points)
    if points.is_cuda and r2o_C is not None and points.shape[1] > r2o_C.max_points_cuda:
        warnings.warn(f"{points.shape[1]} points are too many for the CUDA kmeans: plain PyTorch runs", stacklevel=2)
        with full_precision(points.device):
            return kmeans_ref(points, valid, uniforms, max_iters)
    return _run(kmeans_ref, points, valid, uniforms, max_iters)


# ---- crop_masks ------------------------------------------------------------------------------------------------------


def crop_masks_ref(masks: Tensor, boxes: Tensor, flips: Tensor, num_clusters: int, size: int) -> Tensor:
    B, h, w = masks.shape
    one_hot = (masks[:, None] == torch.arange(num_clusters, device=masks.device)[:, None, None]).float()  # (B, K, h, w)
    x0, y0, x1, y1 = boxes.float().unbind(1)
    xyxy = torch.stack([x0 * w, y0 * h, x1 * w, y1 * h], 1)
    image = torch.arange(B, device=boxes.device, dtype=torch.float32)[:, None]
    weights = roi_align(one_hot, torch.cat([image, xyxy], 1), size, aligned=True)
    return torch.where(flips[:, None, None, None], weights.flip(-1), weights)


def crop_masks(masks: Tensor, boxes: Tensor, flips: Tensor, num_clusters: int, size: int) -> Tensor:
    """The masks m as one view sees them (m1 or m2): RoIAlign of one-hot m with the view's box, mirrored if the view is.

    masks: (B, h, w) integer cluster ids < num_clusters. boxes: (B, 4), xyxy in [0, 1] of the full image. flips: (B,),
    non-zero for a mirrored view. Returns float32 weights (B, K, size, size) in [0, 1].
    Raises ValueError for input that does not fit.
    Equivalent to: flip(torchvision.ops.roi_align(one_hot(m), boxes * [w, h, w, h], size, aligned=True)).
    """
    _expect("masks", masks, "integer", None, None, None)
    _expect("boxes", boxes, "float", len(masks), 4, device=masks.device)
    flips = flips.bool()
    _expect("flips", flips, "bool", len(masks), device=masks.device)
    _check(num_clusters > 0 and size > 0, f"num_clusters and size must be positive, got {num_clusters} and {size}")
    _check_ids("cluster ids", masks, num_clusters)
    return _run(crop_masks_ref, masks, boxes.float(), flips, num_clusters, size)


# ---- mask_pool -------------------------------------------------------------------------------------------------------


def mask_pool_ref(features: Tensor, weights: Tensor, pairs: Tensor) -> Tensor:
    w, f = weights.detach().flatten(2), upcast(features).flatten(2)  # (B, K, HW), (B, C, HW)
    total = w.sum(2, keepdim=True)
    h = torch.einsum("bkn,bcn->bkc", w, f) / torch.where(total > 0, total, 1)
    return h[pairs[:, 0], pairs[:, 1]]  # (P, C)


def mask_pool(features: Tensor, weights: Tensor, pairs: Tensor) -> Tensor:
    """Weighted mean of the features inside masks, one packed row per (image, mask) pair: the h of Sec. 3.2.

    features: (B, C, H, W). weights: (B, K, H, W), a mask's share of each cell. pairs: (P, 2) int64, (image, cluster).
    Returns (P, C), float32 or float64; zero for a mask without weight. Differentiable in the features only: masks are
    not trained. Raises ValueError for input that does not fit.
    Equivalent to: (f * w).sum((2, 3)) / w.sum((2, 3)) for each pair.
    """
    _expect("features", features, "float", None, None, None, None)
    B, _, H, W = features.shape
    _expect("weights", weights, "float", B, None, H, W, device=features.device)
    _expect("pairs", pairs, "integer", None, 2, device=features.device)
    _check_ids("images in pairs", pairs[:, 0], B)
    _check_ids("clusters in pairs", pairs[:, 1], weights.shape[1])
    return _run(mask_pool_ref, features, weights.to(upcast(features[:0]).dtype), pairs)


# ---- What PyTorch needs to know about the compiled ops: output shapes (for torch.compile) and mask_pool's gradient ---

if r2o_C is not None:

    @torch.library.register_fake("r2o::region_pool")
    def _(features, regions, num_regions):
        B, C = features.shape[:2]
        full = upcast(features[:0])
        return full.new_empty(B, num_regions, C), full.new_empty(B, num_regions)

    @torch.library.register_fake("r2o::kmeans")
    def _(points, valid, uniforms, max_iters):
        (G, N, D), K = points.shape, uniforms.shape[1]
        return points.new_empty(G, K, D), valid.new_empty(G, N, dtype=torch.long)

    @torch.library.register_fake("r2o::crop_masks")
    def _(masks, boxes, flips, num_clusters, size):
        return boxes.new_empty(masks.shape[0], num_clusters, size, size)

    @torch.library.register_fake("r2o::mask_pool")
    def _(features, weights, pairs):
        return weights.new_empty(pairs.shape[0], features.shape[1])  # not len(): P may be unknown

    @torch.library.register_fake("r2o::mask_pool_backward")
    def _(grad, weights, pairs):
        B, _, H, W = weights.shape
        return grad.new_empty(B, H, W, grad.shape[1]).permute(0, 3, 1, 2)

    def _setup_context(ctx, inputs, output):
        features, weights, pairs = inputs
        ctx.save_for_backward(weights, pairs)
        ctx.dtype = features.dtype

    def _backward(ctx, grad):
        return torch.ops.r2o.mask_pool_backward(grad, *ctx.saved_tensors).to(ctx.dtype), None, None

    torch.library.register_autograd("r2o::mask_pool", _backward, setup_context=_setup_context)

"""R2O: Region-to-Object representation learning (arXiv 2208.11821), in one file and in the paper's order:

    masks -> K-means -> pooling -> networks -> loss -> curriculum -> data (-> files and pictures)

Every step, R2O (1) pools the target network's C4 features over small superpixels, clusters those region
embeddings with K-means and so draws a mask of every image, and (2) trains an encoder BYOL-style so that the
features pooled inside each mask agree between two augmented views. K falls from 128 to 4: first regions, later objects.

The letters are the paper's; shapes stand as trailing comments.

    B C H W   batch, channels, feature-map height and width        G N D   K-means problems, points in each, dimensions
    R K P     regions per image, clusters now, (image, mask) pairs h w     a label map's height and width, in pixels

The ops of csrc/ are in r2o_ops.py, each beside the plain PyTorch code that defines it.
"""

import contextlib
import copy
import functools
import math
import os
import pickle
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torchvision import models
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.v2 import functional as TF

from r2o_ops import (
    cluster_scores,
    crop_masks,
    crop_masks_ref,
    extension,
    kmeans,
    kmeans_ref,
    kmeans_seeded,
    mask_pool,
    mask_pool_ref,
    region_pool,
    region_pool_ref,
    seeding_uniforms,
    upcast,
)

__all__ = ["cluster_scores", "crop_masks_ref", "extension", "kmeans", "kmeans_ref", "mask_pool_ref", "region_pool_ref"]


class UsageError(ValueError):
    """Bad arguments or data: one line that says what was wrong, what was expected and what to do."""


def _check(ok: bool, message: str):
    if not ok:
        raise ValueError(message)


# ---------------------------------------------------------------------------------------------------------------------
# Masks, 1: the region-level prior (Sec. 3.1; A.7)
# ---------------------------------------------------------------------------------------------------------------------


def slic_regions(image, num_segments: int = 100, size: int = 56) -> Tensor:
    """SLIC superpixels of one image, as a coarse map. Sec. 3.1.

    image: PIL image, uint8 or [0, 1] float array (h, w, 3), or tensor (3, h, w). It is resized to (4 size)^2, 224 x 224
    by default, segmented as RGB in [0, 1], and every 4th pixel kept.
    Returns uint8 (size, size) with ids 0 … n - 1, all of them used; n is near num_segments, usually below.
    Raises UsageError where more than 256 come out.
    """
    from skimage.segmentation import slic  # takes half a second to import; only preparing data needs it

    if isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating):
        image = (image * 255).round().astype(np.uint8)
    if not isinstance(image, Image.Image):
        image = TF.to_pil_image(image)
    side = 4 * size
    rgb = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    segments = slic(np.asarray(rgb, dtype=np.float32) / 255, n_segments=num_segments, start_label=0)
    names, ids = np.unique(segments[2::4, 2::4], return_inverse=True)
    if len(names) > 256:
        raise UsageError(f"SLIC gave {len(names)} regions, more than 256: ask for fewer than {num_segments} segments")
    return torch.from_numpy(ids.reshape(size, size).astype(np.uint8))


def grid_regions(cells: int = 14, size: int = 56) -> Tensor:
    """The prior without an image: cells x cells square patches, uint8 (size, size). A.7."""
    row = torch.arange(size) * cells // size
    return (row[:, None] * cells + row).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# Networks (Sec. 3.2; A.1)
# ---------------------------------------------------------------------------------------------------------------------

ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "tiny")


class Tiny(nn.Module):
    """An encoder for 64-pixel images on a laptop: four residual blocks of 16 … 128 channels; C4 has stride 4, C5 8."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Identity()
        for i, (cin, cout, stride) in enumerate([(16, 16, 1), (16, 32, 2), (32, 64, 1), (64, 128, 2)]):
            down = None
            if cin != cout:
                down = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))
            setattr(self, f"layer{i + 1}", nn.Sequential(BasicBlock(cin, cout, stride, down)))


def build_encoder(arch: str) -> nn.Module:
    """A torchvision ResNet (its own parameter names) without the classifier, or `tiny`."""
    if arch not in ARCHS:
        raise UsageError(f"no encoder {arch!r}: choose one of {', '.join(ARCHS)}")
    if arch == "tiny":
        net = Tiny()
    else:
        net = models.get_model(arch, weights=None)
        del net.fc, net.avgpool
    net.arch = arch
    return net


def encode_c4(net: nn.Module, x: Tensor) -> Tensor:
    """Images (B, 3, S, S) -> C4, the output of layer3: (B, 1024, S/16, S/16) for ResNet-50."""
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer3(net.layer2(net.layer1(x)))


def encode(net: nn.Module, x: Tensor) -> Tensor:
    """Images (B, 3, S, S) -> C5, the output of layer4: (B, 2048, S/32, S/32) for ResNet-50."""
    return net.layer4(encode_c4(net, x))


def mlp(cin: int, hidden: int, cout: int) -> nn.Module:
    """Projector and predictor. A.1."""
    return nn.Sequential(nn.Linear(cin, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, cout))


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # always the same one: memory is kept for each stream apart


def of_ranks(x: Tensor, first: int, count: int) -> Tensor:
    """x of ranks first … first + count - 1, one after another."""
    every = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(every, x.contiguous())
    return every[first * len(x) : (first + count) * len(x)]


@torch.no_grad()
def draw_masks(
    c4: Tensor,
    regions: Tensor,
    num_clusters: int,
    uniforms: Tensor,
    num_regions: int = 256,
    assign: str = "pixel",
    iters: int = 20,
    span: int = 1,
) -> Tensor:
    """The mask m of every image: clusters of its regions' C4 embeddings. Sec. 3.1, Eq. (3).

    c4: (B, C, H, W). regions: (B, h, w), ids below num_regions. uniforms: seeding_uniforms(B / group, K). iters: of
    Lloyd. span: ranks that share one group, where a group is larger than B; each of them solves the same problem.
    Returns (B, H, W) for assign = "pixel", (B, h, w) for "region"; ids are shared inside a group.
    """
    B, R, K, G = len(c4), num_regions, num_clusters, len(uniforms)
    p, area = region_pool(c4, regions, R)
    length = p.norm(dim=-1, keepdim=True)  # (B, R, 1)
    # Absent regions take no part; differs: the authors cluster them as zero vectors. Nor does what is not finite.
    valid = (area > 0) & length[..., 0].isfinite()
    p, own = p / length.clamp(min=1e-12), slice(None)
    if span > 1:
        rank = dist.get_rank()
        p, valid = (of_ranks(x, rank // span * span, span) for x in (p, valid))
        own = slice(rank % span * B * R, (rank % span + 1) * B * R)
    p, valid = p.reshape(G, -1, p.shape[2]), valid.reshape(G, -1)  # (G, N, C), (G, N)
    mu, own_id = kmeans_seeded(p, valid, uniforms, iters)
    if assign == "region":
        own_id = own_id[:, own].clamp(min=0)  # regions in the map that are not finite
        return own_id.view(B, R).gather(1, regions.flatten(1).long()).view(regions.shape)
    with torch.autocast(c4.device.type, enabled=False):
        x = upcast(c4).permute(0, 2, 3, 1).reshape(G, -1, c4.shape[1])  # (G, N, C); normalised after the product
        length = x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        scores = x @ mu.mT / length - mu.square().sum(-1)[:, None] / 2  # (G, N, K)
    spare = torch.arange(K, device=x.device) >= valid.sum(1, keepdim=True)
    return scores.masked_fill(spare[:, None], -math.inf).argmax(2).view(B, *c4.shape[2:])


class R2O(nn.Module):
    """Online and target networks, mask prediction and the loss of one step.

    arch: one of ARCHS. num_regions: region ids are below it. kmeans_group: images that share one K-means (the images of
    all ranks are a multiple of it, or fewer; where a rank has fewer, several share a group). kmeans_iters: Lloyd
    iterations. assign: "pixel" gives each C4 pixel its nearest centre (Sec. 3.1); "region" gives each region its
    cluster, at the region map's resolution. overlap: on a GPU, draw the masks on a stream of their own while the online
    network runs. compile: the encoders, by torch.compile.
    """

    def __init__(
        self,
        arch: str = "resnet50",
        num_regions: int = 256,
        kmeans_group: int = 32,
        kmeans_iters: int = 20,
        assign: str = "pixel",
        hidden: int = 4096,
        dim: int = 256,
        overlap: bool = True,
        compile: bool = False,
    ):
        super().__init__()
        if assign not in ("pixel", "region"):
            raise UsageError(f"no mask assignment {assign!r}: choose pixel or region")
        self.num_regions, self.assign, self.overlap = num_regions, assign, overlap
        self.kmeans_group, self.kmeans_iters = kmeans_group, kmeans_iters
        self.encode_c4, self.encode = (torch.compile(f) if compile else f for f in (encode_c4, encode))
        encoder = build_encoder(arch)
        channels = [m for m in encoder.layer4.modules() if isinstance(m, nn.BatchNorm2d)][-1].num_features
        self.online = nn.ModuleDict({"encoder": encoder, "projector": mlp(channels, hidden, dim)})  # theta
        self.target = copy.deepcopy(self.online).requires_grad_(False)  # xi
        self.predictor = mlp(dim, hidden, dim)

    @torch.no_grad()
    def update_target(self, tau: float):
        """xi <- tau xi + (1 - tau) theta, the parameters; batch norm buffers are not averaged, and never read."""
        torch._foreach_lerp_(list(self.target.parameters()), list(self.online.parameters()), 1 - tau)

    def predict_masks(
        self, encoder: nn.Module, images: Tensor, regions: Tensor, num_clusters: int, uniforms: Tensor, span: int = 1
    ) -> Tensor:
        """The mask m of every image, (B, 3, S, S) normalised: draw_masks() of its C4."""
        with torch.no_grad():
            c4 = self.encode_c4(encoder, images)
        settings = self.num_regions, self.assign, self.kmeans_iters
        return draw_masks(c4, regions, num_clusters, uniforms, *settings, span)

    def forward(
        self,
        images: Tensor,
        views: Tensor,
        regions: Tensor,
        boxes: Tensor,
        flips: Tensor,
        num_clusters: int,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one step, Eq. (5), and what to watch.

        images: (B, 3, S, S) and views: (2B, 3, S, S), the first views then the second, normalised. regions: (B, h, w).
        boxes: (B, 2, 4). flips: (B, 2). generator: on the CPU; seeded alike on all ranks, K-means then does not depend
        on how many there are; parts of a batch that follow one another with the same generator cluster as the whole
        would. Returns the loss, whose average over ranks (DDP's) is the mean over all pairs, and detached scalars.
        """
        B, K = len(images), num_clusters
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        group = min(self.kmeans_group, B * world)
        G, span = max(B // group, 1), max(group // B, 1)  # groups of this rank, ranks of a group
        if G * group != B * span or world % span:
            raise UsageError(f"{B} images per process do not divide into K-means groups of {group}: change one of them")
        uniforms = seeding_uniforms(B * world // group, K, generator)[rank // span * G :][:G]
        uniforms = uniforms.to(images.device, non_blocking=True)

        # (1) Draw the masks, and see them as each view does; on a GPU on a stream of their own, beside the online
        # network (synchronised batch norm makes the host wait in each layer: then K-means is what goes on beside it).
        side, beside = None, contextlib.nullcontext()
        if images.is_cuda and self.overlap:
            main, side = torch.cuda.current_stream(images.device), _side_stream(images.device)
            side.wait_stream(main)
            beside = torch.cuda.stream(side)
        with beside:
            m = self.predict_masks(self.target["encoder"], images, regions, K, uniforms, span)  # (B, H, W)
        c5 = self.encode(self.online["encoder"], views)  # (2B, C, H, W)
        with beside:
            m1, m2 = (crop_masks(m, boxes[:, v], flips[:, v], K, c5.shape[-1]) for v in (0, 1))  # (B, K, H, W)
            in_both = (m1.sum((2, 3)) > 1e-3) & (m2.sum((2, 3)) > 1e-3)
            pairs = in_both.nonzero()  # (P, 2); the host waits for the masks here, to learn P
        if side:
            main.wait_stream(side)
            for x in (m, m1, m2, pairs):
                x.record_stream(main)
        P = len(pairs)
        weights, rows = torch.cat([m1, m2]), torch.cat([pairs, pairs + pairs.new_tensor([B, 0])])

        # (2) Pool inside them, and make one view predict the other. differs: only rows of masks that both views see
        # go through the heads; two blank rows keep batch norm and the collectives going where there is none.
        blank = (0, 0, 0, 2 if P == 0 else 0)
        h = F.pad(mask_pool(c5, weights, rows), blank)  # (2P, C)
        q = self.predictor(self.online["projector"](h))  # (2P, 256)
        with torch.no_grad():
            c5 = self.encode(self.target["encoder"], views)
            z = self.target["projector"](F.pad(mask_pool(c5, weights, rows), blank))
        total = torch.full((), float(P), device=h.device)
        if world > 1:
            dist.all_reduce(total)
        loss = byol_loss(q, torch.cat([z[P:], z[:P]]))  # (2P,): both directions, Eq. (5)
        loss = (loss.sum() if P else 0 * loss.sum()) * world / total.clamp(min=1)  # DDP averages over ranks
        cells = m.new_zeros(B, K).scatter_add_(1, m.flatten(1), torch.ones_like(m).flatten(1))  # (B, K)
        sizes = cells.view(G, -1, K).sum(1).float()  # (G, K): of clusters, in cells of m
        stats = {
            "total": total,  # pairs of all ranks, over which the loss is a mean
            "pairs": torch.tensor(P / B),  # masks per image that both views see
            "masks": (cells > 0).sum(1).float().mean(),  # masks per image
            "clusters": (sizes > 0).sum(1).float().mean(),  # that own anything, per group
            "largest": (sizes.amax(1) / sizes.sum(1)).mean(),  # the largest cluster's share of its group
            "spread": math.sqrt(z.shape[1]) * F.normalize(z.float(), dim=1).std(0, correction=0).mean(),  # 0: collapse
        }
        return loss, stats


# ---------------------------------------------------------------------------------------------------------------------
# Loss and optimiser (Sec. 3.2; A.1)
# ---------------------------------------------------------------------------------------------------------------------


def byol_loss(q: Tensor, z: Tensor) -> Tensor:
    """Eq. (4): |q/|q| - z/|z||² = 2 - 2 cos(q, z), row by row. q, z: (P, D) -> (P,) float32. No gradient to z."""
    q, z = F.normalize(upcast(q), dim=-1), F.normalize(upcast(z.detach()), dim=-1)
    return (q - z).square().sum(-1)


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, tensor by tensor, by eta |w| / |g + weight_decay w| (You et al.,
    arXiv 1708.03888, in BYOL's form). Parameters with at most one dimension get neither decay nor the ratio. A.1."""

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 1e-6, eta: float = 1e-3):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = [p.grad for p in params]
            matrices = [i for i, p in enumerate(params) if p.ndim > 1]
            if matrices:
                w = [params[i] for i in matrices]
                g = torch._foreach_add([updates[i] for i in matrices], w, alpha=group["weight_decay"])
                w_norm, g_norm = torch.stack(torch._foreach_norm(w)), torch.stack(torch._foreach_norm(g))
                ratio = torch.where((w_norm > 0) & (g_norm > 0), group["eta"] * w_norm / g_norm, 1.0)
                torch._foreach_mul_(g, list(ratio))
                for i, update in zip(matrices, g, strict=True):
                    updates[i] = update
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            velocity = [self.state[p]["momentum"] for p in params]
            torch._foreach_mul_(velocity, group["momentum"])
            torch._foreach_add_(velocity, updates)
            torch._foreach_add_(params, velocity, alpha=-group["lr"])
        return loss


# ---------------------------------------------------------------------------------------------------------------------
# Curriculum (Sec. 3.3, Eq. (A1), Table 9)
# ---------------------------------------------------------------------------------------------------------------------


def num_clusters(
    epoch: float, epochs: int, k_start: int = 128, k_end: int = 4, hold_epochs: int = 40, schedule: str = "cosine"
) -> int:
    """K(t): k_start up to hold_epochs, then down (or, with k_end above k_start, up) to k_end at t = epochs. Eq. (A1).

    schedule: "cosine", "linear", or "constant" (k_start throughout). With the paper's settings K is 128 up to epoch 40
    and 119, 74, 4 at 100, 200, 300 (Fig. 5). differs: as printed, Eq. (A1) ends at K = 103.
    """
    _check(k_start >= 1 and k_end >= 1, f"k_start and k_end must be at least 1, got {k_start} and {k_end}")
    _check(schedule in ("cosine", "linear", "constant"), f"no schedule {schedule!r}: choose cosine, linear or constant")
    if schedule == "constant" or epoch <= hold_epochs:
        return k_start
    t = min((epoch - hold_epochs) / max(epochs - hold_epochs, 1e-9), 1.0)
    left = 1 - t if schedule == "linear" else math.cos(math.pi / 2 * t)
    return math.floor(k_end + left * (k_start - k_end) + 1e-9)


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Linear from 0 to peak over warmup_steps, then a half cosine to 0 at `steps`; before the factor for K. A.1."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    t = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    return peak * (1 + math.cos(math.pi * t)) / 2


def target_momentum(step: int, steps: int, base: float = 0.99) -> float:
    """tau: from base to 1 along a half cosine. A.1."""
    return 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Data, 1: in the worker, decode, crop and resize (A.1)
# ---------------------------------------------------------------------------------------------------------------------


def resize(image: Tensor, size: int) -> Tensor:
    """A whole image (3, h, w) uint8 -> (3, size, size), whatever its proportions. In memory both lie as (h, w, 3), as
    decoders leave them, which saves PyTorch a third of the time in repacking."""
    x = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    return F.interpolate(x, (size, size), mode="bicubic", antialias=True)[0]


def draw_crop(rng: np.random.Generator, h: int, w: int) -> tuple[int, int, int, int]:
    """A random crop of an h x w image, 8 to 100 % of its area, of proportions 3/4 to 4/3: top, left, height, width. As
    torchvision's RandomResizedCrop draws it, in a tenth of its time."""
    for area, ratio, y, x in rng.random((10, 4)).tolist():
        area, ratio = (0.08 + 0.92 * area) * h * w, math.exp((2 * ratio - 1) * math.log(4 / 3))
        ch, cw = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < ch <= h and 0 < cw <= w:
            return int(y * (h - ch + 1)), int(x * (w - cw + 1)), ch, cw
    ch, cw = min(h, round(w / (3 / 4))), min(w, round(h * (4 / 3)))  # too long or too flat: its middle
    return (h - ch) // 2, (w - cw) // 2, ch, cw


class ImageRegions(torch.utils.data.Dataset):
    """Images with their region maps, indexed by (epoch, i): all randomness of a sample follows from (seed, epoch, i),
    so that it depends on no worker, rank or interruption, and no two samples share any.

    images: a files.ImageList. maps, header: files.region_maps'; images that were unreadable then are left out. size: a
    view's side. A sample is a dict: image (S, S, 3) and views (2, S, S, 3) uint8, not yet mirrored, regions (h, w),
    boxes (2, 4), flips (2,), factors (2, 11) for `augment`, and unreadable: whether the next image stands in for it.
    """

    def __init__(self, images, maps: np.ndarray, header: dict, size: int = 224, seed: int = 0):
        self.images, self.maps, self.size, self.seed = images, maps, size, seed
        self.keep = np.delete(np.arange(len(images)), [i for i, _ in header["unreadable"]])

    def __len__(self):
        return len(self.keep)

    def __getstate__(self):  # workers that are not forked open the maps themselves
        return vars(self) | {"maps": self.maps.filename}

    def __setstate__(self, state):
        vars(self).update(state, maps=np.load(state["maps"], mmap_mode="r"))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = int(key[0]), int(key[1])
        for later in range(10):
            i = int(self.keep[(index + later) % len(self)])
            path = self.images.path(i)
            try:
                image = read_image(path)
                break
            except OSError as e:  # it could be read when the maps were made
                said = printable(f"unreadable: {path} ({e}): the next image stands in for it")
                print(said, file=sys.stderr, flush=True)
        else:
            raise UsageError(f"{path} and the 9 images before it can no longer be read: is the disk still there?")
        h, w = image.shape[1:]
        rng = np.random.default_rng([self.seed, epoch, int(self.keep[index])])
        views = torch.empty(2, self.size, self.size, 3, dtype=torch.uint8)
        boxes, flips, factors = [], [], []
        for v in (0, 1):
            top, left, ch, cw = draw_crop(rng, h, w)
            views[v] = resize(image[:, top : top + ch, left : left + cw], self.size).permute(1, 2, 0)
            boxes.append([left / w, top / h, (left + cw) / w, (top + ch) / h])
            flips.append(rng.random() < 0.5)  # differs: the authors' code mirrors always
            factors.append(draw_factors(rng, v))
        return {
            "image": resize(image, self.size).permute(1, 2, 0),
            "views": views,
            "regions": torch.from_numpy(np.array(self.maps[i])),
            "boxes": torch.tensor(boxes),
            "flips": torch.tensor(flips),
            "factors": torch.tensor(factors),
            "unreadable": torch.tensor(later > 0),
        }


# ---------------------------------------------------------------------------------------------------------------------
# Data, 2: on the device, mirror, jitter, grey, blur, solarise, normalise, a batch at a time (A.1)
# ---------------------------------------------------------------------------------------------------------------------


def draw_factors(rng: np.random.Generator, view: int) -> list[float]:
    """One view's random colour changes, 11: the order of the four jitters (-1: none), brightness, contrast, saturation
    and hue factor, whether grey, sigma of the blur in 224ths of the view (0: none), whether solarised."""
    u = rng.random(13).tolist()
    order = sorted(range(4), key=u.__getitem__) if u[4] < 0.8 else [-1] * 4
    jitter = [0.6 + 0.8 * u[5], 0.6 + 0.8 * u[6], 0.8 + 0.4 * u[7], 0.2 * u[8] - 0.1]
    blur, solarise = ((1.0, 0.0), (0.1, 0.2))[view]
    sigma = 0.1 + 1.9 * u[10] if u[9] < blur else 0.0
    return [*order, *jitter, u[11] < 0.2, sigma, u[12] < solarise]


def grey(x: Tensor) -> Tensor:
    """(N, 3, S, S) -> (N, 1, S, S), ITU-R 601 luma."""
    return (x * x.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = grey(x).mean((1, 2, 3), keepdim=True)
    return (mean + factor * (x - mean)).clamp(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    luma = grey(x)
    return (luma + factor * (x - luma)).clamp(0, 1)


def adjust_hue(x: Tensor, factor: Tensor) -> Tensor:
    """Turns the hue by `factor` of a full circle, in HSV."""
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    c = torch.where(chroma > 0, chroma, 1)
    sixth = torch.where(value == r, (g - b) / c, torch.where(value == g, 2 + (b - r) / c, 4 + (r - g) / c))
    sixth = sixth + 6 * factor[:, 0]  # the hue, in sixths of a circle
    k = (x.new_tensor([5, 3, 1]).view(3, 1, 1) + sixth[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Each image with its own sigma; the kernel spans a tenth of the side (23 of 224 pixels), edges are reflected."""
    n, c, s, _ = x.shape
    half = (s // 10) // 2
    d = torch.arange(-half, half + 1, device=x.device)
    kernel = torch.exp(-0.5 * (d / sigma.view(-1, 1)) ** 2)  # (n, taps)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None, None]  # (n c, 1, 1, taps)
    x = F.pad(x, [half] * 4, mode="reflect").view(1, n * c, s + 2 * half, s + 2 * half)
    x = F.conv2d(F.conv2d(x, kernel, groups=n * c), kernel.mT, groups=n * c)
    return x.view(n, c, s, s)


JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def augment(views: Tensor, flips: Tensor, factors: Tensor) -> Tensor:
    """A.1's mirroring and colour changes of a batch. views: (N, 3, S, S) uint8 and flips: (N,) on the training device;
    factors: (N, 11) of draw_factors, on the CPU, where images are chosen by them without asking the device. Returns
    normalised float32."""
    x = views.to(torch.float32, memory_format=torch.contiguous_format) / 255
    x = torch.where(flips.view(-1, 1, 1, 1), x.flip(-1), x)

    def change(images: Tensor, f, column: int | None):
        i = images.nonzero()[:, 0]  # on the CPU
        if len(i):
            args = [] if column is None else [factors[i, column].view(-1, 1, 1, 1).to(x.device, non_blocking=True)]
            i = i.to(x.device, non_blocking=True)
            x[i] = f(x[i], *args)

    for slot in range(4):
        for j, f in enumerate(JITTER):
            change(factors[:, slot] == j, f, 4 + j)
    change(factors[:, 8] > 0, lambda v: grey(v).expand_as(v), None)
    change(factors[:, 9] > 0, lambda v, sigma: gaussian_blur(v, sigma * v.shape[-1] / 224), 9)
    change(factors[:, 10] > 0, lambda v: torch.where(v >= 0.5, 1 - v, v), None)
    return normalize(x)


def normalize(x: Tensor) -> Tensor:
    """uint8 or [0, 1] float images -> ImageNet mean 0 and deviation 1 per channel."""
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    return TF.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


# ---------------------------------------------------------------------------------------------------------------------
# Files: images and weights
# ---------------------------------------------------------------------------------------------------------------------


def read_image(path: str | Path) -> Tensor:
    """Any image file as uint8 RGB (3, h, w), upright as its EXIF tag says; of an animation the first frame.
    Raises OSError where the file cannot be read whole."""
    try:
        file = read_file(os.fspath(path))
        if (
            bytes(file[:4].tolist()) == b"GIF8"
        ):  # damaged, it crashes torchvision (github.com/pytorch/vision/issues/9551)
            raise RuntimeError
        image = decode_image(file, ImageReadMode.RGB, apply_exif_orientation=True)
    except RuntimeError:  # not a format of torchvision's (BMP, TIFF, …), or damaged: Pillow tells
        try:
            with Image.open(path) as file:
                if file.mode[0] in "IF":
                    raise OSError(f"{file.mode} pixels: save it with 8 bits a channel")
                return TF.pil_to_tensor(ImageOps.exif_transpose(file).convert("RGB"))
        except (ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as e:
            raise OSError(f"{type(e).__name__}: {e}") from None
    image = image[0] if image.ndim == 4 else image
    return image if image.dtype == torch.uint8 else (image.int() // 257).to(torch.uint8)  # 16-bit PNG


def printable(text: str) -> str:
    """Without the surrogates that stand for bytes of file names that are not UTF-8."""
    return text.encode(errors="replace").decode()


def save_atomically(path: str | Path, write, keep: str | Path | None = None):
    """write(file) into a temporary file that takes path's place only once it is whole and on the disk. What was at path
    before is moved to `keep`, if given. Raises OSError where it cannot be written; what was there then stays."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as e:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(e.__context__, OSError):  # behind what torch.save raises on a full disk
            raise e.__context__ from None
        raise
    if keep and os.path.exists(path):
        os.replace(path, keep)
    os.replace(temporary, path)


def load_file(path: str | Path) -> dict:
    """A checkpoint of tensors and plain types. Raises UsageError where there is none, or it holds anything else."""
    try:
        if zipfile.is_zipfile(path) and (torn := zipfile.ZipFile(path).testzip()):  # torch.load checks no checksums
            raise ValueError(torn)
        file = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(
            f"no such checkpoint: {path}; expected r2o.pth, last.pth or a torchvision state dict"
        ) from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder: expected a file in it, such as r2o.pth") from None
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        pickle.UnpicklingError,
        zlib.error,
        zipfile.BadZipFile,
    ) as e:
        raise UsageError(
            f"{path} is not a checkpoint that can be loaded safely ({type(e).__name__}): "
            "it is damaged, or holds more than tensors and plain types"
        ) from None
    return file if isinstance(file, dict) else {}


def load_encoder(ckpt: str, arch: str | None = None) -> tuple[nn.Module, str]:
    """An encoder in eval mode and a line about what it holds.

    ckpt: r2o.pth, a training checkpoint (its online encoder), any torchvision ResNet's state dict (say which with
    arch), or "random". Raises UsageError unless every tensor matches, none left over but the classifier's.
    """
    if ckpt == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_encoder(arch or "resnet50").eval(), f"{arch or 'resnet50'}, randomly initialised"
    if Path(ckpt).suffix in (".safetensors", ".pkl"):
        raise UsageError(f"{ckpt} is in another layout: make it r2o.pth with transfer/export.py --to r2o")
    file = load_file(ckpt)
    meant = file.get("arch") or (file.get("args") or {}).get("arch") or arch or "resnet50"
    if arch not in (None, meant):
        raise UsageError(f"{ckpt} holds a {meant}, not a {arch}: leave --arch out")
    net = build_encoder(meant)
    prefix = "online.encoder." if "model" in file else ""
    state = file.get("model") or file.get("state_dict") or file
    tensors = {n: v for n, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    state = {str(n).removeprefix("module.").removeprefix(prefix): v for n, v in tensors.items() if prefix in str(n)}
    state = {name: v for name, v in state.items() if not name.startswith("fc.")}
    own = net.state_dict()
    matched, rest = match(state, own)
    if rest:
        raise UsageError(
            f"{ckpt} matches {len(matched)} of {len(own)} tensors of {meant}, {len(rest)} do not fit, such as "
            f"{rest[0]}: pass the --arch that it holds (for other layouts see transfer/export.py)"
        )
    net.load_state_dict(own | {name: state[name] for name in matched})
    counters = "" if len(matched) == len(own) else ", the rest are batch norm's counters"
    return net.eval(), f"{meant} from {ckpt}: {len(matched)} of {len(own)} tensors matched{counters}"


def match(state: dict[str, Tensor], own: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Names of `own` that state has in the same shape, and all that do not fit, of both: none where only batch norm's
    counters are missing, as they are in torchvision's older files; nothing here reads them."""
    matched = [name for name, x in own.items() if getattr(state.get(name), "shape", None) == x.shape]
    fitting = set(matched)
    rest = [name for name in [*own, *state] if name not in fitting]
    counters = all(name.endswith("num_batches_tracked") and name not in state for name in rest)
    return matched, [] if counters else rest


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def palette(ids: Tensor) -> Tensor:
    """A colour for each id, (...) -> (..., 3) in [0.2, 1]; neighbouring ids get distant ones."""
    hue = (ids[..., None].float() * 0.618034) % 1  # golden ratio
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return 1 - 0.8 * torch.minimum(k, 4 - k).clamp(0, 1)


def paint(images: Tensor, masks: Tensor) -> Tensor:
    """Label maps (n, h, w) as colours over the images (n, 3, S, S) uint8; returns the same as the images."""
    colour = F.interpolate(palette(masks).movedim(-1, 1), images.shape[-2:], mode="nearest")
    return (255 * (0.75 * colour + 0.25 * grey(images.float() / 255))).round().to(torch.uint8)


def film_strip(columns: list[tuple[str, Tensor]], zoom: int = 1, notes: list[str] | None = None) -> Image.Image:
    """Labelled columns of n pictures each, (label, (n, 3, S, S) uint8), as one image, enlarged `zoom` times. notes: one
    on the first picture of each row."""
    columns = [(label, x.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)) for label, x in columns]
    n, _, s, _ = columns[0][1].shape
    top, gap = 16, 4
    sheet = Image.new("RGB", (len(columns) * (s + gap) - gap, top + n * (s + gap) - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for c, (label, pictures) in enumerate(columns):
        draw.text((c * (s + gap) + 2, 2), label, fill="black")
        for r, picture in enumerate(pictures):
            sheet.paste(TF.to_pil_image(picture), (c * (s + gap), top + r * (s + gap)))
    for r, note in enumerate(notes or []):
        at = (3, top + r * (s + gap) + 2)
        draw.rectangle(draw.textbbox(at, note), fill="white")
        draw.text(at, note, fill="black")
    return sheet

"""R2O: Region-to-Object representation learning (arXiv 2208.11821), in the paper's order:

    prior -> mask prediction -> masks in views -> networks -> R2O -> losses -> LARS -> schedule -> views

Each step, R2O (1) pools the target network's C4 features over small superpixels, clusters these region embeddings with
K-means and so divides every image into masks, and (2) trains the online network, BYOL-style, so that the features
pooled inside each mask agree between two augmented views. K falls from 128 to 4: regions first, objects later.

Letters are mostly the paper's. Trailing comments give shapes.

    B C H W   batch, channels, feature-map height and width        G N D   K-means problems, points in each, dimensions
    R K P     regions per image, clusters, (image, mask) pairs     h w     height and width of a label map, in pixels

This file opens no file and prints nothing. train.py is the training loop, runtime/ reads and writes files.
"""

import contextlib
import copy
import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.v2 import functional as TF

from r2o_ops import (  # the ops of csrc/; some are only re-exported
    cluster_scores,
    crop_masks,
    crop_masks_ref,
    extension,
    full_precision,
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
from r2o_vit import ViT

# ---- The region-level prior (Sec. 3.1, A.7) --------------------------------------------------------------------------


def slic_regions(image, num_segments: int = 100, size: int = 56) -> Tensor:
    """SLIC superpixels of one image, as a coarse map. Sec. 3.1.

    image: PIL image, uint8 or [0, 1] float array (h, w, 3), or tensor (3, h, w). It is resized to (4 size)^2, 224 x 224
    by default, and segmented as RGB in [0, 1]; every 4th pixel of the result is kept.
    Returns uint8 (size, size) with ids 0 … n - 1, n near num_segments. Raises ValueError if n exceeds 256.
    """
    from skimage.segmentation import slic  # importing it takes half a second, and only preparing data needs it

    if isinstance(image, np.ndarray) and np.issubdtype(image.dtype, np.floating):
        image = (image * 255).round().astype(np.uint8)
    if not isinstance(image, Image.Image):
        image = TF.to_pil_image(image)
    side = 4 * size
    rgb = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    segments = slic(np.asarray(rgb, dtype=np.float32) / 255, n_segments=num_segments, start_label=0)
    names, ids = np.unique(segments[2::4, 2::4], return_inverse=True)
    if len(names) > 256:
        raise ValueError(f"SLIC gave {len(names)} regions, more than 256: ask for fewer than {num_segments} segments")
    return torch.from_numpy(ids.reshape(size, size).astype(np.uint8))


def fh_regions(image: Tensor, size: int = 56) -> Tensor:
    """Felzenszwalb and Huttenlocher's segments of one image, as a coarse map: DetCon's prior (arXiv 2103.10957).

    image: (3, h, w) uint8, segmented at its own size with scale 1000 and segments of at least 1000 pixels.
    Returns uint8 (size, size) with ids 0 … n - 1. Raises ValueError for an image without pixels.
    """
    from skimage.segmentation import felzenszwalb

    _, h, w = image.shape
    if h * w == 0:
        raise ValueError(f"an image of {w} x {h} pixels has no segments")
    rgb = image.permute(1, 2, 0).numpy()
    segments = felzenszwalb(rgb, scale=1000, min_size=1000)
    if segments.max() > 255:  # differs: only then are larger segments made, of which at most 256 fit
        segments = felzenszwalb(rgb, scale=1000, min_size=math.ceil(h * w / 256))
    y, x = ((np.arange(size) + 0.5) * side // size for side in (h, w))  # the pixel at the center of every cell
    _, ids = np.unique(segments[np.ix_(y.astype(int), x.astype(int))], return_inverse=True)
    return torch.from_numpy(ids.reshape(size, size).astype(np.uint8))


def grid_regions(cells: int = 14, size: int = 56) -> Tensor:
    """A prior that needs no image: cells x cells square patches, uint8 (size, size). A.7."""
    row = torch.arange(size) * cells // size
    return (row[:, None] * cells + row).to(torch.uint8)


# ---- Mask prediction (Sec. 3.1): region_pool gives the p_i, kmeans clusters them, Eq. (3); both are in r2o_ops.py ----


@torch.no_grad()
def predict_masks(
    c4: Tensor,
    regions: Tensor,
    num_clusters: int,
    uniforms: Tensor,
    num_regions: int = 256,
    assign: str = "pixel",
    iters: int = 20,
    ranks_per_group: int = 1,
) -> Tensor:
    """The label map m of every image (the paper's mask), from K-means of its regions' C4 embeddings. Sec. 3.1, Eq. (3).

    c4: (B, C, H, W). regions: (B, h, w), ids below num_regions. uniforms: (G, K, T) from seeding_uniforms(), for G
    groups of images, each clustered together in at most `iters` iterations. ranks_per_group: ranks that share a group.
    Returns, for assign = "pixel", the nearest center of every C4 pixel, (B, H, W), 14 x 14 for ResNet-50; for "region",
    the cluster of every region, (B, h, w). Ids are shared within a group. Raises ValueError for another assign.
    """
    check_choice("mask assignment", assign, "pixel", "region")
    p, area = region_pool(c4, regions, num_regions)  # (B, R, C), (B, R)
    length = p.norm(dim=-1, keepdim=True)  # (B, R, 1)
    # differs: the authors cluster absent regions too, as zero vectors. Here absent and non-finite ones are left out.
    valid = (area > 0) & length[..., 0].isfinite()
    p = p / length.clamp(min=1e-12)
    mu, cluster, valid = cluster_regions(p, valid, uniforms, iters, ranks_per_group)  # (G, K, C), (B, R), (G, N)
    if assign == "region":
        return cluster.clamp(min=0).gather(1, regions.flatten(1).long()).view(regions.shape)

    with full_precision(c4.device):
        x = in_groups(upcast(c4).permute(0, 2, 3, 1).flatten(1, 2), len(mu)).flatten(1, 2)  # (G, cells, C)
        length = x.norm(dim=-1, keepdim=True).clamp(min=1e-12)  # dividing the product is cheaper than dividing x
        scores = x @ mu.mT / length - mu.square().sum(-1)[:, None] / 2  # (G, cells, K)
    spare = torch.arange(num_clusters, device=x.device) >= valid.sum(1, keepdim=True)  # more clusters than regions
    m = scores.masked_fill(spare[:, None], -math.inf).argmax(2).view(-1, *c4.shape[2:])
    return m[: len(c4)]


def cluster_regions(p: Tensor, valid: Tensor, uniforms: Tensor, iters: int, ranks_per_group: int):
    """K-means over the regions of each group of images. Ranks that share a group each solve the whole problem.

    p: (B, R, C). valid: (B, R). Returns mu (G, K, C), the cluster of this rank's regions (B, R), and valid (G, N).
    """
    B, R, _ = p.shape
    own = slice(None)  # this rank's points within a group
    if ranks_per_group > 1:
        group, place = divmod(dist.get_rank(), ranks_per_group)
        p, valid = (gather_from_ranks(x, group * ranks_per_group, ranks_per_group) for x in (p, valid))
        own = slice(place * B * R, (place + 1) * B * R)
    p, valid = (in_groups(x, len(uniforms)).flatten(1, 2) for x in (p, valid))  # (G, N, C), (G, N)
    mu, cluster = kmeans_seeded(p, valid, uniforms, iters)  # Eq. (3)
    return mu, cluster[:, own].reshape(-1, R)[:B], valid


def in_groups(x: Tensor, groups: int) -> Tensor:
    """(B, …) -> (groups, images in each, …). If `groups` does not divide B, the last group is padded with zeros."""
    each = -(-len(x) // groups)
    missing = groups * each - len(x)
    x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x
    return x.reshape(groups, each, *x.shape[1:])


def kmeans_groups(images: int, world: int, most: int) -> tuple[int, int]:
    """How many K-means groups a rank has, and how many ranks share one, for `images` per rank and at most `most` images
    in a group. Sizes are equal if possible; otherwise the last group is smaller, by less than the number of groups."""
    ranks = max(n for n in range(1, world + 1) if world % n == 0 and (n == 1 or n * images <= most))
    return -(-images * ranks // most), ranks


def check_choice(what: str, value: str, *choices: str):
    if value not in choices:
        raise ValueError(f"no {what} {value!r}: choose one of {', '.join(choices)}")


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_from_ranks(x: Tensor, first: int, count: int) -> Tensor:
    """x of `count` ranks, from rank `first` on, concatenated. All ranks must call it."""
    gathered = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.contiguous())
    return gathered[first * len(x) : (first + count) * len(x)]


# ---- Masks in views, and pooling inside them (Sec. 3.2) --------------------------------------------------------------


def masks_in_views(m: Tensor, boxes: Tensor, flips: Tensor, num_clusters: int, size: int) -> tuple[Tensor, Tensor]:
    """Weights (2B, K, size, size), m1 then m2 (all first views, then all second), and pairs (P, 2): (image, cluster)
    of each mask that both views see. m: (B, h, w). boxes: (B, 2, 4). flips: (B, 2)."""
    m1, m2 = (crop_masks(m, boxes[:, v], flips[:, v], num_clusters, size) for v in (0, 1))  # (B, K, H, W)
    in_both = (m1.sum((2, 3)) > 1e-3) & (m2.sum((2, 3)) > 1e-3)
    return torch.cat([m1, m2]), in_both.nonzero()  # on a GPU the host waits here, to learn P


def pool_pairs(c5: Tensor, weights: Tensor, pairs: Tensor) -> Tensor:
    """h of each pair: (2P, C), all first views, then all second. c5: (2B, C, H, W). weights: (2B, K, H, W).

    differs: only pairs become rows of the heads; the authors feed a row for each of K masks, most of them empty. A rank
    without pairs feeds two zero rows, so that batch norm and the collectives still run.
    """
    image, cluster = pairs.unbind(1)
    rows = torch.cat([pairs, torch.stack([image + len(c5) // 2, cluster], 1)])  # (2P, 2)
    return F.pad(mask_pool(c5, weights, rows), (0, 0, 0, 0 if len(pairs) else 2))


def mask_stats(m: Tensor, num_clusters: int, groups: int) -> dict[str, Tensor]:
    """Cluster usage of this rank's masks (B, h, w), as scalars."""
    flat = m.flatten(1)
    cells = flat.new_zeros(len(m), num_clusters).scatter_add_(1, flat, torch.ones_like(flat))  # (B, K)
    sizes = in_groups(cells, groups).sum(1).float()  # (G, K): of clusters, in cells of m
    return {
        "masks": (cells > 0).sum(1).float().mean(),  # per image
        "clusters": (sizes > 0).sum(1).float().mean(),  # not empty, per group
        "largest": (sizes.amax(1) / sizes.sum(1)).mean(),  # the largest cluster's share of its group
    }


# ---- Networks (Sec. 4) -----------------------------------------------------------------------------------------------

ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "tiny", "vit_b")


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
    """A torchvision ResNet or ViT-B/16 (A.5), with its own parameter names but no classifier, or `tiny`. Raises
    ValueError for any other arch."""
    check_choice("encoder", arch, *ARCHS)
    if arch in ("tiny", "vit_b"):
        net = Tiny() if arch == "tiny" else ViT()
    else:
        net = models.get_model(arch, weights=None)
        del net.fc, net.avgpool
    net.arch = arch
    return net


def channels(layer: nn.Module) -> int:
    """The number of output channels of an encoder's stage."""
    return [m for m in layer.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))][-1].num_features


def encode_c4(net: nn.Module, x: Tensor) -> Tensor:
    """Images (B, 3, S, S) -> C4, the output of layer3: (B, 1024, S/16, S/16) for ResNet-50."""
    if isinstance(net, ViT):
        return net.layer3(net.last_map(x))
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer3(net.layer2(net.layer1(x)))


def encode(net: nn.Module, x: Tensor) -> Tensor:
    """Images (B, 3, S, S) -> C5, the output of layer4: (B, 2048, S/32, S/32) for ResNet-50."""
    return net.layer4(encode_c4(net, x))


def mlp(cin: int, hidden: int, cout: int) -> nn.Module:
    """Projector and predictor. Sec. 4."""
    return nn.Sequential(nn.Linear(cin, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, cout))


# ---- R2O (Sec. 3) ----------------------------------------------------------------------------------------------------


class R2O(nn.Module):
    """Online network theta, target network xi, and the loss of one step.

    arch: one of ARCHS. num_regions: all region ids are below it. kmeans_group: maximum number of images clustered
    together, across ranks if each has fewer. kmeans_iters: Lloyd iterations. assign: see predict_masks(). masks:
    "predicted", or "prior" to take the regions themselves (Table 4). hidden, dim: widths of the heads. overlap: on a
    GPU, predict masks on a side stream. compile: use torch.compile for the encoders. Raises ValueError for an unknown
    arch, assign or masks.
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
        masks: str = "predicted",
    ):
        super().__init__()
        check_choice("mask assignment", assign, "pixel", "region")
        check_choice("masks", masks, "predicted", "prior")
        self.num_regions, self.assign, self.overlap, self.masks = num_regions, assign, overlap, masks
        self.kmeans_group, self.kmeans_iters = 1 if masks == "prior" else kmeans_group, kmeans_iters
        self.encode_c4, self.encode = (torch.compile(f) if compile else f for f in (encode_c4, encode))
        encoder = build_encoder(arch)
        self.online = nn.ModuleDict({"encoder": encoder, "projector": mlp(channels(encoder.layer4), hidden, dim)})
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = mlp(dim, hidden, dim)

    @torch.no_grad()
    def update_target(self, tau: float):
        """xi <- tau xi + (1 - tau) theta (A.1). Batch norm buffers are not averaged: the target has its own."""
        torch._foreach_lerp_(list(self.target.parameters()), list(self.online.parameters()), 1 - tau)

    @property
    def mask_encoder(self) -> nn.Module:
        """The network whose features are clustered."""
        return self.target["encoder"]

    @torch.no_grad()
    def predict_masks(
        self, encoder, images, regions, num_clusters, uniforms, ranks_per_group=1, num_regions=None
    ) -> Tensor:
        """predict_masks() of the encoder's C4, with this model's settings. images: (B, 3, S, S) normalized."""
        if self.masks == "prior":
            return regions.long()
        c4 = self.encode_c4(encoder, images)  # (B, C, H, W)
        if num_regions is None or ranks_per_group > 1:  # ranks that share a group need the same number
            num_regions = self.num_regions
        settings = {"assign": self.assign, "iters": self.kmeans_iters, "ranks_per_group": ranks_per_group}
        return predict_masks(c4, regions, num_clusters, uniforms, num_regions, **settings)

    def forward(
        self,
        images: Tensor,
        views: Tensor,
        regions: Tensor,
        boxes: Tensor,
        flips: Tensor,
        num_clusters: int,
        generator=None,
        num_regions: int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one step, Eq. (5), and statistics to watch.

        images: (B, 3, S, S) and views: (2B, 3, S, S), the first views then the second, normalized. regions: (B, h, w).
        boxes: (B, 2, 4). flips: (B, 2). generator: a CPU torch.Generator. With the same state on all ranks,
        K-means does not depend on their number. Micro-batches that share a state get the full batch's clusters
        (bit-identical on a CPU) if kmeans_group divides their size. num_regions: all ids of this batch are below it
        (default: the model's); on a GPU, the time and memory of K-means grow with its square.
        Returns the loss, whose average over ranks (as DDP takes) is the mean over all pairs, and scalars to watch.
        """
        B, K = len(images), self.num_regions if self.masks == "prior" else num_clusters
        uniforms, ranks_per_group = self.draw_uniforms(B, 1 if self.masks == "prior" else K, generator)
        uniforms = copy_to_device(uniforms, images.device)

        # Mask prediction (Sec. 3.1, Eq. (1)). On a GPU this runs on a side stream, overlapping the online forward pass;
        # with SyncBatchNorm, where the host waits in each layer, only K-means overlaps.
        side = SideStream(images.device, self.overlap)
        with side:
            m = self.predict_masks(self.mask_encoder, images, regions, K, uniforms, ranks_per_group, num_regions)

        losses, pairs, z = self.represent(views, m, boxes, flips, K, side, generator)
        loss, total = mean_over_pairs(losses, pairs)
        stats = {
            "total": total,  # pairs of all ranks
            "pairs": torch.tensor(pairs / B),  # per image
            **mask_stats(m, K, len(uniforms)),
            "spread": math.sqrt(z.shape[1]) * F.normalize(z.float(), dim=1).std(0, correction=0).mean(),  # 0: collapse
        }
        return loss, stats

    def represent(self, views, m, boxes, flips, K: int, side, generator) -> tuple[Tensor, int, Tensor]:
        """Representation learning (Sec. 3.2, Eq. (2)): one view predicts the other, inside each mask.

        Arguments as in forward(); m: (B, h, w); side: the stream that computes m. Returns the losses of both
        directions (2P,), Eq. (5), the number of pairs P, and the projections z (2P, dim).
        """
        c5 = self.encode(self.online["encoder"], views)  # (2B, C, H, W)
        with side:
            weights, pairs = masks_in_views(m, boxes, flips, K, c5.shape[-1])  # (2B, K, H, W), (P, 2)
        side.join(m, weights, pairs)
        q = self.predictor(self.online["projector"](pool_pairs(c5, weights, pairs)))  # (2P, dim)
        with torch.no_grad():
            c5 = self.encode(self.target["encoder"], views)
            z = self.target["projector"](pool_pairs(c5, weights, pairs))  # (2P, dim)
        return byol_loss(q, z.roll(len(pairs), 0)), len(pairs), z

    def draw_uniforms(self, B: int, K: int, generator: torch.Generator | None) -> tuple[Tensor, int]:
        """K-means' random numbers for this rank's groups (G, K, T), and how many ranks share a group."""
        rank, world = rank_and_world()
        groups, ranks = kmeans_groups(B, world, self.kmeans_group)
        uniforms = seeding_uniforms(groups * world // ranks, K, generator)
        return uniforms[rank // ranks * groups :][:groups], ranks


def copy_to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy x to the device without making the host wait, as a copy of more than 64 KB of unpinned memory would."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


class SideStream:
    """A context whose CUDA kernels run beside those of the current stream; without effect on a CPU. After join(), the
    current stream may use the tensors that were made inside."""

    # One per device, since the caching allocator keeps a pool per stream. High priority, so that its many small
    # launches do not each wait behind a convolution's blocks.
    stream = functools.cache(functools.partial(torch.cuda.Stream, priority=-1))

    def __init__(self, device: torch.device, enabled: bool = True):
        self.side = None
        if enabled and device.type == "cuda":
            self.main, self.side = torch.cuda.current_stream(device), SideStream.stream(device)
            self.side.wait_stream(self.main)

    def __enter__(self):
        self.context = torch.cuda.stream(self.side) if self.side else contextlib.nullcontext()
        self.context.__enter__()

    def __exit__(self, *exception):
        self.context.__exit__(*exception)

    def join(self, *made: Tensor):
        if self.side:
            self.main.wait_stream(self.side)
            for x in made:
                x.record_stream(self.main)


# ---- Losses (Sec. 3.2) -----------------------------------------------------------------------------------------------


def byol_loss(q: Tensor, z: Tensor) -> Tensor:
    """Eq. (4): |q/|q| - z/|z||² = 2 - 2 cos(q, z), row by row. q, z: (P, D) -> (P,) float32. No gradient to z."""
    q, z = F.normalize(upcast(q), dim=-1), F.normalize(upcast(z.detach()), dim=-1)
    return (q - z).square().sum(-1)


def sample_masks(weight: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` masks of every image, drawn with replacement, uniformly among those of weight above 1e-3. DetCon, A.4.

    weight: (B, K) of each mask in one view. Returns ids (B, count) int64, -1 where an image has no such mask.
    """
    device = weight.device if generator is None else generator.device
    return masks_at(weight, torch.rand(len(weight), count, generator=generator, device=device, dtype=torch.float64))


def masks_at(weight: Tensor, uniforms: Tensor) -> Tensor:
    """sample_masks() with its random numbers (B, count) given."""
    nth = (weight > 1e-3).cumsum(1)  # (B, K): 1 for an image's first such mask, 2 for its second, …
    present = (weight > 1e-3).sum(1, keepdim=True)  # (B, 1)
    wanted = (uniforms.to(weight.device) * present).long().clamp(max=present - 1) + 1  # (B, count)
    return torch.where(present > 0, torch.searchsorted(nth, wanted), -1)


def contrastive_loss(
    q: Tensor, z_same: Tensor, z_other: Tensor, ids: Tensor, ids_same: Tensor, ids_other: Tensor, temperature=0.1
) -> Tensor:
    """DetCon's loss (arXiv 2103.10957), and NT-Xent with masks (A.4): -log softmax of cosine / temperature, over
    the keys of both views and all ranks, at the key with the same image and mask in the other view.

    q: (P, D), rows of one view. z_same, z_other: (N, D), keys of the same view and of the other, with gradient. ids,
    ids_same, ids_other: (P,), (N,), (N,) integer, equal if and only if image and mask are the same. If a row
    has several positives, they weigh equally; keys of its own view and mask are left out. Returns (P,): 0 without a
    positive; otherwise divided by how often the row's mask was sampled in its view.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, z_same, z_other = (F.normalize(upcast(x), dim=-1) for x in (q, z_same, z_other))
        own, positive = ids[:, None] == ids_same, ids[:, None] == ids_other  # (P, N)
        other, same = q @ z_other.T / temperature, q @ z_same.T / temperature  # (P, N)
        same = same.masked_fill(own, torch.finfo(same.dtype).min)
        all_keys = torch.logaddexp(other.logsumexp(1), same.logsumexp(1))  # (P,)
    count = positive.sum(1)
    loss = all_keys - (other * positive).sum(1) / count.clamp(min=1)
    return torch.where(count > 0, loss / own.sum(1).clamp(min=1), 0)


def mean_over_pairs(losses: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """This rank's losses -> a loss whose mean over ranks is the mean over all ranks' pairs, and the number of pairs.
    Without pairs the loss is 0, with zero gradients."""
    total = torch.full((), float(pairs), device=losses.device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return (losses.sum() if pairs else 0 * losses.sum()) * rank_and_world()[1] / total.clamp(min=1), total


# ---- LARS (A.1) ------------------------------------------------------------------------------------------------------


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


# ---- The schedule: K (Sec. 3.3, Eq. (A1), A.6, Table 9), learning rate and tau (A.1) ---------------------------------


def num_clusters(
    epoch: float, epochs: int, k_start: int = 128, k_end: int = 4, hold_epochs: int = 40, schedule: str = "cosine"
) -> int:
    """K(t): k_start up to hold_epochs, then down (or up, if k_end is larger) to k_end at t = epochs. Eq. (A1).

    epoch: counted from 1. schedule: "cosine", "linear", or "constant" (k_start throughout); ValueError for others, and
    for k_start or k_end below 1. The paper's settings give 128 up to epoch 40 and 119, 74, 4 at 100, 200, 300 (Fig. 5).
    differs: as printed, Eq. (A1) ends at K = 103.
    """
    if min(k_start, k_end) < 1:
        raise ValueError(f"k_start and k_end must be at least 1, got {k_start} and {k_end}")
    check_choice("schedule", schedule, "cosine", "linear", "constant")
    if schedule == "constant" or epoch <= hold_epochs:
        return k_start
    t = min((epoch - hold_epochs) / max(epochs - hold_epochs, 1e-9), 1.0)
    left = 1 - t if schedule == "linear" else math.cos(math.pi / 2 * t)
    return math.floor(k_end + left * (k_start - k_end) + 1e-9)


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Linear from 0 to peak over warmup_steps, then a half cosine to 0 at `steps`. A.1."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    t = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    return peak * (1 + math.cos(math.pi * t)) / 2


def target_momentum(step: int, steps: int, base: float = 0.99) -> float:
    """tau: from base to 1 along a half cosine. A.1."""
    return 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2


@dataclass(frozen=True)
class Schedule:
    """K, learning rate and tau of every optimizer step, counted from 0. Defaults: A.1. The learning rate peaks at
    lr * batch_size / 256 * K / lr_k after 1 % of the steps; lr_k = 0 leaves the factor for K out. `shape` is
    num_clusters' schedule. differs: the paper's text multiplies by K (a peak of 614), not by K / 16."""

    steps_per_epoch: int
    epochs: int = 300
    batch_size: int = 4096
    lr: float = 0.3
    lr_k: float = 16
    tau: float = 0.99
    k_start: int = 128
    k_end: int = 4
    hold_epochs: int = 40
    shape: str = "cosine"

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def __call__(self, step: int) -> tuple[int, float, float]:
        epoch = step // self.steps_per_epoch + 1
        k = num_clusters(epoch, self.epochs, self.k_start, self.k_end, self.hold_epochs, self.shape)
        peak = self.lr * self.batch_size / 256 * (k / self.lr_k if self.lr_k else 1)
        return k, learning_rate(step, self.steps, self.steps // 100, peak), target_momentum(step, self.steps, self.tau)


# ---- Views (A.1), 1: in a loader worker, crop and resize, and draw all random numbers --------------------------------


def resize(image: Tensor, size: int) -> Tensor:
    """A whole image (3, h, w) uint8 -> (3, size, size), ignoring its aspect ratio. It works on (h, w, 3) memory,
    the decoders' layout: repacking would take a third of the time."""
    x = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    return F.interpolate(x, (size, size), mode="bicubic", antialias=True)[0]


def draw_crop(rng: np.random.Generator, h: int, w: int) -> tuple[int, int, int, int]:
    """A random crop of an h x w image with 8 to 100 % of its area and an aspect ratio of 3/4 to 4/3: top, left, height,
    width. The same distribution as torchvision's RandomResizedCrop, ten times as fast."""
    for area, ratio, y, x in rng.random((10, 4)).tolist():
        area, ratio = (0.08 + 0.92 * area) * h * w, math.exp((2 * ratio - 1) * math.log(4 / 3))
        ch, cw = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < ch <= h and 0 < cw <= w:
            return int(y * (h - ch + 1)), int(x * (w - cw + 1)), ch, cw
    ch, cw = min(h, round(w / (3 / 4))), min(w, round(h * (4 / 3)))  # too narrow or too wide: the largest center crop
    return (h - ch) // 2, (w - cw) // 2, ch, cw


# Of A.1 and of SimCLR (arXiv 2002.05709): strengths of brightness, contrast, saturation and hue jitter; probability of
# blurring view 1 and view 2; the same for solarizing.
POLICIES = {
    "byol": ((0.4, 0.4, 0.2, 0.1), (1.0, 0.1), (0.0, 0.2)),
    "simclr": ((0.8, 0.8, 0.8, 0.2), (0.5, 0.5), (0.0, 0.0)),
}


def draw_factors(rng: np.random.Generator, view: int, policy: str = "byol") -> list[float]:
    """The 11 parameters of one view's color changes: the order of the four jitters (-1: none), brightness, contrast,
    saturation and hue factor, whether gray, sigma of the blur in 224ths of the view (0: none), whether solarized."""
    strength, blur, solarize = POLICIES[policy]
    u = rng.random(13).tolist()
    order = sorted(range(4), key=u.__getitem__) if u[4] < 0.8 else [-1] * 4
    jitter = [center - s + 2 * s * x for center, s, x in zip((1, 1, 1, 0), strength, u[5:9], strict=True)]
    sigma = 0.1 + 1.9 * u[10] if u[9] < blur[view] else 0.0
    return [*order, *jitter, u[11] < 0.2, sigma, u[12] < solarize[view]]


def draw_views(image: Tensor, size: int, rng: np.random.Generator, policy: str = "byol") -> dict[str, Tensor]:
    """Two views of an image (3, h, w) uint8: views (2, S, S, 3) uint8, not yet mirrored; boxes (2, 4), xyxy in [0, 1];
    flips (2,); factors (2, 11) for augment()."""
    h, w = image.shape[1:]
    views = torch.empty(2, size, size, 3, dtype=torch.uint8)
    boxes, flips, factors = [], [], []
    for v in (0, 1):
        top, left, ch, cw = draw_crop(rng, h, w)
        views[v] = resize(image[:, top : top + ch, left : left + cw], size).permute(1, 2, 0)
        boxes.append([left / w, top / h, (left + cw) / w, (top + ch) / h])
        flips.append(rng.random() < 0.5)  # differs: the authors' code always mirrors
        factors.append(draw_factors(rng, v, policy))
    boxes, flips, factors = (torch.tensor(x) for x in (boxes, flips, factors))
    return {"views": views, "boxes": boxes, "flips": flips, "factors": factors}


# ---- Views (A.1), 2: on the device, mirror, jitter, gray, blur, solarize and normalize a whole batch -----------------


@functools.cache
def constants(of_channels: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, 1, 1), cached, since copying it to a GPU makes the host wait."""
    return torch.tensor(of_channels, device=device).view(3, 1, 1)


def gray(x: Tensor) -> Tensor:
    """(N, 3, S, S) -> (N, 1, S, S), ITU-R 601 luma."""
    return (x * constants((0.2989, 0.587, 0.114), x.device)).sum(1, keepdim=True)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = gray(x).mean((1, 2, 3), keepdim=True)
    return (mean + factor * (x - mean)).clamp(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    luma = gray(x)
    return (luma + factor * (x - luma)).clamp(0, 1)


def adjust_hue(x: Tensor, factor: Tensor) -> Tensor:
    """Rotate the hue by `factor` of a full circle, in HSV."""
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    c = torch.where(chroma > 0, chroma, 1)
    sixth = torch.where(value == r, (g - b) / c, torch.where(value == g, 2 + (b - r) / c, 4 + (r - g) / c))
    sixth = sixth + 6 * factor[:, 0]  # the hue, in sixths of a circle
    k = (constants((5.0, 3.0, 1.0), x.device) + sixth[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image with its own sigma; the kernel spans a tenth of the side (23 of 224), edges reflect."""
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
    """Mirror a batch of views and change its colors as A.1 says. views: (N, 3, S, S) uint8 and flips: (N,) on the
    training device. factors: (N, 11) of draw_factors, kept on the CPU so that selecting images needs no device sync.
    Returns normalized float32."""
    x = views.to(torch.float32, memory_format=torch.contiguous_format) / 255
    x = torch.where(flips.view(-1, 1, 1, 1), x.flip(-1), x)

    order, jitter, grays, sigmas, solarized = factors.split([4, 4, 1, 1, 1], 1)

    def change(which: Tensor, f, factor: Tensor | None = None):
        i = which.nonzero()[:, 0]  # on the CPU
        if len(i):
            args = [] if factor is None else [factor[i].view(-1, 1, 1, 1).to(x.device, non_blocking=True)]
            i = i.to(x.device, non_blocking=True)
            x[i] = f(x[i], *args)

    for slot in range(4):
        for j, f in enumerate(JITTER):
            change(order[:, slot] == j, f, jitter[:, j])
    change(grays > 0, lambda v: gray(v).expand_as(v))
    change(sigmas > 0, lambda v, sigma: gaussian_blur(v, sigma * v.shape[-1] / 224), sigmas)
    change(solarized > 0, lambda v: torch.where(v >= 0.5, 1 - v, v))
    return normalize(x)


def normalize(x: Tensor) -> Tensor:
    """uint8 or [0, 1] float images -> ImageNet mean 0 and standard deviation 1 per channel."""
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    mean, std = (constants(of, x.device) for of in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (x - mean) / std

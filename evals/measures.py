"""What the evaluations measure, as functions of tensors."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import r2o
from runtime.pictures import resize_labels


@torch.no_grad()
def segment_images(encoder: torch.nn.Module, images: Tensor, k: int, layer: str = "c4", generator=None) -> Tensor:
    """K-means of each image's own features. images: (B, 3, S, S) normalized -> scores (B, K, H, W), whose argmax is the
    segment. They are linear in the features, so interpolating them interpolates the features."""
    return segment_features((r2o.encode_c4 if layer == "c4" else r2o.encode)(encoder, images), k, generator)


def segment_features(features: Tensor, k: int, generator=None) -> Tensor:
    """segment_images() of features (B, C, H, W)."""
    H, W = features.shape[2:]
    points = F.normalize(features.float(), dim=1).flatten(2).mT.contiguous()  # (B, HW, C)
    centers, _ = r2o.kmeans(points, k, generator=generator)
    return r2o.cluster_scores(points, centers).mT.unflatten(2, (H, W))


def match_foreground(
    segments: Tensor, k: int, truth: Tensor, void: Tensor | None = None
) -> tuple[int, dict[str, float]]:
    """The segment that overlaps the true foreground best, and the metrics of calling it foreground and all else
    background. segments: (h, w) ids < k. truth: (h, w) bool. void: (h, w) bool, ignored. Hungarian matching of one."""
    if void is not None:
        segments, truth = segments[~void], truth[~void]

    def iou(a, b):
        return ((a & b).sum() / (a | b).sum().clamp(min=1)).item()

    ious = [iou(segments == s, truth) for s in range(k)]
    best = int(np.argmax(ious))
    predicted = segments == best
    background = 1.0 if (predicted & truth).all() else iou(~predicted, ~truth)  # none in either: all right
    return best, {
        "foreground IoU": ious[best],
        "mean IoU": (ious[best] + background) / 2,
        "pixel accuracy": (predicted == truth).float().mean().item(),
    }


def best_overlap(masks: Tensor, objects: Tensor, void: Tensor | None = None) -> Tensor:
    """Best overlap of each object: the largest IoU with any mask.

    masks: (h', w') integer ids, enlarged to the objects' size by the nearest pixel. objects: (n, h, w) bool, which may
    overlap. void: (h, w) bool, pixels to ignore. Returns (n,) float64.
    """
    masks = resize_labels(masks, objects.shape[1:])
    counted = torch.ones_like(masks, dtype=torch.bool) if void is None else ~void
    count = int(masks.max()) + 1
    sizes = torch.bincount(masks[counted], minlength=count)
    best = []
    for o in objects & counted:
        inside = torch.bincount(masks[o], minlength=count)
        best.append((inside.double() / (sizes + o.sum() - inside).clamp(min=1)).max())
    return torch.stack(best) if best else torch.zeros(0, dtype=torch.float64)


def objects_of(ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids (h, w), as read_ids() returns them -> objects (n, h, w) and void (h, w), bool."""
    names = ids[ids > 0].unique()
    return ids == names[:, None, None], ids == -1


BANK, QUERIES = 16384, 1024  # rows that are compared at a time


def nearest(queries: Tensor, bank: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of the bank most similar to each query: similarities (Q, k), descending, and their labels (Q, k). A
    bank of fewer rows is padded with similarity -inf. queries: (Q, C). bank: (N, C). labels: (N,). Chunked."""
    best = queries.new_full((len(queries), k), -math.inf, dtype=torch.float32)
    owners = labels.new_zeros(len(queries), k)
    for start in range(0, len(bank), BANK):
        some, y = bank[start : start + BANK].float(), labels[start : start + BANK]
        for q in range(0, len(queries), QUERIES):
            at = slice(q, q + QUERIES)
            similar = queries[at].float() @ some.T
            both = torch.cat([best[at], similar], 1)
            labels_of_both = torch.cat([owners[at], y.expand(len(similar), -1)], 1)
            best[at], index = both.topk(k, dim=1)
            owners[at] = labels_of_both.gather(1, index)
    return best, owners


def votes(similar: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """The weight of every class: similar, labels (Q, k) -> (Q, classes)."""
    weights = ((similar - similar[:, :1]) / temperature).exp()  # a common factor keeps them from overflowing
    return weights.new_zeros(len(similar), classes).scatter_add_(1, labels, weights)


def confusion(predicted: Tensor, truth: Tensor, classes: int, void: int) -> Tensor:
    """(classes, classes) pixels, by truth and by prediction, without void. predicted, truth: (h, w)."""
    counted = truth != void
    pairs = truth[counted].long() * classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def class_ious(pixels: Tensor) -> Tensor:
    """IoU of each class, NaN if neither present nor predicted: confusion() (classes, classes) -> (classes,)."""
    hits = pixels.diagonal().double()
    return hits / (pixels.sum(0) + pixels.sum(1) - hits)

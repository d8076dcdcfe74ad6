"""Inputs of the ops: random, not contiguous, of any size."""

import torch

import r2o_ops


def rng(seed):
    return torch.Generator().manual_seed(seed)


def ragged(shape, dtype, device, seed, scale=1.0):
    """A tensor with neither contiguous nor dense strides."""
    wide = torch.randn([n + 1 for n in reversed(shape)], generator=rng(seed)).to(device, dtype) * scale
    return wide.permute(*reversed(range(len(shape))))[tuple(slice(0, n) for n in shape)]


def pool_case(B, C, H, W, scale, R, id_type, dtype, device, seed):
    features = ragged((B, C, H, W), dtype, device, seed)
    regions = (
        torch.randint(R, (B, 2 * scale * W, scale * H), generator=rng(seed)).to(device, id_type).mT
    )  # (B, h, w), not contiguous
    return features, regions, R


def kmeans_case(G, N, D, K, dtype, device, seed, spread=6):
    """Integers, each point with its opposite, so that the mean is 0 and distances are exact in any order of summation:
    every path must pick the same seeds. Not contiguous."""
    half = torch.randint(-spread, spread + 1, (G, D, N // 2), generator=rng(seed)).to(device, dtype)
    valid = torch.rand(G, N // 2, generator=rng(seed + 1)) < torch.rand(G, 1, generator=rng(seed + 2)) * 1.5
    points, valid = torch.cat([half, -half], 2).mT, torch.cat([valid, valid], 1).to(device)
    return points, valid, r2o_ops.seeding_uniforms(G, K, rng(seed + 3)).to(device)


def crop_case(B, h, w, K, seed, device):
    masks = torch.randint(K, (B, w, h), generator=rng(seed)).to(device, torch.uint8).mT
    corner = torch.rand(B, 2, generator=rng(seed)) * 0.9
    boxes = torch.cat([corner, corner + (1 - corner) * torch.rand(B, 2, generator=rng(seed + 1))], 1)
    if seed % 2:  # whole, half and quarter images: windows whose bins hold whole pixels, where rounding decides
        boxes = boxes.mul(4).floor().div(4) + torch.tensor([0, 0, 0.25, 0.25])
    return masks, boxes.to(device), torch.rand(B, generator=rng(seed)).to(device) < 0.5, K


def mask_case(B, C, H, K, P, dtype, device, seed):
    features = ragged((B, C, H, H), dtype, device, seed)
    weights = ragged((B, K, H, H), torch.float64 if dtype == torch.float64 else torch.float32, device, seed + 1).clamp(
        min=0
    )
    weights[:, 0] = 0  # a mask that the view does not see
    pairs = torch.stack(
        [torch.randint(B, (P,), generator=rng(seed)), torch.randint(K, (P,), generator=rng(seed + 2))], 1
    )
    return features, weights, pairs.to(device)

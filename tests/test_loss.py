"""Pooling in masks and the loss, Sec. 3.2 and Eq. (4), (5)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import r2o


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_mask_pool_is_the_weighted_mean_over_the_mask_by_hand():
    features = torch.tensor([[[[1.0, 2], [3, 4]]], [[[5.0, 6], [7, 8]]]])  # (2, 1, 2, 2)
    weights = torch.tensor([[[[1.0, 0], [0, 0]], [[0, 0.5], [0.5, 1]]], [[[0, 0], [0, 0]], [[0.1, 0.1], [0.1, 0.1]]]])
    rows = r2o.mask_pool(features, weights, torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [0, 1]]))
    torch.testing.assert_close(rows[:, 0], torch.tensor([1.0, (1 + 1.5 + 4) / 2, 0, 6.5, 3.25]))


def test_a_small_mask_counts_as_much_as_a_large_one():
    """The mean is over the mask's own weight; the authors' code divides by at least 1 and shrinks small masks."""
    features, weights = torch.randn(1, 8, 7, 7, generator=rng()), torch.rand(1, 1, 7, 7, generator=rng())
    pair = torch.tensor([[0, 0]])
    torch.testing.assert_close(r2o.mask_pool(features, weights * 1e-2, pair), r2o.mask_pool(features, weights, pair))


def test_mask_pool_computes_in_full_precision_under_autocast():
    features = torch.randn(1, 8, 7, 7, generator=rng()).bfloat16().requires_grad_()
    weights, pairs = torch.rand(1, 2, 7, 7, generator=rng()), torch.tensor([[0, 1]])
    with torch.autocast("cpu", torch.bfloat16):
        h = r2o.mask_pool(features, weights, pairs)
    want = (features.float() * weights[:, 1:]).sum((2, 3)) / weights[:, 1].sum()
    torch.testing.assert_close(h, want)
    h.sum().backward()
    assert features.grad.dtype == torch.bfloat16 and features.grad.isfinite().all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f, w: r2o.mask_pool(f, w, torch.tensor([[1, 0]])), r"images in pairs must lie in \[0, 1\)"),
        (lambda f, w: r2o.mask_pool(f, w, torch.tensor([[0, -1]])), r"clusters in pairs must lie in \[0, 2\)"),
        (lambda f, w: r2o.mask_pool(f, w, torch.tensor([0, 1])), "pairs must be integer"),
        (lambda f, w: r2o.mask_pool(f, w[..., :2], torch.tensor([[0, 1]])), "weights must be float"),
    ],
)
def test_invalid_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3))


def test_the_loss_by_hand():
    """Eq. (4): 2 - 2 cos, whatever the lengths."""
    q = torch.tensor([[3.0, 0], [0, 2], [1, 1], [1, 0]])
    z = torch.tensor([[5.0, 0], [0, -1], [4, 0], [0, 1]])
    torch.testing.assert_close(r2o.byol_loss(q, z), torch.tensor([0, 4, 2 - math.sqrt(2), 2]))


def test_the_loss_has_no_gradient_in_z():
    q, z = (torch.randn(5, 4, generator=rng(i)).requires_grad_() for i in (0, 1))
    r2o.byol_loss(q, z).sum().backward()
    assert q.grad.abs().sum() > 0 and z.grad is None


def batch(B=4, seed=0, boxes=None):
    images, views = (
        torch.randn(B, 3, 64, 64, generator=rng(seed)),
        torch.randn(2 * B, 3, 64, 64, generator=rng(seed + 1)),
    )
    regions = torch.randint(3, 20, (B, 16, 16), generator=rng(seed), dtype=torch.uint8)
    boxes = torch.tensor([[[0.0, 0, 0.7, 0.8], [0.2, 0.3, 1, 1]]]).repeat(B, 1, 1) if boxes is None else boxes
    return images, views, regions, boxes, torch.rand(B, 2, generator=rng(seed)) < 0.5


def model(**options):
    """Online and target differ, as they do after a step: either in the other's place would be noticed."""
    torch.manual_seed(0)
    r2o_model = r2o.R2O("tiny", num_regions=20, hidden=16, dim=8, **options)
    for p in r2o_model.target.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return r2o_model


def masks_step_by_step(encoder, images, regions, k):
    """Sec. 3.1 spelled out for one group: normalized embeddings of present regions, K-means, nearest centers."""
    c4 = r2o.encode_c4(encoder, images)
    p, area = r2o.region_pool_ref(c4, regions, 20)
    points = torch.nn.functional.normalize(p, dim=2)[area > 0]
    every, valid = torch.zeros(1, 20 * len(images), p.shape[2]), (area > 0).view(1, -1)
    every[valid] = points
    mu, _ = r2o.kmeans(every, k, valid, generator=rng())
    pixels = torch.nn.functional.normalize(c4, dim=1).permute(0, 2, 3, 1)
    return torch.cdist(pixels.flatten(0, 2), mu[0]).argmin(1).view(pixels.shape[:3])


def test_forward_is_the_sum_of_both_directions_averaged_over_pairs():
    """Eq. (5), spelled out image by image with the dense masks."""
    r2o_model = model()
    images, views, regions, boxes, flips = batch()
    loss, stats = r2o_model(images, views, regions, boxes, flips, 5, rng())
    with torch.no_grad():
        m = masks_step_by_step(r2o_model.target["encoder"], images, regions, 5)
        w = [r2o.crop_masks_ref(m, boxes[:, v], flips[:, v], 5, 8) for v in (0, 1)]
        c5 = {net: r2o.encode(getattr(r2o_model, net)["encoder"], views).chunk(2) for net in ("online", "target")}
        rows = {(net, v): [] for net in c5 for v in (0, 1)}
        for b in range(4):
            for k in range(5):
                if w[0][b, k].sum() > 1e-3 and w[1][b, k].sum() > 1e-3:
                    for net, v in rows:
                        f = c5[net][v][b]
                        rows[net, v].append((f * w[v][b, k]).sum((1, 2)) / w[v][b, k].sum())
        q = r2o_model.predictor(r2o_model.online["projector"](torch.stack(rows["online", 0] + rows["online", 1])))
        z = r2o_model.target["projector"](torch.stack(rows["target", 0] + rows["target", 1]))
        cos = [torch.cosine_similarity(*pair) for pair in zip(q.chunk(2), reversed(z.chunk(2)), strict=True)]
    P = len(cos[0])
    torch.testing.assert_close(loss.detach(), sum(2 - 2 * c for c in cos).mean(), rtol=1e-4, atol=1e-5)
    assert stats["pairs"] == P / 4 and 0 < stats["spread"] < 2 and 1 <= stats["masks"] <= 5


def test_gradients_reach_every_online_parameter_and_no_target():
    r2o_model = model()
    r2o_model(*batch(), 5, rng())[0].backward()
    for name, p in r2o_model.named_parameters():
        assert (p.grad is None) == name.startswith("target."), name
    assert all(p.grad.abs().sum() > 0 for n, p in r2o_model.named_parameters() if p.requires_grad and p.ndim > 1)


def test_views_without_a_common_mask_give_zero_and_finite_gradients_everywhere():
    """One region per image half and views of different halves: no pair. DDP still needs every gradient."""
    r2o_model = model(assign="region")
    images, views, regions, _, flips = batch(2)
    regions = torch.zeros_like(regions)
    regions[:, 8:] = 1
    images[:, :, 32:] += 3
    boxes = torch.tensor([[[0.0, 0, 1, 0.3], [0, 0.7, 1, 1]]]).repeat(2, 1, 1)
    loss, stats = r2o_model(images, views, regions, boxes, flips, 4, rng())
    loss.backward()
    assert stats["pairs"] == 0 and loss == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in r2o_model.parameters() if p.requires_grad)


def test_a_mask_counts_from_a_weight_of_a_thousandth_of_a_cell():
    """Region 1 is a sliver that both views see with less than half a cell."""
    r2o_model = model(assign="region", kmeans_group=1)
    images, views, regions, boxes, flips = batch(1)
    regions = torch.zeros_like(regions)
    regions[:, 8, 8] = 1
    images[:, :, 32:36, 32:36] += 9
    weights = [r2o.crop_masks(regions.long(), boxes[:, v], flips[:, v], 2, 8)[0, 1].sum() for v in (0, 1)]
    assert all(1e-3 < w < 0.5 for w in weights)
    assert r2o_model(images, views, regions, boxes, flips, 2, rng())[1]["pairs"] == 2


def test_each_rank_takes_its_own_share_of_the_uniforms(monkeypatch):
    """With the same seed on all ranks, two processes of 2 images draw the masks that one process of 4 draws."""
    seen = []
    monkeypatch.setattr(
        r2o.R2O, "predict_masks", lambda self, e, x, r, k, u, *_: seen.append(u) or torch.zeros(len(x), 16, 16).long()
    )
    monkeypatch.setattr(r2o.dist, "all_reduce", lambda t: None)
    images, views, regions, boxes, flips = batch(4)
    model(kmeans_group=2)(images, views, regions, boxes, flips, 5, rng())
    for rank in (0, 1):
        monkeypatch.setattr(r2o.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(r2o.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(r2o.dist, "get_world_size", lambda: 2)
        model(kmeans_group=2)(images[:2], views[:4], regions[:2], boxes[:2], flips[:2], 5, rng())
    assert torch.equal(seen[0], torch.cat(seen[1:])) and not torch.equal(seen[1], seen[2])


def test_a_single_pair_still_trains():
    r2o_model = model(kmeans_group=1)
    loss, stats = r2o_model(*batch(1), 1, rng())
    loss.backward()
    assert (
        stats["pairs"] == 1
        and loss > 0
        and all(p.grad.isfinite().all() for p in r2o_model.parameters() if p.requires_grad)
    )


def test_the_target_is_the_moving_average_of_the_online_network():
    r2o_model = model()
    before = [p.clone() for p in r2o_model.target.parameters()]
    for p in r2o_model.online.parameters():
        p.data.add_(1.0)
    r2o_model.update_target(0.9)
    for old, new, online in zip(before, r2o_model.target.parameters(), r2o_model.online.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * online)


def test_k_means_groups_are_independent():
    """The masks of 4 images in groups of 2 are those of 2 + 2 images: they depend on no batch size or GPU count."""
    r2o_model = model(kmeans_group=2).eval()
    images, _, regions, _, _ = batch()
    u = r2o.seeding_uniforms(2, 5, rng())
    encoder = r2o_model.target["encoder"]
    together = r2o_model.predict_masks(encoder, images, regions, 5, u)
    apart = [
        r2o_model.predict_masks(encoder, images[i : i + 2], regions[i : i + 2], 5, u[i // 2 : i // 2 + 1])
        for i in (0, 2)
    ]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("assign", ["pixel", "region"])
def test_the_last_group_of_a_batch_may_be_smaller_and_is_clustered_alone(assign):
    """4 images in groups of at most 3: 2 + 2. 3 in groups of at most 2: 2 + 1."""
    r2o_model = model(kmeans_group=3, assign=assign).eval()
    images, views, regions, boxes, flips = batch()
    encoder = r2o_model.target["encoder"]
    for n, most, parts in ((4, 3, (2, 2)), (3, 2, (2, 1)), (4, 32, (4,))):
        assert r2o.kmeans_groups(n, 1, most) == (len(parts), 1)
        u = r2o.seeding_uniforms(len(parts), 5, rng())
        together = r2o_model.predict_masks(encoder, images[:n], regions[:n], 5, u)
        starts = [sum(parts[:i]) for i in range(len(parts))]
        apart = [
            r2o_model.predict_masks(encoder, images[s : s + size], regions[s : s + size], 5, u[i : i + 1])
            for i, (s, size) in enumerate(zip(starts, parts, strict=True))
        ]
        assert torch.equal(together, torch.cat(apart))
    three = views.unflatten(0, (2, 4))[:, :3].flatten(0, 1)
    loss, stats = model(kmeans_group=2)(images[:3], three, regions[:3], boxes[:3], flips[:3], 5, rng())
    loss.backward()
    assert loss.isfinite() and stats["clusters"] <= 5
    m = torch.tensor([[[0, 0]], [[0, 1]], [[1, 1]]])  # groups of two images and of one: 3 of 4 cells, 2 of 2
    found = r2o.mask_stats(m, 5, 2)
    assert found["largest"] == (3 / 4 + 1) / 2 and found["clusters"] == (2 + 1) / 2


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 600), st.integers(1, 16), st.integers(1, 64))
def test_groups_are_as_large_as_allowed(images, world, most):
    """No larger, of whole sets of ranks, none of them empty, and of one size where that is possible."""
    groups, ranks = r2o.kmeans_groups(images, world, most)
    each = -(-images * ranks // groups)
    assert each <= most and world % ranks == 0 and 1 in (groups, ranks)
    assert max(each - groups, 0) < images * ranks - (groups - 1) * each <= each
    if images % most == 0:
        assert (groups, ranks) == (images // most, 1)
    if most % images == 0 and world % (most // images) == 0:
        assert (groups, ranks) == (1, most // images)


@pytest.mark.gpu
@pytest.mark.parametrize("K", [5, 128])
def test_on_a_gpu_the_host_waits_once_per_step_for_the_number_of_pairs(K, monkeypatch):
    """Augmentation, the forward and the backward pass. Random numbers of 128 clusters are more than 64 KB."""
    net = model(kmeans_group=2).cuda()
    images, views, regions, boxes, flips = (x.cuda() for x in batch(B=32))
    factors = torch.stack([torch.tensor(r2o.draw_factors(np.random.default_rng(i), i % 2)) for i in range(64)])
    raw, nonzero = torch.randint(256, (64, 3, 64, 64), dtype=torch.uint8, device="cuda"), torch.Tensor.nonzero
    waits = []

    def counted(x):
        if not x.is_cuda:
            return nonzero(x)
        waits.append(1)
        torch.cuda.set_sync_debug_mode("default")
        found = nonzero(x)
        torch.cuda.set_sync_debug_mode("error")
        return found

    for i in range(2):  # the first makes constants and streams
        if i:
            monkeypatch.setattr(torch.Tensor, "nonzero", counted)
            torch.cuda.set_sync_debug_mode("error")
        try:
            r2o.augment(raw, flips.T.flatten(), factors)
            loss, _ = net(images, views, regions, boxes, flips, K, rng())
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1


@pytest.mark.gpu
def test_masks_are_predicted_on_a_high_priority_stream():
    assert r2o.SideStream.stream(torch.device("cuda")).priority < torch.cuda.current_stream().priority


def test_constants_are_copied_once_per_device(monkeypatch):
    """On a GPU the host would wait for each."""
    x, factor = torch.rand(2, 3, 8, 8), torch.full((2, 1, 1, 1), 0.1)

    def use():
        return r2o.normalize(x), r2o.gray(x), r2o.adjust_hue(x, factor)

    use()
    monkeypatch.setattr(torch, "tensor", None)
    monkeypatch.setattr(torch.Tensor, "new_tensor", None)
    use()


def test_clustering_only_the_batch_s_regions_is_bit_identical(monkeypatch):
    """K-means holds N² products on a GPU: a batch with fewer regions than the data set's maximum pays for its own."""
    seen, losses, pool = [], [], r2o.region_pool
    monkeypatch.setattr(r2o, "region_pool", lambda x, ids, n: seen.append(n) or pool(x, ids, n))
    for count in (None, 20):
        net = model()
        net.num_regions = 60
        losses.append(net(*batch(), 5, rng(), count)[0])
    assert seen == [60, 20] and torch.equal(*losses)

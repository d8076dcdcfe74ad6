"""Masks, Sec. 3.1: the prior, region embeddings, predicted masks, and masks as the views see them."""

import math
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import roi_align

import r2o

fuzz = settings(max_examples=60, deadline=None, derandomize=True)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_slic_follows_the_edges_of_the_image():
    image = np.zeros((120, 90, 3), np.uint8)
    image[:, 40:] = [250, 120, 0]
    regions = r2o.slic_regions(Image.fromarray(image), num_segments=30, size=56)
    assert regions.shape == (56, 56) and regions.dtype == torch.uint8
    assert regions.unique().tolist() == list(range(regions.max() + 1)) and 15 <= regions.max() < 45
    edge = round(40 / 90 * 56)
    left, right = set(regions[:, : edge - 1].unique().tolist()), set(regions[:, edge + 1 :].unique().tolist())
    assert not left & right


def test_slic_accepts_an_image_in_any_form():
    array = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    want = r2o.slic_regions(Image.fromarray(array), size=14)
    for image in (array, array / 255.0, torch.from_numpy(array).permute(2, 0, 1)):
        assert torch.equal(r2o.slic_regions(image, size=14), want)


def test_the_grid_has_14_by_14_square_patches():
    regions = r2o.grid_regions()
    assert regions.shape == (56, 56) and (regions.flatten().bincount() == torch.full((196,), 16)).all()
    assert (regions[:4, :4] == 0).all() and regions[0, 4] == 1 and regions[4, 0] == 14


def test_region_pool_weights_cells_by_the_share_that_a_region_covers():
    """By hand: 2 x 2 cells of 2 x 2 pixels; region 0 covers one cell and a quarter of the next, region 2 is absent."""
    features = torch.tensor([[[[1.0, 2], [4, 8]]]])
    regions = torch.tensor([[[0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]], dtype=torch.uint8)
    p, area = r2o.region_pool(features, regions, 3)
    torch.testing.assert_close(area, torch.tensor([[1.25, 2.75, 0]]))
    torch.testing.assert_close(p[0, :, 0], torch.tensor([(1 + 0.25 * 2) / 1.25, (0.75 * 2 + 4 + 8) / 2.75, 0]))


@fuzz
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 12), st.integers(0, 99)
)
def test_region_pool_equals_pooling_the_upsampled_features_pixel_by_pixel(B, H, W, scale, R, seed):
    features = torch.randn(B, 3, H, W, generator=rng(seed), dtype=torch.float64)
    regions = torch.randint(R, (B, H * scale, W * scale), generator=rng(seed))
    p, area = r2o.region_pool(features, regions, R)
    big = features.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    for b in range(B):
        for r in range(R):
            inside = regions[b] == r
            assert area[b, r] == pytest.approx(inside.sum().item() / scale**2)
            torch.testing.assert_close(p[b, r], big[b, :, inside].mean(1) if inside.any() else torch.zeros(3).double())


def random_views(B, seed):
    corner = torch.rand(B, 2, generator=rng(seed)) * 0.8
    boxes = torch.cat([corner, corner + 0.05 + (0.95 - corner) * torch.rand(B, 2, generator=rng(seed + 1))], 1)
    return boxes, torch.rand(B, generator=rng(seed)) < 0.5


@fuzz
@given(
    st.integers(1, 4),
    st.sampled_from([(14, 14), (56, 56), (9, 20)]),
    st.integers(1, 6),
    st.sampled_from([3, 7]),
    st.integers(0, 999),
)
def test_crop_masks_equals_torchvision_s_roi_align_of_one_hot_masks(B, hw, K, size, seed):
    masks = torch.randint(K, (B, *hw), generator=rng(seed))
    boxes, flips = random_views(B, seed)
    one_hot = torch.nn.functional.one_hot(masks, K).permute(0, 3, 1, 2).float()
    scaled = boxes * torch.tensor([hw[1], hw[0], hw[1], hw[0]])
    want = roi_align(one_hot, list(scaled[:, None]), size, aligned=True)
    want = torch.stack([w.flip(-1) if flip else w for w, flip in zip(want, flips, strict=True)])
    torch.testing.assert_close(r2o.crop_masks(masks, boxes, flips, K, size), want, rtol=1e-4, atol=1e-5)


def test_weights_of_crop_masks_sum_to_1_in_every_cell():
    boxes, flips = random_views(8, 3)
    weights = r2o.crop_masks(torch.randint(5, (8, 14, 14), generator=rng()), boxes, flips, 5, 7)
    torch.testing.assert_close(weights.sum(1), torch.ones(8, 7, 7))


@pytest.mark.parametrize("flip", [False, True])
def test_a_pixel_keeps_its_segment_through_crop_and_flip(flip):
    """An image painted with its own mask, cropped and mirrored as the dataset does, shows the mask of that view."""
    mask = torch.zeros(1, 56, 56, dtype=torch.long)
    mask[0, 10:30, 5:40], mask[0, 35:50, 20:50] = 1, 2
    box = torch.tensor([[0.1, 0.15, 0.8, 0.9]])
    colors = torch.nn.functional.one_hot(mask.repeat_interleave(8, 1).repeat_interleave(8, 2), 3)[0].permute(2, 0, 1)
    left, top, right, bottom = (box[0] * 448).round().int().tolist()
    view = colors[:, top:bottom, left:right].float()
    view = torch.nn.functional.adaptive_avg_pool2d(view.flip(-1) if flip else view, 7)
    weights = r2o.crop_masks(mask, box, torch.tensor([flip]), 3, 7)[0]
    assert (weights - view).abs().mean() < 0.02
    assert (weights - view.flip(-1)).abs().mean() > 0.1  # the other way round would not


def model(**options):
    torch.manual_seed(0)
    return r2o.R2O("tiny", num_regions=16, hidden=8, dim=4, **options).eval()


def scenes(B):
    """Images of two flat colors and 16 square regions; the two sides should become two masks."""
    images = torch.zeros(B, 3, 64, 64)
    images[:, 0, :, :32], images[:, 2, :, 32:] = 1, 1
    regions = r2o.grid_regions(4, 16).expand(B, -1, -1)
    return images, regions


@pytest.mark.parametrize("assign, size", [("pixel", 16), ("region", 16)])
def test_predicted_masks_separate_what_looks_different(assign, size):
    r2o_model = model(assign=assign)
    images, regions = scenes(4)
    m = r2o_model.predict_masks(r2o_model.online["encoder"], images, regions, 2, r2o.seeding_uniforms(1, 2, rng()))
    assert m.shape == (4, size, size)
    left, right = m[:, 4:-4, 2:6], m[:, 4:-4, 10:14]
    assert left.unique().numel() == right.unique().numel() == 1 and left.unique() != right.unique()
    assert torch.equal(m[0], m[3])  # ids are shared inside a group


def test_region_masks_are_unions_of_regions():
    r2o_model = model(assign="region")
    images, regions = torch.rand(2, 3, 64, 64, generator=rng()), torch.randint(16, (2, 32, 32), generator=rng())
    m = r2o_model.predict_masks(r2o_model.online["encoder"], images, regions, 5, r2o.seeding_uniforms(1, 5, rng()))
    for b in range(2):
        for r in range(16):
            assert m[b][regions[b] == r].unique().numel() == 1


def through(r2o_model, c4, regions, k):
    """predict_masks of these features themselves."""
    layers = dict.fromkeys("conv1 bn1 relu maxpool layer1 layer2 layer3".split(), torch.nn.Identity())
    encoder = types.SimpleNamespace(**layers)
    return r2o_model.predict_masks(encoder, c4, regions, k, r2o.seeding_uniforms(1, k, rng()))


def test_autocast_does_not_change_the_masks():
    c4, regions = torch.rand(2, 8, 8, 8, generator=rng()) + 3, r2o.grid_regions(4, 16).expand(2, -1, -1)
    want = through(model(), c4, regions, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(through(model(), c4, regions, 6), want)


def test_kmeans_iters_reaches_k_means():
    c4, regions = torch.rand(2, 8, 8, 8, generator=rng()), r2o.grid_regions(4, 16).expand(2, -1, -1)
    masks = [through(model(kmeans_iters=i), c4, regions, 4) for i in (0, 1, 20)]
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("assign", ["pixel", "region"])
@pytest.mark.parametrize("value", [math.inf, math.nan, 0.0])
def test_a_zero_or_non_finite_cell_does_not_break_the_clustering(assign, value):
    """One such feature cell would otherwise make every center of its group NaN."""
    c4, regions = torch.rand(4, 8, 8, 8, generator=rng()), r2o.grid_regions(4, 16).expand(4, -1, -1)
    want = through(model(assign=assign), torch.cat([c4[:3], c4[2:3]]), regions, 4)
    c4[3, :, 0, 0] = value
    m = through(model(assign=assign), c4, regions, 4)
    assert 0 <= m.min() and m.max() < 4 and all(len(x.unique()) > 1 for x in m)
    assert len(want.unique()) == len(m.unique()) == 4


@pytest.mark.parametrize("assign", ["pixel", "region"])
def test_with_more_clusters_than_regions_each_pixel_has_a_used_cluster(assign):
    r2o_model = model(assign=assign)
    images, regions = scenes(1)
    m = r2o_model.predict_masks(r2o_model.online["encoder"], images, regions, 40, r2o.seeding_uniforms(1, 40, rng()))
    assert 0 <= m.min() and m.max() < 16


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: r2o.region_pool(torch.zeros(1, 2, 4, 4), torch.full((1, 8, 8), 9), 9),
            r"region ids must lie in \[0, 9\)",
        ),
        (lambda: r2o.region_pool(torch.zeros(1, 2, 4, 4), torch.full((1, 8, 8), -1), 9), "region ids must lie"),
        (lambda: r2o.region_pool(torch.zeros(1, 2, 4, 4), torch.zeros(1, 8, 8), 9), "regions must be integer"),
        (lambda: r2o.region_pool(torch.zeros(1, 2, 4, 4), torch.zeros(1, 9, 8).long(), 9), "does not tile"),
        (
            lambda: r2o.region_pool(torch.zeros(2, 2, 4, 4), torch.zeros(1, 8, 8).long(), 9),
            r"regions must be integer of shape \(2",
        ),
        (
            lambda: r2o.region_pool(torch.zeros(1, 2, 4, 4).long(), torch.zeros(1, 8, 8).long(), 9),
            "features must be float",
        ),
        (lambda: r2o.region_pool(torch.zeros(1, 2, 4, 4), torch.zeros(1, 8, 8, device="meta").long(), 9), "on meta"),
        (
            lambda: r2o.crop_masks(torch.full((1, 4, 4), 5), torch.zeros(1, 4), torch.zeros(1).bool(), 5, 7),
            "cluster ids must lie",
        ),
        (
            lambda: r2o.crop_masks(torch.zeros(1, 4, 4).long(), torch.zeros(2, 4), torch.zeros(1).bool(), 5, 7),
            "boxes must be",
        ),
        (
            lambda: r2o.crop_masks(torch.zeros(1, 4, 4).long(), torch.zeros(1, 4), torch.zeros(2), 5, 7),
            "flips must be bool",
        ),
        (lambda: r2o.R2O("tiny", assign="both"), "choose one of pixel, region"),
        (lambda: r2o.predict_masks(None, None, 2, None, assign="both"), "choose one of pixel, region"),
        (lambda: r2o.R2O("resnet51"), "no encoder 'resnet51'"),
    ],
)
def test_invalid_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

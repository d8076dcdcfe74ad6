"""Data: reading, region maps, crops and flips, and the color changes of A.1."""

import numpy as np
import pytest
import torch
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

import r2o
from evals.scenes import shape_of
from runtime.images import list_images, read_image
from runtime.loader import ImageRegions, step_seed
from runtime.regions import region_maps

fuzz = settings(max_examples=25, deadline=None, derandomize=True)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- color changes: each equals torchvision's, given the same factor ------------------------------------------------


def images(n=6, seed=0):
    x = torch.rand(n, 3, 32, 32, generator=rng(seed))
    x[0] = x[0].mean(0)  # gray: hue undefined
    x[1, :, :16], x[1, :, 16:] = 0, 1
    return x


@pytest.mark.parametrize(
    "ours, theirs, low, high",
    [
        (r2o.adjust_brightness, TF.adjust_brightness, 0.6, 1.4),
        (r2o.adjust_contrast, TF.adjust_contrast, 0.6, 1.4),
        (r2o.adjust_saturation, TF.adjust_saturation, 0.8, 1.2),
        (r2o.adjust_hue, TF.adjust_hue, -0.5, 0.5),
    ],
)
def test_each_color_jitter_equals_torchvision_s_with_one_factor_per_image(ours, theirs, low, high):
    x, factors = images(), torch.linspace(low, high, 6)
    want = torch.stack([theirs(x[i], factors[i].item()) for i in range(6)])
    torch.testing.assert_close(ours(x, factors.view(-1, 1, 1, 1)), want, atol=1e-5, rtol=0)


def test_gray_equals_torchvision_s():
    torch.testing.assert_close(r2o.gray(images()), TF.rgb_to_grayscale(images()))


def test_blur_equals_torchvision_s_with_one_sigma_per_image():
    x, sigma = torch.rand(4, 3, 224, 224, generator=rng()), torch.tensor([0.1, 0.7, 1.3, 2.0])
    want = torch.stack([TF.gaussian_blur(x[i], [23, 23], [sigma[i].item()]) for i in range(4)])
    torch.testing.assert_close(r2o.gaussian_blur(x, sigma.view(-1, 1, 1, 1)), want, atol=1e-5, rtol=0)


def by_torchvision(view, f):
    """What one row of factors means, an image at a time."""
    x = view.float() / 255
    jitters = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
    for j in f[:4].int().tolist():
        x = jitters[j](x, f[4 + j].item()) if j >= 0 else x
    x = TF.rgb_to_grayscale(x, 3) if f[8] else x
    if f[9]:
        taps = 2 * ((x.shape[-1] // 10) // 2) + 1
        x = TF.gaussian_blur(x, [taps, taps], [f[9].item() * x.shape[-1] / 224])
    x = TF.solarize(x, 0.5) if f[10] else x
    return TF.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@fuzz
@given(st.integers(0, 10**6))
def test_augmenting_a_batch_equals_augmenting_its_images_one_by_one(seed):
    views = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=rng(seed))
    factors = torch.tensor([r2o.draw_factors(np.random.default_rng([seed, i]), i % 2) for i in range(8)])
    flips = torch.arange(8) % 3 == 0
    got = r2o.augment(views, flips, factors)
    mirrored = torch.stack([v.flip(-1) if flip else v for v, flip in zip(views, flips, strict=True)])
    want = torch.stack([by_torchvision(v, f) for v, f in zip(mirrored, factors, strict=True)])
    off = (got - want).abs().amax(1) > 1e-4
    assert off.float().mean() < 2e-3  # rounding may take single pixels across solarization's threshold


def test_factors_have_the_probabilities_and_ranges_of_a1():
    draw = np.random.default_rng(0)
    first, second = (torch.tensor([r2o.draw_factors(draw, v) for _ in range(2000)]) for v in (0, 1))
    for f, blur, solarize in ((first, 1.0, 0.0), (second, 0.1, 0.2)):
        assert (f[:, 0] >= 0).float().mean() == pytest.approx(0.8, abs=0.03)
        assert f[:, 8].mean() == pytest.approx(0.2, abs=0.03)
        assert (f[:, 9] > 0).float().mean() == pytest.approx(blur, abs=0.03)
        assert f[:, 10].mean() == pytest.approx(solarize, abs=0.03)
        for column, low, high in ((4, 0.6, 1.4), (5, 0.6, 1.4), (6, 0.8, 1.2), (7, -0.1, 0.1)):
            assert low <= f[:, column].min() < low + 0.02 and high - 0.02 < f[:, column].max() <= high
        jittered = f[f[:, 0] >= 0][:, :4]
        assert (jittered.sort(1).values == torch.arange(4.0)).all() and len(jittered.unique(dim=0)) == 24
    assert 0.1 <= first[:, 9].min() < 0.15 and 1.95 < first[:, 9].max() <= 2.0


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(photos, tmp_path_factory):
    images = list_images(photos)
    maps, header = region_maps(images, tmp_path_factory.mktemp("maps") / "regions.npy", size=16, num_segments=20)
    return ImageRegions(images, maps, header, size=64)


def test_a_view_is_the_crop_that_its_box_names_before_mirroring(data):
    """Cropping the image by the box gives the view, mirrored later, on the device."""
    for i in range(8):
        sample = data[0, i]
        image = read_image(data.images.path(i))
        h, w = image.shape[1:]
        for v in range(2):
            left, top, right, bottom = (sample["boxes"][v] * torch.tensor([w, h, w, h])).round().int().tolist()
            view = r2o.resize(image[:, top:bottom, left:right], 64)
            assert torch.equal(sample["views"][v], view.permute(1, 2, 0))
        assert torch.equal(sample["image"], r2o.resize(image, 64).permute(1, 2, 0))
        assert np.array_equal(sample["regions"], data.maps[i])
    assert {name: (x.dtype, tuple(x.shape)) for name, x in sample.items()} == {
        "image": (torch.uint8, (64, 64, 3)),
        "views": (torch.uint8, (2, 64, 64, 3)),
        "regions": (torch.uint8, (16, 16)),
        "boxes": (torch.float32, (2, 4)),
        "flips": (torch.bool, (2,)),
        "factors": (torch.float32, (2, 11)),
        "unreadable": (torch.bool, ()),
        "num_regions": (torch.int64, ()),
    }


def test_crops_and_flips_have_byol_s_distribution(data):
    """Flips with p = 0.5, each view on its own (the authors' code mirrors always); 8 to 100 % of the area."""
    samples = [data[epoch, i] for epoch in range(20) for i in range(len(data))]
    flips = torch.stack([s["flips"] for s in samples]).float()
    assert flips.mean(0) == pytest.approx([0.5, 0.5], abs=0.08)
    assert (flips[:, 0] != flips[:, 1]).float().mean() == pytest.approx(0.5, abs=0.08)
    left, top, right, bottom = torch.stack([s["boxes"] for s in samples]).flatten(0, 1).unbind(1)
    area, ratio = (right - left) * (bottom - top), (right - left) / (bottom - top) * 80 / 64
    assert (
        0.07 < area.min() < 0.15 and area.max() > 0.8 and (area > 0.54).float().mean() == pytest.approx(0.45, abs=0.12)
    )
    assert ratio.min() > 0.7 and ratio.max() < 1.4


@pytest.mark.parametrize("h, w", [(375, 500), (500, 333), (20, 300), (300, 20), (1, 1), (3, 900)])
def test_crops_have_the_distribution_of_random_resized_crop(h, w):
    """Area, proportions and position; of images too long or too flat for any, the same middle."""
    draw = np.random.default_rng(0)
    torch.manual_seed(0)
    image = torch.empty(3, h, w)
    ours = torch.tensor([r2o.draw_crop(draw, h, w) for _ in range(4000)]).float()
    crops = (RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000))
    theirs = torch.tensor(list(crops)).float()
    top, left, ch, cw = ours.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + ch <= h).all() and (left + cw <= w).all()
    for a, b in ((ours, theirs), (ours[:, 2:].log(), theirs[:, 2:].log())):
        for q in (0.02, 0.25, 0.5, 0.75, 0.98):
            spread = (theirs.quantile(0.9, 0) - theirs.quantile(0.1, 0)) if a is ours else b.std(0)
            assert ((a.quantile(q, 0) - b.quantile(q, 0)).abs() <= 0.08 * spread + 1.01 * (a is ours)).all()
    assert torch.equal(ours.amin(0), theirs.amin(0)) or len(ours.unique(dim=0)) > 1  # the middle, where it is all


def test_a_sample_depends_on_seed_epoch_and_index_alone(data):
    one, same, other_epoch = data[3, 5], data[3, 5], data[4, 5]
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["boxes"], other_epoch["boxes"]) and not torch.equal(one["boxes"], data[3, 6]["boxes"])
    loader = torch.utils.data.DataLoader(data, batch_sampler=[[(3, 5), (3, 6)]], num_workers=2)
    assert torch.equal(next(iter(loader))["views"][0], one["views"])


def test_every_seed_step_and_rank_draws_other_numbers():
    """PyTorch's CPU generator ignores all but 32 bits of a seed."""
    seeds = [step_seed(*numbers) for numbers in ((0, 5), (1, 5), (2**31 - 1, 5), (0, 6), (0, 5, 1))]
    drawn = {torch.rand((), generator=torch.Generator().manual_seed(seed)).item() for seed in seeds}
    assert len(drawn) == len(seeds)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, convert",
    [
        ("gray.jpg", lambda im, path: im.convert("L").save(path)),
        ("cmyk.jpg", lambda im, path: im.convert("CMYK").save(path)),
        ("palette.png", lambda im, path: im.convert("P").save(path)),
        ("alpha.png", lambda im, path: im.convert("RGBA").save(path)),
        ("gif.jpg", lambda im, path: im.save(path, "GIF")),
        ("bitmap.bmp", lambda im, path: im.save(path)),
        ("tagged.tif", lambda im, path: im.save(path)),
        ("deep.png", lambda im, path: Image.fromarray(np.array(im.convert("L")).astype(np.uint16) * 257).save(path)),
    ],
)
def test_every_image_format_is_read_as_rgb(tmp_path, name, convert):
    im = picture(0)
    convert(im, tmp_path / name)
    image = read_image(tmp_path / name)
    want = torch.from_numpy(np.array(im.convert("L" if name[0] in "gd" and "if" not in name else "RGB")).copy()).float()
    assert image.shape == (3, 64, 80) and image.dtype == torch.uint8
    assert (image.float().mean() - want.mean()).abs() < 2


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.webp", "turned.tif"])
def test_exif_orientation_is_applied(tmp_path, name):
    im, exif = picture(0), Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    im.save(tmp_path / name, exif=exif)
    assert read_image(tmp_path / name).shape == (3, 80, 64)
    assert shape_of(tmp_path / name) == (80, 64)


def test_an_image_of_one_pixel_gives_a_sample(tmp_path):
    for i in range(2):
        Image.new("RGB", (1, 1), (i, 2, 3)).save(tmp_path / f"{i}.png")
    images = list_images(tmp_path)
    maps, header = region_maps(images, tmp_path / "regions.npy", size=16)
    sample = ImageRegions(images, maps, header, size=64)[0, 1]
    assert (sample["views"][0] == torch.tensor([1, 2, 3])).all()
    assert sample["num_regions"] == sample["regions"].max() + 1


def test_the_two_views_have_their_own_blur_and_solarization(data):
    """The first view is always blurred and never solarized, the second seldom blurred. A.1."""
    factors = torch.stack([data[epoch, i]["factors"] for epoch in range(4) for i in range(len(data))])  # (n, 2, 11)
    assert (factors[:, 0, 9] > 0).all() and (factors[:, 0, 10] == 0).all()
    assert (factors[:, 1, 9] > 0).float().mean() < 0.3 and (factors[:, 1, 10] > 0).any()


def test_downscaling_is_antialiased():
    """antialias: a fine checkerboard becomes gray, not one of its colors."""
    board = (torch.arange(256)[:, None] + torch.arange(256)) % 2 * 255
    small = r2o.resize(board.to(torch.uint8).expand(3, -1, -1), 32)
    assert (small.float() - 127.5).abs().max() < 4

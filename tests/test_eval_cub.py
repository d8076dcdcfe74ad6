"""eval_cub.py, Table 3: protocol, checkpoints, splits, and bad input."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import picture, refused_by
from PIL import Image
from torchvision.models import resnet18, resnet101

import eval_cub
import r2o
from evals import common, measures, truth
from runtime.weights import load_encoder

refused = refused_by(eval_cub)


def test_the_metrics_by_hand():
    """Segment 1 covers the foreground's 4 pixels and 2 more of 12; segment 2 covers one of them."""
    truth = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]).bool()
    segments = torch.tensor([[1, 1, 1, 2], [1, 1, 0, 0], [0, 0, 0, 0]])
    best, score = measures.match_foreground(segments, 5, truth)
    assert best == 1
    assert score["foreground IoU"] == pytest.approx(3 / 6)
    assert score["mean IoU"] == pytest.approx((3 / 6 + 6 / 9) / 2)
    assert score["pixel accuracy"] == pytest.approx(9 / 12)


def test_an_image_of_foreground_alone_can_be_perfect():
    segments = torch.zeros(2, 2, dtype=torch.long)
    assert measures.match_foreground(segments, 1, segments == 0)[1]["mean IoU"] == 1


def test_void_pixels_are_ignored():
    truth, void = torch.tensor([[1, 1, 0, 0, 0, 0]]).bool(), torch.tensor([[0, 0, 1, 0, 0, 0]]).bool()
    segments = torch.tensor([[1, 1, 1, 0, 0, 0]])
    assert measures.match_foreground(segments, 2, truth, void)[1]["foreground IoU"] == 1
    assert measures.match_foreground(segments, 2, truth)[1]["foreground IoU"] == pytest.approx(2 / 3)


def test_segments_follow_the_features():
    """An encoder that passes colors through: K = 2 on a two-colored image gives its two halves."""

    class Colors(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = self.bn1 = self.relu = self.maxpool = self.layer1 = self.layer2 = torch.nn.Identity()
            self.layer3, self.layer4 = torch.nn.AvgPool2d(4), torch.nn.AvgPool2d(2)

    images = torch.zeros(3, 3, 32, 32)
    images[:, 0, :, :20], images[:, 2, :, 20:] = 1, 1
    for layer, side in (("c4", 8), ("c5", 4)):
        scores = measures.segment_images(Colors(), images, 2, layer, torch.Generator().manual_seed(0))
        assert scores.shape == (3, 2, side, side)
    segments = measures.segment_images(Colors(), images, 2, "c4", torch.Generator().manual_seed(0)).argmax(1)
    assert (segments[:, :, :5] == segments[:, :1, :1]).all() and (segments[:, :, 5:] != segments[:, :1, :1]).all()


def test_interpolated_scores_are_the_scores_of_interpolated_features():
    x, centers = torch.randn(1, 16, 8), torch.randn(1, 5, 8)
    up = torch.nn.Upsample(scale_factor=3, mode="bilinear")
    scores = up(r2o.cluster_scores(x, centers).mT.unflatten(2, (4, 4)))
    features = up(x.mT.unflatten(2, (4, 4))).flatten(2).mT
    torch.testing.assert_close(scores.flatten(2).mT, r2o.cluster_scores(features, centers))


@pytest.fixture(scope="module")
def cub(tmp_path_factory):
    """12 images in CUB's layout, every other one in the test set; the foreground is the ellipse."""
    root = tmp_path_factory.mktemp("data") / "CUB_200_2011"
    names = [f"001.bird/{i:02}.jpg" for i in range(12)]
    for name in ("images", "segmentations"):
        (root / name / "001.bird").mkdir(parents=True)
    for i, name in enumerate(names):
        im = picture(i)
        im.save(root / "images" / name)
        mask = np.abs(np.asarray(im).astype(int) - np.asarray(im)[:1, :1]).sum(2) > 90
        Image.fromarray((mask * 255).astype(np.uint8)).save((root / "segmentations" / name).with_suffix(".png"))
    (root / "images.txt").write_text("".join(f"{i + 1} {name}\n" for i, name in enumerate(names)))
    (root / "train_test_split.txt").write_text("".join(f"{i + 1} {i % 2}\n" for i in range(12)))
    return root


def evaluate(tmp_path, *flags):
    json_file = tmp_path / "out.json"
    eval_cub.main([str(f) for f in (*flags, "--json", json_file, "--size", 64)])
    return json.loads(json_file.read_text())


def test_a_run_prints_and_writes_metrics_and_protocol(cub, tmp_path, capsys):
    png = tmp_path / "vis.png"
    result = evaluate(tmp_path, "--ckpt", "random", "--arch", "tiny", "--data", cub, "--vis", png)
    printed = capsys.readouterr().out
    assert result["n"] == 6 and result["split"] == "test" and result["layer"] == "c4" and result["size"] == 64
    assert 0.2 < result["foreground IoU"] < 1 and 0.2 < result["mean IoU"] < 1 and 0.3 < result["pixel accuracy"] < 1
    assert f"foreground IoU  {result['foreground IoU']:.3f}" in printed and "n = 6" in printed
    assert (
        "chosen by the truth" in printed and "| paper: none for this data |" in printed and "CUB's own" not in printed
    )
    picture_of = Image.open(png)
    assert picture_of.width == 4 * 132 - 4 and picture_of.height == 16 + 6 * 132 - 4


def test_results_do_not_overwrite_earlier_ones(pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", "random", "--arch", "tiny", "--data", pairs / "images", pairs / "masks", "--size", 64]
    for k in (5, 4, 3):
        eval_cub.main([str(f) for f in (*flags, "-k", k)])
    names = ["eval_cub.json", "eval_cub-2.json", "eval_cub-3.json"]
    assert [json.loads((tmp_path / name).read_text())["K"] for name in names] == [5, 4, 3]
    assert "results: eval_cub-3.json" in capsys.readouterr().out


def test_the_same_run_twice_gives_the_same_figures(cub, tmp_path):
    flags = ["--ckpt", "random", "--arch", "tiny", "--data", cub]
    assert evaluate(tmp_path, *flags) == evaluate(tmp_path, *flags)


def test_splits_may_be_a_file_of_ids_or_redo_s(cub, tmp_path):
    (tmp_path / "ids.txt").write_text("1\n3\n4\n")
    (tmp_path / "redo.txt").write_text("".join(f"{i + 1} {i % 3}\n" for i in range(12)))
    names = [[image.name for image, _ in truth.list_cub(cub, str(tmp_path / f))] for f in ("ids.txt", "redo.txt")]
    assert names == [["00.jpg", "02.jpg", "03.jpg"], ["02.jpg", "05.jpg", "08.jpg", "11.jpg"]]
    assert [image.name for image, _ in truth.list_cub(cub, "test")] == [f"{i:02}.jpg" for i in range(0, 12, 2)]


def trimaps(pairs, folder, values=(1, 2, 3)):
    """The ellipses as trimaps: 1 object, 2 ground, 3 a border between them, as Oxford-IIIT Pet's."""
    folder.mkdir()
    for path in (pairs / "masks").iterdir():
        inside = np.array(Image.open(path)) > 127
        border = inside ^ (np.roll(inside, 2, 1) & np.roll(inside, -2, 1))
        Image.fromarray(np.select([border, inside], [values[2], values[0]], values[1]).astype(np.uint8)).save(
            folder / path.name
        )
    return folder


def test_trimaps_are_refused_until_object_and_border_are_named(pairs, tmp_path, refused):
    """All of a trimap would be foreground: exit status 0, and figures that mean nothing."""
    masks = trimaps(pairs, tmp_path / "trimaps")
    flags = ["--ckpt", "random", "--arch", "tiny", "--data", pairs / "images"]
    line = refused(*flags, masks)
    assert "only 0 of 12 masks have background (0); they hold the ids 1, 2, 3: say which are objects with" in line
    plain, named = evaluate(tmp_path, *flags, pairs / "masks"), [*flags, masks, "--foreground", 1, "--void", 3]
    found = evaluate(tmp_path, *named)
    assert found["n"] == 12 and found["foreground IoU"] == pytest.approx(plain["foreground IoU"], abs=0.08)
    ground = evaluate(tmp_path, *flags, masks, "--foreground", 2, "--void", 3)
    assert ground["foreground IoU"] != pytest.approx(found["foreground IoU"], abs=0.02)
    assert "leave --foreground and --void out" in refused(*named, "--masks", "binary")
    assert "--void must be at least 0" in refused(*flags, masks, "--void", -1)
    assert "they hold the ids 1, 2, 3" in refused(*flags, masks, "--foreground", 3, 2, 1)
    assert "both name 3: name an id once" in refused(*flags, masks, "--foreground", 1, 3, "--void", 3)
    others = trimaps(pairs, tmp_path / "others", (10, 20, 30))
    assert "they hold the ids 10, 20, 30" in refused(*flags, others, "--foreground", 10, 20, 30)


def test_ids_of_objects_and_void_are_those_that_the_flags_name(tmp_path):
    values = np.array([[0, 1, 2], [7, 30, 255]], np.uint8)
    Image.fromarray(values).save(tmp_path / "gray.png")
    palette = Image.fromarray(values, "P")
    palette.putpalette([i * 7 % 256 for i in range(768)])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(np.stack([values] * 3, 2)).save(tmp_path / "rgb.png")
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "sixteen.png")
    Image.fromarray(np.dstack([values] * 3 + [np.full_like(values, 255)])).save(tmp_path / "alpha.png")
    for name in ("gray", "palette", "rgb", "sixteen", "alpha"):
        path = tmp_path / f"{name}.png"
        read = truth.read_ids(path, "ids", foreground=[7, 0], void=[2])
        assert read.tolist() == [[2, 0, -1], [1, 0, 0]], name
        white = 0 if name == "sixteen" else -1  # 16 bits have no void of their own
        assert truth.read_ids(path, "ids", foreground=[7]).tolist() == [[0, 0, 0], [1, 0, white]]
        assert truth.read_ids(path, "ids", foreground=[255]).tolist() == [[0, 0, 0], [0, 0, 1]]
        assert truth.read_ids(path, "ids", void=[1, 30]).tolist() == [[0, -1, 2], [7, -1, 255]]
    Image.fromarray(values == 7).save(tmp_path / "one.png")
    assert truth.read_ids(tmp_path / "one.png", foreground=[1]).tolist() == [[0, 0, 0], [1, 0, 0]]
    colors = np.zeros((2, 3, 3), np.uint8)
    colors[0, 0, :2], colors[0, 1, :2], colors[1, 1] = (232, 3), (5, 0), (255, 0, 0)  # 1000, void; 5; 255, a class
    Image.fromarray(colors).save(tmp_path / "s.png")
    assert truth.read_ids(tmp_path / "s.png", foreground=[5, 255]).tolist() == [[-1, 1, 0], [0, 2, 0]]


def test_masks_of_another_shape_than_the_image_are_refused(pairs, tmp_path, refused):
    shutil.copytree(pairs / "masks", tmp_path / "masks")
    mask = Image.open(tmp_path / "masks/05.png")
    mask.rotate(90, expand=True).save(tmp_path / "masks/05.png")
    line = refused("--ckpt", "random", "--arch", "tiny", "--data", pairs / "images", tmp_path / "masks")
    assert "05.png is 64 x 80 pixels, the image 80 x 64: expected one shape" in line
    mask.resize((160, 128), 0).save(tmp_path / "masks/05.png")  # the same at twice the size is fine
    flags = ["--ckpt", "random", "--arch", "tiny", "--data", pairs / "images", tmp_path / "masks"]
    assert evaluate(tmp_path, *flags)["n"] == 12


def test_the_paper_s_figure_is_printed_for_cub_only(cub, tmp_path, capsys):
    """CUB has 11,788 images; other data may be laid out like it."""
    whole = tmp_path / "whole"
    shutil.copytree(cub, whole)
    more = "".join(f"{i + 1} x/{i}.jpg\n" for i in range(12, 11_788))
    (whole / "images.txt").write_text((cub / "images.txt").read_text() + more)
    flags = ["--ckpt", "random", "--arch", "tiny", "--kmeans-seeds", 1]
    evaluate(tmp_path, *flags, "--data", whole)
    printed = capsys.readouterr().out
    assert "| paper: mIoU 0.716 (Table 3" in printed and "CUB's own test images; Table 3 uses ReDO's 1,000" in printed
    evaluate(tmp_path, *flags, "--data", whole / "images", whole / "segmentations")
    assert "| paper: none for this data |" in capsys.readouterr().out


def test_random_weights_are_those_that_training_with_this_seed_starts_from(refused, pairs):
    for ckpt, seed in (("random", 0), ("random:3", 3)):
        torch.manual_seed(seed)
        start = r2o.R2O("tiny", hidden=16, dim=8).online["encoder"].state_dict()
        found = load_encoder(ckpt, "tiny")[0].state_dict()
        assert all(torch.equal(found[name], x) for name, x in start.items())
    assert load_encoder("random:3", "tiny")[1] == "tiny, randomly initialized (seed 3)"
    for ckpt in ("random:x", f"random:{2**31}", "random:"):
        said = refused("--ckpt", ckpt, "--data", pairs / "images", pairs / "masks")
        assert f"--ckpt {ckpt}: expected random, or random:1 for another seed" in said


def test_the_spread_over_starts_of_k_means_is_printed(pairs, tmp_path, capsys):
    flags = ["--ckpt", "random", "--arch", "tiny", "--data", pairs / "images", pairs / "masks"]
    one, three = (evaluate(tmp_path, *flags, *more) for more in (["--kmeans-seeds", 1], []))
    printed = capsys.readouterr().out
    assert one["standard deviations"] == {} and three["K-means seeds"] == 3 and "± " in printed
    encoder, _ = load_encoder("random", "tiny")
    files, _ = truth.open_masks(eval_cub.parse_args([str(f) for f in flags]))
    squares = common.square_batches([image for image, _ in files], 64)
    common.calibrate(encoder, squares)
    found = [row[4] for row in common.segmented(encoder, files, 5, "c4", 64, "cpu", seeds=3)]
    means = [np.mean([metrics[seed]["foreground IoU"] for metrics in found]) for seed in range(3)]
    assert one["foreground IoU"] == pytest.approx(means[0]) and three["foreground IoU"] == pytest.approx(np.mean(means))
    sd = three["standard deviations"]["foreground IoU"]
    assert sd == pytest.approx(np.std(means, ddof=1)) and sd > 1e-4
    assert f"foreground IoU  {np.mean(means):.3f} ± {sd:.3f}" in printed


def test_any_pair_of_folders_of_images_and_masks_will_do(cub, tmp_path):
    result = evaluate(tmp_path, "--ckpt", "random", "--arch", "tiny", "--data", cub / "images", cub / "segmentations")
    assert result["n"] == 12 and result["split"] == "all"


def foreground(path):
    return truth.read_ids(path) > 0


def test_masks_may_be_levels_ids_or_palettes(tmp_path):
    levels = np.array([[0, 51, 127], [128, 204, 255]], np.uint8)
    Image.fromarray(levels).save(tmp_path / "levels.png")
    Image.fromarray(np.array([[0, 1, 2]], np.uint8)).save(tmp_path / "ids.png")
    palette = Image.fromarray(np.array([[0, 7, 255]], np.uint8), "P")
    palette.putpalette([255 - i // 3 for i in range(768)])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(np.array([[0, 3, 255]], np.uint8)).save(tmp_path / "void.png")
    assert foreground(tmp_path / "void.png").tolist() == [[False, True, False]]
    assert foreground(tmp_path / "levels.png").tolist() == [[False] * 3, [True] * 3]
    assert foreground(tmp_path / "ids.png").tolist() == [[False, True, True]]
    assert foreground(tmp_path / "palette.png").tolist() == [[False, True, False]]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_every_checkpoint_format_gives_the_same_encoder(tmp_path):
    torch.manual_seed(1)
    net = resnet18()
    model = r2o.R2O("resnet18", hidden=8, dim=4)
    weights = {name: x for name, x in net.state_dict().items() if not name.startswith("fc.")}
    model.online["encoder"].load_state_dict(weights)
    files = {
        "r2o": {"arch": "resnet18", "state_dict": weights},
        "last": {"model": model.state_dict(), "args": {"arch": "resnet18"}, "epoch": 3},
        "torchvision": net.state_dict(),
        "parallel": {"state_dict": {f"module.{name}": x for name, x in net.state_dict().items()}},
    }
    for name, file in files.items():
        torch.save(file, tmp_path / name)
        loaded, line = load_encoder(str(tmp_path / name))
        assert all(torch.equal(x, weights[n]) for n, x in loaded.state_dict().items()) and not loaded.training
        assert "resnet18" in line and "120 of 120 tensors matched" in line


def test_checkpoints_that_do_not_fit_are_refused(cub, tmp_path, refused):
    def said(file, *flags):
        torch.save(file, tmp_path / "ckpt.pth")
        return refused("--ckpt", tmp_path / "ckpt.pth", "--data", cub, *flags)

    half = dict(list(resnet18().state_dict().items())[:50])
    assert "50 of 120 tensors of resnet18 matched, 70 do not fit, such as layer" in said(half, "--arch", "resnet18")
    flags = "--arch", "resnet50"
    assert "of 318 tensors of resnet50" in said(resnet18().state_dict(), *flags)
    assert "of 318 tensors of resnet50" in said(
        resnet101().state_dict(), *flags
    )  # would fit, with half of it left over
    for strange in ({"model": torch.zeros(1)}, {"state_dict": [1]}, {"args": None}, {1: 2}):
        assert " 0 of" in said(strange)
    assert "holds a resnet18, not a resnet50" in said({"arch": "resnet18", "state_dict": half}, "--arch", "resnet50")
    assert " 0 of" in said([1, 2, 3])
    assert "not a checkpoint that can be loaded safely" in said(picture)
    diverged = {name: x * float("nan") if x.is_floating_point() else x for name, x in resnet18().state_dict().items()}
    assert (
        "the weights in " in (line := said(diverged)) and "are not finite: they come from a run that diverged" in line
    )
    (tmp_path / "ckpt.pth").write_bytes(b"not a checkpoint")
    assert "not a checkpoint" in refused("--ckpt", tmp_path / "ckpt.pth", "--data", cub)
    assert "no such checkpoint: nowhere.pth" in refused("--ckpt", "nowhere.pth", "--data", cub)


def test_data_that_does_not_fit_is_refused(cub, tmp_path, refused):
    def said(*data, **flags):
        return refused("--ckpt", "random", "--arch", "tiny", "--size", 64, "--data", *data, *flags.get("more", []))

    broken = tmp_path / "CUB_200_2011"
    shutil.copytree(cub, broken)
    shutil.rmtree(broken / "segmentations")
    assert "no segmentations" in (line := said(broken)) and "segmentations.tgz" in line
    (broken / "images.txt").unlink()
    assert "no images.txt" in said(broken)
    assert "no such folder" in said(tmp_path / "nowhere")
    assert "-k must be at least 1" in said(cub, more=["-k", 0])
    assert "cannot write" in said(cub, more=["--vis", tmp_path / "nowhere/vis.png"])
    assert "two outputs" in said(cub, more=["--json", tmp_path / "a", "--vis", tmp_path / "b/../a"])
    assert "one folder or two" in said(cub, cub, cub)
    assert "no such split" in said(cub, more=["--split", tmp_path / "nowhere.txt"])
    (tmp_path / "ids.txt").write_text("1\n99\n")
    assert "names 1 ids, of 2, that images.txt does not list" in said(cub, more=["--split", tmp_path / "ids.txt"])
    two = cub / "images", cub / "segmentations"
    assert "--split is for CUB_200_2011" in said(*two, more=["--split", tmp_path / "ids.txt"])
    (tmp_path / "empty").mkdir()
    assert "no images in" in said(cub / "images", tmp_path / "empty")
    shutil.copytree(cub / "segmentations", tmp_path / "masks")
    (tmp_path / "masks/001.bird/03.png").unlink()
    assert "1 of 12 images have no mask" in said(cub / "images", tmp_path / "masks")
    (tmp_path / "masks/001.bird/03.png").write_text("hello")
    assert "cannot read" in said(cub / "images", tmp_path / "masks")


def test_masks_may_have_a_suffix_in_their_names(pairs, tmp_path, refused):
    """X.png and X_mask.png, in one folder or in two."""
    for name in ("together", "images", "masks"):
        (tmp_path / name).mkdir()
    for path in (pairs / "images").iterdir():
        shutil.copy(path, tmp_path / "images")
        shutil.copy(path, tmp_path / "together")
        for folder in ("masks", "together"):
            shutil.copy(pairs / "masks" / path.name, tmp_path / folder / f"{path.stem}_mask.png")
    start = ["--ckpt", "random", "--arch", "tiny", "--size", 64]
    plain = truth.list_pairs(pairs / "images", pairs / "masks")
    for folders in (("together", "together"), ("images", "masks")):
        found = truth.list_pairs(*(tmp_path / f for f in folders), "_mask")
        assert [(i.name, m.name) for i, m in found] == [(i.name, f"{i.stem}_mask.png") for i, _ in plain]
    flags = [*start, "--kmeans-seeds", 1, "--json"]
    both = []
    for i, data in enumerate(([pairs / "images", pairs / "masks"], [tmp_path / "together"] * 2)):
        more = ["--mask-suffix", "_mask"] if i else []
        eval_cub.main([str(f) for f in (*flags, tmp_path / f"{i}.json", "--data", *data, *more)])
        both.append(json.loads((tmp_path / f"{i}.json").read_text())["foreground IoU"])
    assert both[0] == both[1]
    for i, folder in ((0, "images"), (1, "masks")):  # a photograph whose own name ends in it
        shutil.copy(
            pairs / ("images", "masks")[i] / "00.png", tmp_path / folder / ("gas_mask.png", "gas_mask_mask.png")[i]
        )
    assert len(truth.list_pairs(tmp_path / "images", tmp_path / "masks", "_mask")) == 13
    line = refused(*start, "--data", tmp_path / "masks", tmp_path / "masks", "--mask-suffix", "_mask")
    assert "no names in" in line and "do not end in _mask before the dot" in line
    assert "masks named like X_mask.png need --mask-suffix" in refused(
        *start, "--data", tmp_path / "images", tmp_path / "masks"
    )
    line = refused(*start, "--data", tmp_path / "images", tmp_path / "masks", "--mask-suffix", "_gt")
    assert "no names in" in line and "end in _gt before the dot: correct --mask-suffix" in line

"""evals/segment.py and evals/detect.py, Tables 1, 2, 5, 6: networks, data, measures, runs and resumption, bad input."""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load, picture, refused_by, same
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors

import r2o
from evals import coco as coco_json
from evals import detect, finetune, measures, scenes, segment, vitdet
from runtime import distributed, pictures

refused_segment, refused_detect = refused_by(segment), refused_by(detect)


# ---- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, width", [("resnet18", 512), ("resnet50", 2048)])
def test_the_fcn_follows_a_2(arch, width, monkeypatch):
    """conv5: 3 x 3 with dilation 2, stride 1; two 3 x 3 of 256 with dilation 6, batch norm, ReLU; dropout; 1 x 1."""
    fcn = segment.FCN(r2o.build_encoder(arch), 21).eval()
    convs = [m for m in fcn.encoder.layer4.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(m.stride == (1, 1) for m in convs)
    assert {m.dilation for m in convs if m.kernel_size == (3, 3)} == {(2, 2)}
    kinds = [type(m).__name__ for m in fcn.head]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU"] * 2 + ["Conv2d"] and not fcn.head[6].bias.any()
    wide = [fcn.head[i] for i in (0, 3)]
    assert [(m.in_channels, m.out_channels) for m in wide] == [(width, 256), (256, 256)]
    assert all(m.kernel_size == (3, 3) and m.dilation == (6, 6) for m in wide) and fcn.head[6].kernel_size == (1, 1)
    with torch.no_grad():
        assert r2o.encode(fcn.encoder, torch.zeros(1, 3, 64, 96)).shape == (1, width, 4, 6)
        assert fcn(torch.zeros(1, 3, 65, 50)).shape == (1, 21, 65, 50)
        dropped = []
        monkeypatch.setattr(torch.nn.functional, "dropout2d", lambda x, p, training: dropped.append((p, training)) or x)
        fcn.train()(torch.zeros(2, 3, 65, 50))
        assert dropped == [(0.1, True)]


def test_cells_of_cityscapes_crops_stay_where_the_strides_put_them():
    """Cell i of 769 = 48 x 16 + 1 pixels is centered at pixel 16 i; the authors' VOC configuration does not align."""
    assert scenes.CITYSCAPES.align_corners and not scenes.VOC.align_corners
    fcn = segment.FCN(r2o.build_encoder("resnet18"), 2, scenes.CITYSCAPES.align_corners)
    scores = torch.rand(1, 2, 49, 49)
    torch.testing.assert_close(fcn.interpolate(scores, (769, 769))[..., ::16, ::16], scores)


def test_a_dilated_block_has_the_original_outputs_at_every_other_cell():
    """At stride 1 with dilation 2, every other cell of conv5's output is what it was (its first block apart)."""
    torch.manual_seed(0)
    block = r2o.build_encoder("resnet18").eval().layer4[1]
    x = torch.randn(1, 512, 8, 8)
    with torch.no_grad():
        before = block(x)
        holder = torch.nn.Module()
        holder.layer4 = block
        segment.dilate(holder)
        spread = torch.zeros(1, 512, 16, 16)
        spread[..., ::2, ::2] = x
        torch.testing.assert_close(block(spread)[..., ::2, ::2], before)


def test_mask_rcnn_trains_all_weights_and_normalizes_backbone_fpn_and_mask_head():
    """With Detectron2's number of proposals and adaptive sampling."""
    net = detect.mask_rcnn(r2o.build_encoder("resnet50"), 80, 256)
    assert (
        net.rpn.post_nms_top_n() == 1000 and net.eval().rpn.post_nms_top_n() == 1000 and net.rpn.pre_nms_top_n() == 1000
    )
    assert net.roi_heads.box_roi_pool.sampling_ratio == net.roi_heads.mask_roi_pool.sampling_ratio == 0
    parts = {"backbone.body", "backbone.fpn", "roi_heads.mask_head"}
    for part in parts:
        module = net.get_submodule(part)
        norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        convs = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
        assert len(norms) == len(convs) > 3, part
    assert all(p.requires_grad for p in net.parameters())
    assert net.roi_heads.box_predictor.cls_score.out_features == 81
    synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in synced.modules())


@pytest.mark.parametrize("arch, strides", [("resnet18", [4, 8, 16, 32]), ("tiny", [2, 4, 4, 8])])
def test_a_detector_pools_at_the_right_scales_even_if_its_first_image_is_flat(arch, strides):
    net = detect.mask_rcnn(r2o.build_encoder(arch), 2, 64).eval()
    with torch.no_grad():
        net([torch.rand(3, 40, 90)])
    assert net.roi_heads.box_roi_pool.scales == net.roi_heads.mask_roi_pool.scales == [1 / s for s in strides]


def test_the_learning_rate_rises_and_drops():
    rates = [finetune.learning_rate(s, 90, 1.0, 4, (2 / 3, 8 / 9)) for s in range(90)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1, 1] and rates[59] == 1 and rates[60] == pytest.approx(0.1)
    assert rates[79] == pytest.approx(0.1) and rates[80] == rates[89] == pytest.approx(0.01)


# ---- data -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(20, 70), st.integers(20, 70), st.floats(0.5, 2), st.integers(32, 64))
def test_a_mask_stays_on_its_image_and_padding_is_void(seed, h, w, scale, size):
    """A mask that is the thresholded image still is after scaling, mirroring, cropping and padding."""
    image = torch.zeros(3, h, w, dtype=torch.uint8)
    image[:, h // 4 : h // 2, w // 3 : 2 * w // 3] = 255
    sample = {"image": tv_tensors.Image(image), "mask": tv_tensors.Mask((image[:1] > 127).to(torch.uint8))}
    shape = round(scale * h), round(scale * w)
    x, m = finetune.jitter(np.random.default_rng(seed), sample, shape, size, 9).values()
    assert x.shape == (3, size, size) and m.shape == (1, size, size)
    m = m[0]
    inside = m != 9
    rows, columns = inside.any(1), inside.any(0)
    assert (rows.sum(), columns.sum()) == (min(size, shape[0]), min(size, shape[1]))
    assert torch.equal(inside, rows[:, None] & columns)  # a rectangle
    assert (x[:, ~inside] == torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None]).all()
    sure = inside & ((x[0] < 60) | (x[0] > 195))
    wrong = (m != (x[0] > 127).to(torch.uint8)) & sure
    assert wrong.sum() <= 0.02 * sure.sum()
    if min(size - shape[0], size - shape[1]) >= 0:  # nothing was cut off
        height, width = scale * (h // 2 - h // 4), scale * (2 * w // 3 - w // 3)
        assert (m == 1).any(1).sum() == pytest.approx(height, abs=1.5)
        assert (m == 1).any(0).sum() == pytest.approx(width, abs=1.5)


def test_samples_are_mirrored_and_depend_on_their_generator_alone():
    ramp = torch.arange(9, dtype=torch.uint8).expand(3, 9, 9) * 20
    seen = []
    for seed in [*range(9), 0]:
        torch.manual_seed(len(seen))  # must not matter
        sample = {"image": tv_tensors.Image(ramp)}
        seen.append(finetune.jitter(np.random.default_rng(seed), sample, (9, 9), 9)["image"])
    assert torch.equal(seen[0], seen[-1])
    assert {bool(x[0, 0, 0] > x[0, 0, -1]) for x in seen} == {True, False}


def voc(root, count=4):
    """Ellipses as PASCAL VOC: their class is 5, their outline void."""
    base = root / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / name).mkdir(parents=True)
    for i in range(count):
        im = picture(i)
        im.save(base / f"JPEGImages/{i}.jpg", quality=95)
        mask = np.abs(np.asarray(im).astype(int) - np.asarray(im)[:1, :1]).sum(2) > 90
        label = np.where(mask, 5, 0).astype(np.uint8)
        label[:, :-1][mask[:, :-1] != mask[:, 1:]] = 255
        palette = Image.fromarray(label, "P")
        palette.putpalette([i % 256 for i in range(768)])
        palette.save(base / f"SegmentationClass/{i}.png")
    for split in ("train", "val"):
        (base / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(map(str, range(count))))
    return root


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return voc(tmp_path_factory.mktemp("voc"))


def make_cityscapes(root):
    """An image of road in train and in val."""
    for split in ("train", "val"):
        for kind, suffix, pixels in (("leftImg8bit", "leftImg8bit", 0), ("gtFine", "gtFine_labelIds", 7)):
            folder = root / kind / split / "town"
            folder.mkdir(parents=True)
            shape = (20, 30, 3) if kind == "leftImg8bit" else (20, 30)
            Image.fromarray(np.full(shape, pixels, np.uint8)).save(folder / f"town_0_0_{suffix}.png")


def test_cityscapes_ids_become_its_19_classes(tmp_path):
    ids = scenes.CITYSCAPES.ids
    assert (ids[7], ids[8], ids[33], ids[24]) == (0, 1, 18, 11)  # road, sidewalk, bicycle, person
    assert ids[0] == ids[255] == ids[9] == ids[29] == 255  # unlabeled, license plate, parking, caravan
    assert sorted(set(ids.values())) == [*range(19), 255] and len(scenes.CITYSCAPES.names) == 19
    assert len(scenes.VOC.names) == 21
    make_cityscapes(tmp_path)
    recipe, train, val = opened(tmp_path)
    image, label = scenes.Scenes(val, recipe).whole(0)
    assert recipe is scenes.CITYSCAPES and train != val and image.shape == (3, 20, 30) and (label == 0).all()


def opened(*data, more=()):
    return scenes.open_scenes(segment.parse_args([str(f) for f in (*SEGMENT, "--data", *data, *more)]))


def test_sbd_adds_the_images_that_voc_lacks(shapes, tmp_path):
    """train_aug: VOC's train, and SBD's images of neither of VOC's splits."""
    scipy_io = pytest.importorskip("scipy.io")
    for name in ("img", "cls"):
        (tmp_path / name).mkdir()
    for name in ("0", "new", "other"):
        picture(9).save(tmp_path / f"img/{name}.jpg")
        truth = {"Segmentation": np.full((64, 80), 3, np.uint8)}
        scipy_io.savemat(tmp_path / f"cls/{name}.mat", {"GTcls": truth})
    (tmp_path / "train.txt").write_text("0\nnew\n")
    (tmp_path / "val.txt").write_text("other\n")
    recipe, train, val = opened(shapes, more=["--sbd", tmp_path])
    data = scenes.Scenes(train, recipe)
    assert len(data) == 4 + 2 and (data.whole(4)[1] == 3).all() and len(val) == 4


# ---- measures -------------------------------------------------------------------------------------------------------


def test_miou_by_hand():
    """Class 0: 2 of 4; class 1: 1 of 3; class 2 is neither there nor predicted; void counts for nothing."""
    truth = torch.tensor([[0, 0, 1, 1, 0, 255]])
    predicted = torch.tensor([[0, 0, 1, 0, 1, 2]])
    ious = measures.class_ious(measures.confusion(predicted, truth, 3, 255))
    assert ious[0] == 2 / 4 and ious[1] == 1 / 3 and ious[2].isnan()


# ---- runs of segment.py ---------------------------------------------------------------------------------------------


SEGMENT = "--ckpt random --arch tiny --crop 64 --batch-size 2 --workers 0".split()


def results(out):
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_a_run_learns_its_training_images_and_prints_its_score(shapes, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--data", shapes, "--out", out, "--epochs", 50, "--lr", 0.05, 1e-6, "--seeds", 0, 1, "--scales", 1, 1]
    segment.main([str(f) for f in (*SEGMENT, *flags)])
    found, printed = results(out), capsys.readouterr().out
    assert found["best lr"] == 0.05 and found["images"] == 4 and len(found["runs"]["1e-06"]) == 2
    good = [one["mIoU"] for one in found["runs"]["0.05"]]
    assert min(good) > 70 > 50 > max(one["mIoU"] for one in found["runs"]["1e-06"])
    spread = np.std(good, ddof=1)
    row = f"ours: mIoU {np.mean(good):.2f} ± {spread:.2f} (n = 2, lr 0.05) | paper: none for this data |"
    assert row in printed.splitlines()[-1]
    each = json.loads((out / "lr0.05-seed1/result.json").read_text())["IoU"]
    assert each["bottle"] > 50 and each["cat"] is None
    assert Image.open(out / "lr0.05-seed0/masks.png").size == (3 * 228 - 4, 16 + 4 * 228 - 4 + 20)  # 20: the legend


def stopped_after(monkeypatch, program, steps, flags):
    """Runs until a stop signal comes during step `steps`."""

    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "agree", lambda finite, stop: (True, asked.append(1) or len(asked) >= steps))
        with pytest.raises(SystemExit) as stop:
            program.main(flags)
    assert stop.value.code == distributed.STOPPED


def test_a_stopped_run_resumes_bit_identically(shapes, tmp_path, monkeypatch):
    def flags(name):
        more = ["--data", shapes, "--out", tmp_path / name, "--epochs", 3, "--seeds", 4, "--lr", 0.01]
        return [str(f) for f in (*SEGMENT, *more)]

    segment.main(flags("whole"))
    stopped_after(monkeypatch, segment, 3, flags("parts"))
    assert load(tmp_path / "parts/lr0.01-seed4/last.pth")["step"] == 3
    segment.main(flags("parts"))
    whole, parts = (load(tmp_path / name / "lr0.01-seed4/last.pth") for name in ("whole", "parts"))
    assert whole["step"] == 6 and same(whole, parts)
    assert results(tmp_path / "whole")["runs"] == results(tmp_path / "parts")["runs"]
    segment.main(flags("parts"))  # done: evaluated again, not trained
    assert results(tmp_path / "whole")["runs"] == results(tmp_path / "parts")["runs"]


def test_zero_epochs_evaluates_the_trained_checkpoint(shapes, tmp_path, refused_segment):
    def run(*more):
        flags = ["--data", shapes, "--out", tmp_path, "--seeds", 0, "--lr", 0.05, "--scales", 1, 1, *more]
        segment.main([str(f) for f in (*SEGMENT, *flags)])
        return results(tmp_path)["runs"]["0.05"][0]["mIoU"]

    trained = run("--epochs", 15)
    assert run("--epochs", 0) == trained > 30
    flags = ["--data", shapes, "--out", tmp_path / "nothing", "--seeds", 0, "--epochs", 0]
    assert "there is no" in refused_segment(*SEGMENT, *flags)


def test_evaluating_an_unfinished_run_says_so(shapes, tmp_path, monkeypatch, capsys):
    flags = [*SEGMENT, "--data", shapes, "--out", tmp_path, "--seeds", 0, "--lr", 0.05]
    stopped_after(monkeypatch, segment, 2, [str(f) for f in (*flags, "--epochs", 3)])
    segment.main([str(f) for f in (*flags, "--epochs", 0)])
    printed = capsys.readouterr().out.splitlines()
    assert "lr0.05-seed0: not finished, after 2 of 6 steps" in printed
    assert "NOT FINISHED (after 2 of 6 steps) |" in printed[-1]
    assert results(tmp_path)["unfinished"] == {"lr0.05-seed0": "2 of 6 steps"}
    segment.main([str(f) for f in (*flags, "--epochs", 3)])
    segment.main([str(f) for f in (*flags, "--epochs", 0)])
    assert results(tmp_path)["unfinished"] == {} and "NOT FINISHED" not in capsys.readouterr().out


def test_the_paper_s_figure_is_printed_for_its_own_data_only(shapes, tmp_path, monkeypatch, capsys):
    flags = [*SEGMENT, "--data", shapes, "--out", tmp_path, "--seeds", 0, "--lr", 0.05, "--epochs", 1]
    segment.main([str(f) for f in flags])
    assert "| paper: none for this data |" in capsys.readouterr().out
    trained = results(tmp_path)["training images"]
    for images, found in (((trained + 1, 4), "none for this data"), ((trained, 4), "mIoU 77.3 (Table 1)")):
        monkeypatch.setattr(scenes.VOC, "images", images)  # of training, as without --sbd, and val
        segment.main([str(f) for f in flags])
        assert f"| paper: {found}" in capsys.readouterr().out


def test_a_diverging_learning_rate_does_not_end_the_sweep(shapes, tmp_path, capsys, refused_segment):
    flags = ["--data", shapes, "--seeds", 0, "--epochs", 2, "--out", tmp_path]
    segment.main([str(f) for f in (*SEGMENT, *flags, "--lr", 0.01, 1e30)])
    said = capsys.readouterr()
    assert "diverged (lr 1e+30)" in said.out and "lr 0.01)" in said.out.splitlines()[-1] and "diverged:" in said.err
    assert results(tmp_path)["runs"]["1e+30"] == [None] and results(tmp_path)["best lr"] == 0.01
    assert "a run diverged at each" in refused_segment(*SEGMENT, *flags, "--lr", 1e30)


def test_another_encoder_under_the_same_name_is_noticed(shapes, tmp_path, refused_segment):
    flags = [*SEGMENT[2:], "--data", shapes, "--seeds", 0, "--epochs", 1, "--out", tmp_path / "out"]
    flags = ["--ckpt", tmp_path / "my.pth", *flags]
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.save({"arch": "tiny", "state_dict": r2o.build_encoder("tiny").state_dict()}, tmp_path / "my.pth")
        if seed == 1:
            segment.main([str(f) for f in flags])
    assert "was trained from other weights than --ckpt" in refused_segment(*flags)


def test_seeds_scales_and_steps_follow_the_flags(shapes, coco, tmp_path, monkeypatch):
    calls = []

    def fit(run, model, fingerprint, data, loss_of, drops, warmup=0, collate=None, optimizer_of=None):
        calls.append((model, data, loss_of, drops, warmup))
        raise finetune.Stopped

    monkeypatch.setattr(finetune, "fit", fit)
    for program, flags in (
        (segment, [*SEGMENT, "--data", shapes, "--scales", 0.7, 0.8, "--crop", 50]),
        (detect, [*DETECT, "--data", coco, "--warmup", 7]),
    ):
        for seed in (0, 1):
            with pytest.raises(SystemExit):
                program.main([str(f) for f in (*flags, "--seeds", seed, "--out", tmp_path)])
    (one, data, loss_of, drops, warmup), (two, other, *_), (rcnn, boxes, detect_loss, last_drops, rise), _ = calls
    assert data.seed == 0 and other.seed == 1 and data.scales == [0.7, 0.8] and data.crop == 50
    assert not torch.equal(one.head[0].weight, two.head[0].weight)
    assert (drops, warmup, last_drops, rise) == ((0.7, 0.9), 0, (2 / 3, 8 / 9), 7)
    sizes = [(data[epoch, 0][1] != 255).sum() for epoch in range(30)]  # 80 x 64, at 0.7 to 0.8, cut to 50
    assert len({int(x) for x in sizes}) > 3 and min(sizes) > 45 * 40
    _, labels = batch = [torch.stack(x) for x in zip(data[0, 0], data[1, 0], strict=True)]
    labels[0, 8:] = 255
    seen = []
    loss = loss_of(lambda x: seen.append(x) or torch.zeros(2, 21, 50, 50), batch)
    share = (labels != 255).float().mean().item()  # the mean is over all pixels, as MMSegmentation's
    assert share < 0.8 and loss == pytest.approx(np.log(21) * share) and torch.equal(seen[0], r2o.normalize(batch[0]))
    detect_loss(lambda x, t: seen.append(x) or {"loss": torch.ones(())}, [boxes[0, 0]])
    assert 0.5 < seen[1][0].max() <= 1 and rcnn.transform.size_divisible == 64


def test_fine_tuning_defaults_are_the_paper_s(shapes, coco, tmp_path, monkeypatch):
    """A.2: 30,000 steps for segmentation; for COCO batches of 32 and 1,000 steps of warm-up; three seeds (Tables 5, 6).
    A.5 for a ViT. --lr paper is the sweep of A.2."""
    seen = []
    monkeypatch.setattr(finetune, "sweep", lambda args, settings, work, *rest: seen.append((args, rest[1])) or 0)

    def args_of(program, *flags):
        program.main([str(f) for f in flags])
        return seen[-1]

    voc, paper = args_of(segment, "--ckpt", "random", "--data", shapes)
    assert (voc.steps, voc.epochs, voc.batch_size, voc.lr, voc.seeds, voc.crop) == (
        30000,
        None,
        16,
        [0.01],
        [0, 1, 2],
        513,
    )
    assert voc.weight_decay == 1e-4 and "77.3 (Table 1)" in paper
    voc, _ = args_of(segment, "--ckpt", "random", "--data", shapes, "--lr", "paper", "--epochs", 3)
    assert voc.lr == [0.001, 0.003, 0.01, 0.03, 0.1] and (voc.steps, voc.epochs) == (None, 3)
    assert scenes.CITYSCAPES.sweep == (0.004, 0.01, 0.04) and scenes.CITYSCAPES.shape == (1025, 2049)

    one, paper = args_of(detect, "--ckpt", "random", "--data", coco)
    assert (one.epochs, one.batch_size, one.warmup, one.lr, one.seeds) == (12, 32, 0, [0.1], [0, 1, 2])
    monkeypatch.setattr(finetune, "steps_of", lambda settings, images: 12 * 118_287 // 32)
    assert args_of(detect, "--ckpt", "random", "--data", coco)[0].warmup == 1000
    monkeypatch.setattr(finetune, "steps_of", lambda settings, images: 250)
    assert args_of(detect, "--ckpt", "random", "--data", coco)[0].warmup == 25
    assert one.weight_decay == 4e-5 and "box AP 41.7" in paper
    two, paper = args_of(detect, "--ckpt", "random", "--data", coco, "--schedule", "2x", "--lr", "paper")
    assert two.epochs == 24 and two.lr == [0.003, 0.1, 0.3] and "box AP 43.0, mask AP 39.3" in paper
    vit, paper = args_of(detect, "--ckpt", "random", "--arch", "vit_b", "--data", coco)
    assert (vit.lr, vit.weight_decay, vit.epochs) == (
        [3e-4],
        0.1,
        12,
    ) and "Table 8, after ImageNet-100: box AP 40.5" in paper


def test_steps_are_counted_instead_of_epochs(shapes, tmp_path, refused_segment):
    flags = [*SEGMENT, "--data", shapes, "--out", tmp_path, "--seeds", 0, "--lr", 0.01]
    segment.main([str(f) for f in (*flags, "--steps", 3)])
    assert load(tmp_path / "lr0.01-seed0/last.pth")["step"] == 3 and results(tmp_path)["steps"] == 3
    assert "was trained with --steps 3, now it is 4" in refused_segment(*flags, "--steps", 4)
    assert "two ways to say how long" in refused_segment(*flags, "--steps", 3, "--epochs", 1)
    assert "pass no others beside it" in refused_segment(*flags, "--lr", "paper", 0.1)
    assert "--lr must be above 0" in refused_segment(*flags, "--lr", "papers")


def test_images_of_one_size_are_scaled_from_another_and_measured_at_their_labels_size(shapes):
    """Cityscapes: 2048 x 1024 becomes 2049 x 1025, before scaling and for evaluation; here 80 x 64 becomes 160 x 96."""
    data = scenes.Scenes(opened(shapes)[2], dataclasses.replace(scenes.VOC, shape=(96, 160)), crop=200)
    _, label = data[0, 0]
    inside = label != 255  # outlines of ellipses apart, all but the padding
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    assert 90 <= rows.max() - rows.min() + 1 <= 96 and 150 <= columns.max() - columns.min() + 1 <= 160
    seen = []

    class Left(torch.nn.Module):
        """Class 5 in the left half."""

        def forward(self, x):
            seen.append(x.shape)
            scores = torch.zeros(1, 21, *x.shape[2:])
            scores[:, 5, :, : x.shape[3] // 2] = 1
            return scores

        def interpolate(self, scores, shape):
            return torch.nn.functional.interpolate(scores, shape, mode="bilinear")

    pixels, _ = segment.measure(Left(), data, 21, 0, "")
    assert seen == [(1, 3, 96, 160)] * 4
    counted = torch.stack([data.whole(i)[1] for i in range(4)])
    assert pixels.sum() == (counted != 255).sum() and pixels[:, 5].sum() == (counted[..., :40] != 255).sum()


def test_cityscapes_is_resized_for_training_and_evaluation(tmp_path, monkeypatch):
    make_cityscapes(tmp_path)
    seen = []
    monkeypatch.setattr(segment, "write_json", lambda *rest: None)
    monkeypatch.setattr(finetune, "fit", lambda run, model, fingerprint, data, *rest, **more: seen.append(data.shape))
    monkeypatch.setattr(
        segment, "measure", lambda model, val, *rest: seen.append(val.shape) or (torch.ones(19, 19), [])
    )
    monkeypatch.setattr(finetune, "save_strip", lambda *rest: None)
    segment.main([str(f) for f in (*SEGMENT, "--data", tmp_path, "--out", tmp_path / "out", "--seeds", 0)])
    assert seen == [(1025, 2049)] * 2


def test_parameter_groups_may_scale_the_learning_rate(tmp_path):
    """As a ViT's layers do."""
    net, args = (
        torch.nn.Linear(2, 2),
        argparse.Namespace(epochs=1, steps=None, batch_size=2, weight_decay=0, workers=0, save_every=9),
    )
    before = [p.clone() for p in net.parameters()]

    class Ones(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, key):
            return torch.ones(2)

    def optimizer_of(model, lr, weight_decay):
        return torch.optim.SGD([{"params": [model.weight], "scale": 0.0}, {"params": [model.bias]}], lr=lr)

    run = finetune.Run(args, tmp_path, 0.1, 0, {})
    finetune.fit(run, net, "", Ones(), lambda ddp, x: ddp(x).square().mean(), (0.5,), optimizer_of=optimizer_of)
    assert torch.equal(before[0], net.weight) and not torch.equal(before[1], net.bias)


def test_a_vit_is_fine_tuned_as_in_a_5(coco, tmp_path, monkeypatch):
    seen = []

    def fit(run, model, fingerprint, data, loss_of, drops, warmup, collate, optimizer_of):
        seen.append((drops, optimizer_of, model))
        raise finetune.Stopped

    monkeypatch.setattr(finetune, "fit", fit)
    for arch in ("vit_b", "tiny"):
        with pytest.raises(SystemExit):
            detect.main([str(f) for f in (*DETECT, "--arch", arch, "--data", coco, "--out", tmp_path)])
    (drops, optimizer_of, net), (others, sgd, _) = seen
    assert drops == (9 / 12, 11 / 12) and optimizer_of is vitdet.adamw
    assert others == (2 / 3, 8 / 9) and sgd is finetune.sgd
    assert net.backbone.body.encoder.layers[-1].dropout.p == 0.2
    kinds = [type(m).__name__ for m in net.backbone.fpn[0].modules() if not list(m.children())]
    assert kinds == "ConvTranspose2d LayerNorm2d GELU ConvTranspose2d Conv2d LayerNorm2d Conv2d LayerNorm2d".split()


def test_an_encoder_that_cannot_be_dilated_is_refused(shapes, tmp_path, refused_segment):
    flags = ["--ckpt", "random", "--arch", "vit_b", "--data", shapes, "--out", tmp_path, "--seeds", 0]
    assert "the FCN dilates the last stage of a ResNet, which vit_b lacks" in refused_segment(*flags)


@pytest.mark.slow
def test_two_processes_train_and_evaluate_together(shapes, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = ["--data", str(shapes), "--out", str(tmp_path), "--epochs", "2", "--lr", "0.01", "--seeds", "0"]
    command = [*launch, "-m", "evals.segment", *SEGMENT, *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    together = results(tmp_path)["runs"]["0.01"][0]["mIoU"]
    segment.main([*SEGMENT, *more])  # one process evaluates what two have trained
    assert results(tmp_path)["runs"]["0.01"][0]["mIoU"] == pytest.approx(together)


def test_segment_refuses_invalid_input(shapes, tmp_path, refused_segment):
    def said(*flags, data=shapes):
        out = tmp_path / f"out-{data.name}"
        return refused_segment(*SEGMENT, "--data", data, "--out", out, "--seeds", 0, *flags)

    assert "--batch-size 8 is larger than the data (4 images)" in said("--batch-size", 8)
    assert "--lr must be above 0" in said("--lr", 0)
    assert "--epochs must be at least 0" in said("--epochs", -1)
    assert "--scales" in said("--scales", 2, 1)
    assert "must all be different" in said("--seeds", 0, 0) and "must all be different" in said("--lr", 1, 1)
    assert "--seeds must be at least 0" in said("--seeds", -1)
    assert "cannot open valid" in said("--val-split", "valid")
    assert "is none of these: expected the folder of VOCdevkit" in said(data=tmp_path)
    assert "is a folder" in said("--ckpt", tmp_path) and "no such checkpoint" in said("--ckpt", "r2o.pkl")
    assert "of tiny matched" in said("--ckpt", weights(tmp_path)) and "no such checkpoint" in said(
        "--ckpt", "nowhere.pth"
    )
    done = ["--data", shapes, "--out", tmp_path / f"out-{shapes.name}", "--seeds", 0, "--epochs", 1]
    segment.main([str(f) for f in (*SEGMENT, *done)])
    line = said("--epochs", 2)
    assert "was trained with --epochs 1, now it is 2: pass --epochs 1 to resume" in line
    broken = voc(tmp_path / "broken", 2)
    label = broken / "VOCdevkit/VOC2012/SegmentationClass/1.png"
    Image.fromarray(np.full((64, 80), 77, np.uint8)).save(label)
    assert "has class id 77: expected 0, 1, 2" in said(data=broken)
    assert "has class id 77" in said("--workers", 1, data=broken)
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(label)
    assert "has shape (10, 10), the image (64, 80)" in said(data=broken)
    label.unlink()
    assert f"cannot read {label}" in said(data=broken)


def weights(tmp_path):
    path = tmp_path / "half.pth"
    torch.save({"arch": "tiny", "state_dict": dict(list(r2o.build_encoder("tiny").state_dict().items())[:9])}, path)
    return path


# ---- one's own images and labels ------------------------------------------------------------------------------------


OWN = "--void 255 --epochs 1 --seeds 0 --lr 0.01".split()


@pytest.fixture
def own(shapes, tmp_path):
    """The images and labels of `shapes`, four times, as images/ and labels/, with ids 0 and 1, 255 void; and names."""
    for name in ("images", "labels"):
        (tmp_path / f"own/{name}").mkdir(parents=True)
    voc = shapes / "VOCdevkit/VOC2012"
    for i in range(16):
        shutil.copy(voc / f"JPEGImages/{i % 4}.jpg", tmp_path / f"own/images/{i:02}.jpg")
        ids = np.array(Image.open(voc / f"SegmentationClass/{i % 4}.png"))
        Image.fromarray(np.where(ids == 5, 1, ids)).save(tmp_path / f"own/labels/{i:02}.png")
    (tmp_path / "own/names.txt").write_text("ground\nbowl of soup\n")
    return tmp_path / "own"


def test_own_labels_are_trained_on_under_their_names(own, tmp_path, capsys):
    """As a process, from start to result."""
    flags = [
        "--data",
        own,
        "--out",
        tmp_path / "out",
        "--classes",
        own / "names.txt",
        *OWN,
        "--epochs",
        20,
        "--lr",
        0.05,
    ]
    command = [sys.executable, "-m", "evals.segment", *map(str, (*SEGMENT, *flags, "--scales", 1, 1))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "every fifth image (4) is held out for evaluation" in done.stdout
    assert f"| {own} val, 4 images, FCN trained on 12 |" in done.stdout and "| paper: none" in done.stdout
    found = results(tmp_path / "out")
    assert (
        found["classes"] == ["ground", "bowl of soup"]
        and found["images"] == 4
        and found["runs"]["0.05"][0]["mIoU"] > 60
    )
    each = json.loads((tmp_path / "out/lr0.05-seed0/result.json").read_text())["IoU"]
    assert list(each) == ["ground", "bowl of soup"]
    sheet = np.array(Image.open(tmp_path / "out/lr0.05-seed0/masks.png"))
    assert sheet.shape[0] == 16 + 4 * 228 - 4 + 4 + 16  # the last line is the legend
    two = sheet[-10, 2], sheet[-10, 114]
    assert (sheet[-16:, 2 * 112 :] == 255).all() and np.abs(two[0].astype(int) - two[1]).max() > 60


def test_own_splits_may_lie_inside_images_and_labels_or_contain_them(own, tmp_path):
    more = ["--classes", 2, "--void", 255]
    _, train, val = opened(own, more=more)
    assert [i.name for i, _ in val] == ["00.jpg", "05.jpg", "10.jpg", "15.jpg"] and len(train) == 12
    assert all(i.stem == m.stem for i, m in train + val) and not {*train} & {*val}
    same, also, rest = opened(own / "images", own / "labels", more=more)
    assert (also, rest) == (train, val) and same.names == ["class 0", "class 1"]
    for i, (layout, data) in enumerate((("{kind}/{split}", "split"), ("{split}/{kind}", "kinds"))):
        root = tmp_path / data
        for j, pair in enumerate(train + val):
            for kind, file in zip(("images", "labels"), pair, strict=True):
                folder = root / layout.format(kind=kind, split=("val", "train")[j % 3 > 0])
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, folder)
        _, one, other = opened(root, more=more)
        assert (len(one), len(other)) == (10, 6) and {p.parent.name for p, _ in one} == {("train", "images")[i]}
    _, one, other = opened(root, more=[*more, "--split", "val", "--val-split", "train"])
    assert (len(one), len(other)) == (6, 10)


def test_ids_of_own_labels_become_classes_and_void_ones_none(own):
    (own / "three.txt").write_text("nothing\nground\nsoup\n")
    for path in (own / "labels").iterdir():
        ids = np.array(Image.open(path)).astype(np.int32)
        Image.fromarray(np.where(ids == 255, 40_000, ids + 1).astype(np.uint16)).save(path)  # 0 does not occur
    recipe, train, _ = opened(own, more=["--classes", own / "three.txt", "--void", 0, 40_000])
    assert recipe.names == ["ground", "soup"] and recipe.ids == {1: 0, 2: 1, 0: 255, 40_000: 255}
    _, label = scenes.Scenes(train, recipe).whole(0)
    assert label.unique().tolist() == [0, 1, 255]


def test_labels_with_a_suffix_find_their_images(own):
    for path in list((own / "labels").iterdir()):
        path.rename(own / f"images/{path.stem}_L.png")
    _, train, val = opened(own / "images", own / "images", more=["--classes", 2, "--void", 255, "--mask-suffix", "_L"])
    assert len(train) == 12 and all(m.name == f"{i.stem}_L.png" for i, m in train + val)


def test_implausible_own_labels_are_refused_before_training(own, tmp_path, refused_segment):
    def said(*flags):
        line = refused_segment(*SEGMENT, "--data", own, "--out", tmp_path / "out", *OWN, *flags)
        assert not (tmp_path / "out").exists()
        return line

    two = "--classes", 2
    assert "labels of your own need --classes" in said() and "yours hold the ids 0, 1, 255" in said()
    assert "holds id 255, but the 2 classes of --classes are 0 to 1" in said(*two, "--void", 9)
    assert "add the class, or pass --void 9 255 to ignore it" in said(*two, "--void", 9)
    assert "makes 1 classes: expected 2 to 254" in said("--classes", 1)
    assert "no such file: --classes nowhere.txt" in said("--classes", "nowhere.txt")
    (own / "names.txt").write_text("a\nb\na\n")
    assert "names ['a'] twice" in said("--classes", own / "names.txt")
    assert "which are less than two of the 0 classes that are not void" in said(*two, "--void", 0, 1, 255)
    assert "--void must be at least 0 and at most 65535" in said(*two, "--void", 65536)
    (own / "names.txt").write_bytes("a\nb".encode("utf-16"))
    assert "cannot read --classes" in (line := said("--classes", own / "names.txt")) and "expected UTF-8" in line
    (own / "names.txt").write_text("a\n\nb\n")
    assert "has an empty line: expected a name for each id" in said("--classes", own / "names.txt")
    assert "neither" in said(*two, "--split", "day") and "expected these folders" in said(*two, "--split", "day")
    (own / "images/train").mkdir()
    picture(0).save(own / "images/train/0.png")
    assert "no such folder" in said(*two)
    (own / "labels/train").mkdir()
    shutil.copy(own / "labels/00.png", own / "labels/train/0.png")
    assert "has no folder val: expected train and val, or neither of them" in said(*two)
    shutil.rmtree(own / "images/train")
    shutil.rmtree(own / "labels/train")
    colors = np.zeros((64, 80, 3), np.uint8)
    colors[:20, :20] = 128, 0, 64
    Image.fromarray(colors).save(own / "labels/03.png")
    assert "03.png holds colors: expected one class id per pixel" in said(*two)
    Image.fromarray(np.full((64, 80), 7, np.uint8)).save(own / "labels/03.png")
    assert "03.png holds id 7, but the 2 classes" in said(*two, "--workers", 1)
    Image.fromarray(np.full((64, 80), 1, np.uint8)).save(own / "labels/03.png")
    held_out = np.array(Image.open(own / "labels/05.png"))
    Image.fromarray(np.full((64, 80), 7, np.uint8)).save(own / "labels/05.png")
    assert "05.png holds id 7, but the 2 classes" in said(*two)
    Image.fromarray(np.full((80, 64), 1, np.uint8)).save(own / "labels/05.png")
    assert "05.png has shape (80, 64), the image (64, 80)" in said(*two)
    Image.fromarray(held_out).save(own / "labels/05.png")
    Image.fromarray(held_out.astype(np.int32) * 70_000).save(own / "labels/05.tif")
    (own / "labels/05.png").rename(own / "05.png")
    assert "but the 2 classes" in (line := said(*two)) and line.endswith("ids are at most 65,535")
    Image.fromarray(held_out).save(own / "labels/05.jpg")
    (own / "labels/05.tif").unlink()
    assert "05.jpg is a JPEG: expected PNG, since JPEG changes ids" in said(*two)
    (own / "labels/05.jpg").unlink()
    (own / "05.png").rename(own / "labels/05.png")
    (own / "labels/03.png").write_bytes(b"no image")
    assert "cannot read" in said(*two)
    (own / "labels/03.png").unlink()
    assert "1 of 16 images have no mask of the same name" in said(*two)


def test_masks_of_0_and_255_are_not_mistaken_for_void_objects(own, tmp_path, refused_segment):
    """Nor labels that are void where it counts."""
    flags = [*SEGMENT, "--data", own, "--out", tmp_path / "out", *OWN, "--classes", 2]
    for path in (own / "labels").iterdir():
        ids = np.array(Image.open(path))
        Image.fromarray(np.where(ids == 1, 255, 0).astype(np.uint8)).save(path)
    line = refused_segment(*flags)
    assert "if 255 is the object, save it as 1" in line and "are less than two of the 2 classes" in line
    assert "if 255 is the object, save it as 1" in refused_segment(*flags, "--void", 9)
    for path in (own / "labels").iterdir():
        ids = np.array(Image.open(path)) // 255
        held_out = int(path.stem) % 5 == 0
        Image.fromarray(np.full_like(ids, 255) if held_out else ids).save(path)
    assert "all labels to evaluate on are void: 255" in refused_segment(*flags)


def test_a_class_without_labels_is_reported(own, tmp_path, capsys):
    (own / "names.txt").write_bytes("ground\r\nsoup\r\nspoon\r\n".encode("utf-8-sig"))
    flags = [*SEGMENT, "--data", own, "--out", tmp_path, *OWN, "--classes", own / "names.txt"]
    segment.main([str(f) for f in flags])
    said = capsys.readouterr()
    assert "warning: no label to train on holds spoon" in said.err and "of 3 classes" in said.out
    assert results(tmp_path)["classes"] == ["ground", "soup", "spoon"]


def test_a_run_is_not_resumed_on_other_data_of_the_same_size(own, coco, tmp_path, refused_segment, refused_detect):
    flags = [*SEGMENT, "--data", own, "--out", tmp_path / "out", *OWN]
    segment.main([str(f) for f in (*flags, "--classes", 2)])
    (own / "names.txt").write_text("soup\nground\n")
    assert "was trained on other data: pass another --out" in refused_segment(*flags, "--classes", own / "names.txt")
    shutil.copy(own / "images/00.jpg", own / "images/01.jpg")
    assert "was trained on other data: pass another --out" in refused_segment(*flags, "--classes", 2)
    files = [tmp_path / "train.json", coco_files(coco, "val")[1]]
    text = coco_files(coco, "train")[1].read_text()
    files[0].write_text(text)
    flags = [*DETECT, "--data", coco / "train2017", files[0], coco / "val2017", files[1], "--out", tmp_path / "det"]
    (tmp_path / "det/lr0.01-seed0").mkdir(parents=True)
    model = {"model": {}, "optimizer": {}, "step": 1}
    saved = {
        "images": 6,
        "encoder": finetune.training_encoder(detect.parse_args([str(f) for f in flags]))[2],
        "data": "x",
    }
    torch.save(model | {"settings": saved}, tmp_path / "det/lr0.01-seed0/last.pth")
    assert "was trained on other data: pass another --out" in refused_detect(*flags)


def test_voc_refuses_flags_for_own_classes(shapes, tmp_path, refused_segment):
    flags = [*SEGMENT, "--data", shapes, "--out", tmp_path, "--seeds", 0]
    assert "PASCAL VOC has its own classes: leave --classes, --void" in refused_segment(*flags, "--classes", 3)
    assert "--data takes one folder, or one of images" in refused_segment(*flags[:-4], shapes, shapes, *flags[-4:])


def test_the_colors_of_thirty_classes_are_distinguishable():
    """In CIE Lab, as painted: a just noticeable difference is about 2.3."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    gray = torch.full((30, 3, 1, 1), 127, dtype=torch.uint8)
    painted = pictures.paint(gray, torch.arange(30).view(30, 1, 1))[:, :, 0, 0]
    lab = rgb2lab(painted[None].numpy() / 255)[0]
    apart = deltaE_ciede2000(lab[:, None], lab[None]) + 99 * np.eye(30)
    assert apart.min() > 5 and apart[:12, :12].min() > 12


# ---- detect.py ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """6 images of one or two rectangles of two categories, as COCO's train2017 and val2017; one holds a crowd too."""
    pytest.importorskip("pycocotools")
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(6):
            rng = np.random.default_rng(i)
            pixels = rng.integers(0, 50, (60, 90, 3)).astype(np.uint8)
            images.append({"id": 10 + i, "file_name": f"{i}.png", "height": 60, "width": 90})
            for c in range(1 + i % 2):
                x, y, w, h = 5 + 45 * c + int(rng.integers(0, 8)), int(rng.integers(2, 20)), 30, 25
                pixels[y : y + h, x : x + w, c] = 220
                ring = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                one = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "segmentation": ring}
                annotations.append(one | {"id": len(annotations) + 1, "image_id": 10 + i, "category_id": (3, 90)[c]})
            Image.fromarray(pixels).save(root / split / f"{i}.png")
        crowd = {"size": [60, 90], "counts": [0, 60 * 90]}
        one = {"id": 99, "image_id": 10, "category_id": 3, "iscrowd": 1, "area": 5400, "bbox": [0, 0, 90, 60]}
        annotations.append(one | {"segmentation": crowd})
        images.append({"id": 50, "file_name": "0.png", "height": 60, "width": 90})  # without objects
        names = [{"id": 90, "name": "green"}, {"id": 3, "name": "red"}]
        file = {"images": images, "annotations": annotations, "categories": names}
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(file))
    return root


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 5))
def test_boxes_masks_and_pixels_of_an_object_stay_together(coco, epoch, i):
    """Whatever the scale, mirroring and window: the box encloses the mask, the mask its colored pixels."""
    image, target = objects_of(coco)[epoch, i]
    assert image.shape == (3, 96, 96) and len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
    for box, label, mask in zip(*(target[name] for name in ("boxes", "labels", "masks")), strict=True):
        rows, columns = torch.where(mask == 1)
        around = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (box - around).abs().max() <= 2.5
        channel = int(label) - 1  # categories 3 and 90 become labels 1 and 2, red and green
        inner = torch.nn.functional.max_pool2d(1 - mask[None].float(), 5, 1, 2)[0] == 0
        if inner.any():
            assert (image[channel][inner] > 150).float().mean() > 0.95


def coco_files(root, split):
    return root / f"{split}2017", root / f"annotations/instances_{split}2017.json"


objects = {}


def objects_of(coco):
    return objects.setdefault(coco, detect.Objects(*coco_files(coco, "train"), 96))


def test_crowds_and_empty_images_are_evaluated_but_not_trained_on(coco):
    data = objects_of(coco)
    assert [data.row(i)["id"] for i in range(len(data))] == [10, 11, 12, 13, 14, 15]
    assert all(not a["iscrowd"] for i in range(len(data)) for a in data.row(i)["annotations"]) and data.coco is None
    assert len(detect.Objects(*coco_files(coco, "val"), 96, trains=False)) == 7


def test_the_truth_has_ap_100_and_no_detections_have_ap_0(coco):
    from pycocotools import mask as rle

    val = detect.Objects(*coco_files(coco, "val"), 96, trains=False)
    found = []
    for a in val.coco.dataset["annotations"]:
        if not a["iscrowd"]:
            code = rle.encode(np.asfortranarray(coco_json.decode(a["segmentation"], 60, 90).numpy()))
            code["counts"] = code["counts"].decode()
            keys = {key: a[key] for key in ("image_id", "category_id", "bbox")}
            found.append(keys | {"score": 0.9, "segmentation": code})
    shifted = [one | {"bbox": [v + 15 for v in one["bbox"]]} for one in found]
    assert detect.average_precision(val.coco, found, "bbox")[0]["AP"] == pytest.approx(100)
    assert detect.average_precision(val.coco, shifted, "bbox")[0]["AP50"] < 50
    scores, summary = detect.average_precision(val.coco, shifted, "segm")  # masks, and their areas, are not the boxes'
    assert scores["AP"] == pytest.approx(100) and "Average Precision" in summary
    assert detect.average_precision(val.coco, [], "bbox") == (
        {"AP": 0.0, "AP50": 0.0, "AP75": 0.0},
        "no detections: perhaps too few steps",
    )


DETECT = "--ckpt random --arch tiny --size 64 --batch-size 2 --workers 0 --lr 0.01 --warmup 2 --seeds 0".split()


@pytest.fixture
def few_boxes(monkeypatch):
    """A detector that trains on fewer proposals and finds fewer objects: twice as fast."""

    def build(*settings):
        net = mask_rcnn(*settings)
        net.roi_heads.fg_bg_sampler.batch_size_per_image, net.roi_heads.detections_per_img = 32, 5
        return net

    mask_rcnn = detect.mask_rcnn
    monkeypatch.setattr(detect, "mask_rcnn", build)


@pytest.mark.slow
def test_a_detector_trains_resumes_and_is_measured(coco, few_boxes, tmp_path, monkeypatch, capsys):
    def flags(name):
        return [str(f) for f in (*DETECT, "--data", coco, "--out", tmp_path / name, "--epochs", 1)]

    detect.main(flags("whole"))
    printed = capsys.readouterr().out
    assert "| paper: none for this data |" in printed and "box AP" in printed
    found = results(tmp_path / "whole")
    for training, paper in ((found["training images"], "Table 1: box AP 41.7"), (117_266, "none for this data")):
        monkeypatch.setattr(detect, "COCO", (found["images"], 2, training))
        detect.main(flags("whole"))
        assert f"| paper: {paper}" in capsys.readouterr().out
    stopped_after(monkeypatch, detect, 2, flags("parts"))
    detect.main(flags("parts"))
    whole, parts = (load(tmp_path / name / "lr0.01-seed0/last.pth") for name in ("whole", "parts"))
    assert whole["step"] == 3 and same(whole, parts)
    result = json.loads((tmp_path / "parts/lr0.01-seed0/result.json").read_text())
    assert 0 <= result["box AP"] <= 100 and "mask AP50" in result
    assert Image.open(tmp_path / "whole/lr0.01-seed0/masks.png").width == 3 * 228 - 4


@pytest.mark.slow
def test_two_processes_detect_together(coco, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    more = ["--data", str(coco), "--out", str(tmp_path), "--epochs", "1"]
    done = subprocess.run(
        [*launch, "-m", "evals.detect", *DETECT, *more], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    file = tmp_path / "lr0.01-seed0/detections.json"
    together = json.loads(file.read_text())
    detect.main([*DETECT, *more])  # one process evaluates what two have trained
    assert key_of(together) == key_of(json.loads(file.read_text()))
    assert load(tmp_path / "lr0.01-seed0/last.pth")["step"] == 3


def key_of(found):
    return sorted((one["image_id"], one["category_id"], round(one["score"], 4)) for one in found)


def test_detections_use_image_pixels_and_coco_categories(coco):
    class Sees(torch.nn.Module):
        """One box, of label 2, in a quarter of each image."""

        def forward(self, images):
            (image,) = images
            assert 0.5 < image.max() <= 1
            mask = torch.zeros(1, 1, *image.shape[1:])
            mask[..., :30, 45:] = 0.9
            box = torch.tensor([[45.0, 0, 90, 30]])
            return [{"boxes": box, "labels": torch.tensor([2]), "scores": torch.tensor([0.7]), "masks": mask}]

    val = detect.Objects(*coco_files(coco, "val"), 96, trains=False)
    found = detect.find_objects(Sees(), val, workers=0)
    assert [one["image_id"] for one in found] == [10, 11, 12, 13, 14, 15, 50]
    assert found[0]["category_id"] == 90 and found[0]["bbox"] == [45, 0, 45, 30]
    _, predicted, truth = detect.picture(val, 1, found)
    assert (
        (predicted[:30, 45:] == 0).all() and (predicted == 0).sum() == 30 * 45 and truth.unique().tolist() == [-1, 0, 1]
    )


def test_detect_refuses_invalid_input(coco, tmp_path, refused_detect):
    def said(*flags, data=coco):
        return refused_detect(*DETECT, "--data", data, "--out", tmp_path / "out", *flags)

    def mended(**changed):
        file = json.loads((coco / "annotations/instances_val2017.json").read_text()) | changed
        for name in ("val2017", "train2017"):
            (tmp_path / name).exists() or (tmp_path / name).symlink_to(coco / name)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations/instances_val2017.json").write_text(json.dumps(file))
        train = (coco / "annotations/instances_train2017.json").read_text()
        (tmp_path / "annotations/instances_train2017.json").write_text(train)
        return tmp_path

    assert "--size must be a multiple of 32" in said("--size", 70)
    assert "--warmup must be at least 0" in said("--warmup", -1)
    assert "larger than the data (6 images)" in said("--batch-size", 7)
    assert "cannot read" in said("--val-split", "test2017")
    assert "has no annotations" in said(data=mended(annotations=[]))
    for names in ([(3, "red"), (90, "green"), (91, "blue")], [(3, "green"), (90, "red")]):
        data = mended(categories=[{"id": i, "name": name} for i, name in names])
        assert "lists categories that" in said(data=data) and "lacks or names otherwise" in said(data=data)
    assert "--data takes one path, COCO's folder, or four" in refused_detect(*DETECT, "--data", coco, coco)
    wrong = [{"id": 10, "file_name": "0.png", "height": 90, "width": 60}]
    polygons = [a for a in annotations_of(coco) if a["image_id"] == 10 and not a["iscrowd"]]
    data = mended(images=wrong, annotations=polygons)
    assert "is 90 x 60 pixels, its annotations 60 x 90" in said("--epochs", 1, data=data)


@pytest.mark.slow
def test_any_coco_json_is_accepted(coco, few_boxes, tmp_path, capsys):
    """Images anywhere, in any order; fewer categories in val; neither ids nor boxes, areas, crowds."""
    bare = ("image_id", "category_id", "segmentation")
    for split, keep in (("train", (3, 90)), ("val", (90,))):
        folder, file = coco_files(coco, split)
        whole = json.loads(file.read_text())
        whole["annotations"] = [a for a in whole["annotations"] if a["category_id"] in keep and not a["iscrowd"]]
        whole["annotations"] = [{key: a[key] for key in bare} for a in whole["annotations"]]
        whole["categories"] = [c for c in whole["categories"] if c["id"] in keep][::-1]
        (tmp_path / split).symlink_to(folder)
        (tmp_path / f"{split}.json").write_text(json.dumps(whole | {"images": whole["images"][::-1]}))
    _, rows = coco_json.load_coco(tmp_path / "train", tmp_path / "train.json")
    _, before = coco_json.load_coco(*coco_files(coco, "train"))
    assert [a["id"] for row in rows for a in row["annotations"]] == [*range(1, 10)]
    for row, old in zip(rows, before, strict=True):
        pairs = zip(row["annotations"], [a for a in old["annotations"] if not a["iscrowd"]], strict=True)
        assert all(a["bbox"] == b["bbox"] and a["area"] == b["area"] and a["iscrowd"] == 0 for a, b in pairs)
    paths = [tmp_path / name for name in ("train", "train.json", "val", "val.json")]
    flags = ["--data", *paths, "--out", tmp_path / "out", "--epochs", 1]
    detect.main([str(f) for f in (*DETECT[:-4], *DETECT[-2:], *flags)])  # without --warmup: a tenth of the steps
    assert f"| {tmp_path / 'val.json'}, 7 images, Mask R-CNN, 1 epochs |" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/lr0.01-seed0/detections.json").read_text())
    assert {one["category_id"] for one in found} <= {3, 90} and results(tmp_path / "out")["warmup"] == 0


def annotations_of(coco):
    return json.loads((coco / "annotations/instances_val2017.json").read_text())["annotations"]

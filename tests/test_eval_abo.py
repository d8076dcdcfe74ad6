"""abo.py, Fig. 4: the measure, every kind of truth, checkpoints, and bad input. figures.py, which draws them."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import load, picture, refused_by, same
from PIL import Image

import eval_cub
import r2o
from evals import abo, coco, figures, measures, truth
from evals.common import open_checkpoints
from runtime.cli import UsageError
from runtime.images import read_image

refused = refused_by(abo)
refused_figures = refused_by(figures)


# ---- the measure ----------------------------------------------------------------------------------------------------


def test_best_overlap_by_hand():
    """Objects that overlap each other; mask 2 fits the first best (3 of 5 pixels), mask 1 the second (2 of 4)."""
    masks = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2]])
    a, b = torch.zeros(2, 4), torch.zeros(2, 4)
    a[:, 2:], a[0, 1], a[1, 3] = 1, 1, 0
    b[0, :2] = 1
    best = measures.best_overlap(masks, torch.stack([a, b]).bool())
    assert best.tolist() == [3 / 5, 2 / 4]


def test_void_pixels_count_for_neither_masks_nor_objects():
    masks, inside = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[[True, True, True, False]]])
    assert measures.best_overlap(masks, inside).tolist() == [2 / 3]
    assert measures.best_overlap(masks, inside, torch.tensor([[False, False, True, False]])).tolist() == [1]


def test_coarse_masks_are_upsampled_by_nearest_neighbor():
    fine = torch.zeros(1, 6, 8, dtype=torch.bool)
    fine[0, :3, 4:] = True
    assert measures.best_overlap(torch.tensor([[7, 3], [7, 7]]), fine).tolist() == [1]
    assert len(measures.best_overlap(torch.tensor([[7, 3]]), fine[:0])) == 0


# ---- truth ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_mask_file_is_read_as_ids(tmp_path):
    def read(pixels, mode=None, **kwargs):
        image = Image.fromarray(np.array(pixels))
        (image if mode is None else image.convert(mode)).save(tmp_path / "m.png")
        return truth.read_ids(tmp_path / "m.png", **kwargs).tolist()

    gray = np.array([[0, 2, 40, 255]], np.uint8)
    assert read(gray) == [[0, 2, 40, -1]]
    assert read(gray, kind="binary") == [[0, 0, 0, 1]]
    assert read(np.array([[0, 51, 102, 204]], np.uint8)) == [[0, 0, 0, 1]]  # CUB's levels
    assert read(np.array([[0, 60, 200, 254]], np.uint8)) == [[0, 0, 1, 1]]  # soft edges
    assert read(gray, "P") == [[0, 2, 40, -1]]
    for unclear in ([[0, 1, 2, 60]], [[20] + 9 * [255]]):
        with pytest.raises(UsageError, match=r"m\.png may hold ids .* pass --masks ids or --masks binary"):
            read(np.array(unclear, np.uint8))
    assert read(np.array([[0, 1, 60]], np.uint8), kind="ids") == [[0, 1, 60]]
    assert read(np.array([[0, 100, 65535]], np.uint16), kind="binary") == [[0, 0, 1]]
    assert read(np.array([[[0, 0, 0], [255, 200, 0]]], np.uint8), kind="binary") == [[0, 1]]
    assert read(np.array([[0, 60, 200, 255]], np.uint8), kind="ids") == [[0, 60, 200, -1]]
    assert read(np.array([[0, 300, 255]], np.uint16)) == [[0, 300, 255]]
    assert read(gray > 0, "1") == [[0, 1, 1, 1]]
    assert read(gray, "RGB") == [[0, 2, 40, -1]]
    imagenet_s = np.array([[[0, 0, 0], [5, 0, 0], [1, 2, 0], [1000 % 256, 1000 // 256, 0]]], np.uint8)
    assert read(imagenet_s) == [[0, 5, 513, -1]]
    with pytest.raises(UsageError, match=r"m\.png is colored"):
        read(np.array([[[10, 0, 30]]], np.uint8))
    with pytest.raises(UsageError, match=r"m\.png is colored"):
        read(np.array([[[255, 255, 0], [255, 0, 0]]], np.uint8))


FLAGS = "--ckpt random --arch tiny --size 64 --segments 30 --workers 0".split()


def measured(tmp_path, *flags):
    out = tmp_path / "abo.json"
    abo.main([str(f) for f in (*FLAGS, "--json", out, *flags)])
    found = json.loads(out.read_text())
    return found, {(r["masks"], r["K"], r["assign"]): r["average best overlap"] for r in found["rows"]}


def coco_of(pairs, folder):
    """pairs' masks as COCO instances: images/00.png … with one object each, run-length encoded; and a crowd."""
    from pycocotools import mask as rle

    images, annotations = [], []
    for i, path in enumerate(sorted((pairs / "masks").iterdir())):
        mask = np.asarray(Image.open(path)) > 127
        images.append({"id": 100 + i, "file_name": path.name, "height": mask.shape[0], "width": mask.shape[1]})
        code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
        y, x = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        box = [int(v) for v in (x[0], y[0], x[-1] + 1 - x[0], y[-1] + 1 - y[0])]
        code = {"size": code["size"], "counts": code["counts"].decode()}
        one = {"id": i + 1, "image_id": 100 + i, "category_id": 7, "iscrowd": 0, "bbox": box, "segmentation": code}
        annotations.append(one | {"area": int(mask.sum())})
    file = {"images": images, "annotations": annotations, "categories": [{"id": 7, "name": "ellipse"}]}
    path = folder / "instances.json"
    path.write_text(json.dumps(file))
    return path


def test_a_run_measures_and_prints_priors_and_masks(pairs, tmp_path, capsys):
    png = tmp_path / "abo.png"
    found, rows = measured(tmp_path, "--data", pairs / "images", pairs / "masks", "-k", 8, 2, "--plot", png)
    assert found["objects"] == found["images"] == 12
    assert rows.keys() == {("SLIC prior", None, None), ("grid", None, None)} | {
        ("random", k, assign) for k in (8, 2) for assign in ("pixel", "region")
    }
    grid = rows["grid", None, None]
    assert 0.01 < grid < 0.2 and all(grid < x <= 1 for key, x in rows.items() if key[0] != "grid")
    printed = capsys.readouterr().out
    assert f"{grid:.3f}  grid" in printed and "| paper: none for this data |" in printed
    width, height = Image.open(png).size
    assert width == 820 and height == 440 and np.asarray(Image.open(png).convert("L")).std() > 5


def test_region_masks_of_a_prior_that_is_the_truth_overlap_as_well_as_it(pairs, tmp_path, monkeypatch):
    """Where the prior is the truth, the region masks of as many clusters are too; at a quarter of the resolution."""
    truth = {}
    for path in sorted((pairs / "masks").iterdir()):
        truth[read_image(pairs / "images" / path.name).float().mean().item()] = np.asarray(Image.open(path)) > 127

    def prior(image, segments, size):
        mask = Image.fromarray(truth[image.float().mean().item()]).resize((size, size), Image.Resampling.NEAREST)
        return torch.from_numpy(np.asarray(mask).astype(np.uint8))

    monkeypatch.setattr(r2o, "slic_regions", prior)
    flags = ["--data", pairs / "images", pairs / "masks", "-k", 2, "--group", 1]
    _, rows = measured(tmp_path, *flags)
    assert rows["SLIC prior", None, None] > 0.85 and rows["random", 2, "region"] == rows["SLIC prior", None, None]


def test_cub_s_layout_mask_folders_and_coco_json_agree(pairs, tmp_path):
    same = ["-k", 3]
    _, masks = measured(tmp_path, "--data", pairs / "images", pairs / "masks", *same)
    _, coco = measured(tmp_path, "--data", pairs / "images", coco_of(pairs, tmp_path), *same)
    cub = tmp_path / "CUB"
    cub.mkdir()
    for name, source in (("images", "images"), ("segmentations", "masks")):
        (cub / name).symlink_to(pairs / source)
    (cub / "images.txt").write_text("".join(f"{i + 1} {i:02}.png\n" for i in range(12)))
    (cub / "train_test_split.txt").write_text("".join(f"{i + 1} 0\n" for i in range(12)))
    _, birds = measured(tmp_path, "--data", cub, *same)
    assert masks == pytest.approx(coco) and masks == pytest.approx(birds)


def test_the_spread_over_starts_of_k_means_is_printed(pairs, tmp_path, capsys):
    data = ["--data", pairs / "images", pairs / "masks", "-k", 4, "--group", 4]
    one, three = (measured(tmp_path, *data, "--kmeans-seeds", n) for n in (1, 3))
    printed = capsys.readouterr().out
    spread = [row["standard deviation"] for row in three[0]["rows"]]
    assert spread[:2] == [None, None] and min(spread[2:]) > 1e-4 and "over 3 seeds of K-means" in printed
    assert not any(row["standard deviation"] for row in one[0]["rows"])
    for key, x in three[1].items():
        assert (x == one[1][key]) == (key[1] is None)  # SLIC and grid are as they were


def test_only_the_objects_of_a_trimap_count(pairs, tmp_path, refused):
    masks = tmp_path / "trimaps"
    masks.mkdir()
    for path in (pairs / "masks").iterdir():
        inside = np.array(Image.open(path)) > 127
        Image.fromarray(np.where(inside, 1, 2).astype(np.uint8)).save(masks / path.name)
    flags = ["--data", pairs / "images", masks, "-k", 2]
    assert "they hold the ids 1, 2" in refused(*FLAGS, *flags)
    found, rows = measured(tmp_path, *flags, "--foreground", 1)
    plain, want = measured(tmp_path, "--data", pairs / "images", pairs / "masks", "-k", 2)
    assert found["objects"] == plain["objects"] == 12 and rows == want


def test_groups_are_random_and_k_is_128_64_16_4_by_default(pairs, tmp_path, monkeypatch):
    """Files side by side are often of one class: training, and so this, mixes them."""
    seen = []
    monkeypatch.setattr(abo.Truth, "__getitem__", lambda self, i, f=abo.Truth.__getitem__: seen.append(i) or f(self, i))
    _, rows = measured(tmp_path, "--data", pairs / "images", pairs / "masks", "--group", 4)
    assert sorted(seen) == list(range(12)) and seen != sorted(seen)
    assert {key[1] for key in rows if key[1]} == {128, 64, 16, 4}


def test_void_does_not_count_toward_an_object_s_size(tmp_path):
    ids = np.zeros((40, 40), np.uint8)
    ids[:5, :5], ids[10:20, 10:20] = 1, 2
    image = Image.fromarray(ids)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    picture(0, (40, 40)).save(tmp_path / "images/a.png")
    image.save(tmp_path / "masks/a.png")
    flags = ["--data", tmp_path / "images", tmp_path / "masks", "-k", 2]
    assert measured(tmp_path, *flags, "--min-area", 25)[0]["objects"] == 2
    assert measured(tmp_path, *flags, "--min-area", 26)[0]["objects"] == 1


def test_crowds_are_void(pairs, tmp_path):
    path = coco_of(pairs, tmp_path)
    file = json.loads(path.read_text())
    crowd = file["annotations"][0] | {"id": 99, "iscrowd": 1}
    path.write_text(json.dumps(file | {"annotations": [crowd, *file["annotations"][1:]]}))
    found, _ = measured(tmp_path, "--data", pairs / "images", path, "-k", 2)
    assert found["objects"] == 11
    _, rows = coco.load_coco(pairs / "images", path)
    _, _, objects, void = abo.Truth([(row["path"], row) for row in rows], 64, 30)[0]
    assert len(objects) == 0 and void.sum() == file["annotations"][0]["area"]
    path.write_text(json.dumps(file | {"annotations": [crowd, *file["annotations"]]}))  # a crowd where an object is
    _, rows = coco.load_coco(pairs / "images", path)
    _, _, objects, void = abo.Truth([(row["path"], row) for row in rows], 64, 30)[0]
    assert objects.sum() == file["annotations"][0]["area"] and not void.any()


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_folder_of_checkpoints_gives_a_curve_at_each_checkpoint_s_k(pairs, finished, tmp_path):
    """finished: 3 epochs, kept after the 2nd, K from 6 to 2."""
    out = finished[0]
    k2 = r2o.num_clusters(2, 3, 6, 2, 0)
    png = tmp_path / "curve.png"
    flags = ["--ckpt", out, "--data", pairs / "images", pairs / "masks", "--plot", png, "-k", 3]
    found, rows = measured(tmp_path, *flags)
    files = [str(out / "epoch_0002.pth"), str(out / "r2o.pth")]
    assert {key[:2] for key in rows if key[1]} == {(files[0], k2), (files[0], 3), (files[1], 2), (files[1], 3)}
    assert {r["masks"]: r["epoch"] for r in found["rows"] if r["K"]} == {files[0]: 2, files[1]: 3}
    curves, across = abo.curves_of(rows, open_checkpoints(str(out), None, [], 64, torch.device("cpu")))
    assert across == "epoch" and [x for x, _ in curves["pixel masks, K(t)"]] == [2, 3]
    assert [x for x, _ in curves["region masks, K = 3"]] == [2, 3] and len(curves["grid"]) == 2
    assert png.exists()


def test_network_target_loads_the_target_encoder(pairs, finished, tmp_path, refused):
    """In last.pth, and beside the online network in epoch_*.pth; r2o.pth has none."""
    out, data = finished[0], ["--data", pairs / "images", pairs / "masks", "-k", 3]
    network, device = ("--network", "target"), torch.device("cpu")
    found, rows = measured(tmp_path, "--ckpt", out, *data, *network)
    files = [str(out / "epoch_0002.pth"), str(out / "last.pth")]
    assert {key[0] for key in rows if key[1]} == {*files} and found["protocol"]["network"] == "target"
    target = r2o.build_encoder("tiny")
    state = load(out / "last.pth")["model"]
    target.load_state_dict({n.removeprefix("target.encoder."): x for n, x in state.items() if "target.encoder." in n})
    one = open_checkpoints(str(out / "last.pth"), None, [], 64, device, "target")[0]
    assert same(one.encoder.state_dict(), target.state_dict()) and ", target network: " in one.line
    kept = load(out / "epoch_0002.pth")
    assert not same(kept["target"], kept["state_dict"]) and kept["target"].keys() == kept["state_dict"].keys()
    two = open_checkpoints(files[0], None, [], 64, device, "target")[0]
    assert same(dict(two.encoder.state_dict()), kept["target"]) and (two.epoch, two.k) == (2, one.k + 2)
    assert "holds no target network: pass last.pth" in refused(*FLAGS[4:], "--ckpt", out / "r2o.pth", *data, *network)


def test_the_figures_are_drawn_with_the_worst_images_first(pairs, finished, tmp_path, capsys, monkeypatch):
    notes = []
    strip = figures.film_strip
    monkeypatch.setattr(figures, "film_strip", lambda *a, **k: notes.append(k["notes"]) or strip(*a, **k))
    flags = ["--data", pairs / "images", pairs / "masks", "--size", 64, "--count", 3]
    figures.main([str(f) for f in (*flags, "--ckpt", finished[0], "--out", tmp_path)])
    sizes = [Image.open(tmp_path / f"{name}.png").size for name in ("masks", "objects", "worst")]
    assert sizes == [(4 * 132 - 4, 16 + 3 * 132 - 4)] * 3
    result = tmp_path / "cub.json"
    pick = ["--ckpt", finished[0] / "r2o.pth", *flags[:5], "--json", result]
    eval_cub.main([str(f) for f in pick])
    mean = json.loads(result.read_text())["foreground IoU"]
    ious = [float(note.rsplit(" ", 1)[1]) for note in notes[2]]
    assert len(ious) == 3 and ious == sorted(ious) and ious[-1] < mean
    figures.main([str(f) for f in (*flags, "--ckpt", finished[0] / "r2o.pth", "--out", tmp_path)])
    assert Image.open(tmp_path / "masks.png").size == (8 * 132 - 4, 16 + 3 * 132 - 4)


def test_figures_refuse_input_that_cannot_be_drawn(pairs, tmp_path, refused_figures):
    flags = ["--ckpt", "random", "--arch", "tiny", "--size", 64, "--out", tmp_path]
    data = ["--data", pairs / "images", pairs / "masks"]
    assert "no such folder" in refused_figures(*flags, "--data", tmp_path / "nowhere")
    assert "-k must be at least 1 and at most 256" in refused_figures(*flags, *data, "-k", 0)
    assert "no epoch_" in refused_figures("--ckpt", tmp_path, *data, "--out", tmp_path)
    (tmp_path / "file").touch()
    assert "cannot make the folder" in refused_figures(*flags, *data, "--out", tmp_path / "file")


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_annotations_that_do_not_fit_are_refused(pairs, tmp_path, refused):
    images, path = pairs / "images", coco_of(pairs, tmp_path)
    good = json.loads(path.read_text())

    def said(**changed):
        path.write_text(json.dumps(good | changed))
        return refused(*FLAGS, "--data", images, path)

    assert "has no annotations" in said(annotations=[])
    assert "has category_id 9, none of the 1" in said(annotations=[good["annotations"][0] | {"category_id": 9}])
    assert "has image_id 5, none of the 12" in said(annotations=[good["annotations"][0] | {"image_id": 5}])
    assert "1 of the 13 images" in said(images=[*good["images"], good["images"][0] | {"id": 1, "file_name": "x.png"}])
    assert "expected COCO instances" in said(categories=None)
    one = good["annotations"][0]
    other_size = {"size": [5, 5], "counts": "0"}
    for broken in ({"segmentation": []}, {"segmentation": [[1, 2, 3, 4]]}, {"segmentation": other_size}):
        assert "annotation 1 of" in (line := said(annotations=[one | broken])) and "has no mask: expected" in line
    line = said(annotations=[{key: x for key, x in one.items() if key != "segmentation"}])
    assert "has no mask: expected" in line and "boxes alone do not suffice" in line
    for broken in (
        [["a", "b", "c", "d", "e", "f"]],
        [[1, 2, 3, float("nan"), 5, 6]],
        {"size": [64, 80], "counts": [1, 2]},
    ):
        assert "annotation" in (line := said(annotations=[one | {"segmentation": broken}])) and "expected" in line
    corners = [a | {"bbox": [x, y, x + w, y + h]} for a in good["annotations"] for x, y, w, h in [a["bbox"]]]
    assert "most boxes in" in (line := said(annotations=corners)) and "are x, y, x, y: expected x, y, width" in line
    for broken in ({"bbox": [1]}, {"iscrowd": 2}, {"area": -1}):
        assert "is incomplete: expected a bbox" in said(annotations=[one | broken])
    assert "expected COCO instances" in said(
        images=[{k: v for k, v in x.items() if k != "height"} for x in good["images"]]
    )
    path.write_text("[1, 2]")
    assert "expected COCO instances" in refused(*FLAGS, "--data", images, path)
    path.write_text("{")
    assert "expected COCO instances" in refused(*FLAGS, "--data", images, path)
    assert "cannot read" in refused(*FLAGS, "--data", images, tmp_path / "nowhere.json")


def test_data_and_arguments_that_do_not_fit_are_refused(pairs, tmp_path, refused):
    data = ["--data", pairs / "images", pairs / "masks"]
    assert "-k must be at least 1" in refused(*FLAGS, *data, "-k", 4, 0)
    assert "--size must be a multiple of 32, got 100" in refused(*FLAGS, *data, "--size", 100)
    assert "--group must be at least 1" in refused(*FLAGS, *data, "--group", 0)
    assert "no object of 9999 pixels" in refused(*FLAGS, *data, "-k", 2, "--min-area", 9999)
    assert "no epoch_" in refused("--ckpt", tmp_path, *data)
    assert "one folder or two" in refused(*FLAGS, *data, pairs)
    files = ["--data", pairs / "images", coco_of(pairs, tmp_path), "--mask-suffix", "_x"]
    assert "--mask-suffix is for mask files" in refused(*FLAGS, *files)
    for flags in (["--split", "test"], ["--masks", "ids"], ["--void", 3], ["--foreground", 1]):
        assert f"{flags[0]} is for mask files" in refused(*FLAGS, *files[:-2], *flags)
    line = refused(*FLAGS, *data, "-k", 2, "--segments", 2000, "--size", 256)
    assert ".png: SLIC gave" in line and "more than 256" in line and line.endswith("with --segments")
    masks = tmp_path / "masks"
    masks.mkdir()
    for i in range(12):
        Image.fromarray(np.full((20, 80), 255, np.uint8)).save(masks / f"{i:02}.png")
    assert "is 80 x 20 pixels, the image 80 x 64" in refused(*FLAGS, "--data", pairs / "images", masks, "-k", 2)
    (masks / "05.png").unlink()
    assert "1 of 12 images have no mask" in refused(*FLAGS, "--data", pairs / "images", masks)
    Image.fromarray(np.full((20, 80), 255, np.uint8)).save(masks / "04.bmp")
    assert (
        "1 files in" in (line := refused(*FLAGS, "--data", pairs / "images", masks)) and "in their suffix alone" in line
    )
    (masks / "04.bmp").unlink()
    shutil.copytree(pairs / "masks", masks, dirs_exist_ok=True)
    picture(0).save(masks / "05.png")
    assert "05.png is colored" in refused(*FLAGS, "--data", pairs / "images", masks, "-k", 2)

"""knn.py, Table 4: neighbors, votes, processes, and bad input."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, refused_by
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import r2o
from evals import knn, measures
from runtime.images import read_image
from runtime.weights import load_encoder

refused = refused_by(knn)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 9), st.integers(1, 9))
def test_neighbors_do_not_depend_on_the_chunk_size(queries, bank, k, rows, columns):
    generator = torch.Generator().manual_seed(queries * 100 + bank)
    q, b = (torch.randn(n, 5, generator=generator) for n in (queries, bank))
    labels = torch.arange(bank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "BANK", rows)
        patch.setattr(measures, "QUERIES", columns)
        similar, whose = measures.nearest(q, b, labels, k)
    expected, index = (q @ b.T).topk(min(k, bank), dim=1)
    torch.testing.assert_close(similar[:, :bank], expected)
    assert torch.equal(whose[:, :bank], index) and (similar[:, bank:] == -torch.inf).all()


def test_no_tensor_has_queries_times_bank_elements():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            self.size = max([self.size, *(x.numel() for x in (out,) if isinstance(x, torch.Tensor))])
            return out

    with Largest() as largest:
        measures.nearest(torch.randn(3000, 2), torch.randn(40000, 2), torch.zeros(40000).long(), 5)
    assert largest.size < 1.01 * measures.BANK * measures.QUERIES < 3000 * 40000 / 5


def test_votes_by_hand():
    """At temperature 0.1 a neighbor 0.1 nearer weighs e times as much: one at 0.9 against two at 0.8."""
    similar, labels = torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[2, 0, 0]])
    weights = measures.votes(similar, labels, 4, 0.1)
    torch.testing.assert_close(weights, torch.tensor([[2 / np.e, 0, 1, 0]], dtype=torch.float32))
    assert measures.votes(similar, labels, 4, 0.2).argmax() == 0  # 2 exp(-1/2) > 1
    assert measures.votes(similar, labels, 4, 1e-4).isfinite().all()


def test_accuracy_by_hand():
    bank = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]]), dim=1)
    labels = torch.tensor([0, 0, 1, 2])
    queries, truth = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1, 2])
    found = knn.classify(bank, labels, queries, truth, 3, [1, 4], 0.07, 3)
    assert found[1]["top-1"] == pytest.approx(200 / 3) and found[4]["top-5"] == 100
    assert found[1]["top-5"] == pytest.approx(200 / 3)  # classes without a vote are no hits


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """Three classes that color tells apart; 6 training and 3 test images of each."""
    root, rng = tmp_path_factory.mktemp("colors"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for c, name in enumerate(("blue", "green", "red")):
            (root / split / name / "deeper").mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (40, 48, 3))
                pixels[..., 2 - c] += 180
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / "deeper" / f"{i}.png")
    return root


FLAGS = "--ckpt random --arch tiny --size 32 -k 3 1 --batch-size 4 --workers 0".split()


@pytest.mark.slow
def test_one_and_two_processes_classify_colors(colors, tmp_path, capsys):
    out = tmp_path / "one.json"
    knn.main([*FLAGS, "--data", str(colors), "--json", str(out)])
    one, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert one["k"] == {"3": {"top-1": 100, "top-5": 100}, "1": {"top-1": 100, "top-5": 100}}
    assert (one["train"], one["val"], one["classes"]) == (18, 9, 3)
    assert "| ours: top-1 100.0 %, top-5 100.0 % | paper: none for this data |" in printed
    out = tmp_path / "two.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "evals.knn"]
    folders = [str(colors / "train"), str(colors / "val")]
    subprocess.run(
        [*launch, *FLAGS, "--data", *folders, "--json", str(out)],
        cwd=ROOT,
        check=True,
        timeout=120,
        capture_output=True,
    )
    assert json.loads(out.read_text())["k"] == one["k"]


@pytest.mark.slow
def test_unequal_shares_of_processes_give_the_result_of_one(tmp_path):
    """3 processes, 10 rows of the bank, 7 queries: all as in one process, with labels that chance alone would not
    give."""
    script = tmp_path / "share.py"
    script.write_text(
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "from evals import knn\nfrom runtime import distributed\n"
        "g = torch.Generator().manual_seed(3)\n"
        "bank, queries = (torch.randn(n, 4, generator=g).half() for n in (10, 7))\n"
        "y, truth = (torch.randint(0, 6, (n,), generator=g) for n in (10, 7))\n"
        "alone = knn.classify(bank, y, queries, truth, 6, [2, 5], 0.5, 7)\n"
        "rank, world, device = distributed.place()\n"
        "distributed.join_process_group()\n"
        "own = slice(rank, None, world)\n"
        "found = knn.classify(bank[own], y[own], queries[own], truth[own], 6, [2, 5], 0.5, 7)\n"
        "assert found == alone and 0 < found[2]['top-1'] < 100, (found, alone)\n"
        "torch.distributed.barrier()\n"
        "torch.distributed.destroy_process_group()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    done = subprocess.run([*launch, str(script), str(ROOT)], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_features_are_mean_c5_of_the_center_crop(colors):
    """The shorter side becomes 8/7 of the crop: of 40 x 48 pixels at 35, all but 2.5 on each side of the shorter."""
    data = knn.open_folder(colors / "train", 35)
    image, label = data[7]
    whole = torch.nn.functional.interpolate(read_image(data.imgs[7][0])[None].float(), size=(40, 48), mode="bicubic")[0]
    assert image.shape == (3, 35, 35) and label == 1
    assert (image - whole[:, 2:37, 6:41]).abs().mean() < (image - whole[:, :35, :35]).abs().mean() / 2
    args = knn.parse_args(["--ckpt", "x", "--data", "y"])
    assert args.k[0] == 20 and {*args.k} == {10, 20, 100, 200} and args.temperature == 0.07
    args.workers, args.batch_size = 0, 4
    encoder, _ = load_encoder("random", "tiny")
    found, labels = knn.features(encoder, data, 1, 3, args, torch.device("cpu"), "")
    x = torch.stack([data[i][0] for i in range(1, 18, 3)])
    with torch.no_grad():
        c5 = r2o.encode(encoder, r2o.normalize(x)).mean((2, 3))
    torch.testing.assert_close(found.float(), torch.nn.functional.normalize(c5, dim=1), atol=1e-3, rtol=0)
    assert labels.tolist() == [data[i][1] for i in range(1, 18, 3)]


def test_val_may_lack_classes_and_empty_folders_are_none(colors, tmp_path):
    """val may lack classes; empty folders are none, whatever their name; every suffix that training reads is read."""
    val = tmp_path / "val"
    shutil.copytree(colors / "val" / "red", val / "red")
    (val / ".cache").mkdir()
    Image.new("RGB", (40, 48)).save(val / "red" / "x.GIF")
    data = knn.open_folder(val, 32, ["blue", "green", "red"])
    assert [label for _, label in data.samples] == [2] * 4
    pickle.dumps(data)  # for workers that are spawned


def test_imagenet_100_is_recognized_by_class_names_and_size():
    names = [f"n{i:08}" for i in range(100)]
    assert knn.is_imagenet_100(names, 5000) and not knn.is_imagenet_100(names, 2000)  # tiny-imagenet-100 is not
    assert not knn.is_imagenet_100([f"dog{i}" for i in range(100)], 5000) and not knn.is_imagenet_100(names[:99], 5000)


def test_only_the_classes_of_a_subset_are_read(colors, tmp_path, refused):
    """As ImageNet-100 of ImageNet: labels count its classes only."""
    (tmp_path / "two.txt").write_text("red\nblue/\n")
    out = tmp_path / "x.json"
    knn.main([*FLAGS, "--data", str(colors), "--subset", str(tmp_path / "two.txt"), "--json", str(out)])
    found = json.loads(out.read_text())
    assert (found["train"], found["val"], found["classes"]) == (12, 6, 2) and found["k"]["1"]["top-1"] == 100
    (tmp_path / "two.txt").write_text("red\nyellow\n")
    line = refused(*FLAGS, "--data", colors, "--subset", tmp_path / "two.txt")
    assert "1 of the 2 lines of --subset are no class in" in line and "the first: yellow" in line
    assert "cannot read --subset" in refused(*FLAGS, "--data", colors, "--subset", tmp_path / "none.txt")


def test_bad_data_and_arguments_are_refused(colors, tmp_path, refused):
    train, val = colors / "train", colors / "val"
    assert "2 of the 3 classes in" in refused(*FLAGS, "--data", only(tmp_path / "one", train, "blue"), val)
    assert "Couldn't find any class folder in" in refused(*FLAGS, "--data", train / "blue" / "deeper", val)
    (tmp_path / "empty" / "blue").mkdir(parents=True)
    assert "no images in the folders of" in refused(*FLAGS, "--data", train, tmp_path / "empty")
    assert "-k 19 is more than the 18 training images" in refused(*FLAGS, "--data", colors, "-k", 19)
    assert "train does not hold the folders train and val: pass a folder that" in refused(*FLAGS, "--data", train)
    assert "twice" in refused(*FLAGS, "--data", train, train)
    for name in ("train", "other"):  # a class that is called train hides no other
        shutil.copytree(train / "red", tmp_path / "classes" / name)
    assert knn.open_folder(tmp_path / "classes", 32).classes == ["other", "train"]
    bad = r2o.build_encoder("tiny").state_dict()
    bad["conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save({"arch": "tiny", "state_dict": bad}, tmp_path / "nan.pth")
    assert "are not finite" in refused(*FLAGS[2:], "--ckpt", tmp_path / "nan.pth", "--data", colors)
    assert "-k must be at least 1" in refused(*FLAGS, "--data", colors, "-k", 0)
    assert "--temperature must be above 0" in refused(*FLAGS, "--data", colors, "--temperature", 0)
    assert "one folder (with train and val) or two" in refused(*FLAGS, "--data", train, val, val)
    assert "cannot write" in refused(*FLAGS, "--data", colors, "--json", tmp_path / "nowhere/x.json")
    broken = only(tmp_path / "broken", train, "blue")
    (broken / "blue/deeper/0.png").write_text("hello")
    line = refused(*FLAGS, "--data", broken, only(tmp_path / "v", val, "blue"), "-k", 1, "--workers", 1)
    assert "cannot read" in line and "0.png" in line


def only(folder, source, name):
    """A folder with one of the classes."""
    shutil.copytree(source / name, folder / name, dirs_exist_ok=True)
    return folder

"""One's own photographs: what train.py says about a folder, the command it proposes, and what it cannot do here."""

import re
import shlex
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, picture
from PIL import Image

import r2o
import train
from runtime import cli, distributed, folders, images, plan
from runtime.images import list_images, read_image


def photo(seed: int, size=(80, 64)) -> Image.Image:
    """A gradient with noise, which has as many colors as a photograph."""
    rng = np.random.default_rng(seed)
    pixels = np.linspace(0, 200, size[0])[None, :, None] + rng.uniform(0, 55, (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def label(seed: int, mode: str) -> Image.Image:
    """An object's mask as 0 and 255, as the ids of a palette, or in colors."""
    ids = np.asarray(picture(seed).convert("L")) > 100
    if mode == "RGB":
        return Image.fromarray(np.where(ids[..., None], [128, 0, 64], [0, 200, 9]).astype(np.uint8))
    image = Image.fromarray((ids * (255 if mode == "L" else 3)).astype(np.uint8), mode)
    if mode == "P":
        image.putpalette([i % 256 for i in range(768)])
    return image


def fill(folder, count, make, ending=".png"):
    folder.mkdir(parents=True)
    for i in range(count):
        make(i).save(folder / f"{i:03}{ending}")


def said_of(folder, capsys):
    folders.print_images(list_images(folder))
    said = capsys.readouterr()
    return said.out.strip(), said.err


# ---- what is in a folder --------------------------------------------------------------------------------------------


def test_images_are_counted_by_top_level_folder(tmp_path, capsys):
    fill(tmp_path / "b/deep/er", 3, photo)
    fill(tmp_path / "a", 2, lambda i: photo(9 + i), ".jpg")
    photo(99).save(tmp_path / "loose.png")
    out, err = said_of(tmp_path, capsys)
    assert out == f"6 images in {tmp_path}: 1 in the folder itself, 2 in a, 3 in b" and "share" not in err
    for i in range(9):
        fill(tmp_path / f"many/{i}", 1 + i % 2, photo)
    out, err = said_of(tmp_path / "many", capsys)
    assert out == f"13 images in {tmp_path / 'many'}: 9 folders of 1 to 2" and not err


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_labels_among_the_photographs_are_warned_about(tmp_path, capsys, mode):
    fill(tmp_path / "images/train", 9, photo, ".jpg")
    fill(tmp_path / "labels/train", 9, lambda i: label(i, mode))
    _, err = said_of(tmp_path, capsys)
    assert "9 of 9 images sampled from labels have few colors, like label images: pass the folder of" in err
    assert "images and labels share 9 names, like images and their labels" in err
    assert len(err.splitlines()) == 2  # nothing about the photographs


def test_labels_beside_their_photographs_are_warned_about(tmp_path, capsys):
    fill(tmp_path / "one", 8, photo, ".jpg")
    for i in range(8):
        label(i, "L").save(tmp_path / f"one/{i:03}_mask.png")
    assert "8 of 16 images sampled from" in said_of(tmp_path / "one", capsys)[1]


def test_photographs_in_class_folders_are_not_warned_about(tmp_path, capsys):
    """Though their names are 000.png, 001.png, … in each."""
    for name in "abc":
        fill(tmp_path / name, 5, lambda i, name=name: photo(i + ord(name)))
    assert said_of(tmp_path, capsys)[1] == ""
    for name in "defghi":
        fill(tmp_path / name, 1, photo)
    fill(tmp_path / "masks", 5, lambda i: label(i, "L"))
    assert "4 of 4 images sampled from masks" in said_of(tmp_path, capsys)[1]  # one of ten folders


def test_training_prints_what_it_found(tmp_path):
    """A process, from start to end."""
    fill(tmp_path / "data/images", 10, photo, ".jpg")
    fill(tmp_path / "data/labels", 10, lambda i: label(i, "L"))
    flags = ["--data", tmp_path / "data", "--out", tmp_path / "out", *SMALL, "--epochs", 1, "--batch-size", 7]
    done = subprocess.run(
        [sys.executable, "train.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and "10 in images, 10 in labels" in done.stdout
    assert "have few colors" in done.stderr and "share 10 names" in done.stderr


# ---- a command that suits it ----------------------------------------------------------------------------------------


def proposed(refuse, *flags, **kwargs):
    line = refuse(*flags, **kwargs)
    return shlex.split(re.search(r"A command that suits these images and this machine: (.*)", line)[1])


@pytest.mark.parametrize("count, side", [(3, 40), (40, 300)])
def test_a_command_that_does_not_fit_proposes_one_that_runs(tmp_path, refuse, monkeypatch, count, side):
    """Here, as printed."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "my photos", count, lambda i: photo(i, (side + 20, side)), ".jpg")
    command = proposed(refuse, "--data", "my photos")
    assert command[:4] == ["python", "train.py", "--data", "my photos"] and "--out" not in command
    assert "--accum" not in command
    assert command[command.index("--size") + 1] == ("64" if side == 40 else "96")
    command[command.index("--epochs") + 1] = "1"
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *command[2:]], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert (tmp_path / "out/r2o.pth").exists()
    given = ["--data", "my photos", "--seed", 7, "--batch-size=4096", "--accum", 2, "--dry-run", "--lr", 3]
    again = " ".join(proposed(refuse, *given))  # the flags that were given stay, unless others take their place
    assert (
        again.startswith("python train.py --data my photos --seed 7 --dry-run --arch tiny")
        and again.count("--lr ") == 1
    )
    assert again.endswith("--lr-k 0 --out out-2")  # out holds maps of perhaps another size, and another run
    two = proposed(refuse, "--data", "my photos", "--out", "new", world=2)
    assert two[:3] == ["torchrun", "--nproc_per_node=2", "train.py"] and two.count("--out") == 1
    two[0:3] = ["-m", "torch.distributed.run", "--standalone", *two[1:2], ROOT / "train.py"]
    done = subprocess.run([sys.executable, *two, "--dry-run"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_the_proposal_counts_readable_images_only(tmp_path, refuse):
    fill(tmp_path / "photos", 9, photo)
    for i in range(3):
        (tmp_path / f"photos/{i:03}.png").write_bytes(b"no image")
    flags = ["--data", tmp_path / "photos", "--out", tmp_path / "out", "--workers", 0, "--skip-unreadable"]
    command = proposed(refuse, *flags, "--batch-size", 8, "--arch", "tiny", "--size", 64, "--k-start", 8)
    assert command[2 : len(flags) + 2] != flags and "--skip-unreadable" in command
    assert command[command.index("--batch-size") + 1] == "1" and command[-2:] == ["--out", f"{tmp_path / 'out'}-2"]
    one = tmp_path / "one"
    one.mkdir()
    photo(0).save(one / "0.png")
    assert proposed(refuse, "--data", one, world=3)[:2] == ["python", "train.py"]


def test_the_proposal_for_a_gpu_fits_its_memory(tmp_path, monkeypatch):
    """The choice for another machine: its device is pretended, the arithmetic is done on the CPU."""
    fill(tmp_path / "photos", 60, lambda i: photo(i, (300, 300)), ".jpg")
    listed, args = list_images(tmp_path / "photos"), train.parse_args(["--data", "photos"])
    device = type("Device", (), {"type": "cuda"})()
    monkeypatch.setattr(distributed, "place", lambda: distributed.Place(0, 1, device))
    monkeypatch.setattr(r2o.R2O, "to", lambda self, device: self)
    real, cpu = plan.training_memory, torch.device("cpu")
    needed = [real(r2o.R2O("resnet18"), n, 224, cpu) for n in (4, 8)]
    monkeypatch.setattr(plan, "memory_of", lambda device: sum(needed) / 2)
    monkeypatch.setattr(plan, "training_memory", lambda model, n, size, device: real(model, n, size, cpu))
    words = plan.command_for(args, listed, len(listed)).split()
    chosen = dict(zip(words[2::2], words[3::2], strict=True))
    assert chosen["--arch"] == "resnet18" and chosen["--size"] == "224" and chosen["--batch-size"] == "8"
    assert chosen["--accum"] == "2"


def test_a_container_s_memory_limit_is_respected(tmp_path, monkeypatch):
    limits = {"/sys/fs/cgroup/memory.max": "7000\n", "/sys/fs/cgroup/memory/memory.limit_in_bytes": "max\n"}
    monkeypatch.setattr(plan.Path, "read_text", lambda self: limits[str(self)])
    assert plan.memory_of(torch.device("cpu")) == 7000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert plan.memory_of(torch.device("cpu")) == 3500


def test_a_dry_run_of_a_large_batch_times_few_images(photos, tmp_path, capsys, monkeypatch):
    """As many as take half a second, doubling from 2, here 8 of 16."""
    timed = []
    real = train.forward_backward

    def slow(ddp, batches, *rest, **more):
        batch = next(batches)
        timed.append(len(batch["image"]))
        time.sleep(0.6 if timed[-1] >= 8 else 0)
        return real(ddp, iter([batch]), *rest, **more)

    monkeypatch.setattr(train, "forward_backward", slow)
    train.main(["--data", str(photos), "--out", str(tmp_path / "out"), *SMALL, "--batch-size", "16", "--dry-run"])
    assert timed == [2, 2, 4, 4, 8, 8, 8, 8, 8, 8] and "3 steps of 8 of 16 images took" in capsys.readouterr().out


def test_the_plan_counts_the_k_means_problems_of_uneven_groups(capsys):
    """20 images in 4 micro-batches of 5, in groups of at most 4: 2 of each."""
    flags = ["--data", "x", "--batch-size", "20", "--accum", "4", "--kmeans-group", "4"]
    args = train.parse_args(flags)
    plan.print_plan(args, train.make_schedule(args, 40))
    assert "8 K-means of 3 images per step" in capsys.readouterr().out


# ---- grids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", r2o.ARCHS)
def test_the_plan_s_grid_sizes_are_those_of_the_features(arch):
    net, x = r2o.build_encoder(arch), torch.zeros(1, 3, 128, 128)
    with torch.no_grad():
        assert plan.cells(arch, 128) == (r2o.encode_c4(net, x).shape[-1], r2o.encode(net, x).shape[-1])


def test_masks_of_few_cells_are_warned_about(photos, capsys):
    def warned(*flags):
        plan.check_cells(train.parse_args(["--data", "x", *flags]))
        return capsys.readouterr().err

    assert "masks have 4 x 4 cells (C4 of --arch resnet18 at --size 64)" in warned("--arch", "resnet18", "--size", "64")
    with pytest.raises(SystemExit):
        train.main(["--data", str(photos), "--arch", "resnet18", "--size", "64"])
    assert "masks have 4 x 4 cells" in capsys.readouterr().err
    assert not warned() and not warned("--arch", "tiny", "--size", "64")
    assert not warned("--arch", "resnet18", "--size", "64", "--assign", "region")
    assert not warned("--arch", "resnet18", "--size", "64", "--masks", "prior")


# ---- unreadable and huge images -------------------------------------------------------------------------------------


def test_skip_unreadable_allows_more_than_one_percent(tmp_path, refuse, capsys):
    fill(tmp_path / "photos", 12, photo)
    for i in range(3):
        (tmp_path / f"photos/{i:03}.png").write_bytes(b"no image")
    flags = ["--data", tmp_path / "photos", "--out", tmp_path / "out", *SMALL, "--epochs", 2]
    assert "restore them, or pass --skip-unreadable" in refuse(*flags)
    train.main([str(f) for f in (*flags, "--skip-unreadable", "--prepare")])
    assert "9 images of at most" in capsys.readouterr().out
    lost = tmp_path / "photos/005.png"  # damaged after the maps were made
    lost.write_bytes(bytes(lost.stat().st_size))
    train.main([str(f) for f in (*flags, "--skip-unreadable")])
    assert ", 1 images unreadable," in capsys.readouterr().out
    for path in (tmp_path / "photos").iterdir():
        path.write_bytes(b"no image")
    flags[3] = tmp_path / "other"
    assert "no image in" in (line := refuse(*flags, "--skip-unreadable")) and "can be read" in line


@pytest.mark.parametrize("ending", [".jpg", ".png", ".bmp"])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch, ending):
    """Twice Pillow's MAX_IMAGE_PIXELS, 179 million; here 2,000. torchvision's decoder knows no limit."""
    photo(0, (50, 39)).save(tmp_path / f"good{ending}")
    photo(0, (50, 41)).save(tmp_path / f"huge{ending}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    decoded = []
    decode = images.decode_image
    monkeypatch.setattr(images, "decode_image", lambda *a, **k: decoded.append(1) or decode(*a, **k))
    assert read_image(tmp_path / f"good{ending}").shape == (3, 39, 50) and len(decoded) == 1
    with pytest.raises(OSError, match="exceeds limit of 2000 pixels"):
        read_image(tmp_path / f"huge{ending}")
    assert len(decoded) == 1


# ---- what the environment lacks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, package, command",
    [
        ("tqdm", "tqdm", "train.py --data photos"),
        ("torch", "torch", "train.py --data photos"),
        ("torchvision", "torchvision", "eval_cub.py --ckpt random --data photos"),
        ("tqdm", "tqdm", "-m evals.knn --ckpt random --data photos"),
        ("skimage", "scikit-image", "train.py --data DATA --batch-size 4"),
        ("ninja", "ninja", "setup.py build_ext --inplace"),
        ("pybind11", "pybind11", "setup.py build_ext --inplace"),
    ],
)
def test_a_missing_package_is_one_line_with_the_command_to_install_it(tmp_path, photos, module, package, command):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules['{module}'] = None\n")
    words = [str(photos) if word == "DATA" else word for word in command.split()]
    words += ["--out", str(tmp_path / "out")] if "DATA" in command else []
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"pip install {package}" in lines[-1] and len(lines) == 1


def test_unbuilt_ops_are_reported_as_slow(monkeypatch):
    assert "build_ext" not in cli.describe_ops("cpu") or r2o.extension("cpu") == "python"
    monkeypatch.setattr(r2o, "extension", lambda device: "python")
    said = "ops: python; python setup.py build_ext --inplace makes the mask step 5 to 9 times faster"
    assert said in cli.describe_ops("cpu")

"""One's own photographs: what train.py says about a folder, the command it proposes, and what it cannot do here."""

import re
import shlex
import subprocess
import sys

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
def test_labels_among_the_photographs_are_warned_of(tmp_path, capsys, mode):
    fill(tmp_path / "images/train", 9, photo, ".jpg")
    fill(tmp_path / "labels/train", 9, lambda i: label(i, mode))
    _, err = said_of(tmp_path, capsys)
    assert "9 of 9 images looked at in labels have few colors, as label images do: pass the folder of" in err
    assert "images and labels share 9 names, as images and their labels do" in err
    assert len(err.splitlines()) == 2  # nothing about the photographs


def test_labels_beside_their_photographs_are_warned_of(tmp_path, capsys):
    fill(tmp_path / "one", 8, photo, ".jpg")
    for i in range(8):
        label(i, "L").save(tmp_path / f"one/{i:03}_mask.png")
    assert "8 of 16 images looked at in" in said_of(tmp_path / "one", capsys)[1]


def test_photographs_in_classes_are_not_warned_of(tmp_path, capsys):
    for name in "abc":
        fill(tmp_path / name, 5, lambda i, name=name: photo(i + ord(name)))
        for path in (tmp_path / name).iterdir():
            path.rename(path.with_name(f"{name}_{path.name}"))
    assert said_of(tmp_path, capsys)[1] == ""


def test_training_says_what_it_found(tmp_path):
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
    return shlex.split(re.search(r"This command suits them and this machine: (.*)", line)[1])


@pytest.mark.parametrize("count, side", [(3, 40), (40, 300)])
def test_a_bare_command_proposes_one_that_runs(tmp_path, refuse, monkeypatch, count, side):
    """Here, as printed."""
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "my photos", count, lambda i: photo(i, (side + 20, side)), ".jpg")
    command = proposed(refuse, "--data", "my photos")
    assert command[:4] == ["python", "train.py", "--data", "my photos"] and "--out" not in command
    assert command[command.index("--size") + 1] == ("64" if side == 40 else "96")
    command[command.index("--epochs") + 1] = "1"
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *command[2:]], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert (tmp_path / "out/r2o.pth").exists()
    again = proposed(refuse, "--data", "my photos", "--out", "other")
    assert again[again.index("--out") + 1] == "other"
    two = proposed(refuse, "--data", "my photos", world=2)
    assert two[:3] == ["torchrun", "--nproc_per_node=2", "train.py"]


def test_what_is_proposed_for_a_gpu_fits_its_memory(tmp_path, monkeypatch):
    """The choice for another machine: its device is pretended, the arithmetic is done on the CPU."""
    fill(tmp_path / "photos", 60, lambda i: photo(i, (300, 300)), ".jpg")
    listed, args = list_images(tmp_path / "photos"), train.parse_args(["--data", "photos"])
    device = type("Device", (), {"type": "cuda"})()
    monkeypatch.setattr(distributed, "place", lambda: (0, 1, device))
    monkeypatch.setattr(r2o.R2O, "to", lambda self, device: self)
    real, cpu = plan.training_memory, torch.device("cpu")
    needed = [real(r2o.R2O("resnet18"), n, 224, cpu) for n in (4, 8)]
    monkeypatch.setattr(plan, "memory_of", lambda device: sum(needed) / 2)
    monkeypatch.setattr(plan, "training_memory", lambda model, n, size, device: real(model, n, size, cpu))
    words = plan.command_for(args, listed).split()
    chosen = dict(zip(words[2::2], words[3::2], strict=True))
    assert chosen["--arch"] == "resnet18" and chosen["--size"] == "224" and chosen["--batch-size"] == "8"
    assert chosen["--accum"] == "2"


# ---- grids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", r2o.ARCHS)
def test_the_grids_are_those_of_the_features(arch):
    net, x = r2o.build_encoder(arch), torch.zeros(1, 3, 128, 128)
    with torch.no_grad():
        assert plan.cells(arch, 128) == (r2o.encode_c4(net, x).shape[-1], r2o.encode(net, x).shape[-1])


def test_masks_of_few_cells_are_warned_of(capsys):
    def warned(*flags):
        plan.check_cells(train.parse_args(["--data", "x", *flags]))
        return capsys.readouterr().err

    assert "masks have 4 x 4 cells (C4 of --arch resnet18 at --size 64)" in warned("--arch", "resnet18", "--size", "64")
    assert not warned() and not warned("--arch", "tiny", "--size", "64")
    assert not warned("--arch", "resnet18", "--size", "64", "--assign", "region")
    assert not warned("--arch", "resnet18", "--size", "64", "--masks", "prior")


# ---- unreadable and huge images -------------------------------------------------------------------------------------


def test_more_than_one_unreadable_image_in_a_hundred_can_be_left_out(tmp_path, refuse, capsys):
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
        ("tqdm", "tqdm", "-m evals.knn --ckpt random --data photos"),
        ("skimage", "scikit-image", "train.py --data DATA --batch-size 4"),
        ("ninja", "ninja", "setup.py build_ext --inplace"),
        ("pybind11", "pybind11", "setup.py build_ext --inplace"),
    ],
)
def test_a_missing_package_is_one_line_with_the_command_that_mends_it(tmp_path, photos, module, package, command):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules['{module}'] = None\n")
    words = [str(photos) if word == "DATA" else word for word in command.split()]
    words += ["--out", str(tmp_path / "out")] if "DATA" in command else []
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"pip install {package}" in lines[-1] and (len(lines) == 1 or "DATA" in command)


def test_ops_that_were_not_built_are_said_to_be_slow(monkeypatch):
    assert "build_ext" not in cli.ops("cpu") or r2o.extension("cpu") == "python"
    monkeypatch.setattr(r2o, "extension", lambda device: "python")
    assert "ops: python; python setup.py build_ext --inplace makes the mask step 3 to 8 times faster" in cli.ops("cpu")

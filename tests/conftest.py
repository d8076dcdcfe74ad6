"""Small pictures, made here, and small runs of train.py."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start: two tests may run side by side
torch.set_num_threads(1)


def pytest_configure(config):
    """Tests run on the CPU, also where there is a GPU; `pytest -m gpu` runs those that need one."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: pytest -m gpu"))


def picture(seed: int, size=(80, 64)) -> Image.Image:
    """A colored ellipse on a gradient."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[1], : size[0]] / 64
    ground = rng.uniform(0, 160, 3) + (x[..., None] * rng.uniform(0, 60, 3))
    cy, cx, r = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.9), rng.uniform(0.15, 0.3)
    inside = np.hypot(y - cy, (x - cx) * 0.7) < r
    return Image.fromarray(np.where(inside[..., None], rng.uniform(60, 255, 3), ground).astype(np.uint8))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """24 images, nested in two folders, PNG and JPEG."""
    root = tmp_path_factory.mktemp("photos")
    for i in range(24):
        folder = root / ("ab"[i % 2])
        folder.mkdir(exist_ok=True)
        picture(i).save(folder / f"{i:02}.{('png', 'jpg')[i % 3 == 0]}")
    return root


ROOT = Path(train.__file__).parent
SMALL = (
    "--arch tiny --size 32 --epochs 3 --batch-size 8 --kmeans-group 4 --k-start 6 --k-end 2 "
    "--hidden 16 --dim 8 --segments 20 --workers 1 --lr 1"
).split()


def command(photos, out, *flags, torchrun=0):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"] if torchrun else []
    return [sys.executable, *launch, "train.py", "--data", str(photos), "--out", str(out), *SMALL, *flags]


def run(*args, **kwargs):
    done = subprocess.run(command(*args, **kwargs), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Equal to the last bit, all the way down."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="session")
def finished(photos, tmp_path_factory):
    """One uninterrupted run."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, run(photos, out, "--keep-every", "2")


@pytest.fixture
def refuse(capsys, monkeypatch):
    def call(*flags, world=1):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        with pytest.raises(SystemExit) as stop:
            train.main([str(flag) for flag in flags])
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and lines[-1].startswith("train.py: error: ") and "Traceback" not in "".join(lines)
        return lines[-1]

    return call


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """12 images and masks of their ellipses, as two folders; those of the masks hold 0 and 255."""
    root = tmp_path_factory.mktemp("pairs")
    for name in ("images", "masks"):
        (root / name).mkdir()
    for i in range(12):
        im = picture(i)
        im.save(root / f"images/{i:02}.png")
        mask = np.abs(np.asarray(im).astype(int) - np.asarray(im)[:1, :1]).sum(2) > 90
        Image.fromarray((mask * 255).astype(np.uint8)).save(root / f"masks/{i:02}.png")
    return root


def refused_by(program):
    """A fixture's function that calls the program's main and returns the one line with which it refuses."""

    @pytest.fixture
    def refused(capsys):
        def call(*flags):
            with pytest.raises(SystemExit) as stop:
                program.main([str(flag) for flag in flags])
            lines = capsys.readouterr().err.strip().splitlines()
            name = program.__name__ if "." in program.__name__ else f"{program.__name__}.py"
            assert stop.value.code == 2 and lines[-1].startswith(f"{name}: error: ") and "Traceback" not in lines[-1]
            return lines[-1]

        return call

    return refused

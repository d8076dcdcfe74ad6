"""train.py as its users run it: real processes, real files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from torchvision.models import resnet18

import r2o
import train

ROOT = Path(train.__file__).parent
SMALL = (
    "--arch tiny --size 32 --epochs 3 --batch-size 8 --kmeans-group 4 --k-start 6 --k-end 2 "
    "--hidden 16 --dim 8 --segments 20 --workers 1 --lr 1"
).split()


def command(photos, out, *flags, torchrun=0):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"] if torchrun else []
    return [sys.executable, *launch, "train.py", "--data", str(photos), "--out", str(out), *SMALL, *flags]


def run(*args, **kwargs):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(*args, **kwargs), cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """One uninterrupted run."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, run(photos, out, "--keep-every", "2")


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


def test_a_run_leaves_weights_log_checkpoint_and_film_strip(finished):
    out, printed = finished
    assert f"ops: {r2o.extension('cpu')}" in printed and "24 images" in printed
    file = load(out / "r2o.pth")
    assert file["arch"] == "tiny" and file["epoch"] == 3 and file["args"]["k_end"] == 2
    assert file["state_dict"].keys() == r2o.build_encoder("tiny").state_dict().keys()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log] == [1, 2, 3] and [row["K"] for row in log] == [5, 4, 2]
    assert all(0 < row["loss"] < 8 and row["pairs"] > 0 and row["images/s"] > 0 for row in log)
    strip = Image.open(out / "strip.png")
    assert strip.width == 5 * 132 - 4 and strip.height == 16 + 8 * 132 - 4  # image, prior, three epochs; eight rows
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["epoch_0002.pth", "last.pth", "log.jsonl", "r2o.pth", "regions.json", "regions.npy", "strip.png"]
    )


def test_training_moves_every_weight_and_the_target_follows(finished):
    state = load(finished[0] / "last.pth")["model"]
    torch.manual_seed(0)
    start = r2o.R2O("tiny", hidden=16, dim=8).state_dict()
    for name, before in start.items():
        if name.endswith("weight") and before.ndim > 1:
            assert not torch.equal(state[name], before), name
    distance = {
        net: sum((state[n] - start[n]).norm() for n in start if n.startswith(net) and n.endswith("weight"))
        for net in ("online", "target")
    }
    assert 0 < distance["target"] < distance["online"]


@pytest.mark.parametrize("after", [1, 2])
def test_a_run_killed_between_epochs_and_resumed_ends_with_the_same_bits(photos, finished, tmp_path, after):
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(photos, out), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while not ((out / "last.pth").exists() and load(out / "last.pth")["epoch"] >= after):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "r2o.pth").exists() or after == 2  # killed before its end; the last epoch may be quick
    assert f"going on after epoch {load(out / 'last.pth')['epoch']}" in run(photos, out)
    for name in ("r2o.pth", "last.pth"):
        got, want = load(out / name), load(finished[0] / name)
        assert same({k: v for k, v in got.items() if k != "args"}, {k: v for k, v in want.items() if k != "args"})


def test_a_finished_run_started_again_changes_nothing(photos, finished):
    before = {path.name: path.read_bytes() for path in finished[0].iterdir() if path.suffix != ".pth"}
    weights = load(finished[0] / "r2o.pth")["state_dict"]
    with open(finished[0] / "log.jsonl", "a") as log:
        log.write('{"epoch": 4}\n{"epoch": 5, "lo')  # logged but not saved, and torn: both are dropped
    assert "going on after epoch 3" in run(photos, finished[0], "--keep-every", "2")
    assert {path.name: path.read_bytes() for path in finished[0].iterdir() if path.suffix != ".pth"} == before
    assert same(load(finished[0] / "r2o.pth")["state_dict"], weights)


def test_two_processes_train_together(photos, finished, tmp_path):
    """Under torchrun with gloo: the same data and masks, batch norm per process."""
    printed = run(photos, tmp_path / "out", torchrun=2)
    assert "tiny on 2 x cpu" in printed and printed.count("wrote") == 1
    logs = [(run / "log.jsonl").read_text().splitlines() for run in (finished[0], tmp_path / "out")]
    one, two = (json.loads(log[0]) for log in logs)
    assert one["pairs"] == pytest.approx(two["pairs"], rel=0.2) and two["loss"] == pytest.approx(one["loss"], rel=0.3)


def test_every_image_is_seen_once_an_epoch_whatever_the_number_of_processes():
    whole = list(train.Batches(50, 12, 0, 2, seed=1, rank=0, world=1))
    assert len(whole) == 8
    for epoch in (0, 1):
        seen = [i for batch in whole[4 * epoch : 4 * epoch + 4] for _, i in batch]
        assert len(seen) == len(set(seen)) == 48 and {e for b in whole[4 * epoch : 4 * epoch + 4] for e, _ in b} == {
            epoch
        }
    assert whole[:4] != whole[4:]
    shares = [list(train.Batches(50, 12, 0, 2, seed=1, rank=r, world=3)) for r in range(3)]
    assert [[*a, *b, *c] for a, b, c in zip(*shares, strict=True)] == whole
    assert list(train.Batches(50, 12, 1, 2, seed=1, rank=0, world=1)) == whole[4:]  # resumed


def test_resnet_weights_load_into_torchvision(photos, tmp_path):
    flags = ["--arch", "resnet18", "--epochs", "1"]
    run(photos, tmp_path / "out", *flags)
    net = resnet18()
    result = net.load_state_dict(load(tmp_path / "out/r2o.pth")["state_dict"], strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"] and not result.unexpected_keys


def test_four_steps_of_training_are_what_they_are_written_to_be(photos, tmp_path):
    """train.py against the loop spelled out, with every setting away from its default."""
    flags = (
        "--epochs 2 --batch-size 12 --k-start 8 --k-end 3 --hold-epochs 0 --lr 2 --lr-k 8 --weight-decay 0.1 --tau 0.9"
    )
    train.main(
        [
            "--data",
            str(photos),
            "--out",
            str(tmp_path),
            *SMALL,
            *flags.split(),
            "--assign",
            "region",
            "--seed",
            "7",
            "--workers",
            "0",
        ]
    )
    root, names = r2o.list_images(photos)
    maps, header = r2o.region_maps(root, names, tmp_path / "regions.npy", num_segments=20, size=8)
    data = r2o.ImageRegions(root, names, maps, header, 32, seed=7)
    torch.manual_seed(7)
    model = r2o.R2O("tiny", header["num_regions"], kmeans_group=4, assign="region", hidden=16, dim=8)
    model = model.to(memory_format=torch.channels_last)
    optimizer = r2o.LARS([p for p in model.parameters() if p.requires_grad], lr=0, weight_decay=0.1)
    for step, batch in enumerate(train.Batches(24, 12, 0, 2, 7, 0, 1)):
        samples = [data[key] for key in batch]
        x = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
        views = r2o.augment(
            torch.cat([x["views"][:, 0], x["views"][:, 1]]), torch.cat([x["factors"][:, 0], x["factors"][:, 1]])
        )
        images = r2o.normalize(x["image"].float() / 255)
        images, views = (t.contiguous(memory_format=torch.channels_last) for t in (images, views))
        k = [r2o.num_clusters(t, 2, 8, 3, 0) for t in (1, 2)][step // 2]
        loss, _ = model(
            images, views, x["regions"], x["boxes"], x["flips"], k, torch.Generator().manual_seed((7 << 32) + step)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2 * 12 / 256 * (1 + np.cos(np.pi * step / 4)) / 2 * k / 8
        optimizer.step()
        model.update_target(1 - 0.1 * (np.cos(np.pi * step / 4) + 1) / 2)
    state = load(tmp_path / "last.pth")["model"]
    for name, want in model.state_dict().items():
        torch.testing.assert_close(state[name], want, rtol=1e-4, atol=1e-6, msg=name)
    exported = load(tmp_path / "r2o.pth")["state_dict"]
    assert all(torch.equal(x, state[f"online.encoder.{name}"]) for name, x in exported.items())


def test_one_batch_can_be_overfitted():
    torch.manual_seed(0)
    model = r2o.R2O("tiny", num_regions=16, hidden=32, dim=16)
    optimizer = r2o.LARS([p for p in model.parameters() if p.requires_grad], lr=0.5)
    images, views = torch.rand(8, 3, 32, 32), torch.rand(16, 3, 32, 32)
    regions = r2o.grid_regions(4, 8).expand(8, -1, -1)
    boxes = torch.tensor([[[0.0, 0, 0.8, 0.8], [0.1, 0.1, 1, 1]]]).repeat(8, 1, 1)
    losses = []
    for _ in range(20):
        loss, _ = model(
            images, views, regions, boxes, torch.zeros(8, 2, dtype=torch.bool), 4, torch.Generator().manual_seed(0)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(0.99)
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


# ---- bad input: one line, exit status 2, nothing lost ----------------------------------------------------------------


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


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--data", "nowhere"], "no such folder: nowhere"),
        (["--batch-size", "25"], r"--batch-size 25 is larger than the data (24 images): pass at most 24"),
        (["--batch-size", "6"], "6 images per process do not divide into K-means groups of 4"),
        (["--k-start", "900"], "900 clusters are more than the regions of one K-means (4 images of at most"),
        (["--size", "40"], "pass a multiple of 32"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--workers", "-1"], "--workers must not be negative"),
        (["--out", "/dev/null/out"], "cannot make the folder /dev/null/out (Not a directory): pass another"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(photos, tmp_path, refuse, flags, said):
    base = ["--data", photos, "--out", tmp_path, "--regions", tmp_path / "r.npy", *SMALL, "--workers", "0"]
    assert said in refuse(*base, *flags)
    assert not (tmp_path / "last.pth").exists()


def test_a_batch_the_processes_cannot_share_is_refused(photos, tmp_path, refuse):
    said = refuse("--data", photos, "--out", tmp_path, *SMALL, "--workers", "0", world=3)
    assert "3 processes cannot share --batch-size 8: pass a multiple of 3" in said


def test_a_folder_without_images_is_refused(tmp_path, refuse):
    assert "no images in" in refuse("--data", tmp_path, "--out", tmp_path / "out")


def test_a_checkpoint_of_other_settings_is_refused_and_kept(photos, finished, refuse):
    out, before = finished[0], (finished[0] / "last.pth").read_bytes()
    said = refuse("--data", photos, "--out", out, *SMALL, "--arch", "resnet18")
    assert "was trained with --arch tiny, now it is resnet18: pass --arch tiny" in said
    assert "--epochs 3, now it is 9" in refuse("--data", photos, "--out", out, *SMALL, "--epochs", "9")
    assert (out / "last.pth").read_bytes() == before


def test_region_maps_of_other_data_are_refused(finished, tmp_path, refuse):
    for i in range(24):
        picture(100 + i).save(tmp_path / f"{i}.png")
    said = refuse("--data", tmp_path, "--out", finished[0], *SMALL)
    assert "belong to other data or settings" in said


def test_the_exit_status_is_2_for_the_shell_too():
    done = subprocess.run([sys.executable, "train.py", "--data", "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "train.py: error: no such folder: nowhere; expected a folder of images, flat or nested\n"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_epoch_before(photos, tmp_path, refuse, monkeypatch):
    def learning_rate(step, *args):
        return 0.1 if step < 3 else float("nan")  # the second epoch's

    monkeypatch.setattr(r2o, "learning_rate", learning_rate)
    said = refuse("--data", photos, "--out", tmp_path, *SMALL, "--workers", "0")
    assert "epoch 2 ends in NaN or infinity" in said
    state = load(tmp_path / "last.pth")
    assert state["epoch"] == 1 and all(x.isfinite().all() for x in state["model"].values())


def test_an_image_lost_after_the_maps_were_made_stops_the_run_in_one_line(tmp_path, refuse):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(8):
        picture(i).save(data / f"{i}.png")
    flags = ["--data", data, "--out", tmp_path / "out", *SMALL, "--workers", "1"]
    root, names = r2o.list_images(data)
    (tmp_path / "out").mkdir()
    r2o.region_maps(root, names, tmp_path / "out/regions.npy", num_segments=20, size=8)
    content = (data / "3.png").read_bytes()
    (data / "3.png").write_bytes(b"x" * len(content))
    assert "3.png can no longer be read" in refuse(*flags)

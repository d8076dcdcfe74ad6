"""train.py as its users run it: real processes, real files."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, load, picture, run, same
from PIL import Image
from torchvision.models import resnet18

import r2o
import train
from runtime import cli, distributed, plan
from runtime.images import list_images
from runtime.loader import Batches, ImageRegions, copy_ahead
from runtime.regions import region_maps


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
        ".lock epoch_0002.pth last.pth log.jsonl previous.pth r2o.pth regions.json regions.npy strip.png".split()
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


def test_rerunning_a_finished_run_changes_nothing(photos, finished):
    before = {path.name: path.read_bytes() for path in finished[0].iterdir() if path.suffix != ".pth"}
    weights = load(finished[0] / "r2o.pth")["state_dict"]
    with open(finished[0] / "log.jsonl", "a") as log:
        log.write('{"epoch": 4}\n{"epoch": 5, "lo')  # logged but not saved, and torn: both are dropped
    assert "already finished, after step 9" in run(photos, finished[0], "--keep-every", "2")
    assert {path.name: path.read_bytes() for path in finished[0].iterdir() if path.suffix != ".pth"} == before
    assert same(load(finished[0] / "r2o.pth")["state_dict"], weights)


@pytest.mark.slow
def test_two_processes_train_together(photos, finished, tmp_path):
    """Under torchrun with gloo: the same data and masks, batch norm per process."""
    printed = run(photos, tmp_path / "out", torchrun=2)
    assert "tiny on 2 x cpu" in printed and printed.count("wrote") == 1
    logs = [(run / "log.jsonl").read_text().splitlines() for run in (finished[0], tmp_path / "out")]
    one, two = (json.loads(log[0]) for log in logs)
    assert one["pairs"] == pytest.approx(two["pairs"], rel=0.2) and two["loss"] == pytest.approx(one["loss"], rel=0.3)


@pytest.mark.parametrize("world, accum", [(3, 1), (1, 3), (2, 3)])
def test_every_image_is_seen_once_per_epoch_for_any_number_of_processes_and_parts(world, accum):
    whole = list(Batches(50, 12, range(8), seed=1))
    assert len(whole) == 8
    for epoch in (0, 1):
        seen = [i for batch in whole[4 * epoch : 4 * epoch + 4] for _, i in batch]
        assert len(seen) == len(set(seen)) == 48
        assert {e for batch in whole[4 * epoch : 4 * epoch + 4] for e, _ in batch} == {epoch}
    assert whole[:4] != whole[4:]
    shares = [list(Batches(50, 12, range(8), 1, r, world, accum)) for r in range(world)]
    parts = [[i for share in part for i in share] for part in zip(*shares, strict=True)]  # of all processes
    assert [[i for part in parts[at : at + accum] for i in part] for at in range(0, 8 * accum, accum)] == whole
    resumed = list(Batches(50, 12, range(5, 8), 1, 0, world, accum))  # inside the second epoch
    assert resumed == shares[0][5 * accum :]


def test_resnet_weights_load_into_torchvision(photos, tmp_path):
    flags = ["--arch", "resnet18", "--epochs", "1"]
    run(photos, tmp_path / "out", *flags)
    net = resnet18()
    result = net.load_state_dict(load(tmp_path / "out/r2o.pth")["state_dict"], strict=False)
    assert result.missing_keys == ["fc.weight", "fc.bias"] and not result.unexpected_keys


def test_four_training_steps_equal_a_plain_reimplementation(photos, tmp_path):
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
    images = list_images(photos)
    maps, header = region_maps(images, tmp_path / "regions.npy", num_segments=20, size=8)
    data = ImageRegions(images, maps, header, 32, seed=7)
    torch.manual_seed(7)
    model = r2o.R2O("tiny", header["num_regions"], kmeans_group=4, assign="region", hidden=16, dim=8)
    model = model.to(memory_format=torch.channels_last)
    optimizer = r2o.LARS([p for p in model.parameters() if p.requires_grad], lr=0, weight_decay=0.1)
    for step, batch in enumerate(Batches(24, 12, range(4), 7)):
        samples = [data[key] for key in batch]
        x = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
        views, flips, factors = (torch.cat([x[n][:, 0], x[n][:, 1]]) for n in ("views", "flips", "factors"))
        views = r2o.augment(views.permute(0, 3, 1, 2), flips, factors)
        images = r2o.normalize(x["image"].permute(0, 3, 1, 2).float() / 255)
        images, views = (t.contiguous(memory_format=torch.channels_last) for t in (images, views))
        k = [r2o.num_clusters(t, 2, 8, 3, 0) for t in (1, 2)][step // 2]
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([7, step]).generate_state(1)[0]))
        loss, _ = model(images, views, x["regions"], x["boxes"], x["flips"], k, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 2 * 12 / 256 * (1 + np.cos(np.pi * step / 4)) / 2 * k / 8
        optimizer.step()
        model.update_target(1 - 0.1 * (np.cos(np.pi * step / 4) + 1) / 2)
    state = load(tmp_path / "last.pth")["model"]
    for name, want in model.state_dict().items():
        torch.testing.assert_close(state[name], want, rtol=1e-4, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")
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


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--data", "nowhere"], "no such folder: nowhere"),
        (
            ["--batch-size", "25"],
            r"--batch-size 25 is larger than the data (24 images): pass a smaller one. A command that",
        ),
        (["--k-start", "900"], "900 clusters are more than the regions of one K-means (4 images of at most"),
        (["--k-start", "900"], "lower --k-start and --k-end, or raise --kmeans-group"),
        (["--k-start", "900", "--kmeans-group", "16"], "lower --k-start and --k-end, or raise --batch-size"),
        (["--size", "40"], "--size must be a multiple of 32, got 40"),
        (["--masks", "prior", "--prior", "grid"], "14 x 14 cells, of at least 4 x 4 pixels: pass --size 64 or more"),
        (["--hidden", "99999999999999999999"], "--hidden must be at least 1 and at most 65536"),
        (["--dry-run", "--prepare"], "not allowed with argument --dry-run"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
        (["--lr", "nan"], "--lr must be at least 0, got nan"),
        (["--accum", "3"], "cannot share --batch-size 8 in 3 micro-batches: pass a multiple of 3"),
        (["--out", "/dev/null/out"], "cannot make the folder /dev/null/out (Not a directory): pass another"),
    ],
)
def test_impossible_settings_are_refused_at_once(photos, tmp_path, refuse, flags, said):
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
    others = tmp_path / "others"
    others.mkdir()
    for i in range(24):
        picture(100 + i).save(others / f"{i}.png")
    assert "was trained on other images" in refuse("--data", others, "--out", finished[0], *SMALL)
    said = refuse("--data", others, "--out", tmp_path / "out", "--regions", finished[0] / "regions.npy", *SMALL)
    assert "belong to other data or settings" in said


def test_an_out_folder_inside_the_data_is_refused(photos, tmp_path, refuse):
    """Its strip.png would be a training image after a restart."""
    (tmp_path / "data").symlink_to(photos)
    assert "is inside --data" in refuse("--data", tmp_path / "data", "--out", photos / "out", *SMALL)
    assert not (photos / "out").exists()


def test_the_exit_status_of_the_process_is_2():
    done = subprocess.run([sys.executable, "train.py", "--data", "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "train.py: error: no such folder: nowhere; expected a folder of images, flat or nested\n"


def test_images_missing_since_the_maps_were_computed_are_counted_and_too_many_end_the_run(photos, tmp_path, refuse):
    """Of 24, one: more than 1 %. What was trained until then is saved."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(photos, data)
    flags = ["--data", data, "--out", out, *SMALL, "--workers", "1"]
    train.main([*map(str, flags), "--prepare"])
    victim = data / "a/04.png"
    victim.write_bytes(b"x" * victim.stat().st_size)
    assert "1 images of epoch 1, more than 1 %, can no longer be read" in refuse(*flags)
    assert load(out / "last.pth")["step"] == 3
    assert json.loads((out / "log.jsonl").read_text())["unreadable"] == 1


def test_the_installed_package_imports_only_installed_modules():
    modules = set(
        re.search(r"py-modules = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[1].replace('"', "").split(", ")
    )
    ours = {path.stem for path in ROOT.glob("*.py")} | {"runtime", "evals"}
    for name in modules:
        imported = set(re.findall(r"^(?:from|import) (\w+)", (ROOT / f"{name}.py").read_text(), re.M))
        assert imported & ours <= modules, name


# ---- the other ways to run it ----------------------------------------------------------------------------------------


def test_prepare_computes_the_maps_and_exits(photos, tmp_path, capsys):
    train.main(["--data", str(photos), "--out", str(tmp_path / "out"), *SMALL, "--prepare"])
    assert "regions.npy: 24 images of at most" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["regions.json", "regions.npy"]


def test_a_dry_run_prints_the_plan_and_the_time_and_writes_nothing(photos, tmp_path, capsys):
    train.main(["--data", str(photos), "--out", str(tmp_path / "out"), *SMALL, "--dry-run", "--accum", "2"])
    said = capsys.readouterr().out
    assert "12 in a, 12 in b\n3 epochs of 3 steps, 9 in all" in said
    assert "batches of 8: 1 process(es) x 2 micro-batch(es) x 4 images, 2 K-means of 4 images per step" in said
    assert re.search(r"3 steps of 4 of 8 images took [\d.e-]+ s each .* images/s\n", said)
    assert re.search(r"loading: [\d.e+]+ images/s with --workers 1, if each has a core; [\d:]+ in all", said)
    assert not (tmp_path / "out").exists()


def test_the_plan_of_the_papers_run(capsys, monkeypatch, tmp_path):
    """K of Fig. 5; the learning rate 0.3 * 4096 / 256 * K / 16; 4 GB of region maps."""
    monkeypatch.setattr(distributed, "cores", lambda: 64)
    monkeypatch.setenv("WORLD_SIZE", "8")
    args = train.parse_args(["--data", "x"])
    plan.print_plan(args, train.make_schedule(args, 1281167))
    plan.print_maps_plan(tmp_path / "regions.npy", 1281167, 56, seconds_per_map=0.02)
    said = capsys.readouterr().out
    assert "300 epochs of 312 steps, 93,600 in all" in said
    assert "C4, of masks, 14 x 14 cells; C5, of features, 7 x 7" in said
    assert "batches of 4096: 8 process(es) x 1 micro-batch(es) x 512 images, 128 K-means of 32 images per step" in said
    assert "region maps: 4.02GB" in said and "06:40 on 64 cores" in said
    table = {
        int(row.split()[0]): row.split()[1:]
        for row in said.splitlines()
        if row.strip()[:1].isdigit() and ":" not in row
    }
    assert {epoch: int(row[0]) for epoch, row in table.items()} == {1: 128, 3: 128, 40: 128, 100: 119, 200: 74, 300: 4}
    assert float(table[3][1]) == pytest.approx(4.8 * 128 / 16, rel=1e-2)  # the warm-up's end
    assert float(table[300][1]) < 1e-6 and float(table[1][2]) == 0.99 and float(table[300][2]) == 1


@pytest.mark.parametrize("gpu, native, precision", [(0, 0, "float32"), (1, 0, "float32"), (1, 1, "bfloat16")])
def test_bfloat16_is_the_default_on_gpus_that_do_not_emulate_it(monkeypatch, gpu, native, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert train.parse_args(["--data", "x"]).precision == precision


def test_a_machine_with_other_images_than_rank_0_s_is_refused(photos, tmp_path, refuse, monkeypatch):
    """Its epochs would have other steps, or the same steps other images."""
    flags = ["--data", photos, "--out", tmp_path / "out", *SMALL]
    monkeypatch.setattr(distributed, "of_rank_0", lambda value: (*value[:1], 23, *value[2:]))
    said = refuse(*flags)
    assert "rank 0 sees other images than rank 0, or 24 that can be read: give all machines the same --data" in said


@pytest.mark.parametrize("mode", [["--dry-run"], []])
def test_runs_that_exceed_the_memory_are_refused_before_training(photos, tmp_path, refuse, monkeypatch, mode):
    """With the --accum that does fit; a run that has begun goes on, for it is an estimate."""
    flags = ["--data", photos, "--out", tmp_path / "out", *SMALL, "--size", 64, "--regions", tmp_path / "r.npy", *mode]
    model = r2o.R2O("tiny", hidden=16, dim=8)
    needed = [plan.training_memory(model, n, 64, torch.device("cpu")) for n in (2, 4, 8)]
    monkeypatch.setattr(plan, "memory_of", lambda device: 0.5 * (needed[1] + needed[2]))
    said = refuse(*flags)
    assert "too little memory for each process (about" in said and "for 8 images at a time" in said
    assert "pass --accum 2, or use more machines" in said and not (tmp_path / "out/last.pth").exists()
    monkeypatch.setattr(plan, "memory_of", lambda device: 0.5 * (needed[0] + needed[1]))
    assert "pass --accum 4, or" in refuse(*flags, "--accum", 2)
    monkeypatch.setattr(plan, "memory_of", lambda device: 0.5 * (needed[1] + needed[2]))
    train.main([str(f) for f in (*flags, "--accum", 2)])
    monkeypatch.setattr(plan, "memory_of", lambda device: 1000)
    assert "pass a lower --size or another --arch" in refuse(*flags[: -len(mode) or None], "--out", tmp_path / "2")
    if not mode:
        train.main([str(f) for f in (*flags, "--accum", 2)])


def test_the_memory_estimate_also_serves_synchronized_batch_norm(monkeypatch):
    """On several GPUs. Its forward pass would wait for ranks that do not lack memory."""
    monkeypatch.setattr(r2o, "extension", lambda device: "cuda")
    monkeypatch.setattr(plan.r2o_ops, "r2o_C", type("Built", (), {"gram_bytes_cuda": 2**31}))
    model = r2o.R2O("tiny", hidden=16, dim=8)
    sizes = [(8, 64, torch.device("cpu")), (16, 64, torch.device("cpu"))]
    before = [plan.training_memory(model, *size) for size in sizes]
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [plan.training_memory(model, *size) for size in sizes] == before and before[0] < before[1]


def test_estimating_memory_has_no_side_effects():
    model = r2o.R2O("tiny", hidden=16, dim=8)
    before, state = {name: x.clone() for name, x in model.state_dict().items()}, torch.get_rng_state()
    plan.training_memory(model, 8, 64, torch.device("cpu"))
    assert same(before, dict(model.state_dict())) and torch.equal(state, torch.get_rng_state())


def test_the_memory_estimate_matches_weights_and_saved_activations():
    """Against a count of all storage alive after the forward pass, at another number of images."""
    model = r2o.R2O("resnet18", hidden=64, dim=32)
    alive = {}

    def keep(x):
        alive[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        kept = r2o.encode(
            model.online["encoder"], torch.zeros(2 * 5, 3, 64, 64).contiguous(memory_format=torch.channels_last)
        )
    weights = sum(p.nbytes for p in model.parameters())
    weights += 3 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
    del kept
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    expected = weights + sum(n for storage, n in alive.items() if storage not in own) + 5 * 6 * 12 * 64**2
    expected += 3 * 3 * 5 * 64 * 32 * 32 * 4  # three maps of 64 channels at stride 2, of two views and the image
    assert plan.training_memory(model, 5, 64, torch.device("cpu")) == pytest.approx(expected, rel=0.02)


def test_accumulated_micro_batches_count_as_one_step(photos, tmp_path):
    """EMA, schedules and K follow the optimizer's steps: as many, and the same, as without parts."""
    logs = []
    for accum in ("1", "2"):
        out = tmp_path / accum
        train.main(["--data", str(photos), "--out", str(out), *SMALL, "--workers", "0", "--accum", accum])
        logs.append([json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()])
        assert load(out / "last.pth")["step"] == 9
    for one, two in zip(*logs, strict=True):
        assert all(one[key] == two[key] for key in ("epoch", "K", "lr", "tau"))
        assert one["loss"] == pytest.approx(two["loss"], rel=0.3)  # batch norm sees 4 images, not 8


def test_no_two_samples_of_an_epoch_are_augmented_alike(photos, tmp_path):
    """Whichever process draws them."""
    images = list_images(photos)
    maps, header = region_maps(images, tmp_path / "regions.npy", prior="grid", size=8)
    data = ImageRegions(images, maps, header, size=32)
    keys = [key for r in range(4) for batch in Batches(24, 8, range(3), 0, r, 4) for key in batch]
    boxes = torch.stack([data[key]["boxes"] for key in keys])
    assert len(keys) == 24 and len(boxes.flatten(1).unique(dim=0)) == 24


def test_tensorboard_gets_the_figures_of_the_log(photos, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.main(["--data", str(photos), "--out", str(tmp_path), *SMALL, "--workers", "0", "--tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for name in ("loss", "spread", "K", "skipped"):
        assert [e.value for e in events.Scalars(name)] == pytest.approx([row[name] for row in log])
    assert [e.step for e in events.Images("strip")] == [1, 2, 3]


def test_asking_for_tensorboard_without_the_package_is_refused(photos, refuse, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert "pip install tensorboard" in refuse("--data", photos, *SMALL, "--tensorboard")


def test_a_compiled_encoder_trains_like_the_eager_one(photos, tmp_path, monkeypatch):
    """Traced whole, there and back, by torch.compile, but without generating code, which takes a minute."""
    traced, losses = [], []

    def compile(f, compile=torch.compile):
        traced.append(f)
        return compile(f, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", compile)
    for out, flags in ((tmp_path / "plain", []), (tmp_path / "compiled", ["--compile"])):
        train.main(["--data", str(photos), "--out", str(out), *SMALL, "--workers", "0", "--epochs", "1", *flags])
        losses.append(json.loads((out / "log.jsonl").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert traced == [r2o.encode_c4, r2o.encode]


def test_precision_applies_to_activations_and_not_to_weights(photos, tmp_path):
    convolved, losses, trained = [], [], []

    def note(module, _, output):
        if isinstance(module, torch.nn.Conv2d) and output.requires_grad and not output.is_meta:
            convolved[-1].add(output.dtype)

    with torch.nn.modules.module.register_module_forward_hook(note):
        for precision in ("float32", "bfloat16"):
            convolved.append(set())
            out, flags = tmp_path / precision, [*SMALL, "--workers", "0", "--epochs", "1", "--precision", precision]
            train.main(["--data", str(photos), "--out", str(out), *flags])
            losses.append(json.loads((out / "log.jsonl").read_text())["loss"])
            trained.append(load(out / "last.pth")["model"])
    assert convolved == [{torch.float32}, {torch.bfloat16}]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]
    for a, b in zip(*(model.values() for model in trained), strict=True):
        assert a.dtype == b.dtype != torch.bfloat16


@pytest.mark.gpu
def test_batches_copied_ahead_to_a_gpu_equal_the_loader_s():
    batches = [{"image": torch.full((4, 8), i).pin_memory(), "factors": torch.full((4,), i)} for i in range(5)]
    for i, batch in enumerate(copy_ahead(iter(batches), torch.device("cuda"))):
        assert batch["image"].is_cuda and (batch["image"] == i).all()
        assert batch["factors"].device.type == "cpu" and (batch["factors"] == i).all()
    assert i == 4

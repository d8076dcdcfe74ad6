"""What a run of weeks meets: kills, stop signals, torn files, full disks, lost nodes, steps that are not finite. Real
processes, signals and files."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, command, load, picture, run, same

import r2o
import train
from runtime import checkpoint, cli, distributed, report
from runtime.progress import NonFiniteGuard, Progress
from runtime.storage import save_atomically, try_lock


def start(argv, **kwargs):
    """A process in a group of its own."""
    settings = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    settings["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in a shell's background
    return subprocess.Popen(argv, start_new_session=True, **(settings | kwargs))


def wait_for(condition, process=None, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def children(process) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def assert_same_end(out, want, logs=True):
    """The same weights, optimizer, film and log, to the last bit; only the speed differs."""
    for name in ("r2o.pth", "last.pth"):
        got, expected = ({k: v for k, v in load(path / name).items() if k != "args"} for path in (out, want))
        assert same(got, expected), name
    if logs:
        rows = [map(json.loads, (path / "log.jsonl").read_text().splitlines()) for path in (out, want)]
        assert [r | {"images/s": 0} for r in rows[0]] == [r | {"images/s": 0} for r in rows[1]]


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_at_twelve_random_moments_ends_with_the_same_bits(photos, finished, tmp_path):
    """In the midst of the region maps, of a step, of a checkpoint; resumed inside epochs and between."""
    out = tmp_path / "out"
    kills = [sys.executable, "tests/kill.py", "12", "0", str(out), "--data", str(photos), *SMALL, "--save-every", "2"]
    done = subprocess.run(kills, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    moments = done.stdout.split()
    assert len(moments) == 12 and {"maps", "checkpoint", "training"} <= set(moments), moments
    ends = sorted(tmp_path.glob("out-*"))
    assert ends
    for end in ends:
        assert_same_end(end, finished[0])
        maps = [np.load(path / "regions.npy") for path in (end, finished[0])]
        assert np.array_equal(*maps)
    assert re.search(r"resuming after step \d+, [12] of 3 in", (tmp_path / "out.log").read_text())  # inside an epoch


# ---- stop signals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
@pytest.mark.slow
def test_a_stop_signal_saves_after_the_step_and_sets_the_exit_status(photos, finished, tmp_path, number, status):
    """Sent to all processes, loader's workers too, as batch systems, and terminals at Ctrl-C, do."""
    out = tmp_path / "out"
    process = start(command(photos, out, "--workers", "2"))
    wait_for((out / "last.pth").exists, process)
    os.killpg(process.pid, number)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == status, printed
    saved = int(re.search(r"stop requested: saved after step (\d+)", printed)[1])
    assert 3 < saved < 9 and load(out / "last.pth")["step"] == saved and "Traceback" not in printed
    assert f"resuming after step {saved}" in run(photos, out)
    assert_same_end(out, finished[0])


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
@pytest.mark.slow
def test_stopping_while_computing_region_maps_prints_how_many_are_kept(tmp_path, number, status):
    picture(0, (500, 400)).save(tmp_path / "000.jpg")
    for i in range(1, 300):  # five seconds of maps after the first flush
        os.link(tmp_path / "000.jpg", tmp_path / f"{i:03}.jpg")
    out = tmp_path / "out"
    process = start(command(tmp_path, out, "--prepare", "--size", "224", "--workers", "1"))
    wait_for((out / "regions.progress").exists, process)
    os.killpg(process.pid, number)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == status and "Traceback" not in printed, printed
    kept = int(re.search(r"stopped: (\d+) of 300 region maps are kept; rerun the same command to continue", printed)[1])
    assert 0 < kept < 300 and json.loads((out / "regions.progress").read_text())["done"] == kept
    if number == signal.SIGTERM:
        rest = command(tmp_path, out, "--prepare", "--size", "224")
        printed = subprocess.run(rest, cwd=ROOT, capture_output=True, text=True)
        assert printed.returncode == 0 and f"{kept}/300" in printed.stderr


@pytest.mark.slow
def test_ctrl_c_ends_an_evaluation_with_one_line_and_130(pairs, tmp_path):
    flags = ["--ckpt", "random", "--arch", "resnet18", "--json", str(tmp_path / "x.json"), "--workers", "1"]
    program = [sys.executable, "-m", "evals.abo", "--data", str(pairs / "images"), str(pairs / "masks"), *flags]
    process = start(program)
    wait_for(lambda: children(process), process)  # its loader's worker
    os.killpg(process.pid, signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "evals.abo: interrupted" in printed and "Traceback" not in printed, printed


@pytest.mark.slow
def test_a_killed_loader_worker_ends_the_run_with_one_line(photos, tmp_path):
    process = start(command(photos, tmp_path / "out", "--epochs", "500", "--workers", "1"))
    wait_for((tmp_path / "out/last.pth").exists, process)
    os.kill(children(process)[-1], signal.SIGKILL)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and "Traceback" not in printed, printed
    assert "a loader worker was killed, perhaps for lack of memory: lower --workers" in printed
    assert load(tmp_path / "out/last.pth")["step"] >= 3


@pytest.mark.parametrize(
    "error, said",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried …"), "the GPU's memory is too small (CUDA out of memory"),
        (MemoryError(), "the memory is too small (MemoryError): lower --batch-size"),
        (RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"), "/dev/shm is too small"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal … workers are out of shared memory."),
            "/dev/shm is",
        ),
    ],
)
def test_missing_resources_of_the_machine_are_reported_in_one_line(capsys, error, said):
    def work():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run("program", work)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"program: error: {said}")


def test_a_dead_loader_worker_is_reported_once(monkeypatch, capsys):
    """As a read that ends, and by PyTorch's handler of SIGCHLD, which raises wherever the main thread is then."""

    def handler(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    def extract(tb, extract=cli.traceback.extract_tb):
        signal.raise_signal(signal.SIGCHLD)
        return extract(tb)

    monkeypatch.setattr(cli.traceback, "extract_tb", extract)
    before = signal.signal(signal.SIGCHLD, handler)
    try:
        with pytest.raises(SystemExit) as stop:
            cli.run("program", lambda: exec(compile("raise EOFError", "torch/utils/data/dataloader.py", "exec")))
    finally:
        signal.signal(signal.SIGCHLD, before)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and "program: error: a loader worker was killed" in lines[0]


def test_running_out_of_memory_on_a_cpu_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run("program", lambda: torch.empty(2**50))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and "program: error: the memory is too small (" in lines[0]


def test_a_second_ctrl_c_interrupts_what_the_first_waits_for(monkeypatch):
    monkeypatch.setattr(signal, "raised", [], raising=False)
    with pytest.raises(KeyboardInterrupt), distributed.StopSignals(), distributed.hold_signals():
        os.kill(os.getpid(), signal.SIGINT)
        signal.raised.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        signal.raised.append(2)
    assert signal.raised == [1]
    with pytest.raises(KeyboardInterrupt), distributed.StopSignals():
        with distributed.hold_signals():
            os.kill(os.getpid(), signal.SIGINT)
            signal.raised.append(3)
        signal.raised.append(4)
    assert signal.raised == [1, 3]


def test_a_second_ctrl_c_ends_at_once():
    with distributed.StopSignals(deferred=True) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("whom", ["torchrun", "one worker"])
@pytest.mark.slow
def test_a_stopped_torchrun_saves_before_it_exits(photos, tmp_path, whom):
    """A worker that alone is told tells the others."""
    out = tmp_path / "out"
    process = start(command(photos, out, "--epochs", "500", torchrun=2))
    wait_for((out / "last.pth").exists, process)
    os.kill(process.pid if whom == "torchrun" else children(process)[1], signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert printed.count("stop requested: saved after step") == 1, printed
    assert load(out / "last.pth")["step"] == int(re.search(r"saved after step (\d+)", printed)[1])


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(finished, tmp_path):
    """A finished run's checkpoints, of step 9 and of step 6."""
    for name in ("last.pth", "previous.pth", "regions.npy", "regions.json"):
        (tmp_path / name).write_bytes((finished[0] / name).read_bytes())
    assert (load(tmp_path / "last.pth")["step"], load(tmp_path / "previous.pth")["step"]) == (9, 6)
    return tmp_path


def torn(path, how):
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    path.write_bytes({"cut": whole[:middle], "flipped": flipped, "empty": b""}[how])


@pytest.mark.parametrize("how", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_previous_one(photos, finished, copy, capsys, how):
    """Loadable means all of it: tensors are under checksums."""
    torn(copy / "last.pth", how)
    train.main(["--data", str(photos), "--out", str(copy), *SMALL])
    said = capsys.readouterr()
    assert "last.pth is not a checkpoint that can be loaded" in said.err and "resuming from" in said.err
    assert "resuming after step 6" in said.out
    assert_same_end(copy, finished[0], logs=False)
    assert (copy / "last.pth.damaged").exists()


def test_a_run_killed_between_two_renames_resumes_from_the_previous_checkpoint(photos, finished, copy, capsys):
    (copy / "last.pth").unlink()
    train.main(["--data", str(photos), "--out", str(copy), *SMALL])
    assert "resuming after step 6" in capsys.readouterr().out
    assert_same_end(copy, finished[0], logs=False)


def test_a_run_without_a_loadable_checkpoint_does_not_start_over(photos, copy, refuse):
    for name in ("last.pth", "previous.pth"):
        torn(copy / name, "cut")
    said = refuse("--data", photos, "--out", copy, *SMALL)
    assert "last.pth" in said and "previous.pth" in said and "delete them to start anew" in said
    assert (copy / "last.pth").exists()


def test_a_run_finishes_even_if_no_checkpoint_fits_on_the_disk(photos, finished, tmp_path):
    """A limit on the size of files stands for the disk: last.pth does not fit, the rest does."""
    out = tmp_path / "out"
    size = (finished[0] / "last.pth").stat().st_size
    assert (finished[0] / "r2o.pth").stat().st_size < 0.7 * size
    limit = int(0.8 * size)
    argv = command(photos, out, "--workers", "0")  # whose shared memory would be limited too
    full = start(argv, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    printed = full.communicate(timeout=100)[0]
    assert full.returncode == 0, printed
    assert printed.count("last.pth (File too large): no earlier one exists") == 3
    assert not list(out.glob("last.pth*"))
    assert same(load(out / "r2o.pth")["state_dict"], load(finished[0] / "r2o.pth")["state_dict"])


def test_a_stop_signal_on_a_full_disk_is_a_failure(photos, finished, tmp_path, refuse, monkeypatch):
    monkeypatch.setattr(distributed, "agree", lambda finite, stop: (True, True))
    monkeypatch.setattr(checkpoint, "save_or_warn", lambda *a, **k: False)
    assert "stop requested, but" in refuse("--data", photos, "--out", tmp_path, *SMALL, "--workers", "0")


def test_saving_is_atomic(tmp_path):
    path, before = tmp_path / "last.pth", tmp_path / "previous.pth"
    save_atomically(path, lambda f: f.write(b"one"), keep=before)
    assert not before.exists()
    save_atomically(path, lambda f: f.write(b"two"), keep=before)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, hard))
    try:
        for write in (lambda f: f.write(b"x" * 20000), lambda f: torch.save({"x": torch.rand(10000)}, f)):
            with pytest.raises(OSError):
                save_atomically(path, write, keep=before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (path.read_bytes(), before.read_bytes()) == (b"two", b"one") and len(list(tmp_path.iterdir())) == 2


def test_another_learning_rate_is_refused_without_changed(photos, copy, refuse, monkeypatch):
    flags = ["--data", photos, "--out", copy, *SMALL, "--lr", "0.5"]
    assert "--lr 1.0, now it is 0.5: pass --lr 1.0 to resume, or another --out to start anew (or --changed)" in refuse(
        *flags
    )
    assert "of a finished run: pass its own rates" in refuse(*flags, "--changed")  # r2o.pth would name a wrong one
    assert train.main([*map(str, flags[:-2]), "--changed"]) is None
    built = []
    monkeypatch.setattr(train, "build", lambda *args, build=train.build: built.extend(build(*args)) or built)
    (copy / "previous.pth").replace(copy / "last.pth")
    assert train.main([*map(str, flags), "--weight-decay", "0.25", "--changed"]) is None
    assert {group["weight_decay"] for group in built[2].param_groups} == {0.25}


def test_resuming_with_fewer_images_is_refused(photos, copy, refuse, monkeypatch):
    monkeypatch.setattr(train.ImageRegions, "__len__", lambda self: 23)
    flags = ["--data", photos, "--out", copy, *SMALL]
    assert "was trained on 24 images, of which 23 can be read now: restore the rest" in refuse(*flags)


def test_two_runs_do_not_share_an_out_folder(photos, tmp_path, refuse, monkeypatch):
    hold = "import sys, time; from runtime.storage import try_lock; lock = try_lock(sys.argv[1]); "
    hold += "print(lock, flush=True); time.sleep(99)"
    other = start([sys.executable, "-c", hold, str(tmp_path / ".lock")])
    assert "lock" in other.stdout.readline()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # does not wait for its end
    assert "another run is writing to" in refuse("--data", photos, "--out", tmp_path, *SMALL)
    other.kill()
    other.wait()
    assert try_lock(tmp_path / ".lock")  # died with it


# ---- steps that are not finite ---------------------------------------------------------------------------------------

FAULTY = """
import os, sys, torch, r2o, train
augment, crop, rank, calls = r2o.augment, r2o.crop_masks, os.environ["RANK"], []
def broken(views, *args):
    calls.append(1)
    x = augment(views, *args)
    return x * float("nan") if rank == "1" and len(calls) in (2, 5) else x
def blind(*args):  # two views a step
    return crop(*args) * (0 if rank == "1" and len(calls) in (3, 4) else 1)
r2o.augment, r2o.crop_masks = broken, blind
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_all_ranks_skip_a_non_finite_step_and_a_rank_without_pairs_takes_part(photos, tmp_path):
    """On rank 1 of 2, steps 2 and 5 of 9 are NaN, steps 3 and 4 show no mask to both views."""
    script, out = tmp_path / "faulty.py", tmp_path / "out"
    script.write_text(FAULTY)
    argv = command(photos, out, "--save-every", "0", torchrun=2)
    argv[argv.index("train.py")] = str(script)
    process = start(argv, env={**os.environ, "PYTHONPATH": str(ROOT)})
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 0, printed
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in log] == [1, 1, 0]
    assert all(np.isfinite(row["loss"]) and row["pairs"] > 0 for row in log)
    assert "epoch 1: 1 steps were skipped" in printed
    state = load(out / "last.pth")["model"]
    assert all(x.isfinite().all() for x in state.values())  # batch norm's statistics too


def test_ten_non_finite_steps_in_a_row_end_the_run(photos, finished, tmp_path, refuse, monkeypatch):
    calls = []

    def augment(*args, augment=r2o.augment):
        calls.append(1)
        return augment(*args) * (float("nan") if len(calls) > 4 else 1)

    monkeypatch.setattr(r2o, "augment", augment)
    flags = ["--data", photos, "--out", tmp_path, *SMALL, "--workers", "0", "--epochs", "6", "--save-every", "1"]
    said = refuse(*flags)
    assert len(calls) == 14 and "10 steps in a row, up to step 14" in said and "--changed" in said
    state = load(tmp_path / "last.pth")
    assert state["step"] == 4 and state["streak"] == 0  # from before the streak, however often it could be saved
    assert load(tmp_path / "previous.pth")["step"] == 3
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in log] == [0, 2, 3, 3]


def test_skipped_steps_leave_no_trace_and_are_counted_in_a_row_only(photos, tmp_path, monkeypatch):
    """Every other step of 24 is skipped: 12 in all, none of them changes weights, target, momentum or statistics."""
    states, calls = [], []

    def augment(*args, augment=r2o.augment):
        calls.append(1)
        return augment(*args) * (float("nan") if len(calls) % 2 == 0 else 1)

    class Guard(NonFiniteGuard):
        def remember(self):
            super().remember()
            self.at_first = everything()

    class Counter(Progress):
        def add(self, stats, finite):
            super().add(stats, finite)
            states.append((not finite, same(guard[0].at_first, everything())))

    def build(*args, build=train.build):
        built.extend(build(*args))
        return built

    def everything():
        model, _, optimizer = built
        floats = {n: x.clone() for n, x in model.state_dict().items() if x.is_floating_point()}
        return floats, [s["momentum"].clone() for s in optimizer.state.values()]

    built, guard = [], []
    monkeypatch.setattr(r2o, "augment", augment)
    monkeypatch.setattr(train, "build", build)
    monkeypatch.setattr(train, "Progress", Counter)
    monkeypatch.setattr(train, "NonFiniteGuard", lambda *args: guard.append(Guard(*args)) or guard[0])
    train.main(["--data", str(photos), "--out", str(tmp_path), *SMALL, "--workers", "0", "--epochs", "8"])
    assert states == [(False, False), (True, True)] * 12
    assert load(tmp_path / "last.pth")["step"] == 24  # skipped, but done: a rerun does not train


def test_non_finite_weights_are_never_saved(photos, tmp_path, refuse, monkeypatch):
    def learning_rate(step, *args):
        return 0.1 if step < 4 else float("inf")

    monkeypatch.setattr(r2o, "learning_rate", learning_rate)
    said = refuse("--data", photos, "--out", tmp_path, *SMALL, "--workers", "0", "--save-every", "1")
    assert "the weights are not finite after step 5" in said
    state = load(tmp_path / "last.pth")
    assert state["step"] == 4 and all(x.isfinite().all() for x in state["model"].values())


def test_a_collapse_is_reported(photos, tmp_path, monkeypatch, capsys):
    """Projections that are all the same."""

    def mlp(*args, mlp=r2o.mlp):
        net = mlp(*args)
        torch.nn.init.zeros_(net[-1].weight)
        return net

    monkeypatch.setattr(r2o, "mlp", mlp)
    train.main(["--data", str(photos), "--out", str(tmp_path), *SMALL, "--workers", "0", "--epochs", "1", "--lr", "0"])
    assert "warning: epoch 1: the projections have collapsed to a point" in capsys.readouterr().err
    assert json.loads((tmp_path / "log.jsonl").read_text())["spread"] < 1e-3


def test_each_symptom_raises_one_alarm():
    fine = {"spread": 0.8, "pairs": 5.0, "K": 4, "largest": 0.4, "skipped": 0}
    assert report.alarms(fine) == []
    for sign in ({"spread": 0.01}, {"pairs": 0.0}, {"largest": 0.99}, {"skipped": 2}):
        assert len(report.alarms(fine | sign)) == 1
    fine = fine | {"masks": 90.0, "largest": 0.99}  # large segments of the prior are no collapse, hardly any are bad
    assert report.alarms(fine, "prior") == [] and len(report.alarms(fine | {"masks": 1.3}, "prior")) == 1


# ---- many processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_resumes_after_a_worker_was_killed(photos, tmp_path):
    """--max-restarts: the same weights as two processes that nobody killed."""
    for name in ("whole", "hurt"):
        argv = command(photos, tmp_path / name, "--epochs", "6", "--save-every", "1", torchrun=2)
        process = start([*argv[:3], "--max-restarts=2", *argv[3:]])
        if name == "hurt":
            wait_for((tmp_path / name / "last.pth").exists, process)
            os.kill(children(process)[-1], signal.SIGKILL)
        printed = process.communicate(timeout=150)[0]
        assert process.returncode == 0, printed
        assert ("resuming after step" in printed) == (name == "hurt")
    assert_same_end(tmp_path / "hurt", tmp_path / "whole")


@pytest.mark.slow
def test_two_nodes_train_together_and_one_resumes_alone(photos, tmp_path):
    """Two torchruns that meet at a rendezvous, as on two machines; one is lost, with all its processes."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    out = tmp_path / "out"
    argv = command(photos, out, "--epochs", "15", "--save-every", "1", torchrun=1)
    rendezvous = f"--nnodes=1:2 --rdzv-backend=c10d --rdzv-endpoint=localhost:{port} --rdzv-id=7 --max-restarts=3"
    rendezvous += " --rdzv-conf=join_timeout=60,last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
    argv[argv.index("--standalone") : argv.index("--standalone") + 1] = rendezvous.split()
    first = start(argv)
    wait_for(lambda: socket.socket().connect_ex(("localhost", port)) == 0, first)  # keeps the rendezvous
    second = start(argv)
    wait_for((out / "last.pth").exists, first)
    for pid in (*children(second), second.pid):
        os.killpg(pid, signal.SIGKILL)
    printed = first.communicate(timeout=120)[0]
    printed += second.communicate()[0]
    assert first.returncode == 0, printed
    assert "tiny on 2 x cpu" in printed and "tiny on 1 x cpu" in printed and "resuming after step" in printed
    assert (out / "r2o.pth").exists() and load(out / "last.pth")["step"] == 45


NORMLESS = """
import sys, torch, train
norm = torch.nn.modules.batchnorm._BatchNorm
norm.forward = lambda self, x: x * self.weight.view(1, -1, *[1] * (x.ndim - 2))
train.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("world, accum, group, assign", [(2, 2, 12, "pixel"), (4, 1, 24, "region")])
def test_the_first_loss_does_not_depend_on_the_number_of_processes_or_parts(
    photos, tmp_path, world, accum, group, assign
):
    """With batch norm out of the way, which is per process and part. One step of 24 images: in two parts on two
    processes, which share a K-means of 12; and on four, which share one of 24."""
    script = tmp_path / "normless.py"
    script.write_text(NORMLESS)
    more = ["--batch-size", "24", "--epochs", "1", "--workers", "0", "--regions", str(tmp_path / "regions.npy")]
    more += ["--kmeans-group", str(group), "--assign", assign]

    def first_step(name, *flags, torchrun=0):
        argv = command(photos, tmp_path / name, *more, *flags, torchrun=torchrun)
        argv[argv.index("train.py")] = str(script)
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        row = json.loads((tmp_path / name / "log.jsonl").read_text())
        return row, load(tmp_path / name / "r2o.pth")["state_dict"]["conv1.weight"]

    want, want_weights = first_step("one")
    row, weights = first_step("many", "--accum", str(accum), torchrun=world)
    assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
    assert (row["pairs"], row["masks"]) == pytest.approx((want["pairs"], want["masks"]))
    torch.testing.assert_close(weights, want_weights, rtol=1e-3, atol=1e-5)


def test_a_program_that_fails_does_not_wait_for_its_workers(tmp_path):
    """An exception that nobody catches keeps the loader alive, and its workers ignore the SIGTERM that ends them."""
    script = tmp_path / "fails.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch\nfrom runtime import distributed\n"
        "init = distributed.ignore_stop_signals\n"
        "loader = torch.utils.data.DataLoader(range(99), num_workers=2, worker_init_fn=init)\n"
        "for x in loader:\n"
        "    kept = iter(loader)\n"
        "    raise ArithmeticError('as planned')\n"
    )
    done = subprocess.run([sys.executable, script], timeout=60, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith("ArithmeticError: as planned")


def test_importing_the_runtime_keeps_a_program_s_own_processes_alive(tmp_path):
    """As one does that calls torch.hub.load: at its exit Python waits for the processes that are no daemons."""
    script = tmp_path / "imports.py"
    script.write_text(
        f"import multiprocessing, pathlib, sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "import hubconf, runtime.weights\n"
        "def work():\n    time.sleep(0.5)\n    pathlib.Path(sys.argv[1]).touch()\n"
        "if __name__ == '__main__':\n    multiprocessing.Process(target=work).start()\n"
    )
    subprocess.run([sys.executable, script, tmp_path / "written"], timeout=60, check=True)
    assert (tmp_path / "written").exists()

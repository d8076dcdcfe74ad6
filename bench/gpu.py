"""Everything that needs a GPU, in stages that need no network:

    make gpu                                # all, each at most seven minutes, after the build
    make gpu GPU="--seconds 120"            # each at most two: what was measured until then is kept
    make gpu STAGE=3 GPU="--authors DIR"    # one stage

    1 tests    the tests that need a GPU: ops, a training step, streams, host waits
    2 checks   memcheck, racecheck, synccheck and initcheck (compute-sanitizer) on every op, small
    3 ops      every op, the clustering and the mask step beside other ways to do them; times of K-means' kernels
    4 train    ResNet-50's step in bf16 at B = 32, 256, 512: masks predicted or given, one or two streams, compiled
    5 learn    ResNet-18 on --data (class folders of small images), k-NN; best overlap on --photos, before and after

Writes bench/results/<GPU>-<date>-<stage>.json and .md. Exit status: 0 passed, 1 something failed, 2 no GPU.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench as timing
import r2o
from runtime import plan

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ("memcheck", "racecheck", "synccheck", "initcheck")
N, D = 3000, 1024  # points and dimensions of one K-means at training


class Failed(Exception):
    pass


def call(*command, **more) -> str:
    """Run a command, with `more` environment variables; print and return its output. Raises Failed if it fails."""
    print("$", *command, flush=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen([str(c) for c in command], cwd=ROOT, env=os.environ | more, text=True, **pipes)
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.strip())
    if process.wait():
        raise Failed(f"{' '.join(map(str, command))}: status {process.returncode}: {lines[-1] if lines else ''}")
    return "\n".join(lines)


# ---- Stages: each fills `found`, {name: figure or text}, which is written even if it fails midway --------------------


def tests(args, device, found: dict):
    found["pytest"] = call(sys.executable, "-m", "pytest", "-m", "gpu", "-rfEs", "--durations", "5").splitlines()[-1]


def checks(args, device, found: dict):
    """Runs without PyTorch's caching allocator, where an overrun of one tensor would land in another."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    env = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in CHECKS:
        program = [sys.executable, "tests/emulated.py", "1", "cuda"]
        try:
            said = call(tool, "--tool", check, "--error-exitcode", "1", *program, **env)
            found[check] = next((line.strip("= ") for line in said.splitlines() if "ERROR SUMMARY" in line), "passed")
        except Failed as e:
            found[check] = found["failed"] = str(e)  # the others run nevertheless


def clustering_goals(bench: timing.Bench, found: dict):
    """The whole clustering of one problem of training's size, and the times of its kernels."""
    x = torch.nn.functional.normalize(torch.rand(1, N, D, generator=torch.Generator().manual_seed(0)), dim=-1)
    x, valid = x.to(bench.device), torch.ones(1, N, dtype=torch.bool, device=bench.device)
    for K in timing.CLUSTERS:
        u = r2o.seeding_uniforms(1, K, torch.Generator().manual_seed(1)).to(bench.device)

        def ours(u=u):
            return r2o.kmeans_seeded(x, valid, u, timing.ITERS)

        bench.race(f"kmeans, {N} x {D}, K = {K}", {"r2o": ours, "plain PyTorch": timing.in_plain(ours)})
        found[f"kmeans {N} x {D} K={K}, ms"] = bench.rows[-2]["median ms"]
        found[f"kmeans {N} x {D} K={K}, extra MB"] = bench.rows[-2]["extra MB"]
        if bench.device.type == "cuda":
            found |= {f"K={K}: {name}": us for name, us in kernel_times(ours).items()}


def kernel_times(f) -> dict[str, str]:
    """For each kernel of f: calls and total microseconds per run, averaged over ten runs."""
    f()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            f()
        torch.cuda.synchronize()
    rows = [e for e in profile.key_averages() if e.device_time_total]
    names = [re.sub(r"^void |r2o::|\(anonymous namespace\)::", "", e.key).split("(")[0][:70] for e in rows]
    return {
        name: f"{e.count / 10:.0f} x, {e.device_time_total / 10:.1f} us" for name, e in zip(names, rows, strict=True)
    }


def ops(args, device, found: dict):
    bench = timing.Bench(device, 2)
    found |= {"rows": bench.rows, "rates": bench.rates}
    theirs = timing.authors_code(args.authors, device) if args.authors else None
    clustering_goals(bench, found)
    for B in (32, 256):
        data = timing.make_input(timing.pictures(None, timing.GROUP) * (B // timing.GROUP), device)
        for part in (timing.pooling, timing.clustering, timing.mask_step):
            part(bench, data, theirs)
            ops_goals({(row["what"].split(", C =")[0], row["who"]): row["median ms"] for row in bench.rows}, found)


def ops_goals(times: dict, found: dict):
    """The figures of GOALS that are known so far. times: medians in ms by (what, who)."""
    if ms := times.get(("region_pool, B = 32", "r2o")):
        found["region_pool, B = 32, us"] = 1000 * ms
    for K in timing.CLUSTERS:
        what = f"mask step, B = 32, K = {K}"
        if theirs := times.get((what, "authors (region)")):
            found[f"{what}: of the authors' time, %"] = 100 * times[what, "r2o, --assign region"] / theirs


def train(args, device, found: dict):
    bench = timing.Bench(device, 5)
    found |= {"rows": bench.rows, "rates": bench.rates}
    for B in (32, 256, 512):
        try:
            train_steps(bench, B, found)
        except torch.OutOfMemoryError as e:
            found[f"B={B}"] = f"out of memory: {str(e).splitlines()[0]}"
        torch.cuda.empty_cache()


def train_steps(bench: timing.Bench, B: int, found: dict):
    data = timing.make_input(timing.pictures(None, timing.GROUP) * (B // timing.GROUP), bench.device)
    model, before = r2o.R2O("resnet50", data.R).to(bench.device), len(bench.rows)
    with torch.autocast("cuda", torch.bfloat16):
        estimate = plan.training_memory(model, B, 224, bench.device)
    del model
    torch.cuda.reset_peak_memory_stats()
    timing.train_step(bench, data, 128, compiled=B == 256)
    rows, peak = bench.rows[before:], torch.cuda.max_memory_allocated()
    found[f"B={B}: memory at most, and estimated, GB"] = f"{peak / 1e9:.1f}, {estimate / 1e9:.1f}"
    for row in rows:
        found[f"B={B}, {row['who']}"] = f"{1000 * B / row['median ms']:.0f} images/s, {row['waits']} waits"
    steps = {row["who"]: row["median ms"] for row in rows}
    share = steps["masks predicted, one stream"] / steps["C4 forward, masks given"] - 1
    found[f"B={B}: mask prediction beyond the C4 forward, %"] = 100 * share


def learn(args, device, found: dict):
    if not (args.data and args.photos):
        found["not run"] = "pass --data and --photos"
        return
    flags = f"--arch resnet18 --size 96 --epochs {args.epochs} --batch-size 256 --k-start 32 --k-end 6 --lr-k 0"
    with tempfile.TemporaryDirectory() as out:
        began = time.monotonic()
        call(sys.executable, "train.py", "--data", args.data, "--out", out, *flags.split())
        found["training, s"] = time.monotonic() - began
        for name, weights in (("before", ["random", "--arch", "resnet18"]), ("after", [f"{out}/r2o.pth"])):
            for measure, data in (
                ("knn", [args.data]),
                ("abo", [args.photos / "images", args.photos / "segmentations"]),
            ):
                file = f"{out}/{measure}-{name}.json"
                where = ["--data", *data, "--size", "96", "--json", file]
                call(sys.executable, "-m", f"evals.{measure}", "--ckpt", *weights, *where)
                found[f"{measure} {name}"] = json.loads(Path(file).read_text())


STAGES = {"1": tests, "2": checks, "3": ops, "4": train, "5": learn}

# docs/performance.md: figure -> at most
GOALS = {
    f"kmeans {N} x {D} K=128, ms": 0.7,
    f"kmeans {N} x {D} K=4, ms": 0.4,
    f"kmeans {N} x {D} K=128, extra MB": 64,
    "region_pool, B = 32, us": 10,
    "B=256: mask prediction beyond the C4 forward, %": 3,
    "mask step, B = 32, K = 128: of the authors' time, %": 1,
    "mask step, B = 32, K = 4: of the authors' time, %": 1,
}


def compare(found: dict) -> list[str]:
    """One line for each goal that this stage has a figure for."""
    reached = {name: (found[name], most) for name, most in GOALS.items() if name in found}
    return [
        f"{'reached' if x <= most else 'MISSED'}: {name} {x:.3g} (at most {most})"
        for name, (x, most) in reached.items()
    ]


def write(out: Path, about: dict, found: dict):
    out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", f"{about['gpu']} {about['date']} {about['stage']}".lower())
    (out / f"{name}.json").write_text(json.dumps(about | found, indent=1) + "\n")
    lines = [f"# {about['gpu']}, {about['date']}: {about['stage']}", ""]
    lines += [f"* {key}: {value}" for key, value in (about | found).items() if key not in ("rows", "rates")]
    for row in found.get("rows", []):
        lines += ["", f"## {row['what']}", ""] * (f"## {row['what']}" not in lines)
        lines.append(
            f"* {row['who']}: {row['median ms']:.3f} ms ({row['p10 ms']:.3f} to {row['p90 ms']:.3f}, n = {row['n']})"
        )
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    print(f"wrote {out / name}.md and .json")


def main(argv=None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", choices=STAGES, help="this one alone (default: all)")
    p.add_argument("--authors", type=Path, help="a checkout of github.com/KKallidromitis/r2o")
    p.add_argument("--data", type=Path, help="folder with train and val, of small images in class folders, for stage 5")
    p.add_argument("--photos", type=Path, help="folder with images and segmentations, for stage 5")
    p.add_argument("--epochs", type=int, default=10, help="of stage 5")
    p.add_argument("--seconds", type=int, default=420, help="time limit of each stage")
    p.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # run the stage in this process
    p.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder for the results")
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        p.exit(2, "bench/gpu.py: error: PyTorch sees no GPU here: run it on a machine that has one\n")
    if args.authors and not (args.authors / "utils/mask_utils.py").exists():
        p.error(f"--authors {args.authors} holds no utils/mask_utils.py: pass a checkout of KKallidromitis/r2o")
    for folder in filter(None, (args.data and args.data / "val", args.photos and args.photos / "segmentations")):
        if not folder.is_dir():
            p.error(f"there is no folder {folder}: see --help")
    if not args.here:
        return run_stages(argv or sys.argv[1:], [args.stage] if args.stage else [*STAGES], args.seconds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # out of time: what was measured is written
    device, began, found = torch.device("cuda", 0), time.monotonic(), {}
    about = {
        "stage": STAGES[args.stage].__name__,
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
    }
    about |= {"date": time.strftime("%Y-%m-%d")}
    try:
        STAGES[args.stage](args, device, found)
    except Failed as e:
        found["failed"] = str(e)
    except SystemExit:
        found["failed"] = f"not finished in {args.seconds} s"
    except Exception as e:
        found["failed"] = f"{type(e).__name__}: {e}"
        raise
    finally:  # what was measured before something failed is kept
        lines = compare(found)
        print("\n".join([found.get("failed", "ended"), *lines]))
        write(args.out, about | {"seconds": round(time.monotonic() - began)}, found | {"goals": lines})
    return int("failed" in found or any(line.startswith("MISSED") for line in lines))


def run_stages(flags: list[str], stages: list[str], seconds: int) -> int:
    """Build r2o_C; run each stage in its own session, which is ended as a whole if it takes too long."""
    try:
        call(sys.executable, "setup.py", "-q", "build_ext", "--inplace", FORCE_CUDA="1")
    except Failed as e:
        print(e)
        return 1
    failed = []
    for stage in stages:
        command = [sys.executable, __file__, *flags, "--stage", stage, "--here"]
        process = subprocess.Popen(command, start_new_session=True)
        for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, 30), (0, None)):
            try:
                status = process.wait(patience)
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, number)
        if status:
            failed.append(STAGES[stage].__name__)
    print(f"failed, missed a goal, or took over {seconds} s: {', '.join(failed)}" if failed else "all stages passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

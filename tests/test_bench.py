"""bench/bench.py: its contestants run and solve the same problem. What it measures is not tested: machines differ."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench/bench.py"


def bench(*args, before="pass"):
    """Runs bench.py in a process of its own, after some Python."""
    script = f"import sys; sys.path.insert(0, {str(BENCH.parent)!r}); import bench; {before}; bench.main()"
    return subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True)


@pytest.mark.slow
def test_all_contestants_of_the_evaluation_shapes_reach_the_same_inertia(tmp_path):
    """On smaller problems than the bench's own."""
    small = "bench.EVALUATION = [(8, 49, 64), (4, 196, 64), (2, 784, 64)]"
    run = bench("--only", "evaluation", "--seconds", 0, "--out", tmp_path, before=small)
    assert run.returncode == 0, run.stderr
    (figures,), (table,) = tmp_path.glob("*.json"), tmp_path.glob("*.md")
    rows = json.loads(figures.read_text())["rows"]
    assert len({row["what"] for row in rows}) == 3
    for row in rows:
        assert row["n"] >= 3 and row["floor ms"] > 0
        assert row["inertia / ours"] == pytest.approx(1, abs=1e-3)
        assert f"| {row['who']} |" in table.read_text()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--batches", "40"], "--batches must be multiples of 32"),
        (["--authors", "."], "holds no utils/mask_utils.py"),
        (["--only", "pools"], "pass some of pooling"),
        (["--images", "."], "no images in"),
    ],
)
def test_bad_arguments_end_in_one_line_and_status_2(args, message, tmp_path):
    args = [str(tmp_path) if a == "." else a for a in args]
    run = bench(*args)
    assert run.returncode == 2 and message in run.stderr.splitlines()[-1]


def test_without_a_gpu_make_gpu_says_so_and_ends_with_status_2():
    run = subprocess.run([sys.executable, BENCH.parent / "gpu.py", "--stage", "2"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "bench/gpu.py: error: PyTorch sees no GPU here: run it on a machine that has one\n"


def test_gpu_results_are_compared_with_the_documented_targets():
    script = f"import sys; sys.path.insert(0, {str(BENCH.parent)!r}); import gpu; goals = gpu.GOALS; "
    script += "print(*gpu.compare(dict(goals)), *gpu.compare({k: 2 * v for k, v in goals.items()}), sep='\\n'); "
    script += "print(*goals.values(), sep='\\n')"
    lines = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.splitlines()
    count = len(lines) // 3
    assert count > 3 and [line.split(":")[0] for line in lines[: 2 * count]] == ["reached"] * count + ["MISSED"] * count
    documented = (BENCH.parent.parent / "docs/performance.md").read_text()
    assert all(f"at most {float(value):g} " in documented for value in lines[2 * count :])

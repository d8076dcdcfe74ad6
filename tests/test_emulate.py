"""The CUDA kernels, unmodified, on a CPU (csrc/emulate): they equal their references and break no rule of a GPU."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import r2o_ops

sys.path.insert(0, str(ROOT / "csrc/emulate"))
import build

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")]
OUT = ROOT / "build/emulate"


@pytest.fixture(scope="module")
def emulator():
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build.build(OUT)


def rebuild(tmp_path, change) -> Path:
    """The folder of another build, of changed sources."""
    folder = tmp_path / "build"
    shutil.copytree(OUT, folder, ignore=shutil.ignore_patterns("*.gch"))
    (folder / "cuda.h.gch").symlink_to(OUT / "cuda.h.gch")
    build.build(folder, change)
    return folder


def emulate(folder, orders: int, *only: str) -> tuple[int, str]:
    """The exit status of emulated.py, and its last line."""
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests")))
    command = [sys.executable, ROOT / "tests/emulated.py", str(orders), "cpu", *only]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    return done.returncode, (done.stdout + done.stderr).strip().splitlines()[-1]


@pytest.mark.parametrize("op", ["region_pool", "kmeans", "crop_masks", "mask_pool"])
def test_kernels_equal_their_references_in_any_order_of_threads_and_blocks(emulator, op):
    assert emulate(OUT, 4, op) == (0, "all equal")


def test_k_means_of_fewer_groups_at_a_time_is_the_same(emulator, tmp_path):
    """As many as their dot products have room, here for one group."""
    folder = rebuild(tmp_path, lambda name, text: text.replace("kGramBytes / (N", "4096 / (N"))
    assert emulate(folder, 1, "kmeans") == (0, "all equal")


BREAKS = {
    "a barrier removed before a sum is read": (
        "kmeans.cu",
        "if (lane == 0) part[warp] = v;\n  __syncthreads();",
        "if (lane == 0) part[warp] = v;",
        "shared memory is read before it is written",
    ),
    "a barrier removed before the next round": (
        "kmeans.cu",
        "    __syncthreads();  // before the next round reads weights and writes picks\n",
        "",
        "a race (a read of what another thread has written",
    ),
    "an addition that is not atomic": (
        "region_pool.cu",
        "atomicAdd(&pixels[r * cells + i / w / tall * W + i % w / wide], 1)",
        "pixels[r * cells + i / w / tall * W + i % w / wide] += 1",
        "a race",
    ),
    "an index that is one too large": (
        "kmeans.cu",
        "k = threadIdx.x; k < used; k += kThreads",
        "k = threadIdx.x; k <= used; k += kThreads",
        "an access outside",
    ),
    "the last block's regions not limited": (
        "region_pool.cu",
        "regions = min(kRegions, R - first)",
        "regions = kRegions",
        "an access outside all tensors",
    ),
    "a bound on lanes left out": (
        "region_pool.cu",
        "count = cell < cells ? pixels[warp * cells + cell] : 0",
        "count = pixels[warp * cells + cell]",
        "shared memory",
    ),
    "a barrier that not all threads reach": (
        "region_pool.cu",
        "  if (warp < regions) {",
        "  if (threadIdx.x < 99) __syncthreads();\n  if (warp < regions) {",
        "barrier",
    ),
    "a ballot with half of its mask": (
        "region_pool.cu",
        "__ballot_sync(kAllLanes, count > 0)",
        "__ballot_sync(0xffffu, count > 0)",
        "a lane that is not in its own mask",
    ),
    "shared memory that is not cleared": (
        "crop_masks.cu",
        "i += blockDim.x) taps[i] = 0;",
        "i += blockDim.x) continue;",
        "shared memory is read before it is written",
    ),
    "an array that is not aligned": (
        "crop_masks.cu",
        "taps_x = taps + size * h;",
        "taps_x = reinterpret_cast<float*>(reinterpret_cast<char*>(taps) + 4 * size * h - 2);",
        "an access that is not aligned",
    ),
    "more threads than a block can have": (
        "kmeans.cu",
        "kSeedThreads = 1024",
        "kSeedThreads = 2048",
        "at most 1,024 can be",
    ),
    "more shared memory than was asked for": (
        "region_pool.cu",
        "allow_shared(reinterpret_cast<const void*>(pool<scalar_t, Id, T>), shared);",
        "",
        "bytes of shared memory",
    ),
    "memory that is never written": (
        "region_pool.cu",
        "touched[warp] = found;\n      area[",
        "touched[warp] = found;\n      if (R < 0) area[",
        "nan",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_emulator_reports_broken_kernels(emulator, tmp_path, name):
    file, old, new, said = BREAKS[name]
    changed = []

    def change(other, text):
        if other == file:
            assert text.count(old) == 1
            changed.append(file)
            return text.replace(old, new)
        return text

    status, last = emulate(rebuild(tmp_path, change), 2, file.removesuffix(".cu"))
    assert changed and status == 1 and said in last


def test_no_kernel_exceeds_the_registers_of_a_gpu_or_spills():
    """As ptxas has compiled them: 65,536 for a block, and none spilled to memory."""
    triton = pytest.importorskip("triton", reason="needs cuobjdump, which comes with triton")
    if r2o_ops.r2o_C is None or not r2o_ops.r2o_C.with_cuda:
        pytest.skip("needs r2o_C built with CUDA")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [tool, "--dump-resource-usage", r2o_ops.r2o_C.__file__]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", said)
    assert len({kernel for kernel, *_ in found}) > 20
    for kernel, registers, stack in found:
        threads = 1024 if "seed" in kernel else 256
        assert int(registers) * threads <= 65_536 and int(stack) == 0, kernel

"""Build r2o_C with the CUDA ops in place of the C++ ones, to run on a CPU: python csrc/emulate/build.py OUT

Kernels stay as they are. Replaced are launches, __shared__ arrays, c10's CUDA headers, and the device that the ops are
registered for, so that a tensor on the CPU runs the CUDA code.
"""

import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

CSRC = Path(__file__).resolve().parent.parent

KEY = "[] { static char key; return &key; }()"  # one for each array and each instance of its kernel


def shared_array(match: re.Match) -> str:
    """`__shared__ T a[2], b;` -> references into the block's shared memory."""
    first, *others = match[1].split(",")
    kind, first = re.fullmatch(r"\s*(.*?)\s*(\w+(?:\[[^]]*])*)\s*", first, re.S).groups()
    lines = []
    for declared in [first, *others]:
        name, sizes = re.fullmatch(r"\s*(\w+)((?:\[[^]]*])*)\s*", declared).groups()
        lines.append(f"auto& {name} = emulate::shared<{kind}{sizes}>({KEY});")
    return " ".join(lines)


def launches(text: str) -> str:
    """`kernel<T><<<grid, block>>>(a, b)` -> `emulate::launch({grid, block}, "kernel", kernel<T>, a, b)`."""
    while (at := text.find("<<<")) >= 0:
        begin = re.search(r"[\w:]+(?:<[^;{}]*>)?$", text[:at]).start()
        end = text.index(">>>", at)
        opened = text.index("(", end)
        kernel, config = text[begin:at], text[at + 3 : end]
        name = kernel.split("<")[0]
        text = f'{text[:begin]}emulate::launch({{{config}}}, "{name}", {kernel}, {text[opened + 1 :]}'
    return text


def translate(text: str) -> str:
    text = re.sub(r"#include <c10/cuda/[^>]*>", "", text)
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[];",
        r"\1* \2 = static_cast<\1*>(emulate::dynamic_shared());",
        text,
    )
    text = re.sub(r"__shared__ ([^;]*);", shared_array, text)
    text = text.replace("TORCH_LIBRARY_IMPL(r2o, CUDA, m)", "TORCH_LIBRARY_IMPL(r2o, CPU, m)")
    return launches(text)


def build(out: Path, change=lambda name, text: text):
    """Write r2o_C to `out`. change: (file name, CUDA source) -> the source to use; tests break it on purpose."""
    out.mkdir(parents=True, exist_ok=True)
    includes = [out, CSRC / "emulate", CSRC / "cuda", sysconfig.get_paths()["include"], *include_paths()]
    compiler = [os.environ.get("CXX", "g++"), "-std=c++20", "-fPIC", "-Wno-narrowing", *(f"-I{i}" for i in includes)]

    def write(path: Path, text: str) -> Path:
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return path

    header = write(out / "launch.h", translate(change("launch.h", (CSRC / "cuda/launch.h").read_text())))
    kernels = [*compiler, "-O1", "-g1", "-fsanitize=thread"]
    jobs = [([*compiler, "-O2"], CSRC / "ops.cpp"), ([*compiler, "-O2"], CSRC / "emulate/emulate.cpp")]
    for file in sorted((CSRC / "cuda").glob("*.cu")):
        text = f'#include "cuda.h"\n#line 1 "{file}"\n{translate(change(file.name, file.read_text()))}'
        source = write(out / f"{file.stem}.cpp", text)
        jobs.append((kernels, source))

    def make(job, suffix=".o") -> Path:
        command, source = job
        target = out / f"{source.stem}{suffix}"
        newest = max(p.stat().st_mtime for p in (source, header, CSRC / "common.h", CSRC / "emulate/cuda.h"))
        if not target.exists() or target.stat().st_mtime < newest:
            subprocess.run([*command, "-c", source, "-o", target], check=True)
        return target

    make(([*kernels, "-x", "c++-header"], CSRC / "emulate/cuda.h"), ".h.gch")  # saves 6 s a kernel
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(make, jobs))
    libraries = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch_python"]
    module = out / f"r2o_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists() and module.stat().st_mtime > max(o.stat().st_mtime for o in objects):
        return
    linked = module.with_suffix(".new")  # renamed when complete: another process may have the old one loaded
    subprocess.run([compiler[0], "-shared", *objects, *libraries, "-o", linked], check=True)
    linked.replace(module)


if __name__ == "__main__":
    build(Path(sys.argv[1]))

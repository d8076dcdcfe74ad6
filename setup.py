"""Builds r2o_C, the compiled ops: `python setup.py build_ext --inplace`.

Always builds C++. Builds CUDA too if a toolkit of the same major version as PyTorch's CUDA is found. Prints which.
    FORCE_CUDA=1   fail if CUDA cannot be built; FORCE_CUDA=0: C++ only
    CUDA_HOME      toolkit folder, if not in a standard place
    TORCH_CUDA_ARCH_LIST   GPUs to build for (default: those of this machine, or 8.0 and 9.0 if it has none)
    SANITIZE=1     C++ only, with AddressSanitizer and UndefinedBehaviorSanitizer (make sanitize)
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

needed = ("torch", "pybind11", "ninja", "setuptools")
if missing := [name for name in needed if not importlib.util.find_spec(name)]:
    print(f"setup.py: error: {' and '.join(missing)} not installed: pip install {' '.join(missing)}", file=sys.stderr)
    sys.exit(2)

import torch  # noqa: E402
from setuptools import setup  # noqa: E402


def find_toolkit() -> Path | None:
    """Returns the first complete toolkit folder. nvcc on PATH comes last: it may be a wrapper outside the toolkit."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for place in [*places, nvcc and Path(nvcc).resolve().parent.parent]:
        if place and Path(place, "bin/nvcc").exists() and Path(place, "include/cuda_runtime.h").exists():
            return Path(place)
    return None


def cuda_problem(toolkit: Path | None) -> str:
    """Why CUDA cannot be built, or "" if it can."""
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if toolkit is None:
        return "no CUDA toolkit found (nvcc and its headers; set CUDA_HOME)"
    said = subprocess.run([toolkit / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)", said)[1]
    if release != torch.version.cuda.split(".")[0]:
        return f"the toolkit in {toolkit} is CUDA {release}, PyTorch's is {torch.version.cuda}"
    return ""


toolkit = find_toolkit()
sanitize = os.environ.get("SANITIZE") == "1"
asked = "SANITIZE=1" if sanitize else "FORCE_CUDA=0" if os.environ.get("FORCE_CUDA") == "0" else ""
problem = asked or cuda_problem(toolkit)
if problem and os.environ.get("FORCE_CUDA") == "1":
    sys.exit(f"setup.py: error: FORCE_CUDA=1, but {problem}")
print("r2o_C: C++ only, " + problem if problem else f"r2o_C: C++ and CUDA, toolkit {toolkit}")
if not problem:
    os.environ["CUDA_HOME"] = str(toolkit)
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402  (reads CUDA_HOME on import)

sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"] if sanitize else []
sources = ["csrc/ops.cpp", *map(str, sorted(Path("csrc/cpu").glob("*.cpp")))]
flags = {"cxx": ["-O3"] + (["-fopenmp"] if sys.platform == "linux" else [])}
flags["cxx"] += [*sanitizers, "-g"] if sanitize else []
if not problem:
    sources += map(str, sorted(Path("csrc/cuda").glob("*.cu")))
    flags["cxx"].append("-DR2O_WITH_CUDA")
    flags["nvcc"] = ["-O3"]

extension = CppExtension if problem else CUDAExtension
module = extension("r2o_C", sources, extra_compile_args=flags, extra_link_args=sanitizers)
setup(ext_modules=[module], cmdclass={"build_ext": BuildExtension})

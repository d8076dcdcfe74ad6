"""r2o.pth in the layouts of other libraries, and back; the authors' released weights as r2o.pth.

    python transfer/export.py --ckpt out/r2o.pth --to detectron2 --out r2o.pkl
    python transfer/export.py --ckpt out/r2o.pth --to timm --out r2o.safetensors
    python transfer/export.py --ckpt theirs.pth --to r2o --out r2o.pth

--ckpt may be in any of these layouts, which its names tell. The suffix of --out says what kind of file: .pth, for
torchvision and timm also .safetensors, for Detectron2 also .pkl. Batch norm's counters, where a file leaves them out,
become 0.
"""

import argparse
import importlib.util
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import processes
import r2o
from r2o import UsageError

# The layouts, and the files that their libraries read.
LAYOUTS = {
    "r2o": [".pth"],
    "torchvision": [".pth", ".safetensors"],
    "timm": [".pth", ".safetensors"],
    "mmseg": [".pth"],
    "detectron2": [".pkl", ".pth"],
}
# Where a file keeps an encoder among other things, the likelier first: ours, the authors', detectors and segmenters.
PREFIXES = (
    "online.encoder.",
    "online_network.encoder.",
    "encoder.",
    "backbone.bottom_up.",
    "bottom_up.",
    "backbone.",
    "",
)
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}  # of nn.Sequential


def to_detectron2(name: str) -> str:
    """torchvision's name of a ResNet's tensor -> Detectron2's: layer1.0.bn2.weight -> res2.0.conv2.norm.weight."""
    name = re.sub(r"^(?=conv1|bn1)", "stem.", name)
    name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def to_torchvision(name: str) -> str:
    """The name of a tensor in any of the layouts -> torchvision's; a name of another kind stays."""
    if m := re.match(r"(\d)\.(.+)", name):  # the authors' encoder is nn.Sequential
        return f"{CHILDREN.get(m[1], m[1])}.{m[2]}"
    name = re.sub(r"^stem\.", "", name)
    name = re.sub(r"^res(\d)\.", lambda m: f"layer{int(m[1]) - 1}.", name)
    name = re.sub(r"\bconv(\d)\.norm\.", r"bn\1.", name)
    return name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")


class _Arrays(pickle.Unpickler):
    """Reads arrays and plain types, and runs nothing: any other name is refused."""

    def find_class(self, module, name):
        if (module.split(".")[0], name) in {("numpy", n) for n in ("_reconstruct", "ndarray", "dtype", "scalar")} | {
            ("collections", "OrderedDict"),
            ("_codecs", "encode"),
        }:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class _Pickler(pickle.Pickler):
    """Writes arrays by the names numpy.ndarray and numpy.dtype alone, which every NumPy has: NumPy 2 itself would name
    numpy._core, which those before 1.26, beside many a Detectron2, cannot read."""

    def reducer_override(self, x):
        return (np.ndarray, ((0,), "b"), x.__reduce__()[2]) if type(x) is np.ndarray else NotImplemented


def load_tensors(path: str | Path) -> dict:
    """A checkpoint as a dict, from .safetensors, .pkl or what PyTorch saves."""
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".pkl"):
        return r2o.load_file(path)
    if not Path(path).is_file():
        raise UsageError(f"no such checkpoint: {path}")
    if suffix == ".safetensors":
        need_safetensors()
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as e:
            raise UsageError(f"cannot read {path} ({e}): is it whole?") from None
    try:
        with open(path, "rb") as f:
            return _Arrays(f, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, IndexError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} is not a pickle of arrays and plain types ({e}): it is not read") from None


def need_safetensors():
    if importlib.util.find_spec("safetensors") is None:
        raise UsageError("this needs the package safetensors: pip install safetensors")


def read(path: str | Path) -> dict:
    """A checkpoint in any layout as r2o.pth holds it: arch, epoch, args, and the encoder's state_dict under
    torchvision's names. Raises UsageError where it is not exactly one of the ResNets (a classifier aside), and says how
    many tensors of the nearest matched."""
    file = load_tensors(path)
    state = file if isinstance(file, dict) else {}
    for key in ("model", "state_dict"):
        state = state[key] if isinstance(state.get(key), dict) else state
    tensors = {
        str(name).removeprefix("module."): torch.as_tensor(x)
        for name, x in state.items()
        if isinstance(x, (Tensor, np.ndarray, np.generic))
    }
    for prefix in PREFIXES:
        own = {to_torchvision(n.removeprefix(prefix)): x for n, x in tensors.items() if n.startswith(prefix)}
        if "conv1.weight" in own:
            break
    own = {name: x for name, x in own.items() if not name.startswith("fc.")}
    nearest = []
    for arch in r2o.ARCHS:
        with torch.device("meta"):
            shapes = r2o.build_encoder(arch).state_dict()
        matched, rest = r2o.match(own, shapes)
        if not rest:
            args, epoch = file.get("args"), file.get("epoch")
            more = {"args": args if isinstance(args, dict) else {}, "epoch": epoch if isinstance(epoch, int) else None}
            full = {name: own.get(name, torch.zeros((), dtype=torch.long)) for name in shapes}
            return {"arch": arch, **more, "state_dict": {name: x.contiguous().clone() for name, x in full.items()}}
        nearest.append((len(rest), f"{len(matched)} of {len(shapes)} tensors of {arch} matched, {rest[0]} does not"))
    raise UsageError(
        f"{path} is no known ResNet: {min(nearest)[1]}; expected a layout of {', '.join(LAYOUTS)} or the authors"
    )


def write(file: dict, layout: str, path: Path):
    """`file`, as read() returns it, in a layout."""
    state, about = file["state_dict"], {"arch": file["arch"], "epoch": file["epoch"]}
    if layout == "detectron2":
        state = {to_detectron2(name): x for name, x in state.items()}
    if path.suffix == ".safetensors":
        need_safetensors()
        from safetensors.torch import save

        content = save(state, {name: str(x) for name, x in about.items()} | {"format": "pt"})
        r2o.save_atomically(path, lambda f: f.write(content))
        return
    if layout == "r2o":
        whole = file
    elif layout == "mmseg":
        whole = {"meta": about, "state_dict": state}
    elif layout == "detectron2":
        if path.suffix == ".pkl":
            state = {name: x.numpy() for name, x in state.items()}
        whole = {"model": state, "__author__": "r2o", "matching_heuristics": True}
    else:
        whole = state
    if path.suffix == ".pkl":
        r2o.save_atomically(path, lambda f: _Pickler(f, protocol=4).dump(whole))
    else:
        r2o.save_atomically(path, lambda f: torch.save(whole, f))


def export(args) -> int:
    out = args.out
    if out.suffix not in LAYOUTS[args.to]:
        raise UsageError(f"--out {out} does not go with --to {args.to}: expected {' or '.join(LAYOUTS[args.to])}")
    if out.suffix == ".safetensors":
        need_safetensors()
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise UsageError(f"cannot write {out}: no such folder")
    file = read(args.ckpt)
    if file["arch"] == "tiny" and args.to not in ("r2o", "torchvision"):
        raise UsageError(f"{args.ckpt} holds the encoder tiny, which {args.to} has not: pass --to r2o or torchvision")
    try:
        write(file, args.to, out)
    except OSError as e:
        raise UsageError(f"cannot write {out} ({e.strerror or e})") from None
    back = read(out)["state_dict"]
    if not all(torch.equal(x, back[name]) for name, x in file["state_dict"].items()):
        raise UsageError(f"{out} does not read back as it was written: is the disk sound?")
    print(f"{out}: {len(back)} tensors of a {file['arch']} in {args.to}'s layout, read back and equal")
    return 0


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", required=True, help="r2o.pth, last.pth, or any layout that this program writes")
    p.add_argument("--to", required=True, choices=LAYOUTS, help="timm and mmseg name tensors as torchvision does")
    p.add_argument("--out", required=True, type=Path, help="file to write; its suffix says what kind")
    processes.run("export.py", lambda: export(p.parse_args(argv)))


if __name__ == "__main__":
    main()

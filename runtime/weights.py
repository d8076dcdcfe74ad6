"""Encoder weights: one reader of every layout, and the writers."""

import pickle
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import r2o
import r2o_vit
from runtime.checkpoint import load_file
from runtime.cli import UsageError, need, need_package
from runtime.storage import save_atomically

# The layouts, and the suffixes of the files that their libraries read.
LAYOUTS = {
    "r2o": [".pth"],
    "torchvision": [".pth", ".safetensors"],
    "timm": [".pth", ".safetensors"],
    "mmseg": [".pth"],
    "detectron2": [".pkl", ".pth"],
}
# What precedes an encoder's names in a file that holds more, likelier ones first: ours, the authors', MoCo v2's,
# detectors'; and those of the target network.
PREFIXES = (
    *"online.encoder. online_network.encoder. encoder_q. encoder. backbone.bottom_up. bottom_up. backbone.".split(),
    "",
)
TARGET_PREFIXES = "target.encoder.", "target_network.encoder."
APPENDED = "layer3.", "layer4."  # the layers that vit_b has and other ViTs lack
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}  # of nn.Sequential
COUNTER = "num_batches_tracked"  # of batch norm; torchvision's older files lack it, and nothing here reads it


def random_seed(ckpt: str | Path) -> int | None:
    """The seed of "random:SEED", 0 of "random"; None of a file."""
    kind, colon, seed = str(ckpt).partition(":")
    if kind != "random":
        return None
    valid = not colon or (seed.isdecimal() and int(seed) < 2**31)
    need(valid, f"--ckpt {ckpt}: expected random, or random:1 for another seed")
    return int(seed or 0)


def load_encoder(ckpt: str | Path, arch: str | None = None, network: str = "online") -> tuple[nn.Module, str]:
    """An encoder in eval mode, and a line that describes it.

    ckpt: a file that read_weights() reads, "random", or "random:SEED" for the initial weights of train.py --seed SEED.
    arch: the encoder to expect (default: read from the file; resnet50 for "random"). network: "online" or "target".
    Raises UsageError for what read_weights() refuses.
    """
    if (seed := random_seed(ckpt)) is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            line = f"{arch or 'resnet50'}, randomly initialized{f' (seed {seed})' * (seed > 0)}"
            return r2o.build_encoder(arch or "resnet50").eval(), line
    file = read_weights(ckpt, arch, network)
    appended = file["arch"] != "vit_b" or any(name.startswith(APPENDED) for name in file["state_dict"])
    net = r2o.build_encoder(file["arch"]) if appended else r2o_vit.ViT(appended=False)
    net.arch = file["arch"]
    net.load_state_dict(file["state_dict"])
    return net.eval(), f"{file['arch']} from {ckpt}{', target network' * (network == 'target')}: {file['matched']}"


def read_weights(path: str | Path, arch: str | None = None, network: str = "online") -> dict:
    """The encoder in a checkpoint of any layout: arch, epoch, args, matched (a phrase), torchvision's state_dict.

    path: r2o.pth, last.pth, the authors' files, or weights of torchvision, timm, MMSegmentation or Detectron2, as .pth,
    .safetensors or .pkl. arch: which encoder it must be; by default the file's entry or tensors decide. network: of
    last.pth, epoch_*.pth and the authors' files, "online" or "target". Raises UsageError unless the encoder's tensors
    are exactly those of one of ARCHS, apart from a classifier, and a ViT's appended layers, and finite.
    """
    file = _load_any(path)
    args, epoch = file.get("args"), file.get("epoch")
    about = {"epoch": epoch if isinstance(epoch, int) else None, "args": args if isinstance(args, dict) else {}}
    named = next((x for x in (file.get("arch"), about["args"].get("arch")) if isinstance(x, str)), arch)
    need(arch in (None, named), f"{path} holds a {named}, not a {arch}: leave --arch out")
    own, nearest = _encoder_tensors(file, network), []
    need(
        own or network == "online", f"{path} holds no target network: pass last.pth, or an epoch_*.pth of --keep-every"
    )
    for candidate in [named] if named in r2o.ARCHS else r2o.ARCHS:
        with torch.device("meta"):
            shapes = r2o.build_encoder(candidate).state_dict()
        if candidate == "vit_b" and not any(name.startswith(APPENDED) for name in own):
            shapes = {name: x for name, x in shapes.items() if not name.startswith(APPENDED)}
        fitting = {name for name, x in shapes.items() if name in own and own[name].shape == x.shape}
        rest = [name for name in dict.fromkeys([*shapes, *own]) if name not in fitting]
        count = f"{len(fitting)} of {len(shapes)} tensors"
        if all(name.endswith(COUNTER) and name not in own for name in rest):
            state = {name: own.get(name, torch.zeros((), dtype=torch.long)).contiguous().clone() for name in shapes}
            diverged = f"the weights in {path} are not finite: they come from a run that diverged"
            need(all(x.isfinite().all() for x in state.values()), diverged)
            matched = f"{count} matched" + (", the rest are batch norm's counters" if rest else "")
            return {"arch": candidate, **about, "matched": matched, "state_dict": state}
        nearest.append((len(rest), f"{count} of {candidate} matched, {len(rest)} do not fit, such as {rest[0]}"))
    expected = f"expected one of {', '.join(r2o.ARCHS)} in the layout of {', '.join(LAYOUTS)} or the authors"
    raise UsageError(f"{path} is no known encoder: {min(nearest)[1]}; {expected}")


def _encoder_tensors(file: dict, network: str) -> dict[str, Tensor]:
    """An encoder's tensors in a checkpoint, under torchvision's names, without a classifier."""
    state, ours = file, "target" if isinstance(file.get("target"), dict) and network == "target" else "state_dict"
    for key in ("model", ours):
        state = state[key] if isinstance(state.get(key), dict) else state
    arrays = {n: x for n, x in state.items() if isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind in "biuf"}
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)} | arrays
    tensors = {str(name).removeprefix("module."): torch.as_tensor(x) for name, x in tensors.items()}
    for prefix in PREFIXES if network == "online" else ("",) if ours == "target" else TARGET_PREFIXES:
        own = {to_torchvision(n.removeprefix(prefix)): x for n, x in tensors.items() if n.startswith(prefix)}
        if "conv1.weight" in own or "conv_proj.weight" in own:
            break
    others = "fc.", "head.", "heads.", "decoder_", "mask_token"  # classifiers, and MAE's decoder
    return {name: x for name, x in own.items() if not name.startswith(others)}


def _load_any(path: str | Path) -> dict:
    """A .safetensors, .pkl or PyTorch file as a dict."""
    suffix = Path(path).suffix
    if suffix not in (".safetensors", ".pkl"):
        return load_file(path)
    need(Path(path).is_file(), f"no such checkpoint: {path}")
    if suffix == ".safetensors":
        need_package("safetensors", str(path))
        from safetensors import SafetensorError
        from safetensors.torch import load_file as load_safetensors

        try:
            return load_safetensors(path)
        except SafetensorError as e:
            raise UsageError(f"cannot read {path} ({e}): is it complete?") from None
    try:
        with open(path, "rb") as f:
            file = _ArrayUnpickler(f, encoding="latin1").load()
    except Exception as e:  # damaged pickles raise almost anything
        raise UsageError(f"{path} is not a pickle of arrays and plain types ({e}): it is not read") from None
    return file if isinstance(file, dict) else {}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays and plain types, and refuses every other name, so that no code runs."""

    known = "numpy._reconstruct numpy.ndarray numpy.dtype numpy.scalar collections.OrderedDict _codecs.encode".split()

    def find_class(self, module, name):
        if f"{module.split('.')[0]}.{name}" in self.known:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def to_detectron2(name: str) -> str:
    """torchvision's name of a ResNet tensor -> Detectron2's: layer1.0.bn2.weight -> res2.0.conv2.norm.weight."""
    name = re.sub(r"^(?=conv1|bn1)", "stem.", name)
    name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def to_torchvision(name: str) -> str:
    """A tensor's name in any of the layouts -> torchvision's; unknown names are unchanged."""
    if m := re.match(r"(\d)\.(.+)", name):  # the authors' encoder is an nn.Sequential
        return f"{CHILDREN.get(m[1], m[1])}.{m[2]}"
    name = re.sub(r"^stem\.", "", name)
    name = re.sub(r"^res(\d)\.", lambda m: f"layer{int(m[1]) - 1}.", name)
    name = re.sub(r"\bconv(\d)\.norm\.", r"bn\1.", name)
    name = name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
    return r2o_vit.rename(name, to_timm=False)


def write_weights(file: dict, layout: str, path: Path):
    """Write what read_weights() returns in a layout. The suffix of path is one of LAYOUTS[layout]. Raises OSError.
    The layers that vit_b has and other libraries' ViTs lack are left out, except in layout "r2o"."""
    state, about = file["state_dict"], {"arch": file["arch"], "epoch": file["epoch"]}
    if file["arch"] == "vit_b" and layout != "r2o":
        state = {r2o_vit.rename(n, layout == "timm"): x for n, x in state.items() if not n.startswith(APPENDED)}
    if layout == "detectron2":
        state = {to_detectron2(name): x for name, x in state.items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        content = save(state, {name: str(x) for name, x in about.items()} | {"format": "pt"})
        return save_atomically(path, lambda f: f.write(content))
    if path.suffix == ".pkl":
        state = {name: x.numpy() for name, x in state.items()}
    whole = {
        "r2o": about | {"args": file["args"], "state_dict": state},
        "mmseg": {"meta": about, "state_dict": state},
        "detectron2": {"model": state, "__author__": "r2o", "matching_heuristics": True},
    }.get(layout, state)
    if path.suffix == ".pkl":
        return save_atomically(path, lambda f: _ArrayPickler(f, protocol=4).dump(whole))
    return save_atomically(path, lambda f: torch.save(whole, f))


class _ArrayPickler(pickle.Pickler):
    """Writes arrays by the names numpy.ndarray and numpy.dtype alone, which every NumPy has. NumPy 2 itself would write
    numpy._core, which NumPy before 1.26, still common beside Detectron2, cannot import."""

    def reducer_override(self, x):
        return (np.ndarray, ((0,), "b"), x.__reduce__()[2]) if type(x) is np.ndarray else NotImplemented

"""runtime/weights.py, evals/export.py and hubconf.py: every layout and back, the authors' files, and bad input."""

import json
import pickle
import pickletools
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, refused_by

import r2o
from evals import export
from runtime import weights
from runtime.cli import UsageError
from runtime.weights import load_encoder

refused = refused_by(export)
WAYS = [(layout, suffix) for layout, suffixes in weights.LAYOUTS.items() for suffix in suffixes]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """r2o.pth of a ResNet-18 whose batch norms have seen something; its state; images; and its C2 to C5 of them."""
    torch.manual_seed(0)
    net, x = r2o.build_encoder("resnet18"), torch.randn(2, 3, 64, 64)
    r2o.encode(net.train(), x)
    net.eval()
    state = {name: v.clone() for name, v in net.state_dict().items()}
    path = tmp_path_factory.mktemp("export") / "r2o.pth"
    torch.save({"arch": "resnet18", "epoch": 3, "args": {"lr": 0.3}, "state_dict": state}, path)
    with torch.no_grad():
        return path, state, x, r2o.encode(net, x)


def convert(source, to, out):
    export.main(["--ckpt", str(source), "--to", to, "--out", str(out)])
    return out


@pytest.mark.parametrize("layout, suffix", WAYS)
def test_every_layout_round_trips(ours, tmp_path, layout, suffix):
    there = convert(ours[0], layout, tmp_path / f"there{suffix}")
    back = convert(there, "r2o", tmp_path / "back.pth")
    net, line = load_encoder(str(back))
    assert all(torch.equal(x, ours[1][name]) for name, x in net.state_dict().items())
    with torch.no_grad():
        assert torch.equal(r2o.encode(net, ours[2]), ours[3])
    assert "resnet18" in line and "120 of 120 tensors matched" in line


def test_torchvision_and_timm_load_their_layouts_with_equal_features(ours, tmp_path):
    net = torchvision.models.resnet18()
    missing, unexpected = net.load_state_dict(
        torch.load(convert(ours[0], "torchvision", tmp_path / "tv.pth"), weights_only=True), strict=False
    )
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    with torch.no_grad():
        assert torch.equal(r2o.encode(net.eval(), ours[2]), ours[3])
    timm = pytest.importorskip("timm", reason="timm is not installed")
    overlay = {"file": str(convert(ours[0], "timm", tmp_path / "whole.safetensors"))}  # as its users fine-tune
    net = timm.create_model("resnet18", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10).eval()
    with torch.no_grad():
        torch.testing.assert_close(net.forward_features(ours[2]), ours[3])
        assert net(ours[2]).shape == (2, 10)
    for suffix in ("pth", "safetensors"):
        file = convert(ours[0], "timm", tmp_path / f"timm.{suffix}")
        net = timm.create_model("resnet18", pretrained=False, num_classes=0, checkpoint_path=str(file)).eval()
        with torch.no_grad():
            torch.testing.assert_close(net.forward_features(ours[2]), ours[3])


def test_detectron2_names_match_its_converter():
    """As its tools/convert-torchvision-to-d2.py gives them."""
    names = {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_var": "stem.conv1.norm.running_var",
        "layer1.0.conv3.weight": "res2.0.conv3.weight",
        "layer2.1.bn2.bias": "res3.1.conv2.norm.bias",
        "layer4.0.downsample.0.weight": "res5.0.shortcut.weight",
        "layer3.0.downsample.1.num_batches_tracked": "res4.0.shortcut.norm.num_batches_tracked",
    }
    assert [weights.to_detectron2(name) for name in names] == list(names.values())
    assert [weights.to_torchvision(name) for name in names.values()] == list(names)
    for name in torchvision.models.resnet50().state_dict():
        assert weights.to_torchvision(weights.to_detectron2(name)) == weights.to_torchvision(name) == name


def test_file_formats_are_those_that_the_libraries_read(ours, tmp_path):
    with open(convert(ours[0], "detectron2", tmp_path / "d2.pkl"), "rb") as f:
        d2 = pickle.load(f)
        names = {arg for _, arg, _ in pickletools.genops((tmp_path / "d2.pkl").read_bytes()) if isinstance(arg, str)}
    assert not any("numpy." in name for name in names)  # numpy._core, which NumPy before 1.26 has not
    assert d2["matching_heuristics"] is True and isinstance(d2["model"]["stem.conv1.weight"], np.ndarray)
    mmseg = torch.load(convert(ours[0], "mmseg", tmp_path / "mmseg.pth"), weights_only=True)
    assert mmseg["state_dict"].keys() == ours[1].keys() and mmseg["meta"] == {"arch": "resnet18", "epoch": 3}
    again = torch.load(convert(ours[0], "r2o", tmp_path / "r2o.pth"), weights_only=True)
    assert again["args"] == {"lr": 0.3} and again["epoch"] == 3


def test_the_authors_weights_and_whole_detectors_are_read(ours, tmp_path):
    """Their encoder is nn.Sequential of a ResNet's children without pooling and fc: names begin with encoder.0, .1,
    .4."""
    net = torchvision.models.resnet18()
    net.load_state_dict(ours[1], strict=False)
    sequential = torch.nn.Sequential(*list(net.children())[:-2]).state_dict()
    zeros = {name: torch.zeros_like(x) for name, x in sequential.items()}
    original = {"module.online_network.encoder." + name: x for name, x in sequential.items()}
    original |= {"module.target_network.encoder." + name: x for name, x in zeros.items()}
    original |= {"module.online_network.projetion.l1.weight": torch.zeros(3, 3)}
    d2 = {"backbone.bottom_up." + weights.to_detectron2(name): x for name, x in ours[1].items()}
    for i, file in enumerate(
        (
            {"config": {"a": 1}, "epoch": 300, "steps": 5, "model": OrderedDict(original)},
            OrderedDict(("encoder." + name, x) for name, x in sequential.items()),
            {"state_dict": {"module.encoder_q." + name: x for name, x in net.state_dict().items()}},  # MoCo v2's
            dict(sequential),
            net.state_dict(),
            {"model": d2 | {"roi_heads.box_head.fc1.weight": torch.zeros(2, 2)}},
            {"state_dict": {"backbone." + name: x for name, x in ours[1].items()} | {"decode_head.w": torch.zeros(1)}},
            {name: x for name, x in net.state_dict().items() if not name.endswith("num_batches_tracked")},
        )
    ):
        torch.save(file, tmp_path / f"{i}.pth")
        found = weights.read_weights(tmp_path / f"{i}.pth")
        assert found["arch"] == "resnet18"
        same = {n: x for n, x in found["state_dict"].items() if not (i == 7 and n.endswith("num_batches_tracked"))}
        assert all(torch.equal(x, ours[1][name]) for name, x in same.items()), i


def test_torchvision_files_without_counters_load_in_evaluations(ours, tmp_path):
    old = {name: x for name, x in ours[1].items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    net, line = load_encoder(str(tmp_path / "old.pth"), "resnet18")
    with torch.no_grad():
        assert torch.equal(r2o.encode(net, ours[2]), ours[3])
    assert "100 of 120 tensors matched, the rest are batch norm's counters" in line
    del old["bn1.running_mean"]
    torch.save(old, tmp_path / "old.pth")
    with pytest.raises(UsageError, match=r"99 of 120 tensors of resnet18 matched, .* such as bn1.running_mean"):
        load_encoder(str(tmp_path / "old.pth"), "resnet18")


def test_torch_hub_loads_the_same_features(ours):
    net = torch.hub.load(str(ROOT), "encoder", source="local", ckpt=str(ours[0]))
    with torch.no_grad():
        torch.testing.assert_close(net(ours[2]), ours[3].mean((2, 3)))
    assert not net.training


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.pth", {"arch": torch.ones(2), "state_dict": {}}),
        ("x.pkl", {"model": {"conv1.weight": np.array(["text"]), "bn1.weight": np.array([None, {}])}}),
        ("x.pkl", b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00"),  # bytes longer than the memory
    ],
)
def test_unknown_files_are_refused(tmp_path, name, content):
    path = tmp_path / name
    if name == "x.pth":
        torch.save(content, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    with pytest.raises(UsageError, match=r"no known encoder|not a pickle of arrays"):
        load_encoder(str(path))


def test_a_pickle_that_would_run_code_is_refused_without_running_it(tmp_path, refused):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": Evil()}))
    line = refused("--ckpt", tmp_path / "evil.pkl", "--to", "r2o", "--out", tmp_path / "out.pth")
    assert "not a pickle of arrays" in line and not (tmp_path / "ran").exists() and not (tmp_path / "out.pth").exists()


def test_weights_that_do_not_fit_are_refused_with_the_number_matched(ours, tmp_path, refused):
    def said(file, *flags):
        torch.save(file, tmp_path / "in.pth")
        return refused("--ckpt", tmp_path / "in.pth", "--to", "r2o", "--out", tmp_path / "out.pth", *flags)

    half = dict(list(ours[1].items())[:60])
    assert "60 of 120 tensors of resnet18 matched, 60 do not fit, such as layer" in said(half)
    assert "119 of 120 tensors of resnet18 matched, 1 do not fit, such as conv1.weight" in said(
        ours[1] | {"conv1.weight": torch.zeros(64, 1, 7, 7)}
    )
    assert "0 of" in said({"a": torch.zeros(2)}) and "0 of" in said([1, 2])
    assert "no such checkpoint" in refused("--ckpt", "no.pkl", "--to", "r2o", "--out", tmp_path / "o.pth")
    for layout, suffix in (("timm", "pkl"), ("detectron2", "safetensors"), ("mmseg", "safetensors"), ("r2o", "pt")):
        out = tmp_path / f"o.{suffix}"
        assert f"does not go with --to {layout}" in refused("--ckpt", ours[0], "--to", layout, "--out", out)
    assert "no such folder" in refused("--ckpt", ours[0], "--to", "timm", "--out", tmp_path / "no/o.pth")
    assert "is --ckpt itself" in refused("--ckpt", ours[0], "--to", "r2o", "--out", ours[0])
    (tmp_path / "torn.safetensors").write_bytes(b"1234")
    assert "is it complete" in refused(
        "--ckpt", tmp_path / "torn.safetensors", "--to", "r2o", "--out", tmp_path / "o.pth"
    )
    tiny = {"arch": "tiny", "state_dict": r2o.build_encoder("tiny").state_dict()}
    assert "holds the encoder tiny" in said(tiny, "--to", "timm")
    assert json.dumps(sorted(p.name for p in tmp_path.glob("o*"))) == "[]"

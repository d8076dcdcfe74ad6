"""ViT-B/16, A.5 and Table 8: the encoder, a step of R2O, weights in other libraries and theirs here, fine-tuning."""

import pytest
import torch
import torchvision
from conftest import refused_by

import r2o
import r2o_vit
from evals import detect, export, vitdet
from runtime import weights
from runtime.cli import UsageError

refused = refused_by(export)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """r2o.pth of a ViT-B whose tensors are all different, and the network."""
    torch.manual_seed(0)
    net = r2o.build_encoder("vit_b").eval()
    for p in net.parameters():
        p.data += 0.02 * torch.randn_like(p)
    path = tmp_path_factory.mktemp("vit") / "r2o.pth"
    torch.save({"arch": "vit_b", "epoch": 3, "args": {}, "state_dict": net.state_dict()}, path)
    return path, net


@torch.no_grad()
@pytest.mark.parametrize("shape", [(224, 224), (128, 192)])
def test_vit_maps_have_the_resolution_of_c4_and_c5_at_any_size(ours, shape):
    h, w = shape
    x = torch.randn(1, 3, h, w, generator=rng())
    c4, c5 = r2o.encode_c4(ours[1], x), r2o.encode(ours[1], x)
    assert c4.shape == (1, 768, h // 16, w // 16) and c5.shape == (1, 768, h // 32, w // 32)
    assert r2o.channels(ours[1].layer4) == 768 and (c5 > 0).any()


@torch.no_grad()
def test_timm_and_torchvision_compute_the_same_features_from_the_exports(ours, tmp_path):
    def written(to, name):
        export.main(["--ckpt", str(ours[0]), "--to", to, "--out", str(tmp_path / name)])
        return tmp_path / name

    x = torch.randn(2, 3, 224, 224, generator=rng())
    want = ours[1].last_map(x)
    tv = torchvision.models.vit_b_16()
    missing, unexpected = tv.load_state_dict(torch.load(written("torchvision", "tv.pth")), strict=False)
    assert missing == ["heads.head.weight", "heads.head.bias"] and not unexpected
    tokens = tv.eval().encoder(torch.cat([tv.class_token.expand(2, -1, -1), tv._process_input(x)], 1))
    torch.testing.assert_close(tokens[:, 1:].mT.unflatten(2, (14, 14)), want)
    hub = torch.hub.load(str(r2o.__file__).rpartition("/")[0], "encoder", source="local", ckpt=str(ours[0]))
    torch.testing.assert_close(hub(x), want.mean((2, 3)))

    timm = pytest.importorskip("timm", reason="timm is not installed")
    net = timm.create_model("vit_base_patch16_224", num_classes=0, dynamic_img_size=True)
    net.load_state_dict(torch.load(written("timm", "timm.pth")))
    torch.testing.assert_close(
        net.eval().forward_features(x)[:, 1:].mT.unflatten(2, (14, 14)), want, rtol=1e-4, atol=1e-4
    )
    x = torch.randn(1, 3, 160, 256, generator=rng())
    other = net.forward_features(x)[:, 1:].mT.unflatten(2, (10, 16))
    torch.testing.assert_close(other, ours[1].last_map(x), rtol=1e-3, atol=1e-3)  # interpolated positions


@torch.no_grad()
def test_mae_weights_load_and_c4_is_the_last_block_s_map(ours, tmp_path):
    """MAE's release holds timm's names under `model`; the whole one also a decoder."""
    state = {r2o_vit.rename(n, True): x for n, x in ours[1].state_dict().items() if not n.startswith(weights.APPENDED)}
    more = {
        "decoder_blocks.0.norm1.weight": torch.zeros(512),
        "mask_token": torch.zeros(1),
        "head.bias": torch.zeros(9),
    }
    torch.save({"model": state | more}, tmp_path / "mae.pth")
    net, line = weights.load_encoder(tmp_path / "mae.pth")
    x = torch.randn(1, 3, 224, 224, generator=rng())
    c4 = r2o.encode_c4(net, x)
    assert torch.equal(c4, ours[1].last_map(x)) and "vit_b from" in line and "150 of 150 tensors matched" in line
    torch.testing.assert_close(r2o.encode(net, x), torch.nn.functional.avg_pool2d(c4, 2))
    del state["blocks.3.mlp.fc1.bias"]
    torch.save({"model": state}, tmp_path / "part.pth")
    with pytest.raises(UsageError, match=r"149 of 150 tensors of vit_b matched, 1 do not fit"):
        weights.load_encoder(tmp_path / "part.pth")


def test_r2o_pth_round_trips_with_its_appended_layers(ours):
    net, line = weights.load_encoder(ours[0])
    assert all(torch.equal(x, net.state_dict()[name]) for name, x in ours[1].state_dict().items())
    assert "162 of 162 tensors matched" in line


def test_exporting_a_vit_to_a_library_without_one_is_refused(ours, tmp_path, refused):
    line = refused("--ckpt", ours[0], "--to", "mmseg", "--out", tmp_path / "o.pth")
    assert "holds the encoder vit_b, which mmseg lacks: pass --to r2o or torchvision or timm" in line


@pytest.mark.slow
def test_an_r2o_step_reaches_every_layer_of_a_vit():
    torch.manual_seed(0)
    model = r2o.R2O("vit_b", num_regions=196, hidden=16, dim=8)
    regions = r2o.grid_regions(size=32).expand(2, -1, -1)
    boxes = torch.tensor([[[0.0, 0, 0.7, 0.8], [0.2, 0.3, 1, 1]]]).repeat(2, 1, 1)
    images, views = torch.randn(2, 3, 128, 128, generator=rng()), torch.randn(4, 3, 128, 128, generator=rng(1))
    loss, stats = model(images, views, regions, boxes, torch.zeros(2, 2), 4, rng())
    loss.backward()
    assert stats["masks"] > 1 and stats["spread"] > 0.1
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle


# ---- Mask R-CNN on a ViT --------------------------------------------------------------------------------------------


def test_layer_wise_decay_and_drop_path_follow_a_5():
    with torch.device("meta"):
        net = torch.nn.ModuleDict(
            {"backbone": torch.nn.ModuleDict({"body": r2o_vit.ViT(), "fpn": torch.nn.Linear(2, 2)})}
        )
    names = {p: name.removeprefix("backbone.") for name, p in net.named_parameters()}
    groups = vitdet.adamw(net, 3e-4, 0.1).param_groups
    found = {names[p]: (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found["body.conv_proj.weight"] == (0.75**13, 0.1) and found["body.encoder.pos_embedding"] == (0.75**13, 0)
    assert found["body.encoder.layers.encoder_layer_0.mlp.0.weight"][0] == 0.75**12
    assert found["body.encoder.layers.encoder_layer_11.mlp.0.bias"] == (0.75, 0)
    assert found["body.encoder.ln.weight"] == (1, 0) and found["fpn.weight"] == (1, 0.1) and len(found) == len(names)

    vit = net["backbone"]["body"]
    vitdet.set_drop_path(vit, 0.2)
    rates = [(block.dropout.p, block.mlp[4].p) for block in vit.encoder.layers]
    assert rates[0] == (0, 0) and rates[-1] == (0.2, 0.2) and rates[5][0] == pytest.approx(0.2 * 5 / 11)


@pytest.mark.slow
def test_mask_rcnn_on_a_vit_trains_every_weight_and_pools_at_the_right_scales(ours):
    """DDP allows no weight without a gradient."""
    net = detect.mask_rcnn(weights.load_encoder(ours[0])[0], 2, 128)
    assert net.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    masks = torch.zeros(1, 100, 128, dtype=torch.uint8)
    masks[0, 20:80, 30:90] = 1
    target = {"boxes": torch.tensor([[30.0, 20, 90, 80]]), "labels": torch.tensor([1]), "masks": masks}
    torch.manual_seed(0)
    sum(net([torch.rand(3, 100, 128, generator=rng())], [target]).values()).backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]
    with torch.no_grad():
        assert set(net.eval()([torch.rand(3, 90, 60)])[0]) == {"boxes", "labels", "scores", "masks"}

"""What the paper compares R2O with: masks of the prior (Table 4), DetCon_B (Table 1), NT-Xent (A.4), Odin (A.9)."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import r2o
import train
from r2o_baselines import Contrastive, Odin, hard_masks, spanning_crop
from runtime import plan, report
from runtime.images import list_images
from runtime.loader import ImageRegions
from runtime.pictures import evenly
from runtime.regions import region_maps

ODIN = "--masks odin --objective detcon --prior grid --kmeans-group 1 --schedule constant --discovery-tau 0.9"
fuzz = settings(max_examples=60, deadline=None, derandomize=True)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- the loss -------------------------------------------------------------------------------------------------------


def slow_contrastive_loss(q, z_same, z_other, ids, ids_same, ids_other, temperature):
    """Row by row and key by key, as DetCon describes it."""
    losses = []
    for x, i in zip(q, ids.tolist(), strict=True):
        positives, total = [], 0.0
        for z, j in zip(z_other, ids_other.tolist(), strict=True):
            score = torch.dot(x, z) / (x.norm() * z.norm()) / temperature
            total = total + score.exp()
            positives += [score] if i == j else []
        for z, j in zip(z_same, ids_same.tolist(), strict=True):
            if i != j:
                total = total + (torch.dot(x, z) / (x.norm() * z.norm()) / temperature).exp()
        loss = sum((total.log() - score for score in positives), torch.zeros((), dtype=q.dtype))
        times = max(ids_same.tolist().count(i), 1)
        losses.append(loss / max(len(positives), 1) / times)
    return torch.stack(losses)


def rows(P, N, D, masks, seed):
    """P rows of a view, whose ids are among those of the N keys of that view, and as many keys of the other."""
    N = max(N, P)
    q, z_same, z_other = (
        torch.randn(n, D, generator=rng(seed + i), dtype=torch.float64) for i, n in enumerate((P, N, N))
    )
    ids_same, ids_other = (torch.randint(masks, (N,), generator=rng(seed + i)) for i in (3, 4))
    return q, z_same, z_other, ids_same[:P], ids_same, ids_other


@fuzz
@given(
    st.integers(1, 7), st.integers(1, 9), st.integers(1, 5), st.integers(1, 8), st.integers(0, 999), st.floats(0.05, 2)
)
def test_the_contrastive_loss_equals_detcon_s_row_by_row(P, N, D, masks, seed, temperature):
    args = rows(P, N, D, masks, seed)
    want = slow_contrastive_loss(*args, temperature)
    torch.testing.assert_close(r2o.contrastive_loss(*args, temperature), want)
    halves = [x.float() if x.is_floating_point() else x for x in args]
    torch.testing.assert_close(r2o.contrastive_loss(*halves, temperature), want.float(), rtol=1e-3, atol=1e-3)


def test_the_contrastive_loss_by_hand():
    """One row, of mask 7. Keys of the other view: its own at an angle of 0, another at 90 degrees. Of its own view: the
    same mask, twice, which is left out, and another at 180 degrees. Two samples of the mask: it counts half."""
    q, z_other = torch.tensor([[2.0, 0]]), torch.tensor([[5.0, 0], [0, 1]])
    z_same = torch.tensor([[1.0, 0], [1, 0], [-3, 0]])
    ids = torch.tensor([7])
    loss = r2o.contrastive_loss(q, z_same, z_other, ids, torch.tensor([7, 7, 8]), torch.tensor([7, 9]), temperature=0.5)
    e = np.exp
    assert loss.item() == pytest.approx(-np.log(e(2) / (e(2) + e(0) + e(-2))) / 2)


def test_a_row_without_a_positive_has_no_loss_but_is_a_negative_for_others():
    q, z_same, z_other, ids, ids_same, ids_other = rows(4, 6, 3, 5, 0)
    ids_other[:] = 99
    q.requires_grad_()
    loss = r2o.contrastive_loss(q, z_same, z_other, ids, ids_same, ids_other)
    loss.sum().backward()
    assert (loss == 0).all() and (q.grad == 0).all()
    nearer = r2o.contrastive_loss(q, z_same, z_other, ids, ids_same, ids_same)
    assert (nearer > r2o.contrastive_loss(q, z_same, z_other[:0], ids, ids_same, ids_same[:0])).all()


def test_gradients_of_the_contrastive_loss_reach_queries_and_keys():
    q, z_same, z_other, *ids = rows(4, 6, 3, 3, 1)
    inputs = [x.requires_grad_() for x in (q, z_same, z_other)]
    assert gradcheck(lambda *x: r2o.contrastive_loss(*x, *ids), inputs)


def test_the_contrastive_loss_is_computed_in_full_precision_under_autocast():
    q, z_same, z_other, *ids = (x.float() if x.is_floating_point() else x for x in rows(5, 9, 16, 3, 2))
    want = r2o.contrastive_loss(q, z_same, z_other, *ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(r2o.contrastive_loss(q, z_same, z_other, *ids), want)


# ---- sampled masks --------------------------------------------------------------------------------------------------


def test_present_masks_are_sampled_uniformly_regardless_of_size():
    weight = torch.tensor([[30.0, 0, 0.002, 5, 1e-4], [0, 0, 0, 0, 1], [0, 0, 1e-3, 0, 0]])
    ids = r2o.sample_masks(weight, 3000, rng())
    assert ids.dtype == torch.int64 and ids.shape == (3, 3000)
    counts = ids[0].bincount(minlength=5)
    assert counts[[1, 4]].tolist() == [0, 0] and (counts[[0, 2, 3]] - 1000).abs().max() < 120  # 4.6 deviations
    assert (ids[1] == 4).all() and (ids[2] == -1).all()
    assert torch.equal(ids, r2o.sample_masks(weight, 3000, rng())) and not torch.equal(
        ids, r2o.sample_masks(weight, 3000, rng(1))
    )
    assert r2o.sample_masks(weight[:0], 4).shape == (0, 4) and r2o.sample_masks(weight[:, :0], 4).eq(-1).all()


def batch(B=4, size=64):
    images, views = torch.randn(B, 3, size, size, generator=rng(1)), torch.randn(2 * B, 3, size, size, generator=rng(2))
    regions = torch.randint(0, 20, (B, size // 4, size // 4), generator=rng(3), dtype=torch.uint8)
    boxes = torch.tensor([[[0.0, 0, 0.6, 0.7], [0.3, 0.2, 1, 1]]]).repeat(B, 1, 1)
    return images, views, regions, boxes, torch.rand(B, 2, generator=rng(4)) < 0.5


def contrastive(objective="detcon", kind=Contrastive, **options):
    torch.manual_seed(0)
    settings = {"num_regions": 20, "hidden": 16, "dim": 8, "kmeans_group": 2} | options
    model = kind("tiny", **settings) if kind is Odin else kind("tiny", objective=objective, **settings)
    for p in model.target.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def test_hard_masks_assign_each_cell_to_the_mask_that_covers_most_of_it():
    _, _, regions, boxes, flips = batch()
    hard = hard_masks(regions, boxes, flips, 20, 7)
    soft = torch.cat([r2o.crop_masks(regions, boxes[:, v], flips[:, v], 20, 7) for v in (0, 1)])
    assert hard.shape == (8, 20, 7, 7) and (hard.sum(1) == 1).all() and set(hard.unique().tolist()) == {0, 1}
    torch.testing.assert_close((hard * soft).sum(1), soft.amax(1))


@pytest.mark.parametrize("objective", ["detcon", "ntxent"])
def test_forward_is_the_loss_over_16_sampled_masks_of_each_view(objective):
    """Spelled out: dense masks made hard, samples in the order of the generator, every row and key by itself."""
    model, args = contrastive(objective, masks="prior"), batch()
    loss, stats = model(*args, 5, rng(7))
    _, views, regions, boxes, flips = args
    generator = rng(7)
    r2o.seeding_uniforms(4, 1, generator)  # K-means' share
    uniforms = torch.rand(2, 4, 16, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        nets = {
            name: r2o.encode(getattr(model, name)["encoder"], views).unflatten(0, (2, 4))
            for name in ("online", "target")
        }
        h, ids = {"online": [], "target": []}, [[], []]
        for v in (0, 1):
            m = r2o.crop_masks_ref(regions, boxes[:, v], flips[:, v], 20, 8).argmax(1)
            for b in range(4):
                present = m[b].unique()
                for u in uniforms[v, b]:
                    k = present[int(u * len(present))]
                    ids[v].append(b * 20 + int(k))
                    for name in h:
                        h[name].append(nets[name][v, b][:, m[b] == k].mean(1))
        z = {name: getattr(model, name)["projector"](torch.stack(x)) for name, x in h.items()}
        q, keys = (model.predictor(z["online"]), z["target"]) if objective == "detcon" else (z["online"], z["online"])
    q, keys, ids = q.chunk(2), keys.chunk(2), [torch.tensor(x) for x in ids]
    want = sum(
        slow_contrastive_loss(q[v], keys[v], keys[1 - v], ids[v], ids[v], ids[1 - v], 0.1).mean() for v in (0, 1)
    )
    torch.testing.assert_close(loss.detach(), want, rtol=1e-4, atol=1e-4)
    assert stats["pairs"] == 16 and stats["total"] == 64
    model.temperature = 0.2
    assert model(*args, 5, rng(7))[0] != loss


def test_sampling_masks_does_not_change_the_random_numbers_of_k_means():
    """So micro-batches cluster as the full batch would, whatever the objective."""
    states = []
    for model in (contrastive(), r2o.R2O("tiny", 20, kmeans_group=2, hidden=16, dim=8)):
        generator = rng(5)
        model(*batch(), 5, generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("objective", ["detcon", "ntxent"])
def test_gradients_reach_every_online_parameter_and_no_target_of_a_contrastive_model(objective):
    model = contrastive(objective)
    model(*batch(), 5, rng())[0].backward()
    for name, p in model.named_parameters():
        shift = objective == "ntxent" and name == "online.projector.4.bias"  # SimCLR's last batch norm has none
        assert (p.grad is None) == (name.startswith("target.") or shift), name
    assert any("predictor" in name for name, _ in model.named_parameters()) == (objective == "detcon")


RANKS = """
import torch, torch.distributed as dist
from test_baselines import batch, contrastive, rng
from torch.nn.parallel import DistributedDataParallel as DDP
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
for objective in ("detcon", "ntxent"):
    model = contrastive(objective).double().eval()  # without batch statistics, which differ between shares
    images, views, regions, boxes, flips = batch(8)
    own = slice(rank * 8 // world, (rank + 1) * 8 // world)
    views = views.double().unflatten(0, (2, 8))[:, own].flatten(0, 1)
    ddp = DDP(model)
    loss, _ = ddp(images.double()[own], views, regions[own], boxes[own], flips[own], 5, rng(3))
    loss.backward()
    mean = loss.detach() / world
    dist.all_reduce(mean)
    grad = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    if rank == 0:
        print(objective, mean.item(), grad.norm().item(), (grad * torch.arange(len(grad))).sum().item())
del ddp, model
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_contrastive_loss_and_gradient_do_not_depend_on_the_number_of_processes(tmp_path):
    """Keys and sampled masks are those of the global batch; DDP averages gradients, also through gathered keys."""
    (tmp_path / "ranks.py").write_text(RANKS)
    said = []
    for world in (1, 4):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        done = subprocess.run([*launch, tmp_path / "ranks.py"], env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        said.append([[float(x) for x in line.split()[1:]] for line in done.stdout.splitlines()])
    one, four = said
    assert len(one) == 2
    np.testing.assert_allclose(four, one, rtol=1e-5)


def learn(model, K, steps=30):
    """Losses and spreads of training on one batch."""
    optimizer = r2o.LARS([p for p in model.parameters() if p.requires_grad], lr=0.5)
    images, views, regions, boxes, _ = batch(8, size=32)
    seen = []
    for _ in range(steps):
        loss, stats = model(images, views, regions, boxes, torch.zeros(8, 2, dtype=torch.bool), K, rng())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(0.99)
        seen.append((loss.item(), stats["spread"].item()))
    return np.array(seen)


@pytest.mark.gpu
@pytest.mark.parametrize("kind, options", [(r2o.R2O, {}), (Contrastive, {}), (Odin, {"discovery_tau": 0.9})])
def test_the_loss_on_a_gpu_is_the_cpu_s_on_one_stream_and_on_two(kind, options):
    """Few cells may change masks, since features differ in their last digits."""
    losses = []
    for device, overlap in (("cpu", False), ("cuda", False), ("cuda", True), ("cuda", True)):
        torch.manual_seed(0)
        net = kind("tiny", 20, kmeans_group=2, hidden=16, dim=8, overlap=overlap, **options).to(device)
        with torch.backends.cudnn.flags(allow_tf32=False):
            losses.append(net(*(x.to(device) for x in batch()), 5, rng())[0])
            losses[-1].backward()
        assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
    cpu, alone, *beside = (x.item() for x in losses)
    assert alone == pytest.approx(cpu, rel=0.02) and beside == pytest.approx([alone] * 2, rel=1e-4)


@pytest.mark.parametrize(
    "kind, options",
    [
        (Contrastive, {"objective": "detcon"}),
        (Contrastive, {"objective": "detcon", "masks": "prior"}),
        (Contrastive, {"objective": "ntxent"}),
        (Odin, {"discovery_tau": 0.99, "kmeans_group": 1}),
    ],
)
def test_a_contrastive_model_overfits_one_batch_without_collapsing(kind, options):
    seen = learn(contrastive(kind=kind, hidden=32, dim=16, **options), 4)
    assert seen[-5:, 0].mean() < 0.75 * seen[0, 0] and seen[-1, 1] > 0.4


def test_the_memory_estimate_includes_the_contrastive_loss(monkeypatch):
    """Against what the loss of both directions keeps for its backward pass; 8 bytes a cosine more are for that pass."""
    model, device, kept = contrastive(), torch.device("cpu"), {}
    plain = r2o.R2O("tiny", 20, hidden=16, dim=8)
    more = plan.training_memory(model, 32, 64, device) - plan.training_memory(plain, 32, 64, device)
    assert more == 28 * 512 * 512
    monkeypatch.setenv("WORLD_SIZE", "4")
    four = plan.training_memory(model, 32, 64, device) - plan.training_memory(plain, 32, 64, device)
    assert four == 28 * 512 * 2048

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    q, z_same, z_other, *ids = rows(512, 2048, 8, 99, 0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        r2o.contrastive_loss(q.float().requires_grad_(), z_same.float(), z_other.float(), *ids)
    large = sum(x.untyped_storage().nbytes() for x in kept.values() if x.shape == (512, 2048))
    assert 2 * large == 20 * 512 * 2048


# ---- masks of the prior, Table 4 ------------------------------------------------------------------------------------


def test_with_masks_prior_each_region_is_a_mask_and_nothing_is_clustered(monkeypatch):
    monkeypatch.setattr(r2o, "kmeans_seeded", None)
    torch.manual_seed(0)
    model = r2o.R2O("tiny", num_regions=20, hidden=16, dim=8, masks="prior")
    images, views, regions, boxes, flips = batch()
    loss, stats = model(images, views, regions, boxes, flips, 4, rng())
    loss.backward()
    both = [(r2o.crop_masks(regions, boxes[:, v], flips[:, v], 20, 8).sum((2, 3)) > 1e-3) for v in (0, 1)]
    assert stats["pairs"] == (both[0] & both[1]).sum() / 4
    assert stats["masks"] == stats["clusters"] == np.mean([len(r.unique()) for r in regions])
    with pytest.raises(ValueError, match="choose one of predicted, prior"):
        r2o.R2O("tiny", masks="slic")


@pytest.mark.parametrize("flags, K", [("--prior grid --size 64", 196), ("--prior slic --segments 20", 20)])
def test_table_4_without_mask_prediction_takes_k_from_the_number_of_segments(photos, tmp_path, flags, K):
    """K also scales the learning rate, and does not change."""
    flags = [*SMALL, *flags.split(), *"--masks prior --epochs 2 --lr-k 16 --batch-size 6 --workers 0".split()]
    train.main(["--data", str(photos), "--out", str(tmp_path), *flags])
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["K"] for row in log] == [K, K] and log[0]["loss"] > 0
    assert log[0]["lr"] == pytest.approx(r2o.learning_rate(3, 8, 0, 6 / 256 * K / 16))
    schedule = train.make_schedule(train.parse_args(["--data", "x", "--masks", "prior"]), 10**6)
    assert {schedule(step)[0] for step in range(0, schedule.steps, 999)} == {100}


def test_all_rows_of_tables_4_and_9_are_command_lines():
    rows = {
        "--masks prior --prior grid": 196,
        "--masks prior": 100,
        "--prior grid --schedule constant --k-start 64": 64,
        "--prior grid": 128,
        "--schedule constant --k-start 64": 64,
        "": 128,
        "--schedule constant --k-start 160": 160,
        "--k-start 4 --k-end 16": 4,
        "--schedule linear": 128,
        "--k-start 1 --k-end 1 --schedule constant --lr-k 0": 1,
    }
    for flags, first in rows.items():
        schedule = train.make_schedule(train.parse_args(["--data", "x", *flags.split()]), 10**6)
        assert schedule(0)[0] == first, flags


# ---- DetCon's prior -------------------------------------------------------------------------------------------------


def test_fh_segments_an_image_at_its_original_size():
    from skimage.segmentation import felzenszwalb

    image = np.full((300, 420, 3), 40, np.uint8)
    image[60:220, 100:330] = (220, 180, 20)
    noise = np.random.default_rng(0).integers(0, 20, image.shape, np.uint8)
    regions = r2o.fh_regions(torch.from_numpy(image + noise).permute(2, 0, 1))
    assert regions.shape == (56, 56) and regions.dtype == torch.uint8 and regions.unique().tolist() == [0, 1]
    inside = regions == regions[28, 28]
    assert inside[12:40, 15:42].all() and not inside[:10].any() and not inside[:, :12].any()
    want = felzenszwalb(image + noise, scale=1000, min_size=1000)
    at = lambda i, side: int((i + 0.5) * side // 56)  # noqa: E731
    assert all(
        (regions[y, x] == regions[0, 0]) == (want[at(y, 300), at(x, 420)] == want[0, 0])
        for y in range(56)
        for x in range(56)
    )


def test_fh_segment_ids_of_a_large_busy_image_fit_in_a_byte(monkeypatch):
    import skimage.segmentation

    asked = []

    def segments(image, scale, min_size, real=skimage.segmentation.felzenszwalb):
        asked.append(min_size)
        cells = np.arange(600) // (25 if min_size == 1000 else 50)
        return cells[:, None] * 24 + cells[None]

    monkeypatch.setattr(skimage.segmentation, "felzenszwalb", segments)
    r2o.fh_regions(torch.zeros(3, 600, 600, dtype=torch.uint8))
    assert asked == [1000, 1407]  # 256 segments of 1,407 pixels are the whole image


def test_fh_refuses_an_image_without_pixels():
    with pytest.raises(ValueError, match="an image of 0 x 5 pixels has no segments"):
        r2o.fh_regions(torch.zeros(3, 5, 0, dtype=torch.uint8))


def test_fh_maps_are_not_mistaken_for_slic_maps(photos, tmp_path, refuse):
    flags = ["--data", photos, *SMALL, "--workers", "0", "--regions", tmp_path / "maps.npy"]
    train.main([*map(str, flags), "--out", str(tmp_path / "a"), "--prior", "fh", "--prepare"])
    header = json.loads((tmp_path / "maps.json").read_text())
    assert header["prior"] == "fh" and header["num_segments"] == "scale 1000, at least 1000 pixels"
    assert "belong to other data or settings (prior fh, now slic)" in refuse(*flags, "--out", tmp_path / "b")


# ---- SimCLR's views, Odin's crops -----------------------------------------------------------------------------------


def test_simclr_views_are_jittered_more_blurred_half_the_time_and_never_solarized():
    generator = np.random.default_rng(0)
    views = [np.array([r2o.draw_factors(generator, v, "simclr") for _ in range(2000)]) for v in (0, 1)]
    for x in views:
        assert 0.2 <= x[:, 4:7].min() < 0.22 and 1.78 < x[:, 4:7].max() <= 1.8
        assert -0.2 <= x[:, 7].min() < -0.19 and 0.19 < x[:, 7].max() <= 0.2
        assert np.mean(x[:, 9] > 0) == pytest.approx(0.5, abs=0.05) and not x[:, 10].any()
        assert np.mean(x[:, 0] >= 0) == pytest.approx(0.8, abs=0.05) and np.mean(x[:, 8]) == pytest.approx(
            0.2, abs=0.05
        )


@fuzz
@given(st.integers(5, 80), st.integers(5, 80), st.integers(0, 10**6))
def test_the_spanning_crop_is_the_smallest_that_contains_both_views(h, w, seed):
    """Its boxes cut the very pixels out of it that the views' boxes cut out of the whole image."""
    image = torch.arange(h * w).view(1, h, w)
    views = r2o.draw_views(torch.zeros(3, h, w, dtype=torch.uint8), 32, np.random.default_rng(seed))
    crop, boxes = spanning_crop(image, views["boxes"])

    def cut(x, box):
        left, top, right, bottom = (box * torch.tensor([x.shape[2], x.shape[1]] * 2)).round().int().tolist()
        return x[:, top:bottom, left:right]

    for box, inner in zip(views["boxes"], boxes, strict=True):
        assert torch.equal(cut(image, box), cut(crop, inner))
    assert boxes[:, :2].amin(0).tolist() == [0, 0] and boxes[:, 2:].amax(0).tolist() == [1, 1]


def test_odin_takes_the_spanning_crop_and_others_the_whole_image(photos, tmp_path):
    images = list_images(photos)
    maps, header = region_maps(images, tmp_path / "regions.npy", prior="grid", size=8)
    whole, spanning = (ImageRegions(images, maps, header, 32, spanning=s)[0, 3] for s in (False, True))
    assert all(torch.equal(whole[name], spanning[name]) for name in ("views", "flips", "factors", "regions"))
    assert not torch.equal(whole["image"], spanning["image"]) and not torch.equal(whole["boxes"], spanning["boxes"])


def test_odin_predicts_masks_with_a_second_target_network_of_another_momentum(monkeypatch):
    model = contrastive(kind=Odin, discovery_tau=0.5, kmeans_group=1)
    before = {
        name: [p.clone() for p in net.parameters()] for name, net in (("d", model.discovery), ("t", model.target))
    }
    for p in model.online.parameters():
        p.data.add_(1.0)
    model.update_target(0.9)
    pairs = [("d", model.discovery, model.online["encoder"], 0.5), ("t", model.target, model.online, 0.9)]
    for name, net, online, tau in pairs:
        for old, new, p in zip(before[name], net.parameters(), online.parameters(), strict=True):
            torch.testing.assert_close(new, tau * old + (1 - tau) * p)
    assert not any(p.requires_grad for p in model.discovery.parameters())

    regions = batch()[2]
    seen = []
    monkeypatch.setattr(Odin, "predict_masks", lambda self, net, x, *rest: seen.append(net) or regions.long())
    model(*batch(), 20, rng())
    assert seen == [model.discovery] and contrastive().mask_encoder is not model.discovery


# ---- train.py -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, kind, masks, policy, spanning",
    [
        ("", r2o.R2O, "predicted", "byol", False),
        ("--masks prior", r2o.R2O, "prior", "byol", False),
        ("--objective detcon --masks prior", Contrastive, "prior", "byol", False),
        ("--objective ntxent", Contrastive, "predicted", "simclr", False),
        ("ODIN", Odin, "predicted", "byol", True),
    ],
)
def test_flags_choose_the_model_and_its_views(photos, tmp_path, flags, kind, masks, policy, spanning):
    flags = flags.replace("ODIN", ODIN).split()
    args = train.parse_args(["--data", str(photos), "--out", str(tmp_path), *SMALL, "--workers", "0", *flags])
    data = train.open_data(args, list_images(photos), args.regions)
    model, _, _ = train.build(args, data.num_regions)
    assert type(model) is kind and model.masks == masks and (data.policy, data.spanning) == (policy, spanning)
    assert (model.predictor is None) == ("ntxent" in flags) and getattr(model, "discovery_tau", 0.9) == 0.9
    assert model.kmeans_group == (1 if masks == "prior" or kind is Odin else 4)


def test_the_strip_shows_the_masks_of_training_and_has_no_side_effects(photos, tmp_path):
    """In eval mode, on rank 0 alone: SyncBatchNorm in train mode would wait for the others."""
    args = train.parse_args(["--data", str(photos), "--out", str(tmp_path), *SMALL, "--workers", "0", *ODIN.split()])
    data = train.open_data(args, list_images(photos), args.regions)
    model, _, _ = train.build(args, data.num_regions)
    for p in model.discovery.parameters():
        p.data += 0.3 * torch.randn_like(p)
    shown = report.Report(tmp_path, train.make_schedule(args, 24), tensorboard=False)
    shown.start("", data, 0)
    before, seen = [x.clone() for x in model.state_dict().values()], []
    for net in model.modules():
        net.register_forward_pre_hook(lambda net, _: seen.append(net.training))
    shown.draw_strip(model, 6, 1, seed=0)
    assert seen and not any(seen) and all(map(torch.equal, before, model.state_dict().values()))
    assert all(net.training for net in model.modules())
    images = r2o.normalize(shown.preview["image"].movedim(-1, 1))
    uniforms = r2o.seeding_uniforms(24, 6, rng())
    m = model.predict_masks(model.discovery.eval(), images, shown.preview["regions"], 6, uniforms)  # each by itself
    assert torch.equal(shown.masks[0][2].long(), m[evenly(24, 8)])


def test_micro_batches_warn_that_a_contrastive_loss_has_fewer_negatives(photos, tmp_path, capsys):
    flags = [*SMALL, "--workers", "0", "--epochs", "1", "--objective", "detcon", "--accum", "2"]
    train.main(["--data", str(photos), "--out", str(tmp_path), *flags])
    assert "--accum limits negatives to the 4 images of a micro-batch" in capsys.readouterr().err


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "--objective detcon",
        "--objective detcon --masks prior --prior fh",
        "--objective ntxent --accum 2",
        ODIN,
    ],
)
def test_every_baseline_trains_and_resumes_bit_identically(photos, tmp_path, flags, monkeypatch):
    from runtime import distributed

    def run(out, *more):
        train.main(
            ["--data", str(photos), "--out", str(tmp_path / out), *SMALL, "--workers", "0", *flags.split(), *more]
        )
        return load(tmp_path / out / "last.pth")["model"] if (tmp_path / out / "last.pth").exists() else None

    whole = run("whole")
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "agree", lambda finite, stop: (True, asked.append(1) or len(asked) == 5))
        with pytest.raises(SystemExit):
            run("parts")
    parts = run("parts")
    assert len(asked) == 5 and whole.keys() == parts.keys() and all(torch.equal(x, parts[n]) for n, x in whole.items())
    file = load(tmp_path / "whole/r2o.pth")
    assert file["state_dict"].keys() == r2o.build_encoder("tiny").state_dict().keys() and file["args"]["lr_k"] == 0
    log = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert len(log) == 3 and all(row["loss"] > 0 and row["spread"] > 0.1 for row in log)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--objective detcon --k-end 1", "--objective detcon compares masks, but K reaches 1"),
        ("--objective ntxent --schedule constant --k-start 1", "--objective ntxent compares masks"),
        ("--objective detcon --masks prior --segments 1", "--objective detcon compares masks"),
        (ODIN + " --k-start 200", "200 clusters are more than the regions of one K-means (1 images of at most 196)"),
        ("--arch vit_b --size 64", "--arch vit_b makes 4 x 4 cells of --size 64, too few for masks"),
        ("--masks prior --prior fh", "has no fixed K to multiply the learning rate by: pass --lr-k 0"),
        ("--masks prior --assign region", "leave --assign out"),
        (ODIN.replace("detcon", "byol"), "--masks odin goes with DetCon's loss"),
        (ODIN.replace("grid", "slic"), "pass --prior grid --kmeans-group 1"),
        (ODIN.replace("group 1", "group 4"), "pass --prior grid --kmeans-group 1"),
        (ODIN.replace("--discovery-tau 0.9", ""), "--masks odin needs the momentum of its second network"),
        ("--discovery-tau 0.9", "--discovery-tau is only for --masks odin"),
        ("--objective simclr", "invalid choice: 'simclr'"),
    ],
)
def test_incompatible_flags_are_refused(photos, tmp_path, refuse, flags, said):
    assert said in refuse("--data", photos, "--out", tmp_path, *SMALL, "--workers", "0", *flags.split())
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_from_before_these_flags_resumes_and_another_objective_is_refused(photos, tmp_path, refuse):
    flags = ["--data", photos, "--out", tmp_path, *SMALL, "--workers", "0"]
    train.main([*map(str, flags)])
    file = load(tmp_path / "last.pth")
    for name in train.OLDER:
        del file["args"][name]
    torch.save(file, tmp_path / "last.pth")
    train.main([*map(str, flags)])
    assert "was trained with --objective byol, now it is detcon" in refuse(
        *flags, "--objective", "detcon", "--lr-k", 16
    )

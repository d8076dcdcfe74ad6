"""The compiled ops equal their references, on any input: csrc/ against the `_ref`s of r2o_ops.py."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import crop_case, kmeans_case, mask_case, pool_case, ragged, rng

import r2o
import r2o_ops

pytestmark = pytest.mark.skipif(r2o_ops.r2o_C is None, reason="r2o_C is not built: python setup.py build_ext --inplace")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
fuzz = settings(max_examples=40, deadline=None, derandomize=True)
ops = torch.ops.r2o
ROOT = Path(__file__).parent.parent


@on_devices
@fuzz
@given(
    st.integers(0, 3),
    st.sampled_from([1, 5, 64]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 30),
    st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_region_pool_equals_its_reference(device, B, C, H, W, scale, R, id_type, dtype):
    case = pool_case(B, C, H, W, scale, R, id_type, dtype, device, B + C + H)
    for got, want in zip(ops.region_pool(*case), r2o.region_pool_ref(*case), strict=True):
        torch.testing.assert_close(got, want)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@on_devices
@fuzz
@given(
    st.integers(0, 3),
    st.sampled_from([0, 1, 2, 7, 24, 40, 100]),  # 2 or 3 blocks of rows, the last one ragged
    st.sampled_from([1, 2, 3, 7, 16, 37, 130]),  # whole vectors of channels, and a rest
    st.sampled_from([1, 2, 3, 4, 5, 8, 21, 60]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)
def test_kmeans_chooses_the_seeds_of_its_reference(device, G, N, D, K, dtype, seed):
    """max_iters = 0 returns the seeds, K > N and groups without a valid point included."""
    case = (*kmeans_case(G, N, D, K, dtype, device, seed), 0)
    for got, want in zip(ops.kmeans(*case), r2o.kmeans_ref(*case), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@on_devices
@fuzz
@given(st.integers(0, 3), st.integers(0, 60), st.sampled_from([1, 2, 9, 40]), st.integers(1, 12), st.integers(0, 99))
def test_kmeans_equals_its_reference(device, G, N, D, K, seed):
    case = (*kmeans_case(G, N, D, K, torch.float64, device, seed, spread=1000), 20)
    (centers, assign), (centers_ref, assign_ref) = ops.kmeans(*case), r2o.kmeans_ref(*case)
    torch.testing.assert_close(centers, centers_ref)
    assert torch.equal(assign, assign_ref)


@on_devices
def test_kmeans_at_training_size_has_the_reference_s_inertia(device):
    """float32, N = 3200, D = 256, K = 64: sums run in another order, so compare what K-means minimizes."""
    points = torch.nn.functional.normalize(torch.randn(2, 3200, 256, generator=rng(0)).to(device) + 1, dim=-1)
    valid = torch.rand(2, 3200, generator=rng(1)).to(device) < 0.8
    u = r2o.seeding_uniforms(2, 64, rng(2)).to(device)
    inertia = []
    for f in (ops.kmeans, r2o.kmeans_ref):
        centers, assign = f(points - points.mean(1, keepdim=True), valid, u, 20)
        d = (
            (
                points
                - points.mean(1, keepdim=True)
                - centers.gather(1, assign.clamp(min=0)[..., None].expand_as(points))
            )
            .square()
            .sum(-1)
        )
        inertia.append((d * valid).sum())
    torch.testing.assert_close(*inertia, rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
@on_devices
def test_split_products_are_nearly_those_of_float32(device, scale):
    """What csrc/cuda/kmeans.cu makes of float32 points; on a CPU the representation alone, multiplied in float64."""
    x = torch.nn.functional.normalize(torch.randn(1, 500, 1024, generator=rng(0)).to(device) + 1, dim=-1) * scale
    x = x - x.mean(1, keepdim=True)
    scaled = x * 2.0 ** (15 - math.frexp(2 * x.abs().max().item())[1])  # as large as float16 allows
    high = scaled.half()
    low = (scaled - high.float()).half()
    if device == "cpu":
        got = high.double() @ high.double().mT + high.double() @ low.double().mT + low.double() @ high.double().mT
    else:
        got = sum(torch.bmm(a, b.mT, out_dtype=torch.float32) for a, b in ((high, high), (high, low), (low, high)))
    length = scaled.double().norm(dim=-1)
    error = (got - scaled.double() @ scaled.double().mT).abs() / (length[:, :, None] * length[:, None])
    # Tensor cores cut the sums off where a CPU rounds them, which lowers a point's product with itself.
    assert error.max() < (2**-20 if device == "cpu" else 2**-16)


CAPABILITIES = ["default", "avx2", "avx512"]
HERE = torch.backends.cpu.get_cpu_capability().lower()  # PyTorch would take more, but the processor has no more


@pytest.mark.parametrize("capability", CAPABILITIES[: CAPABILITIES.index(HERE) + 1] if HERE in CAPABILITIES else [HERE])
def test_ops_equal_their_references_for_every_vector_width(capability, tmp_path):
    """csrc/cpu/rows.h has its loops once for each; PyTorch's own switch picks among those that the processor has."""
    names = "region_pool_equals or chooses_the_seeds or kmeans_equals or mask_pool_and_its"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", f"cpu and ({names})", __file__]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))  # make sanitize's build comes first
    env = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": path}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert run.returncode == 0 and "4 passed" in run.stdout, run.stdout


@on_devices
@fuzz
@given(
    st.integers(0, 4),
    st.integers(1, 30),
    st.integers(1, 56),
    st.integers(1, 9),
    st.sampled_from([1, 3, 7, 14]),
    st.integers(0, 999),
)
def test_crop_masks_equals_its_reference(device, B, h, w, K, size, seed):
    case = (*crop_case(B, h, w, K, seed, device), size)
    torch.testing.assert_close(ops.crop_masks(*case), r2o.crop_masks_ref(*case), rtol=1e-4, atol=1e-5)


@on_devices
@fuzz
@given(
    st.integers(1, 3),
    st.sampled_from([1, 5, 64]),
    st.integers(1, 7),
    st.integers(1, 6),
    st.integers(0, 20),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 99),
)
def test_mask_pool_and_its_gradient_equal_their_references(device, B, C, H, K, P, dtype, seed):
    features, weights, pairs = mask_case(B, C, H, K, P, dtype, device, seed)
    results = []
    for f in (ops.mask_pool, r2o.mask_pool_ref):
        x = features.detach().clone().requires_grad_()
        h = f(x, weights, pairs)
        h.backward(ragged(h.shape, h.dtype, device, seed))
        results.append((h.detach(), x.grad))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype and got.isfinite().all()
        torch.testing.assert_close(got, want)


@on_devices
def test_mask_pool_s_gradient_equals_finite_differences(device):
    features, weights, pairs = mask_case(2, 3, 3, 4, 6, torch.float64, device, 0)
    assert torch.autograd.gradcheck(lambda x: ops.mask_pool(x, weights, pairs), features.clone().requires_grad_())


@on_devices
def test_ops_pass_opcheck(device):
    """opcheck: schemas, shape inference, autograd and tracing by torch.compile."""
    torch.library.opcheck(ops.region_pool, pool_case(2, 5, 3, 2, 2, 7, torch.uint8, torch.bfloat16, device, 0))
    torch.library.opcheck(ops.kmeans, (*kmeans_case(2, 30, 4, 5, torch.float32, device, 0), 5))
    torch.library.opcheck(ops.crop_masks, (*crop_case(3, 14, 14, 5, 0, device), 7))
    features, weights, pairs = mask_case(2, 3, 3, 4, 6, torch.float32, device, 0)
    torch.library.opcheck(ops.mask_pool, (features.clone().requires_grad_(), weights, pairs))
    torch.library.opcheck(ops.mask_pool_backward, (torch.ones(6, 3, device=device), weights, pairs))


@on_devices
def test_ops_are_deterministic(device):
    """Twice the same bits, also with another number of threads."""
    torch.manual_seed(0)
    points, valid, u = (
        torch.randn(1, 3000, 160, device=device),  # enough columns for two threads to share
        torch.ones(1, 3000, dtype=torch.bool, device=device),
        r2o.seeding_uniforms(1, 16, rng(0)).to(device),
    )
    features, weights, pairs = mask_case(3, 64, 7, 6, 40, torch.float32, device, 0)
    grad = torch.randn(40, 64, device=device)
    threads = 2
    runs = []
    for n in (threads, threads, 1):
        torch.set_num_threads(n)
        runs.append(
            (
                *ops.kmeans(points, valid, u, 20),
                ops.mask_pool(features, weights, pairs),
                ops.mask_pool_backward(grad, weights, pairs),
            )
        )
    torch.set_num_threads(1)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@on_devices
@pytest.mark.parametrize("shape", [(5, 307), (32, 48), (29, 53)])
def test_region_pool_with_about_48_kb_of_shared_memory(device, shape):
    """1,535, 1,536 and 1,537 cells."""
    case = pool_case(1, 3, *shape, 1, 5, torch.uint8, torch.float32, device, 0)
    for got, want in zip(ops.region_pool(*case), r2o.region_pool_ref(*case), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "G, N, D, K", [(1, 6132, 3, 4), (1, 6134, 3, 4), (1, 6144, 3, 4), (70_000, 10, 8, 2), (40, 4000, 4, 3)]
)
def test_kmeans_of_many_points_or_groups_on_a_gpu(G, N, D, K):
    """float64 rows of 48 KB; more groups than a grid has rows; more dot products than are kept at a time (5 GB)."""
    case = (*kmeans_case(G, N, D, K, torch.float64, "cuda", 0, spread=1000), 2)
    (centers, assign), (centers_ref, assign_ref) = ops.kmeans(*case), r2o.kmeans_ref(*case)
    torch.testing.assert_close(centers, centers_ref)
    assert torch.equal(assign, assign_ref)


@on_devices
def test_ops_keep_full_precision_whatever_the_global_setting(device):
    """TF32, or bfloat16 on a CPU, would move points between clusters."""
    points = torch.nn.functional.normalize(torch.randn(1, 400, 64, generator=rng(0)).to(device), dim=-1)
    valid = torch.ones(1, 400, dtype=torch.bool, device=device)
    u = r2o.seeding_uniforms(1, 30, rng(1)).to(device)
    c4 = torch.randn(2, 64, 14, 14, generator=rng(2)).to(device)
    regions = r2o.grid_regions().expand(2, -1, -1).to(device)
    found = []
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        with r2o_ops.full_precision(points.device):
            reference = r2o.kmeans_ref(points, valid, u, 20)
        assert torch.get_float32_matmul_precision() == precision
        masks = r2o.predict_masks(c4, regions, 30, u)
        found.append((*reference, *r2o_ops.kmeans_seeded(points, valid, u, 20), masks))
    torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.gpu
def test_kmeans_under_autocast_on_a_gpu():
    case = (*kmeans_case(2, 60, 8, 5, torch.float32, "cuda", 0), 5)
    with torch.autocast("cuda", torch.bfloat16):
        got = ops.kmeans(*case)
    assert all(torch.equal(a, b) for a, b in zip(got, ops.kmeans(*case), strict=True))


def test_fake_mask_pool_supports_symbolic_shapes():
    """P of a nonzero() that torch.compile has not run."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        weights, features = torch.rand(2, 3, 7, 7), torch.rand(2, 5, 7, 7)
        pairs = (weights.sum((2, 3)) > 1).nonzero()
        assert ops.mask_pool(features, weights, pairs).shape == (pairs.shape[0], 5)


def test_non_finite_boxes_have_no_weight_and_terminate():
    masks, flips = torch.zeros(3, 4, 4, dtype=torch.long), torch.zeros(3, dtype=torch.bool)
    boxes = torch.tensor([[0, 0, math.inf, 1], [0, math.nan, 1, 1], [0, 0, 3e38, 1]])
    began = time.perf_counter()
    assert not ops.crop_masks(masks, boxes, flips, 1, 7).any() and time.perf_counter() - began < 1


@pytest.mark.gpu
def test_ops_never_synchronize_with_the_host():
    case = kmeans_case(2, 500, 16, 8, torch.float32, "cuda", 0)
    pool, crop, mask = (
        pool_case(2, 8, 7, 7, 2, 9, torch.uint8, torch.float32, "cuda", 0),
        crop_case(2, 14, 14, 5, 0, "cuda"),
        mask_case(2, 8, 7, 5, 9, torch.float32, "cuda", 0),
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.kmeans(*case, 20), ops.region_pool(*pool), ops.crop_masks(*crop, 7), ops.mask_pool(*mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


BAD = {
    "region ids too high": lambda: (ops.region_pool, torch.zeros(1, 2, 2, 2), torch.full((1, 4, 4), 3), 3),
    "negative region ids": lambda: (ops.region_pool, torch.zeros(1, 2, 2, 2), torch.full((1, 4, 4), -1), 3),
    "float region ids": lambda: (ops.region_pool, torch.zeros(1, 2, 2, 2), torch.zeros(1, 4, 4), 3),
    "regions that do not tile": lambda: (
        ops.region_pool,
        torch.zeros(1, 2, 2, 2),
        torch.zeros(1, 5, 4, dtype=torch.uint8),
        3,
    ),
    "integer features": lambda: (
        ops.region_pool,
        torch.zeros(1, 2, 2, 2, dtype=torch.long),
        torch.zeros(1, 4, 4, dtype=torch.uint8),
        3,
    ),
    "another batch": lambda: (ops.region_pool, torch.zeros(2, 2, 2, 2), torch.zeros(1, 4, 4, dtype=torch.uint8), 3),
    "points without groups": lambda: (
        ops.kmeans,
        torch.zeros(4, 2),
        torch.ones(4, dtype=torch.bool),
        torch.rand(1, 2, 2, dtype=torch.float64),
        5,
    ),
    "half points": lambda: (
        ops.kmeans,
        torch.zeros(1, 4, 2).half(),
        torch.ones(1, 4, dtype=torch.bool),
        torch.rand(1, 2, 2, dtype=torch.float64),
        5,
    ),
    "valid of another shape": lambda: (
        ops.kmeans,
        torch.zeros(1, 4, 2),
        torch.ones(1, 5, dtype=torch.bool),
        torch.rand(1, 2, 2, dtype=torch.float64),
        5,
    ),
    "uniforms of another group": lambda: (
        ops.kmeans,
        torch.zeros(1, 4, 2),
        torch.ones(1, 4, dtype=torch.bool),
        torch.rand(2, 2, 2, dtype=torch.float64),
        5,
    ),
    "cluster ids too high": lambda: (
        ops.crop_masks,
        torch.full((1, 4, 4), 3),
        torch.zeros(1, 4),
        torch.zeros(1, dtype=torch.bool),
        3,
        7,
    ),
    "boxes of another shape": lambda: (
        ops.crop_masks,
        torch.zeros(1, 4, 4, dtype=torch.long),
        torch.zeros(1, 5),
        torch.zeros(1, dtype=torch.bool),
        3,
        7,
    ),
    "pairs out of range": lambda: (
        ops.mask_pool,
        torch.zeros(1, 2, 3, 3),
        torch.zeros(1, 4, 3, 3),
        torch.tensor([[1, 0]]),
    ),
    "negative pairs": lambda: (
        ops.mask_pool_backward,
        torch.zeros(1, 2),
        torch.zeros(1, 4, 3, 3),
        torch.tensor([[0, -1]]),
    ),
    "weights of another size": lambda: (
        ops.mask_pool,
        torch.zeros(1, 2, 3, 3),
        torch.zeros(1, 4, 2, 3),
        torch.tensor([[0, 0]]),
    ),
    "float pairs": lambda: (ops.mask_pool, torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 3, 3), torch.tensor([[0.0, 0]])),
    "a gradient of another length": lambda: (
        ops.mask_pool_backward,
        torch.zeros(2, 2),
        torch.zeros(1, 4, 3, 3),
        torch.tensor([[0, 0]]),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_ops_refuse_invalid_input(name):
    op, *args = BAD[name]()
    with pytest.raises(RuntimeError):
        op(*args)

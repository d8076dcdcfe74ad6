"""K-means, Eq. (3): what kmeans() promises whichever code runs."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import r2o
import r2o_ops

fuzz = settings(max_examples=60, deadline=None, derandomize=True)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def inertia(points, centers, assign):
    """Sum of squared distances to the assigned center, per group."""
    own = centers.gather(1, assign.clamp(min=0)[..., None].expand(*assign.shape, centers.shape[2]))
    return ((points - own).square().sum(-1) * (assign >= 0)).sum(1)


def test_it_finds_planted_clusters():
    centers = torch.randn(3, 8, 16, generator=rng()) * 10
    points = centers.repeat_interleave(25, 1) + torch.randn(3, 200, 16, generator=rng(1)) * 0.1
    found, assign = r2o.kmeans(points, 8, generator=rng())
    planted = torch.arange(8).repeat_interleave(25)
    for g in range(3):
        assert len({(int(a), int(b)) for a, b in zip(assign[g], planted, strict=True)}) == 8  # one to one
        torch.testing.assert_close(found[g][assign[g]], centers[g].repeat_interleave(25, 0), atol=0.15, rtol=0)


def test_more_iterations_never_raise_the_inertia():
    points = torch.rand(4, 300, 5, generator=rng())
    runs = [inertia(points, *r2o.kmeans(points, 12, max_iters=i, generator=rng(1))) for i in (0, 1, 2, 3, 5, 10, 50)]
    for before, after in itertools.pairwise(runs):
        assert (after <= before * (1 + 1e-6)).all()
    assert (runs[-1] < runs[0]).all()


def test_converged_means_every_center_is_the_mean_of_its_points():
    points = torch.rand(2, 200, 4, generator=rng())
    centers, assign = r2o.kmeans(points, 7, max_iters=200, generator=rng(1))
    for g in range(2):
        for k in range(7):
            torch.testing.assert_close(centers[g, k], points[g][assign[g] == k].mean(0))


@fuzz
@given(st.integers(1, 3), st.integers(0, 40), st.integers(1, 6), st.integers(1, 50), st.integers(0, 999), st.booleans())
def test_every_valid_point_goes_to_its_nearest_center_and_nothing_is_nan(G, N, D, K, seed, duplicates):
    points = torch.randn(G, N, D, generator=rng(seed))
    points = points.round() if duplicates else points
    valid = torch.rand(G, N, generator=rng(seed)) < torch.rand(G, 1, generator=rng(seed + 1)) * 1.5
    points[~valid] = float("nan")  # whatever an invalid row holds
    centers, assign = r2o.kmeans(points, K, valid, generator=rng(seed))
    assert centers.shape == (G, K, D) and centers.isfinite().all()
    assert (assign[~valid] == -1).all() and (assign[valid] >= 0).all() and (assign < K).all()
    distance = torch.cdist(points.nan_to_num().double(), centers.double())  # (G, N, K)
    own = distance.gather(2, assign.clamp(min=0)[..., None])[..., 0]
    assert (own - distance.amin(2))[valid].le(1e-3).all()
    for g in range(G):  # K is cut to the number of valid points
        assert assign[g][valid[g]].unique().numel() <= min(K, int(valid[g].sum()))
        if K >= valid[g].sum():
            assert own[g][valid[g]].le(1e-3).all()


@pytest.mark.parametrize("iters", [1, 2, 3])
def test_exactly_the_given_number_of_iterations_is_run(iters):
    """The compiled op and the reference agree after each iteration, not only at the end."""
    if r2o_ops.r2o_C is None:
        pytest.skip("r2o_C is not built")
    case = (
        torch.rand(2, 300, 4, generator=rng()).double(),
        torch.ones(2, 300, dtype=torch.bool),
        r2o.seeding_uniforms(2, 12, rng(1)),
        iters,
    )
    torch.testing.assert_close(torch.ops.r2o.kmeans(*case), r2o.kmeans_ref(*case))


def test_it_runs_in_inference_mode_on_several_threads():
    torch.set_num_threads(2)
    with torch.inference_mode():
        centers, assign = r2o.kmeans(torch.rand(4, 100, 8, generator=rng()), 5, generator=rng(1))
    torch.set_num_threads(1)
    torch.set_num_threads(1)
    assert centers.isfinite().all() and assign.max() == 4


def test_invalid_points_change_nothing():
    points, junk = torch.randn(1, 50, 3, generator=rng()), torch.full((1, 30, 3), 1e6)
    alone = r2o.kmeans(points, 5, generator=rng(1))
    valid = torch.arange(80)[None] < 50
    both = r2o.kmeans(torch.cat([points, junk], 1), 5, valid, generator=rng(1))
    torch.testing.assert_close(both[0], alone[0])
    assert torch.equal(both[1][:, :50], alone[1])


def test_groups_are_independent():
    """So that results depend on neither the batch nor the number of processes."""
    points, u = torch.randn(4, 60, 3, generator=rng()), r2o.seeding_uniforms(4, 6, rng(1))
    valid = torch.ones(4, 60, dtype=torch.bool)
    together = r2o.kmeans_seeded(points, valid, u, 20)
    for g in range(4):
        alone = r2o.kmeans_seeded(points[g : g + 1], valid[g : g + 1], u[g : g + 1], 20)
        torch.testing.assert_close(together[0][g], alone[0][0])
        assert torch.equal(together[1][g], alone[1][0])


@pytest.mark.parametrize("native", [False, True])
def test_an_emptied_cluster_keeps_its_center(native):
    """Seeds 0, 1 and 10 of one dimension: after the first update 0 and 1's points all prefer one of the two centers."""
    if native and r2o_ops.r2o_C is None:
        pytest.skip("r2o_C is not built")
    op = torch.ops.r2o.kmeans if native else r2o.kmeans_ref
    emptied = 0
    for seed in range(200):
        points = torch.randint(0, 8, (1, 12, 1), generator=rng(seed)).double()
        valid, u = torch.ones(1, 12, dtype=torch.bool), r2o.seeding_uniforms(1, 7, rng(seed))
        sizes = [torch.bincount(op(points, valid, u, i)[1][0], minlength=7) for i in (0, 30)]
        centers = [op(points, valid, u, i)[0][0] for i in (0, 30)]
        assert centers[1].isfinite().all()
        for k in range(7):
            if sizes[0][k] == 0 and sizes[1][k] == 0:  # never owned a point: the seed must still stand there
                emptied += 1
                torch.testing.assert_close(centers[1][k], centers[0][k])
    assert emptied > 10  # the case did occur


def test_half_precision_costs_less_than_a_thousandth_of_the_inertia():
    points = torch.nn.functional.normalize(torch.randn(2, 500, 64, generator=rng()).abs(), dim=-1)
    full = inertia(points, *r2o.kmeans(points, 10, generator=rng(1)))
    for dtype in (torch.float16, torch.bfloat16):
        centers, assign = r2o.kmeans(points.to(dtype), 10, generator=rng(1))
        assert centers.dtype == torch.float32
        again = inertia(points.to(dtype).float(), centers, assign)
        reference = inertia(points.to(dtype).float(), *r2o.kmeans(points.to(dtype).float(), 10, generator=rng(1)))
        torch.testing.assert_close(again, reference, rtol=1e-3, atol=0)
        torch.testing.assert_close(again, full, rtol=3e-2, atol=0)


def test_points_far_from_the_origin_are_clustered_as_well():
    """Distances come from dot products, which would lose all digits at an offset of 1e4 in float32."""
    points = torch.rand(1, 300, 3, generator=rng())
    near, far = (inertia(p, *r2o.kmeans(p, 9, generator=rng(1))) for p in (points, points + 1e4))
    torch.testing.assert_close(far, near, rtol=1e-2, atol=0)


def test_seeding_prefers_points_far_from_the_seeds():
    """Two far clusters of unequal size: k-means++ seeds one in each, nearly always."""
    points = torch.randn(200, 50, 2, generator=rng())
    points[:, 0] += 100
    seeds, _ = r2o.kmeans(points, 2, max_iters=0, generator=rng(1))
    assert ((seeds[..., 0] > 50).sum(1) == 1).float().mean() > 0.98


def test_autocast_does_not_lower_the_precision():
    points = torch.randn(1, 100, 8, generator=rng()) + 5
    want = r2o.kmeans(points, 5, generator=rng(1))
    with torch.autocast("cpu", torch.bfloat16):
        got = r2o.kmeans(points, 5, generator=rng(1))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.zeros(4, 2), 2), "points must be float"),
        ((torch.zeros(1, 4, 2, dtype=torch.long), 2), "points must be float"),
        ((torch.zeros(1, 4, 2), 0), "num_clusters must be at least 1"),
        ((torch.zeros(1, 4, 2), 2, torch.ones(1, 3, dtype=torch.bool)), "valid must be bool"),
        ((torch.zeros(1, 4, 2), 2, torch.ones(1, 4)), "valid must be bool"),
        ((torch.zeros(1, 4, 2), 2, None, -1), "max_iters must not be negative"),
    ],
)
def test_invalid_input_is_refused(args, message):
    with pytest.raises(ValueError, match=message):
        r2o.kmeans(*args)

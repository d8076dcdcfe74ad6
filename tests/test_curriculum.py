"""Schedules, Sec. 3.3, Eq. (A1) and A.1, and the optimizer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import r2o


def test_k_has_the_paper_s_values_at_epochs_100_200_and_300():
    """Fig. 5: 119, 74 and 4 clusters after 100, 200 and 300 epochs, 128 up to epoch 40."""
    assert [r2o.num_clusters(t, 300) for t in (0, 1, 40, 100, 200, 300)] == [128, 128, 128, 119, 74, 4]
    assert r2o.num_clusters(41, 300) < 128


def test_the_other_schedules_of_table_9():
    assert [r2o.num_clusters(t, 100, 64, 4, 0, "linear") for t in (0, 50, 100)] == [64, 34, 4]
    assert {r2o.num_clusters(t, 100, 16, 4, 0, "constant") for t in range(101)} == {16}
    rising = [r2o.num_clusters(t, 100, 4, 128, 0, "cosine") for t in range(101)]
    assert rising[0] == 4 and rising[-1] == 128 and rising == sorted(rising)


@given(
    st.integers(1, 400),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(0, 400),
    st.sampled_from(["cosine", "linear"]),
)
def test_k_runs_monotonically_from_start_to_end(epochs, start, end, hold, schedule):
    ks = [r2o.num_clusters(t, epochs, start, end, hold, schedule) for t in range(epochs + 1)]
    assert ks[0] == start and all(k == start for k in ks[: hold + 1])
    if hold < epochs:
        assert ks[-1] == end
    assert ks in (sorted(ks), sorted(ks, reverse=True)) and min(ks) >= min(start, end) and max(ks) <= max(start, end)


@pytest.mark.parametrize("bad", [{"schedule": "square"}, {"k_start": 0}, {"k_end": 0}])
def test_invalid_schedules_are_refused(bad):
    with pytest.raises(ValueError, match=r"choose one of cosine|at least 1"):
        r2o.num_clusters(1, 10, **bad)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [r2o.learning_rate(s, 1000, 10, 4.8) for s in range(1001)]
    assert rates[0] == 0 and rates[5] == pytest.approx(2.4) and max(rates) == rates[10] == 4.8
    assert rates[505] == pytest.approx(2.4) and rates[1000] == pytest.approx(0, abs=1e-9)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert r2o.learning_rate(0, 5, 0, 1.0) == 1.0


def test_the_target_momentum_rises_to_one():
    """tau = 1 - (1 - 0.99) (cos(pi s / S) + 1) / 2."""
    assert r2o.target_momentum(0, 100) == pytest.approx(0.99)
    assert r2o.target_momentum(50, 100) == pytest.approx(0.995)
    assert r2o.target_momentum(100, 100) == 1
    assert r2o.target_momentum(25, 100, 0.9) == pytest.approx(1 - 0.1 * (math.cos(math.pi / 4) + 1) / 2)


def test_lars_by_hand():
    """Three steps of arXiv 1708.03888 on matrices of different scale, plain momentum SGD without decay on a vector."""
    torch.manual_seed(0)
    params = [torch.randn(4, 3), torch.randn(4), 7 * torch.randn(2, 5)]
    grads = [[torch.randn_like(p) for p in params] for _ in range(3)]
    want, velocity = [p.clone() for p in params], [torch.zeros_like(p) for p in params]
    params = [p.requires_grad_() for p in params]
    optimizer = r2o.LARS(params, lr=0.5, momentum=0.9, weight_decay=0.1, eta=0.01)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for i, g in enumerate(step):
            assert torch.equal(params[i].grad, g)  # gradients stay as they were
            if g.ndim > 1:
                g = g + 0.1 * want[i]
                g = 0.01 * want[i].norm() / g.norm() * g
            velocity[i] = 0.9 * velocity[i] + g
            want[i] = want[i] - 0.5 * velocity[i]
    torch.testing.assert_close([p.detach() for p in params], want)


def test_lars_handles_zero_weights_zero_gradients_and_missing_gradients():
    params = [torch.zeros(2, 2), torch.ones(2, 2), torch.ones(2, 2)]
    params = [p.requires_grad_() for p in params]
    optimizer = r2o.LARS(params, lr=1.0, weight_decay=0.0)
    params[0].grad, params[1].grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), -torch.ones(2, 2))  # ratio 1 where a norm is 0
    assert torch.equal(params[1].detach(), torch.ones(2, 2)) and torch.equal(params[2].detach(), torch.ones(2, 2))


def test_lars_continues_from_its_state_dict():
    def run(split):
        torch.manual_seed(0)
        w = torch.randn(3, 3).requires_grad_()
        optimizer = r2o.LARS([w], lr=0.3)
        for i in range(6):
            if i == split:
                state = optimizer.state_dict()
                optimizer = r2o.LARS([w], lr=0.3)
                optimizer.load_state_dict(state)
            w.grad = w.detach().sin()
            optimizer.step()
        return w.detach()

    assert torch.equal(run(3), run(None))

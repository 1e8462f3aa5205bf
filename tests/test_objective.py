"""The likelihood objective and the loss in the network's own space."""
import pytest
import torch
from conftest import close, full, normal, per_row, rng, same_mean
from families import mixture
from hypothesis import given
from strategies import schedules, seeds

from udm_book.hot import Hot
from udm_book.objective import network_loss, nll
from udm_book.oracle import Oracle
from udm_book.parameterization import EPS, X0, Denoiser, V
from udm_book.posterior import Dirac
from udm_book.schedule import Schedule

SCHEDULE = Schedule.linear(8, 0.05, 0.6)


def cubic(x, t, shift=0.0): return x**3 / 10 + per_row(t.to(x.dtype), x) / 8 + shift


@given(schedules(), seeds)
def test_nll_of_a_dirac_is_the_squared_error(schedule, seed):
    F, x0 = Hot(schedule), normal(5, 2, 3, seed=seed, device="cpu")
    t = torch.randint(1, F.T + 1, (5,), generator=rng(seed, "cpu"))
    got = nll(F, lambda xt, t: Dirac(cubic(xt, t)), x0, t, generator=rng(seed, "cpu"))
    xt = F.sample(x0, t, generator=rng(seed, "cpu"))
    want = torch.stack([((cubic(xt[i:i + 1], t[i:i + 1]) - x0[i]) ** 2).sum() for i in range(5)])
    close(got, want, 6 * (1 + want))


def test_the_exact_posterior_has_the_least_nll():
    "Entropy below cross entropy by KL: at every time the oracle beats oracles of other data, by more than 5 standard errors."
    data, n = mixture(2, 2, seed=1).cpu(), 20_000
    x0, F = data.sample(n, generator=rng(0, "cpu")), Hot(SCHEDULE)
    for t in 1, 4, 8:
        best = nll(F, Oracle(data, SCHEDULE), x0, full(x0, t), generator=rng(t, "cpu"))
        for other in mixture(1, 2, seed=1).cpu(), mixture(2, 2, seed=2).cpu():
            gap = nll(F, Oracle(other, SCHEDULE), x0, full(x0, t), generator=rng(t, "cpu")) - best
            assert gap.mean() > 5 * gap.std() / n**0.5


@pytest.mark.parametrize("P", [EPS, X0, V], ids=lambda P: P.name)
def test_network_loss_is_the_error_in_x0_over_its_weight(P):
    "`|y - y_hat|² out² = |x0 - x0_hat|²`: the definition of a parameterization's weight."
    F, D, x0 = Hot(SCHEDULE), Denoiser(cubic, SCHEDULE, P), normal(6, 2, 2, device="cpu")
    t = torch.tensor([1, 2, 3, 5, 7, 8])
    loss = network_loss(F, D, x0, t, generator=rng(3, "cpu"))
    weight = P.weight(SCHEDULE.alpha, SCHEDULE.sigma)[t]
    error = nll(F, D, x0, t, generator=rng(3, "cpu")) / 4                           # the mean over four coordinates
    close(loss * weight, error, 20 * (1 + weight) * (1 + loss))
    close(network_loss(F, D, x0, t, weight=lambda t: t + 0.5, generator=rng(3, "cpu")), (t + 0.5) * loss, 20 * (1 + loss))


def test_times_are_drawn_uniformly_from_1_to_T():
    seen = []
    def net(x, t):
        seen.append(t)
        return x
    D = Denoiser(net, SCHEDULE, EPS)
    network_loss(Hot(SCHEDULE), D, torch.zeros(40_000, 1), generator=rng(0, "cpu"))
    same_mean(torch.nn.functional.one_hot(seen[0], 10).double(), torch.tensor([0.0] + 8 * [1 / 8] + [0.0]).double())


def test_times_and_noise_come_from_the_generator_alone():
    F, D, x0 = Hot(SCHEDULE), Denoiser(cubic, SCHEDULE, EPS), normal(8, 2, device="cpu")
    state = torch.get_rng_state()
    a, b = (network_loss(F, D, x0, generator=rng(1, "cpu")) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(state, torch.get_rng_state())
    nll(F, D, x0, torch.arange(1, 9), generator=rng(1, "cpu"))
    assert torch.equal(state, torch.get_rng_state())


def test_conditions_reach_the_network_and_gradients_its_weights():
    F, x0, t = Hot(SCHEDULE), normal(3, 2, device="cpu"), torch.tensor([1, 4, 8])
    D = Denoiser(cubic, SCHEDULE, X0)
    plain, moved = (network_loss(F, D, x0, t, generator=rng(0, "cpu"), shift=s) for s in (0.0, 1.0))
    assert (plain != moved).all()
    assert (nll(F, D, x0, t, generator=rng(0, "cpu"), shift=1.0) != nll(F, D, x0, t, generator=rng(0, "cpu"))).all()
    layer = torch.nn.Linear(2, 2).double()
    network_loss(F, Denoiser(lambda x, t: layer(x), SCHEDULE, V), x0, t).sum().backward()
    assert layer.weight.grad.abs().min() > 0

"""EPS, X0, V: each is a mixture of data and noise, and the data come back from it."""
import pytest
import torch
from conftest import close, full, normal, per_row
from hypothesis import given
from strategies import dtypes, seeds, shapes, spans

from udm_book.hot import Hot
from udm_book.parameterization import EPS, X0, Denoiser, Parameterization, V
from udm_book.posterior import Dirac, Gaussian
from udm_book.schedule import Schedule

ALL = pytest.mark.parametrize("P", [EPS, X0, V], ids=lambda P: P.name)
TARGETS = {                                     # what the articles train on, from (x0, eps, alpha, sigma)
    "EPS": lambda x0, eps, a, s: eps,           # Ho et al. 2020
    "X0": lambda x0, eps, a, s: x0,             # the data
    "V": lambda x0, eps, a, s: a * eps - s * x0,    # Salimans & Ho 2022
}
INVERSES = {                                    # and how they give x0_hat from (xt, y, alpha, sigma)
    "EPS": lambda xt, y, a, s: (xt - s * y) / a,
    "X0": lambda xt, y, a, s: y,
    "V": lambda xt, y, a, s: a * xt - s * y,
}


@ALL
@given(span=spans(positive=True), seed=seeds, shape=shapes, dtype=dtypes)
def test_targets_and_answers_are_those_of_the_articles(P, span, seed, shape, dtype):
    schedule, t, _ = span
    x0, eps, y = (normal(*shape, seed=seed + k, dtype=dtype, device="cpu") for k in range(3))
    F, tt, a, s = Hot(schedule), full(x0, t), schedule.alpha[t], schedule.sigma[t]
    xt, D = F(x0, tt, eps), Denoiser(lambda x, t: y, schedule if P is not EPS else signal(schedule), P)
    size = 1 + x0.abs() + eps.abs() + y.abs()
    close(D.target(x0, eps, tt), TARGETS[P.name](x0.double(), eps.double(), a, s), size)
    answer = D(xt, tt)
    assert isinstance(answer, Dirac) and answer.mean.dtype == dtype
    close(answer.mean, INVERSES[P.name](xt.double(), y.double(), a, s), size / a)
    perfect = Denoiser(lambda x, t: D.target(x0, eps, t), signal(schedule), P)
    close(perfect(xt, tt).mean, x0, size / a)


def signal(schedule):
    """The same schedule with some signal left at T, which EPS needs."""
    a = schedule.alpha_bar.clone()
    a[-1] = a[-1].clamp_min(a[-2].item() / 2)
    a[0] = 1
    return Schedule(a)


@ALL
def test_inverse_solves_the_pair_of_equations(P):
    "`x0 = skip (alpha x0 + sigma eps) + out (p x0 + q eps)` for all x0 and eps: two equations for skip and out."
    schedule = Schedule.cosine(50)
    alpha, sigma = schedule.alpha, schedule.sigma
    (skip, out), (p, q) = P.inverse(alpha, sigma), P.mix(alpha, sigma)
    close(skip * alpha + out * p, torch.ones_like(alpha), 1 / alpha)
    close(skip * sigma + out * q, torch.zeros_like(alpha), 1 / alpha)
    assert (skip[0], out[0]) == (1, 0)                                               # nothing to predict at the data


def test_weights_are_the_known_ones():
    schedule = Schedule.cosine(50)
    snr = schedule.snr[1:]
    a, s = schedule.alpha[1:], schedule.sigma[1:]
    close(EPS.weight(a, s), 1 / snr, 1 / a**2)
    close(X0.weight(a, s), torch.ones_like(a))
    close(V.weight(a, s), 1 / (1 + snr), 2 / s)


@pytest.mark.parametrize("P", [X0, V], ids=lambda P: P.name)
def test_without_signal_x0_and_v_still_work(P):
    schedule = Schedule([1.0, 0.5, 0.0])
    x = normal(3, 2, device="cpu")
    sign = 1 if P is X0 else -1
    close(Denoiser(lambda xt, t: sign * xt, schedule, P)(x, full(x, 2)).mean, x)


def test_variances_make_it_gaussian_with_one_for_each_row():
    schedule, var = Schedule.linear(5), torch.arange(6.0)
    D, x = Denoiser(lambda xt, t: xt, schedule, X0, var=var), normal(3, 1, 2, 2, device="cpu")
    law = D(x, torch.tensor([5, 1, 3]))
    assert isinstance(law, Gaussian) and law.var.flatten().tolist() == [5, 1, 3] and law.var.shape == (3, 1, 1, 1)
    assert torch.equal(law.mean, x)


@ALL
def test_mixed_times_go_row_by_row_and_conditions_to_the_network(P):
    def net(x, t, shift): return x.sin() * per_row(t, x) + shift
    D, x, t = Denoiser(net, Schedule.linear(9), P), normal(4, 2, device="cpu"), torch.tensor([1, 9, 4, 5])
    rows = [D(x[i:i + 1], t[i:i + 1], shift=2.0).mean for i in range(4)]
    close(D(x, t, shift=2.0).mean, torch.cat(rows), 12 / Schedule.linear(9).alpha.min())


@pytest.mark.parametrize("p, q", [(-1.0, 1.0), (1.0, 2.0), (3.0, 0.0), (0.0, 2.0)])
def test_a_new_parameterization_is_two_numbers(p, q):
    flow = Parameterization("p x0 + q eps", lambda a, s: (p * torch.ones_like(a), q * torch.ones_like(a)))
    schedule, x0, eps = Schedule.linear(9), normal(4, 2, device="cpu"), normal(4, 2, seed=1, device="cpu")
    t = torch.tensor([1, 9, 4, 5])
    D = Denoiser(lambda x, t: p * x0 + q * eps, schedule, flow)
    close(D.target(x0, eps, t), p * x0 + q * eps, 6)
    det = (p * schedule.sigma - q * schedule.alpha)[1:].abs().min()
    close(D(Hot(schedule)(x0, t, eps), t).mean, x0, 10 * (1 + x0.abs() + eps.abs()) / det)


def test_targets_that_are_the_data_or_the_noise_are_not_computed():
    x0, eps, t = normal(2, 2, device="cpu"), normal(2, 2, seed=1, device="cpu"), torch.tensor([1, 5])
    assert Denoiser(abs, Schedule.linear(5), X0).target(x0, eps, t) is x0
    assert Denoiser(abs, Schedule.linear(5), EPS).target(x0, eps, t) is eps


def test_the_network_trains_and_the_tables_do_not():
    D = Denoiser(torch.nn.Linear(2, 2), Schedule.linear(5), EPS, var=torch.ones(6))
    assert [name for name, _ in D.named_parameters()] == ["net.weight", "net.bias"]
    assert set(D.state_dict()) == {"net.weight", "net.bias", "affine.skip", "affine.out", "mix.on_x0", "mix.on_eps", "var.var"}

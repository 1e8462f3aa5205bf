"""Eight parameterizations: each is a mixture of data and noise, the data come back from it, and one formula turns each into each."""
import math

import pytest
import torch
from conftest import close, full, normal, per_row, refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import dtypes, schedules, seeds, shapes, spans

from udm_book.elbo import elbo
from udm_book.hot import Hot, ddpm, markov_rho
from udm_book.objective import network_loss
from udm_book.parameterization import (EDM, EPS, FLOW, MEAN, ONE_STEP, SCORE, X0, Denoiser, LossWeight, Parameterization, V,
                                       asked, convert, min_snr, nelbo, simple, zero_terminal)
from udm_book.posterior import Dirac, Gaussian
from udm_book.schedule import Schedule

LANGUAGES = [EPS, X0, V, SCORE, FLOW, EDM(0.5), EDM(2.0), MEAN, ONE_STEP]
WITHOUT_SIGNAL = [X0, V, FLOW, EDM(0.5), MEAN]
ALL = pytest.mark.parametrize("P", LANGUAGES, ids=lambda P: P.name)


def edm(d):
    """Karras et al. 2022, Table 1, for their state x = xt / alpha and noise level sigma / alpha: D(x) = c_skip x + c_out F."""
    def target(x0, eps, a, s, *_):
        n = s / a
        c_skip, c_out = d**2 / (n**2 + d**2), n * d / (n**2 + d**2) ** 0.5
        return (x0 - c_skip * (x0 + n * eps)) / c_out
    def inverse(xt, y, a, s, *_):
        n = s / a
        return d**2 / (n**2 + d**2) * xt / a + n * d / (n**2 + d**2) ** 0.5 * y
    return target, inverse


# What the articles train on, from (x0, eps, alpha, sigma, alpha and sigma one step earlier) ...
TARGETS = {
    "EPS": lambda x0, eps, a, s, *_: eps,                                           # Ho et al. 2020
    "X0": lambda x0, eps, a, s, *_: x0,                                             # the data
    "V": lambda x0, eps, a, s, *_: a * eps - s * x0,                                # Salimans & Ho 2022
    "SCORE": lambda x0, eps, a, s, *_: -eps / s,                                    # the slope of log q(xt | x0)
    "FLOW": lambda x0, eps, a, s, *_: eps - x0,                                     # Lipman et al. 2023
    "EDM(0.5)": edm(0.5)[0], "EDM(2)": edm(2.0)[0],
    # Ho et al. 2020, eq. 7, and Su 2022, below eq. 14
    "MEAN": lambda x0, eps, a, s, a_, s_: (a / a_ * s_**2 * (a * x0 + s * eps) + a_ * (1 - (a / a_) ** 2) * x0) / s**2,
    "ONE_STEP": lambda x0, eps, a, s, a_, s_: (1 - (a / a_) ** 2) ** 0.5 / s * eps,
}
INVERSES = {                                    # ... and how they give x0_hat from (xt, y, the same tables)
    "EPS": lambda xt, y, a, s, *_: (xt - s * y) / a,
    "X0": lambda xt, y, a, s, *_: y,
    "V": lambda xt, y, a, s, *_: a * xt - s * y,
    "SCORE": lambda xt, y, a, s, *_: (xt + s**2 * y) / a,
    "FLOW": lambda xt, y, a, s, *_: xt / (a + s) - s / (a + s) * y,
    "EDM(0.5)": edm(0.5)[1], "EDM(2)": edm(2.0)[1],
    "MEAN": lambda xt, y, a, s, a_, s_: (y - a / a_ * (s_ / s) ** 2 * xt) * s**2 / (a_ * (1 - (a / a_) ** 2)),
    "ONE_STEP": lambda xt, y, a, s, a_, s_: (xt - s**2 / (1 - (a / a_) ** 2) ** 0.5 * y) / a,
}


def tables(schedule, t):
    """alpha and sigma at t and one step earlier."""
    return [v[k] for k in (t, t - 1) for v in (schedule.alpha, schedule.sigma)]


def kappa(P, schedule, t, size):
    """How much larger the terms of a conversion from P are than `size`: over the area, and β for the tables of one step."""
    p, q = (c[t] for c in P.mix(schedule.alpha, schedule.sigma))
    a, s, a_, _ = tables(schedule, t)
    return size * (1 + p.abs() + q.abs()) / (p * s - q * a).abs() / (1 - (a / a_) ** 2)


def signal(schedule):
    """The same schedule with some signal left at T, which EPS needs."""
    a = schedule.alpha_bar.clone()
    a[-1] = a[-1].clamp_min(a[-2].item() / 2)
    a[0] = 1
    return Schedule(a)


@ALL
def test_mixed_times_are_converted_row_by_row(P):
    schedule, x, y, t = Schedule.linear(9), normal(4, 2, 3, device="cpu"), normal(4, 2, 3, seed=1, device="cpu"), torch.tensor([1, 9, 4, 5])
    rows = [convert(y[i:i + 1], x[i:i + 1], t[i:i + 1], schedule, P, V) for i in range(4)]
    close(convert(y, x, t, schedule, P, V), torch.cat(rows), 1e3)
    with pytest.raises(ValueError, match="got values from 0"): convert(y, x, t - 1, schedule, P, V)


@ALL
def test_inverse_solves_the_pair_of_equations(P):
    "`x0 = skip (alpha x0 + sigma eps) + out (p x0 + q eps)` for all x0 and eps: two equations for skip and out."
    schedule = Schedule.cosine(50)
    alpha, sigma = schedule.alpha, schedule.sigma
    (skip, out), (p, q) = P.inverse(alpha, sigma), P.mix(alpha, sigma)
    size = (skip * alpha).abs() + (out * p).abs() + (out * q).abs() + 1
    close(skip * alpha + out * p, torch.ones_like(alpha), size)
    close(skip * sigma + out * q, torch.zeros_like(alpha), size)
    assert (skip[0], out[0]) == (1, 0)                                               # nothing to predict at the data
    assert p.isfinite().all() and q.isfinite().all() and P.weight(alpha, sigma).isfinite().all()


def test_edm_for_data_of_variance_1_is_minus_v():
    schedule = Schedule.cosine(50)
    assert EDM().name == "EDM(0.5)"
    for one, two in zip(EDM(1.0).mix(schedule.alpha, schedule.sigma), V.mix(schedule.alpha, schedule.sigma)):
        close(one, -two)


@pytest.mark.parametrize("d", [0.5, 1.0, 3.0])
def test_edm_has_unit_variance_is_uncorrelated_with_xt_and_magnifies_least(d):
    alpha, sigma = (v[1:] for v in (Schedule.linear(100).alpha, Schedule.linear(100).sigma))
    p, q = EDM(d).mix(alpha, sigma)
    close((d * p).square() + q.square(), torch.ones_like(p))
    close(d**2 * alpha * p + sigma * q, torch.zeros_like(p), d)
    out2 = EDM(d).weight(alpha, sigma)
    skip = EDM(d).inverse(alpha, sigma)[0]
    for other in skip + 0.01, skip - 0.01, 0 * skip:                                 # any other skip leaves more to the network
        assert (((1 - other * alpha) * d).square() + (other * sigma).square() > out2).all()


def test_mean_is_that_of_the_chain_and_one_step_its_share_of_the_noise():
    schedule = Schedule.cosine(60)
    F, t = Hot(schedule), torch.arange(1, 61)
    x0, eps = normal(60, 2, device="cpu"), normal(60, 2, seed=1, device="cpu")
    xt = F(x0, t, eps)
    close(Denoiser(abs, schedule, MEAN).target(x0, eps, t), F.step_posterior(x0, xt, t, t - 1).mean, 1 + xt.abs() + x0.abs())
    share = markov_rho(schedule, t, t - 1)[:, None]
    close(Denoiser(abs, schedule, ONE_STEP).target(x0, eps, t), share * eps, eps.abs() / schedule.beta[1])
    zero = torch.zeros_like(x0)
    bridged = ddpm(F, x0, xt, t, t - 1, zero)                                        # Bayes' bridge without its noise
    close(convert(x0, xt, t, schedule, X0, MEAN), bridged, 1e2)


def test_weights_are_the_known_ones():
    schedule = Schedule.cosine(50)
    snr, beta = schedule.snr[1:], schedule.beta[1:]
    a, s = schedule.alpha, schedule.sigma
    known = {EPS: snr, X0: snr / snr, V: snr + 1, SCORE: snr / s[1:] ** 2, FLOW: (1 + snr.sqrt()) ** 2, EDM(0.5): snr + 4,
             MEAN: (a[:-1] * beta / s[1:] ** 2) ** 2, ONE_STEP: beta / s[1:] ** 2 * snr}
    for P, factor in known.items():
        close(P.weight(a, s)[1:] * factor, torch.ones_like(snr), 10 / (beta * a[1:]))


# ---------------------------------------------------------------------------------------------------------------- weights

CHOICES = {
    "bound": (nelbo(0.25), lambda snr: torch.cat([snr.new_tensor([2.0]), (snr[:-1] - snr[1:]) / 2])),
    "min-SNR": (min_snr(5.0), lambda snr: snr.clamp(max=5)),
    "plain EPS": (simple(EPS), lambda snr: snr),
    "plain V": (simple(V), lambda snr: snr + 1),
    "plain X0": (simple(X0), lambda snr: snr**0),
}


def test_the_bound_is_half_the_inverse_variance_in_mean():
    "`1 / (2 beta~)` for t > 1, which is what the divergence of two normal laws with that variance weighs."
    schedule, t = Schedule.linear(100), torch.arange(2, 101)
    var = Hot(schedule).step_posterior(torch.zeros(99, 1).double(), torch.zeros(99, 1).double(), t, t - 1).var.flatten()
    close(nelbo(1.0)(schedule, MEAN)(t) * 2 * var, torch.ones(99).double(), 10 / schedule.beta[t])
    assert nelbo(math.inf)(schedule, X0)(torch.tensor([1])) == 0
    assert nelbo(0.01)(schedule, X0)(torch.tensor([1])) == 50
    assert nelbo(1.0).on_x0(schedule)[0] == 0                                        # and not only once it is said in a language


def test_the_bound_of_a_constant_guess_is_the_sum_of_the_weights():
    "A guess that does not depend on xt makes no random error: the code of the bound, which knows no weight, must agree."
    schedule, x0 = Schedule.cosine(30), normal(4, 3, device="cpu")
    D = Denoiser(lambda x, t: torch.full_like(x, 0.3), schedule, X0)
    terms = elbo(Hot(schedule), D, x0, decoder=lambda law: Gaussian(law.mean, torch.tensor(0.25, dtype=torch.float64)))
    weights, error = nelbo(0.25)(schedule, X0)(torch.arange(31)), (x0 - 0.3).square().sum(1)
    close(terms.steps.sum(1), weights[2:].sum() * error, 1e3 * (1 + error))
    close(terms.data, weights[1] * error + 1.5 * math.log(2 * math.pi * 0.25), 10 * (1 + error))


def test_the_numbers_of_the_bound_for_the_linear_schedule():
    bound = nelbo(1.0)(Schedule.linear(1000), EPS)(torch.arange(1001))
    assert f"{bound[2]:.2f}" == "0.60" and f"{bound[-1]:.4f}" == "0.0102"
    assert bound[2:].argmin() + 2 == 350 and f"{bound[350]:.5f}" == "0.00498"


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_in_the_forms_of_the_article(gamma):
    "Hang et al. 2023, section 3.4; in V it is min(SNR, gamma) / (SNR + 1), not min(SNR + 1, gamma) / (SNR + 1)."
    schedule, t = Schedule.cosine(100), torch.arange(1, 101)
    snr = schedule.snr[1:]
    for P, form in (X0, snr.clamp(max=gamma)), (EPS, (gamma / snr).clamp(max=1)), (V, torch.minimum(snr, torch.full_like(snr, gamma)) / (snr + 1)):
        close(min_snr(gamma)(schedule, P)(t), form, 10 * form / schedule.alpha[1:])
    assert min_snr().name == "min_snr(5)"
    end = torch.tensor([100])
    assert all(min_snr()(zero_terminal(schedule), P)(end) == 0 for P in (X0, V))      # no signal, no weight


def test_a_choice_of_ones_own():
    schedule, t = Schedule.cosine(20), torch.arange(1, 21)
    truncated = LossWeight("truncated", lambda schedule: schedule.snr.clamp(min=1))
    close(truncated(schedule, EPS)(t), (1 / schedule.snr[1:]).clamp(min=1), 10 / schedule.alpha[1:] ** 2)


def test_weights_are_tables_that_move_and_stay_float64():
    weight = min_snr()(Schedule.linear(10), EPS)
    assert weight.half().weight.dtype == torch.float64 and set(weight.state_dict()) == {"weight"}
    assert weight(torch.tensor([[3, 4], [5, 6]])[0]).shape == (2,)


def test_nothing_is_asked_at_the_data():
    x = torch.tensor([math.nan, 2.0, -3.0])
    assert asked(x, torch.tensor([0.0, 0.1, 0.2])).tolist() == [0, 2, -3]


# ------------------------------------------------------------------------------------------------------- without signal


@pytest.mark.parametrize("P", LANGUAGES, ids=lambda P: P.name)
def test_without_signal_only_some_can_say_the_data(P):
    schedule, x = Schedule([1.0, 0.5, 0.0]), normal(3, 2, device="cpu")
    if P.name in {Q.name for Q in [*WITHOUT_SIGNAL, EDM(2.0)]}:
        y = Denoiser(abs, schedule, P).target(x, normal(3, 2, seed=1, device="cpu"), full(x, 2))
        eps = normal(3, 2, seed=1, device="cpu")
        close(Denoiser(lambda xt, t: y, schedule, P)(eps, full(x, 2)).mean, x, 10 * (x.abs() + eps.abs()))
        return
    says = rf"expected alpha > 0 for {P.name}, .*got alpha = 0 at t = 2: use X0 or V"
    for refused in (lambda: Denoiser(abs, schedule, P), lambda: convert(x, x, full(x, 2), schedule, P, V),
                    lambda: simple(P)(schedule, V), lambda: min_snr()(schedule, P)):
        with pytest.raises(ValueError, match=says): refused()


@given(schedule=schedules(20).filter(lambda c: c.T >= 2))
def test_zero_terminal_ends_without_signal_and_begins_as_before(schedule):
    old, new = schedule.alpha, zero_terminal(schedule).alpha                         # Schedule has checked that it decreases
    assert new[0] == 1 and new[-1] == 0
    close(new[1], old[1])
    ratio = (new[1:] / old[1].clamp_min(1e-300) - 0 * old[1:]) * (old[1] - old[-1]) - (old[1:] - old[-1])
    close(ratio, torch.zeros_like(ratio))                                            # shifted and scaled, nothing else
    close(zero_terminal(Schedule(new.square())).alpha, new)


def test_zero_terminal_is_the_published_recipe():
    "Lin et al. 2024, Algorithm 1, in float64, on the schedule of Stable Diffusion."
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    root = (1 - betas).cumprod(0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * first / (first - last)
    close(zero_terminal(Schedule.from_betas(betas)).alpha[1:], root)


# ----------------------------------------------------------------------------------------------------------- the denoiser


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
    close(D(x, t, shift=2.0).mean, torch.cat(rows), 12 * P.inverse(D_SCHEDULE.alpha, D_SCHEDULE.sigma)[1].abs().max() + 12)


D_SCHEDULE = Schedule.linear(9)


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


@ALL
def test_the_network_trains_and_the_tables_do_not(P):
    D = Denoiser(torch.nn.Linear(2, 2), Schedule.linear(5), P, var=torch.ones(6))
    assert [name for name, _ in D.named_parameters()] == ["net.weight", "net.bias"]
    state = D.state_dict()
    assert set(state) == {"net.weight", "net.bias", "affine.skip", "affine.out", "mix.on_x0", "mix.on_eps", "var.var"}
    assert all(v.isfinite().all() for v in state.values())


# ---------------------------------------------------------------------------------------------------------------- bad input

X, TIMES, S = torch.zeros(3, 2), torch.tensor([1, 5, 10]), Schedule.linear(10)
CASES = {
    "a prediction shaped unlike the state": (ValueError, lambda: convert(X[:, :1], X, TIMES, S, V, EPS), r"y shaped as xt, \(3, 2\)", r"\(3, 1\)"),
    "float times": (TypeError, lambda: convert(X, X, TIMES.float(), S, V, EPS), "integer times", "torch.float32"),
    "time 0": (ValueError, lambda: convert(X, X, TIMES - 1, S, V, EPS), "times in 1..10", "0 to 9"),
    "data without spread": (ValueError, lambda: EDM(0.0), "finite sigma_data > 0", "0.0"),
    "data of infinite spread": (ValueError, lambda: EDM(math.inf), "finite sigma_data > 0", "inf"),
    "data of spread NaN": (ValueError, lambda: EDM(math.nan), "finite sigma_data > 0", "nan"),
    "MEAN on a part of the tables": (ValueError, lambda: MEAN.inverse(S.alpha[1:], S.sigma[1:]), "whole tables, with sigma = 0", "0.0099"),
    "ONE_STEP on a part of the tables": (ValueError, lambda: ONE_STEP.weight(S.alpha[2:], S.sigma[2:]), "whole tables", "0.0"),
    "a decoder without width": (ValueError, lambda: nelbo(0.0), "variance > 0 for the decoder of t = 1", "0.0"),
    "a decoder of width NaN": (ValueError, lambda: nelbo(math.nan), "variance > 0 for the decoder of t = 1", "nan"),
    "no bound on the weight": (ValueError, lambda: min_snr(0.0), "bound gamma > 0", "0.0"),
    "a bound that is NaN": (ValueError, lambda: min_snr(math.nan), "bound gamma > 0", "nan"),
    "one step that is first and last": (ValueError, lambda: zero_terminal(Schedule.linear(1)), "T >= 2 steps", "T = 1"),
}


test_the_message_says_what_was_expected_and_what_came = refuses(CASES)


# --------------------------------------------------------------------------------------------- every schedule, every language


@ALL
@settings(max_examples=12)
@given(span=spans(positive=True), seed=seeds, shape=shapes, dtype=dtypes)
def test_targets_and_answers_are_those_of_the_articles(P, span, seed, shape, dtype):
    schedule, t, _ = span
    schedule = signal(schedule)
    x0, eps, y = (normal(*shape, seed=seed + k, dtype=dtype, device="cpu") for k in range(3))
    F, tt, numbers = Hot(schedule), full(x0, t), tables(schedule, t)
    xt, D = F(x0, tt, eps), Denoiser(lambda x, t: y, schedule, P)
    p, q = (c[t].abs() for c in P.mix(schedule.alpha, schedule.sigma))
    size = x0.abs() + eps.abs()
    target = TARGETS[P.name](x0.double(), eps.double(), *numbers)
    close(D.target(x0, eps, tt), target, (p + q + 1) * size / numbers[1] / schedule.beta[t])
    answer = D(xt, tt)
    assert isinstance(answer, Dirac) and answer.mean.dtype == dtype
    close(answer.mean, INVERSES[P.name](xt.double(), y.double(), *numbers), kappa(P, schedule, t, 1 + size + y.abs()))
    perfect = Denoiser(lambda x, t: D.target(x0, eps, t), schedule, P)
    close(perfect(xt, tt).mean, x0, kappa(P, schedule, t, 1 + (1 + p + q) * size))


@given(P=st.sampled_from(LANGUAGES), span=spans(positive=True), seed=seeds, shape=shapes, dtype=dtypes)
def test_convert_says_what_every_other_network_should_say(P, span, seed, shape, dtype):
    schedule, t, _ = span
    schedule = signal(schedule)
    x0, eps, wild = (normal(*shape, seed=seed + k, dtype=dtype, device="cpu") for k in range(3))
    F, tt, numbers = Hot(schedule), full(x0, t), tables(schedule, t)
    xt = F(x0, tt, eps)
    y = TARGETS[P.name](x0.double(), eps.double(), *numbers).to(dtype)
    for Q in LANGUAGES:
        target = TARGETS[Q.name](x0.double(), eps.double(), *numbers)
        p, q = (c[t].abs() for c in Q.mix(schedule.alpha, schedule.sigma))
        size = kappa(P, schedule, t, (1 + p + q) * (1 + x0.abs() + eps.abs() + y.abs() + xt.abs()))
        got = convert(y, xt, tt, schedule, P, Q)
        assert got.dtype == dtype
        close(got, target, size)
        there = convert(wild, xt, tt, schedule, P, Q)
        scale = 1 + wild.abs() + xt.abs() + there.abs()
        close(convert(there, xt, tt, schedule, Q, P), wild, kappa(P, schedule, t, kappa(Q, schedule, t, (1 + p + q) * scale)))


@given(name=st.sampled_from(sorted(CHOICES)), schedule=schedules(12), seed=seeds)
def test_a_choice_of_weight_is_one_loss_in_every_language(name, schedule, seed):
    choice, on_x0 = CHOICES[name]
    schedule = signal(schedule)
    t = torch.randint(1, schedule.T + 1, (5,), generator=torch.Generator().manual_seed(seed))
    want = on_x0(schedule.snr[1:])[t - 1]
    F, x0 = Hot(schedule), normal(5, 3, seed=seed, device="cpu")
    def g(): return torch.Generator().manual_seed(seed)
    seen = F.sample(x0, t, generator=g())
    error = (x0 - seen.sin()).square().mean(1)
    for P in LANGUAGES:
        weight = choice(schedule, P)
        table = weight(torch.arange(schedule.T + 1))
        assert table.dtype == torch.float64 and table[0] == 0 and table.isfinite().all() and (table >= 0).all()
        D = Denoiser(lambda x, t: convert(x.sin(), x, t, schedule, X0, P), schedule, P)
        loss = network_loss(F, D, x0, t, weight=weight, generator=g())
        assert loss.shape == (5,)
        size = torch.stack([kappa(P, schedule, k, 1 + v.abs().max()) for k, v in zip(t, x0)])
        off = size * (1 + P.weight(schedule.alpha, schedule.sigma)[t].sqrt())       # of x0 - x0_hat
        close(loss, want * error, want * off * (1 + error.sqrt()))


def test_one_step_noise_is_the_mean_of_the_noise_of_the_last_step():
    "Regress the noise of step t on the total noise, over 40,000 chains."
    schedule, n, g = Schedule.linear(20, 0.01, 0.3), 40_000, torch.Generator().manual_seed(0)
    F, x = Hot(schedule), torch.zeros(40_000, 1, dtype=torch.float64)
    for k in range(1, 21):
        last = torch.randn(n, 1, generator=g, dtype=torch.float64)
        x = F.step(x, torch.full((n,), k), torch.full((n,), k - 1), last)
    eps = x / schedule.sigma[20]
    slope = (last * eps).mean()
    want = ONE_STEP.mix(schedule.alpha, schedule.sigma)[1][20]
    assert abs(slope - want) < 5 * (last * eps).std() / n**0.5


@pytest.mark.parametrize("P", [X0, EPS, V, EDM()], ids=lambda P: P.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_denoiser_answers_the_times_of_a_run_as_any_others(P, dtype):
    "In a run the coefficients are numbers in float64, else tensors in the precision of x."
    schedule, x = Schedule.linear(20), normal(3, 2, seed=3, dtype=dtype)
    D = Denoiser(lambda x, t: x.sin(), schedule, P).to(x.device)
    for k in 1, 7, 20:
        t = full(x, k)
        plain = D(x, t).mean
        t.number = k
        close(D(x, t).mean, plain, 2 * (1 + schedule.sigma[k] / schedule.alpha[k]) * x.abs().max())

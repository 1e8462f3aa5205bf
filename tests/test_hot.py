"""Hot diffusion against the sources' own formulas, in their letters, and against Bayes."""
import math

import pytest
import torch
from conftest import close, full, normal, per_row, rng, unhooked
from hypothesis import given
from hypothesis import strategies as st
from strategies import schedules, seeds, shapes, spans

from udm_book.forward import row
from udm_book.hot import Hot, ddim, ddpm, markov_rho
from udm_book.reverse import fresh_noise, reuse_noise
from udm_book.schedule import Schedule

etas = st.floats(0, 1)


def triple(F, t, s, seed=0, shape=(4, 3)):
    """Data, a state and fresh noise, with times for every row."""
    x0, xt, fresh = (normal(*shape, seed=seed + k, device="cpu") for k in range(3))
    return x0, xt, full(x0, t), full(x0, s), fresh


def size(F, t, s, *x):
    """kappa of a step: its terms, 1 / sigma_t, and what 1 - rho² cancels under a square root."""
    return (1 + sum(v.abs() for v in x)) / F.schedule.sigma[t]


def weights(F, f, t, s):
    """A map that is affine in (x0, xt, fresh), as its three coefficients: fed with unit vectors."""
    unit = torch.eye(3, dtype=torch.float64)
    return [v.item() for v in f(F, unit[:, :1], unit[:, 1:2], full(unit, t), full(unit, s), unit[:, 2:])]


# ----------------------------------------------------------------------------------------------------- forward and chain


@given(schedules(), seeds, shapes)
def test_forward_is_one_linear_combination_also_into_out(schedule, seed, shape):
    F, x0, eps = Hot(schedule), normal(*shape, seed=seed, device="cpu"), normal(*shape, seed=seed + 1, device="cpu")
    t = torch.randint(0, F.T + 1, shape[:1], generator=rng(seed, "cpu"))
    want = torch.stack([schedule.alpha[k] * a + schedule.sigma[k] * e for k, a, e in zip(t.tolist(), x0, eps)])
    out = torch.empty_like(x0)
    assert F(x0, t, eps, out=out) is out
    close(F(x0, t, eps), want, x0.abs() + eps.abs())
    assert torch.equal(out, F(x0, t, eps))


@given(spans())
def test_steps_of_the_chain_compose_to_the_forward_process(span):
    "x_s in law q(x_s | x0), then one step, is q(x_t | x0); and s -> r -> t is s -> t (Chapman-Kolmogorov)."
    schedule, t, s = span
    a, b, F = schedule.alpha, schedule.sigma, Hot(schedule)
    def step(s, t):
        unit = torch.eye(2, dtype=torch.float64)
        keep, add = F.step(unit[:, :1], full(unit, t), full(unit, s), unit[:, 1:]).flatten()
        assert keep >= 0 and add > 0
        return keep, add**2
    keep, var = step(s, t)
    close(keep * a[s], a[t])
    close(keep**2 * b[s] ** 2 + var, b[t] ** 2)
    for r in range(s + 1, t):
        (k1, v1), (k2, v2) = step(s, r), step(r, t)
        close(k1 * k2, keep)
        close(k2**2 * v1 + v2, var)
    if t == s + 1: close(var, schedule.beta[t])                                    # Ho eq. 2


def test_prior_and_noise_are_standard_normal_from_the_generator():
    F, like = Hot(Schedule.linear(4)), torch.zeros(3, 2)
    for draw in F.prior, F.sample_noise:
        assert torch.equal(draw(like, generator=rng(1, "cpu")), torch.randn(3, 2, generator=rng(1, "cpu")))
    assert F.T == 4 and F.invertible and F.affine() == (F.schedule.alpha, F.schedule.sigma)


# --------------------------------------------------------------------------------------------------------------- kernels


@given(spans(positive=True), etas)
def test_kernels_are_consistent_exactly(span, eta):
    "x_s = a x0 + b x_t + c fresh with a + b alpha_t = alpha_s and b² sigma_t² + c² = sigma_s²: law L3, without sampling."
    schedule, t, s = span
    F = Hot(schedule)
    for kernel in fresh_noise, reuse_noise, ddim(eta):
        a, b, c = (torch.tensor(v, dtype=torch.float64) for v in weights(F, kernel, t, s))
        close(a + b * schedule.alpha[t], schedule.alpha[s], 1 / schedule.sigma[t])
        close((b * schedule.sigma[t]) ** 2 + c**2, schedule.sigma[s] ** 2, 1 / schedule.sigma[t])


@given(st.lists(st.floats(1e-3, 0.9), min_size=2, max_size=20), seeds)
def test_ddpm_is_ho_equations_6_and_7_in_betas(betas, seed):
    F, T = Hot(Schedule.from_betas(betas)), len(betas)
    t = 1 + seed % T
    beta = torch.tensor([0.0] + betas, dtype=torch.float64)
    alpha, bar = 1 - beta, (1 - beta).cumprod(0)                                   # Ho's letters
    x0, xt, tt, ss, z = triple(F, t, t - 1, seed)
    mean = bar[t - 1].sqrt() * beta[t] / (1 - bar[t]) * x0 + alpha[t].sqrt() * (1 - bar[t - 1]) / (1 - bar[t]) * xt
    var = (1 - bar[t - 1]) / (1 - bar[t]) * beta[t]
    kappa = T * size(F, t, t - 1, x0, xt, z) / F.schedule.sigma[t]
    close(ddpm(F, x0, xt, tt, ss, z), mean + var.sqrt() * z, kappa)
    q = F.step_posterior(x0, xt, tt, ss)
    close(q.mean, mean, kappa)
    close(q.var, var.expand(4, 1), T / F.schedule.sigma[t] ** 2)


@given(spans(positive=True), etas, seeds)
def test_ddim_is_song_equations_12_and_16_on_any_subsequence(span, eta, seed):
    schedule, t, s = span
    F = Hot(schedule)
    at, as_ = schedule.alpha_bar[t], schedule.alpha_bar[s]                         # the α of the DDIM article
    x0, xt, tt, ss, z = triple(F, t, s, seed)
    eps = (xt - at.sqrt() * x0) / (1 - at).sqrt()
    sigma = eta * ((1 - as_) / (1 - at)).sqrt() * (1 - at / as_).sqrt()
    want = as_.sqrt() * x0 + (1 - as_ - sigma**2).clamp_min(0).sqrt() * eps + sigma * z
    close(ddim(eta)(F, x0, xt, tt, ss, z), want, size(F, t, s, x0, xt, z) / schedule.sigma[t] / schedule.sigma[s])


@given(spans(positive=True), seeds)
def test_step_posterior_is_bayes_rule_for_normal_laws(span, seed):
    "q(x_s | x_t, x0): precisions add, means weighted by them; the chain written with its one-step factors."
    schedule, t, s = span
    F, beta = Hot(schedule), schedule.beta
    x0, xt, tt, ss, _ = triple(F, t, s, seed)
    gain, noise = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for k in range(s + 1, t + 1): gain, noise = gain * (1 - beta[k]).sqrt(), noise * (1 - beta[k]) + beta[k]
    prior, seen = 1 / schedule.sigma[s] ** 2, gain**2 / noise
    q, kappa = F.step_posterior(x0, xt, tt, ss), (t - s + 1) * size(F, t, s, x0, xt) / schedule.sigma[t] / schedule.sigma[s]
    close(q.mean, (prior * schedule.alpha[s] * x0 + gain / noise * xt) / (prior + seen), kappa / noise)
    close(q.var, (1 / (prior + seen)).expand(4, 1), (t - s + 1) / noise / schedule.sigma[t] ** 2)


def test_step_posterior_wants_integer_times():
    x = normal(2, 3, device="cpu")
    with pytest.raises(TypeError, match="integer times t"), unhooked():
        Hot(Schedule.su(5)).step_posterior(x, x, torch.ones(2), torch.zeros(2).long())


def test_step_posterior_by_quadrature():
    "exp(log q(x_t | x_s) + log q(x_s | x0)) on a grid, with no Gaussian algebra."
    F, x0, xt = Hot(Schedule.linear(10, 0.05, 0.5)), torch.tensor([[0.7]]).double(), torch.tensor([[-0.4]]).double()
    grid = torch.linspace(-12, 12, 6001, dtype=torch.float64)
    for t, s in (10, 3), (5, 4), (2, 1):
        a, b = F.schedule.alpha, F.schedule.sigma
        gain = a[t] / a[s]
        log = -((xt - gain * grid) ** 2) / (b[t] ** 2 - gain**2 * b[s] ** 2) / 2 - (grid - a[s] * x0) ** 2 / b[s] ** 2 / 2
        p = log.softmax(-1)
        q = F.step_posterior(x0, xt, full(x0, t), full(x0, s))
        mean = (p * grid).sum()
        close(q.mean.squeeze(), mean, 100)
        close(q.var.squeeze(), (p * (grid - mean) ** 2).sum(), 100)


def test_without_signal_the_posterior_forgets_the_state():
    "Zero terminal SNR: q(x_s | x_T, x0) = q(x_s | x0)."
    F = Hot(Schedule([1.0, 0.6, 0.2, 0.0]))
    x0, xt, tt, ss, _ = triple(F, 3, 1)
    q = F.step_posterior(x0, xt, tt, ss)
    close(q.mean, F.schedule.alpha[1] * x0, 4)
    close(q.var, torch.full((4, 1), 0.4, dtype=torch.float64), 1)
    assert weights(F, ddpm, 3, 1) == weights(F, fresh_noise, 3, 1)


@given(spans())
def test_markov_rho_is_the_share_of_noise_not_yet_there(span):
    schedule, t, s = span
    snr = schedule.snr
    share = 1 - snr[t] / snr[s] if s else torch.ones((), dtype=torch.float64)
    close(markov_rho(schedule, t, s) ** 2, share, 1 / schedule.sigma[t] ** 2)
    assert 0 <= markov_rho(schedule, t, s) <= 1


def test_nearly_equal_levels_give_no_nan():
    "Neighbouring floating-point numbers: 1 - SNR_t / SNR_s must not round to something below 0."
    pairs = [(a, math.nextafter(a, 0)) for a in torch.linspace(0.99, 0.01, 1000).tolist()]
    schedule = Schedule([1.0, *(a for pair in pairs for a in pair)])
    t = torch.arange(2, 2001, 2)
    assert torch.isfinite(markov_rho(schedule, t, t - 1)).all()


def test_eta_zero_is_the_deterministic_kernel_and_one_is_ddpm():
    assert ddim() is reuse_noise and ddim(0.0) is reuse_noise and ddim(1.0) == ddpm
    assert ddim(0.3) == ddim(0.3) != ddim(0.4)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 1, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_broadcasts_in_the_dtype_of_the_state(shape, dtype):
    v, like = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.ones(shape, dtype=dtype)
    out = row(v, like) * like
    assert out.dtype == dtype and torch.equal(out, per_row(v, like).to(dtype).expand(shape))

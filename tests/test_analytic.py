"""The best variance of a guess: its two forms, its estimate, its bounds, and what a sampler makes of it."""
import math

import pytest
import torch
from conftest import close, full, normal, refuses, rng
from hypothesis import given
from hypothesis import strategies as st
from strategies import dtypes, schedules, seeds, shapes, spans

from udm_book.analytic import Estimate, WithVar, clip_var, error_var, estimate_var, noise_var
from udm_book.forward import Forward
from udm_book.hot import Hot, ddim, ddpm
from udm_book.oracle import Mixture, Oracle
from udm_book.parameterization import EPS, Denoiser
from udm_book.posterior import Dirac, Gaussian
from udm_book.reverse import sample
from udm_book.samplers import output_moments
from udm_book.schedule import Schedule

S = Schedule.linear(20, 0.01, 0.3)
F = Hot(S)
DATA = Mixture.gaussian(torch.tensor([0.3, -0.2, 0.1]).double(), torch.diag(torch.tensor([0.2, 1.0, 0.5]).double()))
ORACLE = Oracle(DATA, S)
X = DATA.sample(300, generator=rng(0, "cpu"))


def best(data, schedule):
    "The average posterior variance of Gaussian data, T+1."
    a, s = schedule.alpha[:, None], schedule.sigma[:, None]
    return (data.var[0] * s**2 / (a**2 * data.var[0] + s**2)).mean(1)


def estimate(denoiser=ORACLE, x0=X, n=20, seed=1, F=F, **options):
    return estimate_var(F, denoiser, x0, n, generator=rng(seed, "cpu"), **options)


# ---------------------------------------------------------------------------------------------------------- the two forms


@given(seeds, shapes, dtypes)
def test_the_first_form_is_the_mean_squared_error_of_each_row(seed, shape, dtype):
    x0, mean = (normal(*shape, seed=seed + k, dtype=dtype, device="cpu") for k in range(2))
    got = error_var(x0, mean)
    want = torch.stack([sum((a - b) ** 2 for a, b in zip(p, q)) / len(p)
                        for p, q in zip(x0.double().flatten().view(len(x0), -1), mean.double().flatten().view(len(x0), -1))])
    assert got.dtype == dtype and got.shape == shape[:1]
    close(got, want, 1 + want)


@given(spans(positive=True), seeds, shapes, dtypes)
def test_the_second_form_is_that_of_the_article(span, seed, shape, dtype):
    "Each row with its own time, in Su's letters."
    schedule, t, s = span
    eps = normal(*shape, seed=seed, dtype=dtype, device="cpu")
    times = torch.tensor([(t, s)[k % 2] for k in range(shape[0])])
    beta_bar2, alpha_bar2 = 1 - schedule.alpha_bar[times], schedule.alpha_bar[times]
    length2 = eps.double().square().flatten().view(len(eps), -1).sum(1)
    got = noise_var(schedule, eps, times)
    assert got.dtype == dtype
    close(got, beta_bar2 / alpha_bar2 * (1 - length2 / (eps.numel() / len(eps))), (1 + length2) / alpha_bar2)


@given(spans(positive=True), seeds)
def test_both_forms_are_lengths_of_noise(span, seed):
    "|x0 - mean|² is sigma²/alpha² |eps - eps_hat|², so the forms differ by 1 - 2 <eps, eps_hat> + ... and agree in the mean."
    schedule, t, _ = span
    F, (x0, eps, guess) = Hot(schedule), normal(3, 4, 2, seed=seed, device="cpu")
    a, s = schedule.alpha[t], schedule.sigma[t]
    xt = F(x0, full(x0, t), eps)
    error = error_var(x0, (xt - s * guess) / a)
    size = 1 + (x0.abs() + eps.abs() + guess.abs()).square().sum(1)
    close(error, (s / a) ** 2 * (eps - guess).square().mean(1), size / a**2)
    rest = (s / a) ** 2 * (eps.square().mean(1) - 1 + 2 * (guess.square() - eps * guess).mean(1))
    close(error - noise_var(schedule, guess, full(x0, t)), rest, size / a**2)


@given(seeds)
def test_no_other_variance_has_a_smaller_surprise(seed):
    x0, mean = normal(2, 5, 3, seed=seed, device="cpu")
    v = error_var(x0, mean).mean()
    def surprise(v): return Gaussian(mean, v).nll(x0).mean()
    assert all(surprise(v) < surprise(v * k) for k in (0.5, 0.9, 0.99, 1.01, 1.1, 2))


# ----------------------------------------------------------------------------------------------------------- the estimate


def test_it_is_the_exact_variance_within_its_standard_errors():
    got, want = estimate(x0=DATA.sample(20_000, generator=rng(2, "cpu")), n=2000), best(DATA, S)
    off = (got.var - want)[1:] / got.se[1:]
    assert isinstance(got, Estimate) and got.var.shape == got.se.shape == (21,) and got.var.dtype == torch.float64
    assert off.abs().max() < 5 and 0.5 < off.std() < 1.6
    assert got.var[0] == got.se[0] == 0
    assert ((got.se / want)[1:] < 0.05).all()


def test_a_network_that_overshoots_is_found_out():
    "A mean that is wrong by a known amount adds its square; the second form would see less instead."
    shifted = estimate(lambda x, t: Dirac(ORACLE(x, t).mean + 0.5), n=3000)
    close(shifted.var[1:], (best(DATA, S) + 0.25)[1:], (5 * shifted.se[1:]) / (32 * torch.finfo(torch.float64).eps))


def test_the_average_and_its_standard_error_are_those_of_the_draws():
    got, g = estimate(n=7, times=[13, 4, 0]), rng(1, "cpu")
    for t in 13, 4:
        i = torch.randint(300, (7,), generator=g)
        xt = F.sample(X[i], torch.full((7,), t), generator=g)
        each = (X[i] - ORACLE(xt, torch.full((7,), t)).mean).square().mean(1)
        close(got.var[t], each.mean(), 1)
        close(got.se[t], each.std() / 7**0.5, 1)


@pytest.mark.parametrize("chunk", [6, 20, 33, 100])
def test_the_batch_leaves_no_trace(chunk):
    rows = []
    def counting(x, t):
        rows.append(len(x))
        return ORACLE(x, t)
    got, want = estimate(counting, chunk=chunk), estimate()
    assert max(rows) <= chunk and sum(rows) == 20 * 20
    close(got.var, want.var, 10)
    close(got.se, want.se, 10)
    assert len(rows) == 20 * math.ceil(20 / chunk) if chunk <= 20 else len(rows) == math.ceil(20 / (chunk // 20))


def test_two_draws_one_step_and_single_rows_will_do():
    one, got = Hot(Schedule([1.0, 0.4])), estimate(n=2, chunk=1, times=[5, 2])
    assert got.se[5] > 0 and torch.equal(got.var, estimate(n=2, times=[5, 2]).var)
    assert estimate(lambda x, t: Dirac(x), F=one).var.shape == (2,)


def test_float32_errors_are_averaged_in_float64():
    got, g = estimate(lambda x, t: Dirac(0.5 * x), x0=X.float(), n=50, times=[9, 0]), rng(1, "cpu")
    i = torch.randint(300, (50,), generator=g)
    xt = F.sample(X.float()[i], torch.full((50,), 9), generator=g)
    assert got.var[9] == error_var(X.float()[i], 0.5 * xt).double().mean() != error_var(X.float()[i], 0.5 * xt).mean()


def test_times_between_are_interpolated_and_later_ones_constant():
    got = estimate(times=[12, 8, 2])
    assert got.se.isfinite().tolist() == [t in (0, 2, 8, 12) for t in range(21)]
    v = got.var
    close(v[:3], torch.tensor([0, 0.5, 1]).double() * v[2], 1)
    close(v[2:9], torch.lerp(v[2], v[8], torch.arange(7).double() / 6), 1)
    close(v[8:13], torch.lerp(v[8], v[12], torch.arange(5).double() / 4), 1)
    assert (v[12:] == v[12]).all()
    again = estimate(times=[12, 8, 2, 0])
    assert torch.equal(again.var, v)


def test_the_same_generator_the_same_table():
    assert torch.equal(estimate().var, estimate().var) and not torch.equal(estimate().var, estimate(seed=2).var)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    estimate()
    assert torch.equal(torch.get_rng_state(), state)


def test_no_gradient_is_kept():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    assert not estimate(lambda x, t: Dirac(weight * x)).var.requires_grad


def test_conditions_go_along_with_their_rows():
    "A denoiser that is told the datum makes no error; what holds no row per datum passes unchanged."
    def told(x, t, *, answer, table, word):
        assert answer.shape == x.shape and torch.equal(table, torch.arange(5)) and word == "so"
        return Dirac(answer)
    assert (estimate(told, answer=X, table=torch.arange(5), word="so", chunk=33).var == 0).all()
    def scalar(x, t, *, size): return Dirac(0 * x + size)
    assert estimate(scalar, size=torch.tensor(1.0)).var[5] > 0


class Told:
    "Needs the time it steps to, and remembers it."
    needs_s = True
    def __init__(self): self.seen = []
    def __call__(self, x, t, s):
        self.seen += (t - s).tolist()
        return Dirac(0 * x + s.view(-1, 1))


def test_denoisers_that_need_the_target_time_get_the_time_before():
    told = Told()
    assert estimate(told).var[20] > 100 and set(told.seen) == {1}


class Fade(Forward):
    "No normal noise, no tables: x_t = x0 (1 - t / 4) + t / 4 u."
    T = 4
    def forward(self, x0, t, eps): return x0 * (1 - t.view(-1, 1) / 4) + t.view(-1, 1) / 4 * eps
    def sample_noise(self, x0, *, generator=None): return torch.rand(x0.shape, generator=generator, dtype=x0.dtype)
    def infer_noise(self, x0, xt, t, fresh): return fresh
    def prior(self, like, *, generator=None): return self.sample_noise(like, generator=generator)


def test_any_family_will_do():
    got = estimate(lambda x, t: Dirac(x), F=Fade(), x0=torch.zeros(5, 2).double(), n=4000)
    want = torch.tensor([t**2 / 16 / 3 for t in range(5)]).double()             # E (t u / 4)²
    assert ((got.var - want).abs() <= 5 * got.se).all()


# -------------------------------------------------------------------------------------------------------------- the bounds


@given(schedules(), st.sampled_from([0.5, 1.0, math.inf]), seeds)
def test_clipping_stays_within_the_bounds_and_leaves_the_possible_alone(schedule, largest, seed):
    raw = 3 * normal(schedule.T + 1, seed=seed, device="cpu")
    cut, upper = clip_var(schedule, raw, largest), (1 / schedule.snr).clamp_max(largest)
    close(cut, torch.minimum(raw.clamp_min(0), upper), 3)
    assert cut[0] == 0 and torch.equal(clip_var(schedule, cut, largest), cut) and not cut.isnan().any()


def test_the_largest_variance_is_1_unless_said():
    assert clip_var(S, torch.full((21,), 9.0))[-1] == 1 < S.snr[-1].reciprocal()
    assert clip_var(S, torch.full((21,), 9.0)).dtype == torch.float32


def test_exact_tables_pass_unclipped():
    v = best(DATA, S)
    assert torch.equal(clip_var(S, v, math.inf), v) and torch.equal(clip_var(S, v), v)


@given(schedules())
def test_without_signal_only_the_data_bound_the_variance(schedule):
    table = torch.full((schedule.T + 1,), 7.0, dtype=torch.float64)
    if schedule.alpha[-1] == 0: assert clip_var(schedule, table, 2.0)[-1] == 2 and clip_var(schedule, table, math.inf)[-1] == 7


# ----------------------------------------------------------------------------------------------------------------- the use


def test_with_var_is_what_denoiser_does_with_a_table():
    table = best(DATA, S)
    net, x, t = (lambda x, t: 0.3 * x), normal(4, 3, device="cpu"), torch.tensor([1, 5, 5, 20])
    ours, theirs = WithVar(Denoiser(net, S, EPS), table)(x, t), Denoiser(net, S, EPS, var=table)(x, t)
    assert isinstance(ours, Gaussian) and torch.equal(ours.mean, theirs.mean) and torch.equal(ours.var, theirs.var)
    assert ours.var.flatten().tolist() == table[t].tolist()
    low = WithVar(Denoiser(net, S, EPS), table)(x.float(), t)
    assert low.mean.dtype == low.var.dtype == torch.float32


def test_with_var_passes_on_what_the_inner_denoiser_needs():
    told = Told()
    x, t, s = torch.zeros(2, 3).double(), torch.tensor([4, 9]), torch.tensor([2, 3])
    outer = WithVar(told, best(DATA, S))
    assert outer.needs_s and not WithVar(ORACLE, best(DATA, S)).needs_s
    assert outer(x, t, s=s).mean[:, 0].tolist() == [2, 3]
    named = WithVar(lambda x, t, *, shift: Dirac(x + shift), best(DATA, S))
    assert (named(x, t, shift=2.0).mean == 2).all()


def test_with_var_keeps_its_table_in_float64_and_in_its_state():
    one = WithVar(torch.nn.Identity(), best(DATA, S)).to(torch.float16)
    assert one.var.var.dtype == torch.float64 and list(one.state_dict()) == ["var.var"]


@pytest.mark.parametrize("kernel", [ddpm, ddim(), ddim(0.4)], ids=["ddpm", "ddim", "eta"])
@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_isotropic_normal_data_come_out_exactly_in_any_number_of_steps(kernel, n):
    "With the exact table, from the true law of x_T; and with a certain guess they do not."
    data = Mixture.gaussian(torch.tensor([0.5, -1.0]).double(), 0.4 * torch.eye(2).double())
    start = S.alpha[-1] * data.means[0], (S.alpha[-1] ** 2 * 0.4 + S.sigma[-1] ** 2) * torch.eye(2).double()
    mean, cov = output_moments(F, kernel, data, S.times(n), best(data, S), start)
    close(mean, data.means[0], 20 * n / S.sigma[1])
    close(cov, 0.4 * torch.eye(2).double(), 20 * n / S.sigma[1])
    assert output_moments(F, kernel, data, S.times(n), None, start)[1][0, 0] < 0.39


def test_samples_have_the_spread_of_the_data():
    "End to end: estimate, clip, wrap, draw. Certain guesses lose variance, these do not."
    data = Mixture.gaussian(torch.zeros(2).double(), 0.3 * torch.eye(2).double())
    oracle, n = Oracle(data, S), 4000
    table = clip_var(S, estimate(oracle, data.sample(5000, generator=rng(3, "cpu")), 4000, times=S.times(3)).var)
    xT = F.sample(data.sample(n, generator=rng(4, "cpu")), torch.full((n,), 20), generator=rng(5, "cpu"))
    def spread(denoiser):
        with torch.no_grad(): return sample(F, denoiser, xT, S.times(3), ddpm, generator=rng(6, "cpu")).var().item()
    se = 0.3 * (2 / (2 * n)) ** 0.5
    assert abs(spread(WithVar(oracle, table)) - 0.3) < 5 * se + 0.3 * 0.02                # the table is an estimate, too
    assert spread(WithVar(oracle, 0 * table)) < 0.3 - 10 * se


# -------------------------------------------------------------------------------------------------------------- bad input

V, T = ValueError, TypeError
CASES = {
    "one draw": (V, lambda: estimate(n=1), "n >= 2 draws", "n = 1, chunk = 4096"),
    "no rows at once": (V, lambda: estimate(chunk=0), "chunk >= 1", "chunk = 0"),
    "increasing times": (V, lambda: estimate(times=[1, 5, 0]), "strictly decreasing", r"\[1, 5, 0\]"),
    "a time beyond T": (V, lambda: estimate(times=[21, 0]), "between 20 and 0", "21 to 0"),
    "no posterior": (T, lambda: estimate(lambda x, t: x), "Posterior", "Tensor"),
    "a short table": (V, lambda: clip_var(S, torch.ones(20)), r"shape \(21,\)", r"\(20,\)"),
    "a negative variance": (V, lambda: WithVar(ORACLE, torch.tensor([0.0, -0.5])), "finite variances >= 0", r"\[-0.5\]"),
    "a variance that is NaN": (V, lambda: WithVar(ORACLE, torch.tensor([0.0, math.nan])), "finite variances >= 0", r"\[nan\]"),
    "an infinite variance": (V, lambda: WithVar(ORACLE, torch.tensor([0.0, math.inf])), "finite variances >= 0", r"\[inf\]"),
}


test_the_message_says_what_was_expected_and_what_came = refuses(CASES)

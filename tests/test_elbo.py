"""The bound against torch.distributions, quadrature, closed forms for Gaussian data, and a plain loop over the times."""

import contextlib
import io

import pytest
import torch
from conftest import close, full, normal, refuses, rng, same_mean
from families import Other
from hypothesis import given
from hypothesis import strategies as st
from strategies import dtypes, schedules, seeds, spans
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from udm_book.elbo import Terms, elbo, fold, normal_axes, normal_kl, prior_kl, reverse_law, step_kl
from udm_book.forward import Forward
from udm_book.hot import Hot, ddim, ddpm
from udm_book.oracle import Mixture, Oracle
from udm_book.parameterization import EPS, V, X0, Denoiser
from udm_book.posterior import Dirac, Gaussian, Laplace
from udm_book.reverse import Kernel, MixNoise, fresh_noise, reuse_noise
from udm_book.schedule import Schedule

SHAPES = st.sampled_from([(4, 1), (3, 2), (1, 2), (2, 1, 2, 2)])                          # (b, d), (b, c, h, w)
KERNELS = st.sampled_from([ddpm, ddim(0.6), fresh_noise])


def gaussian_data(d=2, seed=0):
    """Correlated data off the origin."""
    a = normal(d, d, seed=seed, device="cpu")
    return Mixture.gaussian(normal(d, seed=seed + 1, device="cpu"), a @ a.T / d + 0.1 * torch.eye(d))


# ------------------------------------------------------------------------------------------------------ two normal laws


@given(seeds, SHAPES, st.integers(0, 3))
def test_normal_kl_is_that_of_torch_distributions(seed, shape, kind):
    m1, m2, v1, v2 = (normal(*shape, seed=seed + k, device="cpu") for k in range(4))
    v1, v2 = v1.exp(), v2.exp()
    if kind == 1: v1, v2 = v1[:1, ...], v2.flatten()[0]                             # variances broadcast
    if kind == 2: v2 = v1
    if kind == 3: v1 = v1[:, :1]
    full1, full2 = v1.expand(shape), v2.expand(shape)
    want = kl_divergence(Normal(m1, full1.sqrt()), Normal(m2, full2.sqrt())).flatten(1).sum(1)
    size = (m1 - m2) ** 2 / full2 + full1 / full2 + (full1 / full2).log().abs() + 2
    close(normal_kl(m1, v1, m2, v2), want, size.flatten(1).sum(1))


@given(st.floats(-1e-2, 1e-2), st.floats(0.1, 10))
def test_nearly_equal_variances_keep_their_digits_in_float32(x, scale):
    "The error is eps |r - 1|, not eps."
    v1, v2 = torch.tensor(scale * (1 + x)).float(), torch.tensor(scale).float()
    x = (v1.double() - v2.double()) / v2.double()
    zero = torch.zeros(1, 1)
    close(normal_kl(zero, v1, zero, v2)[0], (x - x.log1p()) / 2, abs(x) + 1e-7 * x**2, C=8)


def test_normal_kl_by_quadrature_and_its_edges():
    grid = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    m1, v1, m2, v2 = (torch.tensor([[z]], dtype=torch.float64) for z in (0.3, 0.5, -0.7, 1.7))
    p, q = (Normal(m[0], v[0].sqrt()).log_prob(grid) for m, v in ((m1, v1), (m2, v2)))
    close(normal_kl(m1, v1, m2, v2)[0], (p.exp() * (p - q)).sum() * (grid[1] - grid[0]), 1e3)
    assert normal_kl(m1, 0 * v1, m2, v2).isposinf().all()
    assert normal_kl(m1, v1, m1, v1) == 0


# ------------------------------------------------------------------------------------------------------- laws of a step


@given(spans(positive=True), seeds, KERNELS, st.floats(0.01, 4))
def test_reverse_law_is_what_the_kernel_does_to_a_normal_guess(span, seed, kernel, var):
    "Mean and variance read off the kernel itself: it is affine in the guess and in its noise."
    schedule, t, s = span
    F, m, xt = Hot(schedule), normal(4, 3, seed=seed, device="cpu"), normal(4, 3, seed=seed + 1, device="cpu")
    tt, ss, zero, one = full(m, t), full(m, s), torch.zeros_like(m), torch.ones_like(m)
    law = reverse_law(F, kernel, Gaussian(m, torch.tensor(var, dtype=torch.float64)), xt, tt, ss)
    mean = kernel(F, m, xt, tt, ss, zero)
    on_guess, on_noise = kernel(F, m + one, xt, tt, ss, zero) - mean, kernel(F, m, xt, tt, ss, one) - mean
    kappa = (1 + m.abs() + xt.abs()) / schedule.sigma[t]
    close(law.mean, mean, kappa)
    close(law.var.expand_as(m), on_noise**2 + var * on_guess**2, (1 + var) * kappa**2)
    q = reverse_law(F, kernel, Dirac(m), xt, tt, ss)
    close(q.mean, mean, kappa)
    close(q.var.expand_as(m), on_noise**2, kappa**2)
    if kernel is ddpm:
        exact = F.step_posterior(m, xt, tt, ss)
        assert torch.equal(q.mean, exact.mean) and torch.equal(q.var, exact.var)


@given(spans())
def test_v_equal_to_sigma_squared_gives_the_variance_of_the_forward_step(span):
    "For every stride, not only for neighbours; v = 0 gives β̃."
    schedule, t, s = span
    F, z = Hot(schedule), torch.zeros(1, 1, dtype=torch.float64)
    tt, ss = full(z, t), full(z, s)
    large = reverse_law(F, ddpm, Gaussian(z, schedule.sigma[t] ** 2), z, tt, ss).var
    close(large[0, 0], 1 - schedule.alpha_bar[t] / schedule.alpha_bar[s], 1 / schedule.sigma[t] ** 2)


@given(spans(positive=True), seeds, KERNELS, dtypes, st.floats(0.0, 4), SHAPES)
def test_step_kl_compares_the_two_laws(span, seed, kernel, dtype, var, shape):
    schedule, t, s = span
    F = Hot(schedule)
    x0, m, xt = (normal(*shape, seed=seed + k, device="cpu") for k in range(3))
    tt, ss = full(x0, t), full(x0, s)
    guess = Gaussian(m, torch.tensor(var, dtype=torch.float64)) if var else Dirac(m)
    q, p = (reverse_law(F, kernel, g, xt, tt, ss) for g in (Dirac(x0), guess))
    want = normal_kl(q.mean, q.var, p.mean, p.var)
    a, _, c = (z[0] for z in kernel.bridge(F, tt, ss))
    kappa = (1 + a**2 * ((x0 - m) ** 2 + x0**2 + m**2 + xt**2 + var)) / c**2
    kappa = kappa.flatten(1).sum(1) / schedule.sigma[t] ** 2 / schedule.sigma[s] ** 2
    cast = Gaussian(m.to(dtype), torch.tensor(var, dtype=dtype)) if var else Dirac(m.to(dtype))
    got = step_kl(F, cast, x0.to(dtype), xt.to(dtype), tt, ss, kernel)
    assert got.dtype == dtype
    close(got, want, kappa, dtype=dtype)


@given(spans(positive=True), seeds)
def test_step_kl_of_a_full_covariance_is_that_of_the_multivariate_laws(span, seed):
    schedule, t, s = span
    F, data = Hot(schedule), gaussian_data(3, seed % 50)
    x0, xt = normal(4, 3, seed=seed, device="cpu"), normal(4, 3, seed=seed + 1, device="cpu")
    tt, ss = full(x0, t), full(x0, s)
    guess = Oracle(data, schedule)(xt, tt)
    a, b, c = (z[0] for z in ddpm.bridge(F, tt, ss))
    eye = torch.eye(3, dtype=torch.float64)
    q = MultivariateNormal(a * x0 + b * xt, c**2 * eye)
    p = MultivariateNormal(a * guess.mean + b * xt, c**2 * eye + a**2 * guess.cov)
    kappa = (10 + (a * (x0 - guess.mean) / c).square().sum(1)) * (1 + a**2 / c**2) / schedule.sigma[t] ** 2
    close(step_kl(F, guess, x0, xt, tt, ss, ddpm), kl_divergence(q, p), kappa, C=300)


@given(schedules(), seeds, SHAPES, dtypes)
def test_prior_kl_is_the_divergence_of_the_end_from_the_prior(schedule, seed, shape, dtype):
    x0 = normal(*shape, seed=seed, device="cpu")
    a, s = schedule.alpha[-1], schedule.sigma[-1]
    want = kl_divergence(Normal(a * x0, s.expand(shape)), Normal(torch.zeros(shape).double(), torch.ones(shape).double()))
    got = prior_kl(Hot(schedule), x0.to(dtype))
    assert got.dtype == dtype
    close(got, want.flatten(1).sum(1), (x0**2 + 2).flatten(1).sum(1) / s**2, dtype=dtype)
    each, square = x0[0].numel(), x0.square().mean().item()
    close(got.double().mean() / each, schedule.prior_kl(square), (square + 2) / s**2, dtype=dtype)


# ------------------------------------------------------------------------------------------------------------ the bound


def by_hand(F, denoiser, x0, times, kernel, seed):
    """One time after the other, with the law of each step written out."""
    g, steps = rng(seed, "cpu"), []
    for t, s in zip(times, times[1:]):
        tt, ss = full(x0, t), full(x0, s)
        xt = F.sample(x0, tt, generator=g)
        guess = denoiser(xt, tt)
        if s:
            q, p = (reverse_law(F, kernel, z, xt, tt, ss) for z in (Dirac(x0), guess))
            steps.append(normal_kl(q.mean, q.var, p.mean, p.var))
        else: data = guess.nll(x0)
    return steps, data


@pytest.mark.parametrize("chunk", [None, 1, 3, 5, 11, 23, 400])
@pytest.mark.parametrize("times", [None, [9, 6, 5, 1, 0], [9, 0]])
@pytest.mark.parametrize("kernel", [ddpm, ddim(0.5), fresh_noise], ids=["ddpm", "ddim", "fresh"])
def test_the_bound_is_a_loop_over_times_whatever_the_chunk(chunk, times, kernel):
    F, x0 = Hot(Schedule.linear(9, 0.02, 0.4)), normal(5, 2, 3, device="cpu")
    sizes = []

    def denoiser(xt, t):
        sizes.append(len(xt))
        return Gaussian((0.1 * t.double())[:, None, None].sin() * xt, F.schedule.sigma[t].square()[:, None, None])
    terms = elbo(F, denoiser, x0, times=times, chunk=chunk, kernel=kernel, generator=rng(3, "cpu"))
    n, rows = len(times or range(10)) - 1, sum(sizes)
    assert rows == 5 * n and max(sizes) <= (chunk or 5)
    if chunk == 400: assert sizes == ([5 * n - 5] if n > 1 else []) + [5]             # the last step comes alone
    if chunk == 11 and n == 9: assert sizes == [10, 10, 10, 10, 5]
    steps, data = by_hand(F, denoiser, x0, times or list(range(9, -1, -1)), kernel, 3)
    assert terms.prior.shape == terms.data.shape == (5,) and terms.steps.shape == (5, n - 1)
    close(terms.data, data, 1e3)
    if steps: close(terms.steps, torch.stack(steps, 1), 1e4)
    close(terms.prior, prior_kl(F, x0), 10)
    close(terms.total, terms.prior + sum(steps) + terms.data, 1e4)


def test_conditions_with_one_row_per_datum_go_along():
    F, x0 = Hot(Schedule.linear(4, 0.02, 0.4)), normal(3, 2, device="cpu")
    shift, seen = normal(3, 2, seed=5, device="cpu"), []

    def denoiser(xt, t, shift, table, scale):
        seen.append((len(xt), len(shift), len(table), scale))
        return Gaussian(scale * xt + shift, torch.ones((), dtype=torch.float64))
    kw = dict(shift=shift, table=torch.zeros(7, 1), scale=0.5)
    one, *rest = (elbo(F, denoiser, x0, chunk=c, generator=rng(1, "cpu"), **kw) for c in (None, 2, 7, 50))
    for terms in rest:
        for u, v in zip(one, terms): close(u, v, 1e3)
    assert all(a == b and c == 7 and d == 0.5 for a, b, c, d in seen)
    steps, data = by_hand(F, lambda xt, t: denoiser(xt, t, **kw), x0, [4, 3, 2, 1, 0], ddpm, 1)
    close(one.steps, torch.stack(steps, 1), 1e3)
    close(one.data, data, 1e3)
    scalar = dict(shift=shift, table=torch.zeros(()).expand(7), scale=torch.tensor(0.5))  # a tensor without rows
    close(elbo(F, lambda xt, t, **k: denoiser(xt, t, **{**k, "scale": k["scale"].item()}), x0, chunk=7,
               generator=rng(1, "cpu"), **scalar).total, one.total, 1e3)


def test_a_denoiser_that_asks_is_told_where_the_step_ends():
    F, x0, seen = Hot(Schedule.linear(6)), normal(2, 1, device="cpu"), []

    class Asks:
        needs_s = True

        def __call__(self, xt, t, s):
            seen.extend(zip(t.tolist(), s.tolist()))
            return Gaussian(xt, torch.ones((), dtype=torch.float64))
    elbo(F, Asks(), x0, times=[6, 4, 1, 0], chunk=100)
    assert seen == [(6, 4)] * 2 + [(4, 1)] * 2 + [(1, 0)] * 2


def test_the_decoder_sees_the_last_guess_alone():
    F, x0, seen = Hot(Schedule.linear(6)), normal(2, 1, device="cpu"), []

    def decoder(guess):
        seen.append(guess)
        return Laplace(guess.mean, torch.tensor(0.3).double())
    terms = elbo(F, lambda xt, t: Dirac(xt), x0, decoder=decoder, chunk=4, generator=rng(0, "cpu"))
    guess, = seen
    assert guess.mean.shape == (2, 1)
    close(terms.data, Laplace(guess.mean, torch.tensor(0.3).double()).nll(x0), 100)


def test_each_row_and_time_has_its_own_noise_of_the_law_of_the_process():
    F, x0 = Hot(Schedule.linear(3, 0.1, 0.5)), torch.ones(20_000, 1, dtype=torch.float64)
    for last, data, xt, t, s, _ in fold(F, x0, [3, 1, 0], 50_000, rng(0, "cpu"), False, {}):
        k = int(t[0])
        same_mean(torch.cat([xt, xt**2], 1), torch.stack([F.schedule.alpha[k], torch.ones(()).double()]))
        assert last == (k == 1) and (s == (0 if last else 1)).all() and torch.equal(data, x0)


def test_families_with_several_noises_and_their_own_terms():
    class Two(Forward):
        T = 3
        def forward(self, x0, t, eps): return x0 + t[:, None] * (eps[0] + eps[1])
        def sample_noise(self, x0, *, generator=None): return torch.ones_like(x0), 2 * torch.ones_like(x0)
        def infer_noise(self, x0, xt, t, fresh): return fresh
        def prior(self, like, *, generator=None): return like
    prior_kl.register(Two, lambda F, x0: x0[:, 0])
    step_kl.register(Two, lambda F, guess, x0, xt, t, s, kernel: (xt - x0)[:, 0])
    x0 = torch.zeros(2, 1, dtype=torch.float64)
    terms = elbo(Two(), lambda xt, t: Gaussian(xt, torch.ones(()).double()), x0, chunk=9)
    assert terms.prior.tolist() == [0, 0] and terms.steps.tolist() == [[9, 6]] * 2


@pytest.mark.parametrize("P", [X0, EPS, V], ids=lambda P: P.name)
def test_float32_networks_are_within_rounding_of_float64(P):
    schedule = Schedule.linear(50, 0.001, 0.3)
    F, x0 = Hot(schedule), normal(3, 2, device="cpu")
    denoiser = Denoiser(lambda x, t: 0.3 * x, schedule, P, schedule.sigma**2)
    noise = normal(50, 3, 2, seed=9, device="cpu")

    class Given(Hot):                                                                # the same noise in both precisions
        def sample_noise(self, x0, *, generator=None): return next(draws).to(x0.dtype)
    totals = []
    for dtype in torch.float64, torch.float32:
        draws = iter(noise)
        totals.append(elbo(Given(schedule), denoiser, x0.to(dtype), chunk=30))
    assert totals[1].total.dtype == torch.float32
    size = (totals[0].prior + totals[0].steps.abs().sum(1) + totals[0].data.abs() + 50) / schedule.sigma[1] ** 2
    close(totals[1].total, totals[0].total, size, dtype=torch.float32)


def test_gradients_reach_the_network():
    F, x0 = Hot(Schedule.linear(5, 0.02, 0.4)), normal(3, 2, device="cpu")
    w = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    elbo(F, lambda xt, t: Gaussian(w * xt, F.schedule.sigma[t].square()[:, None]), x0, chunk=6,
         generator=rng(0, "cpu")).total.sum().backward()
    h = 1e-6
    up, down = (elbo(F, lambda xt, t: Gaussian((0.5 + e) * xt, F.schedule.sigma[t].square()[:, None]), x0,
                     generator=rng(0, "cpu")).total.sum() for e in (h, -h))
    assert abs(w.grad - (up - down) / 2 / h) < 1e-5 * abs(w.grad)


# ------------------------------------------------------------------------------------------------ what Gaussian data say


def gap(F, data, var, first):
    """Closed form: divergence of the starts, and of each step and axis for guesses of variances `var`, `first` at t = 1."""
    a, s = F.schedule.alpha, F.schedule.sigma
    lam = data.var[0]
    def cost(r): return ((r - 1 - r.log()) / 2).sum()
    v_T = a[-1] ** 2 * lam + s[-1] ** 2
    total = cost(v_T) + (a[-1] * data.means).square().sum() / 2
    for t in range(F.T, 0, -1):
        exact = lam * s[t] ** 2 / (a[t] ** 2 * lam + s[t] ** 2)
        if t == 1: return total + (0 if first is None else cost(exact / first))
        if var is not None:
            k, c2 = t - 1, s[t - 1] ** 2 - (a[t] * s[t - 1] ** 2 / s[t] / a[t - 1]) ** 2       # β̃
            on_x0 = a[k] - a[t] * s[k] ** 2 / s[t] ** 2 * a[t] / a[k]
            total = total + cost((c2 + on_x0**2 * exact) / (c2 + on_x0**2 * var[t]))


@pytest.mark.parametrize("which", ["exact", "beta", "beta tilde", "upper"])
def test_the_gap_to_the_entropy_of_gaussian_data_is_the_predicted_one(which):
    "With the exact posterior only the start is left; another variance costs (r - 1 - log r) / 2 a step and axis."
    schedule, data = Schedule.linear(6, 0.1, 0.3), gaussian_data(2, 4)
    F, oracle, one = Hot(schedule), Oracle(data, schedule), schedule.sigma[1] ** 2
    var, first = {"exact": (None, None), "beta": (schedule.sigma**2, one), "beta tilde": (0 * schedule.sigma, one),
                  "upper": (1 / schedule.snr, 1 / schedule.snr[1])}[which]
    def denoiser(xt, t): return oracle(xt, t) if var is None else Gaussian(oracle(xt, t).mean, var[t][:, None])
    decoder = (lambda guess: Gaussian(guess.mean, one)) if which == "beta tilde" else None
    x0 = data.sample(10_000, generator=rng(0, "cpu"))
    terms = elbo(F, denoiser, x0, decoder=decoder, chunk=60_000, generator=rng(1, "cpu"))
    same_mean((terms.total + data.log_prob(x0))[:, None], gap(F, data, var, first)[None])


def test_progress_is_shown_where_asked_for():
    with contextlib.redirect_stderr(io.StringIO()) as out: elbo(F4, unsure, X, chunk=4)
    assert not out.getvalue()
    with contextlib.redirect_stderr(io.StringIO()) as out: elbo(F4, unsure, X, chunk=4, progress=True)
    assert "3/3" in out.getvalue()                                                   # two times, one more, and the last


def test_terms_add_up():
    terms = Terms(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 10.0], [2.0, 20.0]]), torch.tensor([100.0, 200.0]))
    assert terms.total.tolist() == [112, 224]


# ------------------------------------------------------------------------------------------------------------ bad input

F4, X = Hot(Schedule.linear(4)), torch.zeros(2, 3)


def sure(xt, t): return Dirac(xt)


def unsure(xt, t): return Gaussian(xt, torch.ones(()))


class Lazy(Kernel):
    def __call__(self, F, x0, xt, t, s, fresh): return xt


ONE, FOUR = Oracle(Mixture.gaussian(torch.zeros(3), torch.eye(3)), F4.schedule), torch.full((2,), 4)
CASES = {
    "a run that starts below T": (ValueError, lambda: elbo(F4, unsure, X, times=[3, 0]), "times from T = 4 to 0", "3 to 0"),
    "a run that ends above 0": (ValueError, lambda: elbo(F4, unsure, X, times=[4, 1]), "times from T = 4 to 0", "4 to 1"),
    "a time twice": (ValueError, lambda: elbo(F4, unsure, X, times=[4, 4, 0]), "strictly decreasing", r"\[4, 4, 0\]"),
    "no rows at once": (ValueError, lambda: elbo(F4, unsure, X, chunk=0), "a chunk >= 1 row", "0"),
    "a kernel without noise": (ValueError, lambda: elbo(F4, unsure, X, kernel=reuse_noise), "adds noise", "ReuseNoise.*none at t = 4"),
    "a step without noise": (ValueError, lambda: elbo(F4, unsure, X, kernel=MixNoise(lambda F, t, s: (s > 1).double())), "adds noise", "none at t = 2"),
    "a kernel that is not linear": (TypeError, lambda: elbo(F4, unsure, X, kernel=Lazy()), "a x0 . b xt . c fresh", ".*Lazy.* on Hot"),
    "the name of a kernel": (TypeError, lambda: elbo(F4, unsure, X, kernel="ddpm"), "a x0 . b xt . c fresh", "'ddpm' on Hot"),
    "a last guess without width": (ValueError, lambda: elbo(F4, sure, X), "a last guess with a density", "variance 0.*a decoder"),
    "a last guess of 0": (ValueError, lambda: elbo(F4, lambda xt, t: Dirac(0 * xt), X), "a last guess with a density", "variance 0"),
    "a last variance of 0": (ValueError, lambda: elbo(F4, lambda xt, t: Gaussian(xt, 0 * xt), X), "a last guess with a density", "variance 0"),
    "a last variance of 0 in one entry": (
        ValueError, lambda: elbo(F4, lambda xt, t: Gaussian(xt, torch.tensor([0.0, 1.0, 1.0])), X), "a last guess with a density", "variance 0"),
    "a guess that is not normal": (TypeError, lambda: elbo(F4, lambda xt, t: Laplace(xt, torch.ones(())), X), "one-component MixturePosterior", "Laplace"),
    "a guess of several components": (TypeError, lambda: elbo(F4, Oracle(Mixture.points(torch.eye(3)), F4.schedule), X), "one-component", "MixturePosterior"),
    "no posterior": (TypeError, lambda: elbo(F4, lambda xt, t: xt, X), "return a Posterior", "Tensor"),
    "a family without steps": (TypeError, lambda: elbo(Other(), unsure, X), "a registered step_kl", "Other"),
    "a family without a prior": (TypeError, lambda: prior_kl(Other(), X), "a registered prior_kl", "Other"),
    "the step of a mixture": (TypeError, lambda: reverse_law(F4, ddpm, ONE(X, FOUR), X, FOUR, FOUR - 1), "a Dirac or Gaussian guess", "MixturePosterior"),
}
test_the_message_says_what_was_expected_and_what_came = refuses(CASES)


def test_axes_of_a_normal_oracle_have_one_shape():
    x0, mean, var = normal_axes(ONE(X, FOUR), X)
    assert x0.shape == mean.shape == var.shape == (2, 1, 3)


def test_one_step_needs_no_noise_of_the_kernel():
    "From T to 0 at once the kernel only returns the guess."
    assert elbo(F4, unsure, X, times=[4, 0], kernel=reuse_noise).steps.shape == (2, 0)

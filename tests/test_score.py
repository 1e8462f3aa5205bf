"""Score, covariance, likelihood and solvers against closed forms, textbook methods written out, and measured orders."""
import math

import pytest
import torch
from conftest import close, full, normal, per_row, refuses, rng
from families import Other, mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import alpha_bars, build, seeds, spans

from udm_book.hot import Hot
from udm_book.oracle import Oracle
from udm_book.parameterization import EPS, FLOW, X0, Denoiser, V
from udm_book.posterior import Dirac, Gaussian
from udm_book.reverse import reuse_noise, reverse, sample
from udm_book.schedule import Schedule, quadratic, uniform
from udm_book.score import (DPMSolver2M, Heun, Solver, covariance, even, flow, jacobian, karras, log_snr, ode_log_prob, score,
                            value_and_trace, when)

f64 = torch.float64
SMOOTH = Schedule.from_alpha_bar(lambda u: torch.exp(-0.1 * u - 9.95 * u**2), 20_000)
DATA = {"normal": mixture(1, 3, seed=1).cpu(), "mixture": mixture(3, 3, seed=2).cpu(), "images": mixture(2, 1, 2, 2, seed=3).cpu()}
each = pytest.mark.parametrize("data", DATA.values(), ids=DATA)
SPACINGS = {"uniform": uniform, "quadratic": quadratic, "log_snr": log_snr, "karras 7": karras(), "karras 1": karras(1.0)}


def mean_of(oracle):
    return lambda xt, t: Dirac(oracle(xt, t).mean)


def net(xt, t, shift=0.0):
    "A smooth stand-in for a trained network."
    return torch.sin(xt) * per_row(1 + t.to(xt.dtype) / 10, xt) / 2 + shift


def grid(schedule, n, low, high):
    "Even steps of log-SNR between two times, by looking for the nearest entries."
    levels = schedule.log_snr
    want = torch.linspace(levels[high], levels[low], n + 1, dtype=f64).tolist()
    return [low + int((levels[low : high + 1] - w).abs().argmin()) for w in want]


def slope(errors):
    "The order of convergence when steps double from one entry to the next."
    return math.log2(errors[0] / errors[-1]) / (len(errors) - 1)


# --------------------------------------------------------------------------------------------------- score and covariance


@each
@settings(max_examples=10)
@given(seed=seeds, t=st.integers(1, 10))
def test_score_and_covariance_are_derivatives_of_the_density(data, seed, t):
    "Autograd on log p_t, not the oracle's own score; and the oracle's covariance."
    schedule = Schedule.linear(10, 0.05, 0.5)
    oracle, x = Oracle(data, schedule), 2 * normal(4, *data.shape, seed=seed, device="cpu")
    tt, sigma, alpha = full(x, t), schedule.sigma[t], schedule.alpha[t]
    xg = x.clone().requires_grad_()
    want, = torch.autograd.grad(oracle.log_prob(xg, tt).sum(), xg)
    kappa = (10 + want.abs().max()) / 0.05 / (sigma**2 * alpha)
    close(score(oracle(x, tt).mean, x, tt, schedule), want, kappa)
    close(covariance(oracle, x, tt, schedule), oracle(x, tt).cov, kappa**2)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_score_of_rows_with_their_own_times(dtype):
    schedule = Schedule.linear(10, 0.05, 0.5)
    x, mean = (normal(3, 2, 2, seed=k, dtype=dtype, device="cpu") for k in range(2))
    t = torch.tensor([1, 4, 10])
    want = torch.stack([(schedule.alpha[k] * m - v) / schedule.sigma[k] ** 2 for k, m, v in zip(t.tolist(), mean.double(), x.double())])
    close(score(mean, x, t, schedule), want, (x.abs() + mean.abs()).max() / schedule.sigma[1] ** 2)


def test_jacobian_and_trace_of_a_known_map():
    "f(x) = A x + x²/2, row by row: J = A + diag(x). Nothing of x's graph is left on the results."
    A, x = normal(4, 4, device="cpu"), normal(3, 2, 2, seed=1, device="cpu").requires_grad_()
    def f(x): return (x.flatten(1) @ A.T + x.flatten(1) ** 2 / 2).reshape(x.shape)
    J = A + torch.diag_embed(x.detach().flatten(1))
    probes = normal(7, 3, 2, 2, seed=2, device="cpu")
    flat = probes.flatten(2)
    estimate = torch.einsum("kbi,bij,kbj->kb", flat, J, flat).mean(0)
    for grad in True, False:
        with torch.set_grad_enabled(grad):
            y, got = jacobian(f, x)
            close(got, J, 10)
            for p, want in (None, J.diagonal(dim1=1, dim2=2).sum(-1)), (probes, estimate):
                value, trace = value_and_trace(f, x, p)
                close(value, f(x.detach()), 10)
                close(trace, want, 1000)
                assert not any(v.requires_grad for v in (value, trace, y, got))
    signs = (torch.eye(4, dtype=f64) * 2).reshape(4, 1, 2, 2).expand(4, 3, 2, 2)               # covariance I, no noise left
    close(value_and_trace(f, x, signs)[1], J.diagonal(dim1=1, dim2=2).sum(-1), 10)


# ------------------------------------------------------------------------------------------------------ flow matching, grids


@given(T=st.integers(2, 200))
def test_flow_is_the_straight_path(T):
    schedule, u = flow(T), torch.linspace(0, 1, T + 1, dtype=f64)
    assert schedule.T == T and schedule.alpha[-1] == 0
    c = schedule.alpha + schedule.sigma                                                # (1 - u)/c_u + u/c_u
    close(schedule.sigma / c, u, T)
    close(schedule.alpha / c, 1 - u, T)


@given(seed=seeds, cut=st.sets(st.integers(1, 15)))
def test_euler_on_the_flow_of_flow_matching_is_ddim(seed, cut):
    T, schedule = 16, flow(16)
    times, x = [T, *sorted(cut, reverse=True), 0], normal(3, 2, seed=seed, device="cpu")
    want = x
    for t, s in zip(times, times[1:]):
        c = math.hypot(1 - t / T, t / T)
        want = want + (s - t) / T * net(want / c, full(x, t))
    with torch.no_grad(): got = sample(Hot(schedule), Denoiser(net, schedule, FLOW), x, times, reuse_noise)
    close(got, want, 1e4)


@pytest.mark.parametrize("spacing", SPACINGS.values(), ids=SPACINGS)
@settings(max_examples=20)
@given(a=alpha_bars(40), data=st.data())
def test_every_grid_is_sound(spacing, a, data):
    "n + 1 times, strictly falling, from T to 0, for every table, n and spacing (also no signal at T)."
    schedule = build(a)
    n = data.draw(st.integers(1, schedule.T))
    times = schedule.times(n, spacing)
    assert (len(times), times[0], times[-1]) == (n + 1, schedule.T, 0)
    assert all(isinstance(t, int) for t in times) and all(s < t for t, s in zip(times, times[1:]))
    u = torch.linspace(1, 0, n + 1, dtype=f64)
    wish = spacing(schedule, u)
    assert wish[0] == schedule.T and wish[-1] == 0 and (wish.diff() <= 0).all()


@pytest.mark.parametrize("name, scale", [("log_snr", torch.log), ("karras 7", lambda r: r ** (1 / 7)), ("karras 1", lambda r: r)])
@pytest.mark.parametrize("n", [2, 3, 10, 33])
def test_spacings_are_even_where_they_say(name, scale, n):
    "On a fine table rounding does not matter: all steps but the last have one length, from T to 1."
    schedule = Schedule.from_alpha_bar(lambda u: 1 / (1 + (math.log(2) + 8 * u).exp() - 2), 4000)
    wish = SPACINGS[name](schedule, torch.linspace(1, 0, n + 1, dtype=f64))
    assert wish[0] == schedule.T and abs(wish[-2] - 1) < 1e-9 and wish[-1] == 0
    r = schedule.sigma / schedule.alpha
    low = wish[:-1].floor().long().clamp(max=schedule.T - 1)
    share = wish[:-1] - low
    there = scale(r[low]) * (1 - share) + scale(r[low + 1]) * share                    # straight between entries
    steps = there.diff()
    close(steps, steps.mean().expand(n - 1), 1e6 * there.abs().max())


def test_when_finds_times_in_a_rising_table():
    table = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=f64)
    got = when(table, torch.tensor([0.0, 1.0, 1.5, 2.0, 3.0, 7.0, 8.0, 9.0], dtype=f64))
    assert got.tolist() == [1.0, 1.0, 1.5, 2.0, 2.5, 3.75, 4.0, 4.0]
    assert when(table[:1], table).tolist() == [1.0] * 4
    assert when(torch.tensor([1.0, 1.0, 2.0], dtype=f64), table[:2]).isfinite().all()                # ties


def test_without_signal_the_last_entry_counts_as_half_the_one_before():
    schedule, twin = (Schedule([1.0, 0.9, 0.5, 0.2, last]) for last in (0.0, 0.05))
    u = torch.linspace(1, 0, 4, dtype=f64)
    s = twin.sigma.clone()
    s[-1] = 1.0
    by_hand = (s / twin.alpha)[1:].log()
    want = when(by_hand, torch.linspace(by_hand[-1], by_hand[0], 3, dtype=f64))
    close(log_snr(schedule, u)[:-1], want, 100)
    assert even(schedule, torch.tensor([1.0, 0.0], dtype=f64), torch.log).tolist() == [4.0, 0.0]


def test_karras_is_the_formula_of_the_article():
    schedule = Schedule.linear(1000)
    r = (schedule.sigma / schedule.alpha).tolist()
    want = [(r[1000] ** (1 / 7) + i / 9 * (r[1] ** (1 / 7) - r[1000] ** (1 / 7))) ** 7 for i in range(10)]
    near = [min(range(1, 1001), key=lambda t: abs(r[t] - w)) for w in want]
    assert all(abs(a - b) <= 1 for a, b in zip(schedule.times(10, karras()), near))


# ----------------------------------------------------------------------------------------------------------------- solvers


def heun_by_hand(schedule, D, x, times):
    "Karras et al.: in y = x / alpha and r = sigma / alpha, the last step to r = 0 by Euler. float64 numbers."
    a, s = schedule.alpha.tolist(), schedule.sigma.tolist()
    for t, u in zip(times, times[1:]):
        y, r, to = x / a[t], s[t] / a[t], s[u] / a[u]
        d = (y - D(x, full(x, t))) / r
        ahead = y + (to - r) * d
        if u: d = (d + (ahead - D(a[u] * ahead, full(x, u))) / to) / 2
        x = a[u] * (y + (to - r) * d)
    return x


def dpm_by_hand(schedule, D, x, times):
    "Lu et al., algorithm 2: x' = sigma'/sigma x - alpha' (exp(-h) - 1) ((1 + 1/2r) x0 - x0_before/2r), r = h_before/h."
    a, s = schedule.alpha.tolist(), schedule.sigma.tolist()
    lam = [math.log(p / q) if p and q else math.inf for p, q in zip(a, s)]
    before = None
    for i, (t, u) in enumerate(zip(times, times[1:])):
        x0 = D(x, full(x, t))
        h, guess = lam[u] - lam[t], x0
        if i and u:
            r = (lam[t] - lam[times[i - 1]]) / h
            guess = (1 + 1 / (2 * r)) * x0 - before / (2 * r)
        x, before = s[u] / s[t] * x - a[u] * math.expm1(-h) * guess, x0
    return x


@pytest.mark.parametrize("wrapper, by_hand", [(Heun, heun_by_hand), (DPMSolver2M, dpm_by_hand)], ids=["heun", "2m"])
@pytest.mark.parametrize("P", [EPS, V], ids=lambda P: P.name)
@settings(max_examples=10)
@given(seed=seeds, cut=st.sets(st.integers(1, 11), min_size=1), end=st.booleans())
def test_solvers_are_the_textbook_methods(wrapper, by_hand, P, seed, cut, end):
    "On uneven grids, down to the data or to a time above, in every parameterization, from two shapes."
    schedule = Schedule.linear(12, 0.1, 0.3)
    times = [12, *sorted(cut, reverse=True), *([0] if end else [])]
    D = Denoiser(net, schedule, P)
    xT = normal(*((2, 3) if seed % 2 else (2, 1, 2, 2)), seed=seed, device="cpu")
    with torch.no_grad():
        want = by_hand(schedule, lambda x, t: D(x, t).mean, xT, times)
        solver = wrapper(D, Hot(schedule))
        got = sample(Hot(schedule), solver, xT, times, reuse_noise)
        states = list(reverse(Hot(schedule), solver, xT, times, reuse_noise))
    kappa = 1e5 * (10 + want.abs().max())                  # weights up to 10, derivatives up to 10, 12 steps
    close(got, want, kappa)
    close(states[-1].xt, want, kappa)


def exact(data, schedule, x, t, s):
    "The flow of normal data: along each axis of the covariance a ratio of standard deviations."
    (mean,), (var,), (U,) = data.means, data.var, data.basis
    (a, b), (p, q) = ((schedule.alpha[k], schedule.sigma[k]) for k in (t, s))
    z = (x.flatten(1) - a * mean) @ U * ((p**2 * var + q**2) / (a**2 * var + b**2)).sqrt()
    return (p * mean + z @ U.T).reshape(x.shape)


@pytest.mark.parametrize("wrapper, order", [(lambda D, F: D, 1), (Heun, 2), (DPMSolver2M, 2)], ids=["euler", "heun", "2m"])
@pytest.mark.parametrize("P", [EPS, V], ids=lambda P: P.name)
def test_orders_of_convergence(wrapper, order, P):
    "1, 2 and 2 within 0.2, on normal data, to an end above 0, from a network in each parameterization."
    data, low, high = DATA["normal"], 1500, SMOOTH.T
    oracle, F = Oracle(data, SMOOTH), Hot(SMOOTH)
    def network(xt, t):
        x0 = oracle(xt, t).mean
        a, s = SMOOTH.at(t, xt)
        p, q = P.mix(a, s)
        return p * x0 + q * (xt - a * x0) / s
    D = wrapper(Denoiser(network, SMOOTH, P), F)
    xT = normal(5, 3, device="cpu")
    want = exact(data, SMOOTH, xT, high, low)
    with torch.no_grad():
        errors = [(sample(F, D, xT, grid(SMOOTH, n, low, high), reuse_noise) - want).square().mean().sqrt().item() for n in (32, 64)]
    assert abs(slope(errors) - order) < 0.2, errors


def test_a_network_that_knows_the_answer_is_left_alone():
    "Oracle noise: with a constant guess every solver stays on alpha_t x0 + sigma_t eps and ends at x0."
    x0, eps = normal(3, 2, device="cpu"), normal(3, 2, seed=1, device="cpu")
    for schedule in Schedule.linear(50), Schedule.cosine(50), flow(50):
        F = Hot(schedule)
        for wrapper in Heun, DPMSolver2M:
            for step in reverse(F, wrapper(lambda xt, t: Dirac(x0), F), F(x0, full(x0, 50), eps), schedule.times(7, log_snr), reuse_noise):
                close(step.xt, F(x0, full(x0, step.t), eps), 100)


@pytest.mark.parametrize("wrapper", [Heun, DPMSolver2M])
def test_runs_do_not_remember_one_another(wrapper):
    schedule = Schedule.linear(30, 1e-2, 0.2)
    F, D = Hot(schedule), Denoiser(net, schedule, EPS)
    solver, xs = wrapper(D, F), [normal(2, 3, seed=k, device="cpu") for k in range(3)] + [normal(4, 3, seed=4, device="cpu")]
    with torch.no_grad():
        for times in ([30, 20, 10, 0], [30, 12, 5], [12, 5, 2, 0], [5, 1, 0], [5, 0]):                # also from where the last one ended
            for x in xs:
                assert torch.equal(sample(F, solver, x, times, reuse_noise), sample(F, wrapper(D, F), x, times, reuse_noise))
        single = sample(F, wrapper(D, F), xs[0], [30, 20], reuse_noise)
        again = wrapper(D, F)
        sample(F, again, xs[1], [30, 20], reuse_noise)
        t, s = full(single, 20), full(single, 10)
        assert torch.equal(again(single, t, s=s).mean, wrapper(D, F)(single, t, s=s).mean)


@given(span=spans(max_T=12, positive=True), seed=seeds)
def test_rows_with_their_own_times(span, seed):
    "A batch of mixed times equals its rows, over two steps."
    schedule, *_ = span
    F, D = Hot(schedule), Denoiser(net, schedule, V)
    g = rng(seed, "cpu")
    ts = [sorted(torch.randperm(schedule.T - 1, generator=g)[:2].add(1).tolist(), reverse=True) + [0] for _ in range(3)]
    x = normal(3, 2, seed=seed, device="cpu")
    t, s, u = (torch.tensor(k) for k in zip(*ts))
    for wrapper in Heun, DPMSolver2M:
        def go(x, t, s, u):
            solver = wrapper(D, F)
            y = reuse_noise(F, solver(x, t, s=s).mean, x, t, s, None)
            return solver(y, s, s=u).mean
        got = go(x, t, s, u)
        for i in range(3):
            row = slice(i, i + 1)
            close(go(x[row], t[row], s[row], u[row]), got[row], 1e4 / schedule.sigma[1] / schedule.alpha[-2])


@pytest.mark.parametrize("wrapper", [Heun, DPMSolver2M])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_near(wrapper, dtype):
    schedule = Schedule.linear(100, 1e-3, 0.1)
    F, D, x = Hot(schedule), Denoiser(net, schedule, X0), normal(4, 3, device="cpu")
    with torch.no_grad():
        want = sample(F, wrapper(D, F), x, schedule.times(20), reuse_noise)
        got = sample(F, wrapper(D, F), x.to(dtype), schedule.times(20), reuse_noise)
    assert got.dtype == dtype and torch.isfinite(got).all()
    assert (got.double() - want).abs().max() < 200 * torch.finfo(dtype).eps * (1 + want.abs().max())


def test_at_the_ends_the_weights_are_zero():
    "s = 0 and no signal at t: the plain guess. The network of Heun's second call is never asked about t = 0."
    schedule = Schedule([1.0, 0.8, 0.4, 0.0])
    F, asked = Hot(schedule), []
    def network(xt, t):
        asked.append(t.tolist())
        return net(xt, t)
    D, x = Denoiser(network, schedule, V), normal(2, 3, device="cpu")
    heun = Heun(D, F)
    for t, s in (3, 2), (2, 0), (1, 0), (3, 0):
        assert torch.equal(heun(x, full(x, t), s=full(x, s)).mean, D(x, full(x, t)).mean)
        assert asked[-2] == [max(s, 1)] * 2
    two = [k for k in (heun(x, full(x, 2), s=full(x, 1)).mean - D(x, full(x, 2)).mean).abs().flatten()]
    assert min(two) > 0
    dpm = DPMSolver2M(D, F)
    t, s, u, v = (full(x, k) for k in (3, 2, 1, 0))
    for here, to in ((t, s), (s, u)):                                                  # nothing to remember; h_before infinite
        assert torch.equal(dpm(x, here, s=to).mean, D(x, here).mean)
    assert torch.equal(dpm(x, u, s=v).mean, D(x, u).mean)                              # h infinite
    dpm(x, t, s=u)
    assert torch.equal(dpm(x, u, s=v).mean, D(x, u).mean)                              # both infinite: no number
    plain = sample(F, lambda xt, t: Dirac(D(xt, t).mean), x, [3, 1, 0], reuse_noise)
    assert torch.equal(sample(F, dpm, x, [3, 1, 0], reuse_noise), plain)               # both infinite
    for times, calls in ([3, 2, 1, 0], 4), ([2, 1, 0], 3), ([3, 1], 1), ([2, 1], 2):   # Heun saves those of weight 0
        asked.clear()
        sample(F, heun, x, times, reuse_noise)
        assert len(asked) == calls and [0, 0] not in asked
    for times in ([3, 2, 1, 0], [3, 1, 0], [3, 0]):
        for wrapper in Heun, DPMSolver2M: assert torch.isfinite(sample(F, wrapper(D, F), x, times, reuse_noise)).all()


def test_a_run_whose_times_carry_their_numbers_is_the_same_as_one_without():
    "Python numbers for weights, or tables: per row, in the precision of the state."
    schedule = Schedule.linear(20, 1e-2, 0.3)
    F, D = Hot(schedule), Denoiser(net, schedule, V)
    for times in [20, 13, 6, 2, 0], [20, 19, 3, 1]:
        for wrapper in Heun, DPMSolver2M:
            numbered, bare, x = wrapper(D, F), wrapper(D, F), normal(3, 2, device="cpu")
            grid = [full(x, t) for t in times]
            for step, t, s in zip(reverse(F, numbered, x, times, reuse_noise), grid, grid[1:]):
                guess = bare(x, t, s=s).mean
                x = reuse_noise(F, guess, x, t, s, None)
                close(step.xt, x, 1e4)


@pytest.mark.parametrize("wrapper", [Heun, DPMSolver2M])
def test_solvers_pass_on_conditions_and_target_and_use_the_mean_alone(wrapper):
    schedule, seen = Schedule.linear(10), []
    def D(xt, t, s, shift):
        seen.append((t.tolist(), s.tolist(), shift))
        return Gaussian(net(xt, t, shift), torch.ones(()))
    D.needs_s = True
    F, x = Hot(schedule), normal(2, 3, device="cpu")
    solver = wrapper(D, F)
    assert isinstance(solver, Solver) and solver.needs_s
    draws = [sample(F, solver, x, [10, 5, 2], reuse_noise, generator=rng(k, "cpu"), shift=0.5) for k in range(2)]
    assert torch.equal(*draws)
    assert {shift for *_, shift in seen} == {0.5} and ([10, 10], [5, 5], 0.5) in seen and ([5, 5], [2, 2], 0.5) in seen
    assert len(seen) == 2 * 2 * (2 if wrapper is Heun else 1)
    if wrapper is Heun: assert seen[1] == ([5, 5], [5, 5], 0.5)
    assert isinstance(solver(x, full(x, 10), s=full(x, 5), shift=0.5), Dirac)


@pytest.mark.parametrize("wrapper", [Heun, DPMSolver2M])
def test_solvers_are_modules_with_float64_tables(wrapper):
    schedule = Schedule.linear(10)
    net_ = torch.nn.Linear(3, 3)
    solver = wrapper(Denoiser(lambda x, t: net_(x), schedule, EPS), Hot(schedule)).half()
    assert all(v.dtype == f64 for v in solver.tables.buffers())
    twin = wrapper(Denoiser(lambda x, t: net_(x), schedule, EPS), Hot(schedule))
    twin.load_state_dict(solver.state_dict())


# -------------------------------------------------------------------------------------------------------------- likelihood


def log_density(data, schedule, t):
    return lambda x: Oracle(data, schedule).log_prob(x, full(x, t))


@pytest.mark.parametrize("data", [DATA["normal"], DATA["images"]], ids=["normal", "images"])
def test_likelihood_converges_with_order_two(data):
    low, high, oracle = 1000, SMOOTH.T, Oracle(data, SMOOTH)
    x = Hot(SMOOTH).sample(data.sample(6, generator=rng(0, "cpu")), torch.full((6,), low), generator=rng(1, "cpu"))
    want, prior = log_density(data, SMOOTH, low)(x), log_density(data, SMOOTH, high)
    errors = [(ode_log_prob(Hot(SMOOTH), oracle, x, grid(SMOOTH, n, low, high), prior=prior) - want).abs().max().item() for n in (16, 32)]
    assert abs(slope(errors) - 2) < 0.2, errors
    assert errors[-1] < 0.3


def test_likelihood_of_standard_normal_data_is_exact_but_for_rounding_and_the_trapezoid():
    "E[x0|xt] = alpha xt: the flow stands still, the default prior is the law at T, and the integral has a closed form."
    F = Hot(Schedule.linear(20, 0.05, 0.5))
    times, x = list(range(20, 0, -1)), normal(5, 2, device="cpu")
    a, s = F.affine()
    D = lambda xt, t: Dirac(per_row(a[t], xt) * xt)
    got = ode_log_prob(F, D, x, times)
    ratio = s / a
    integral = sum((a[t] ** 2 + a[u] ** 2) / 2 * (ratio[u] / ratio[t]).log() * 2 for t, u in zip(times[1:], times))
    u = x
    for t, s_ in zip(times[::-1], times[-2::-1]):                                     # Heun's steps upwards, written out
        y = u / a[t]
        eps = (u - a[t] ** 2 * u) / s[t]
        ahead = a[s_] * (y + (ratio[s_] - ratio[t]) * eps)
        u = a[s_] * (y + (ratio[s_] - ratio[t]) * (eps + (ahead - a[s_] ** 2 * ahead) / s[s_]) / 2)
    want = -(u**2 + math.log(2 * math.pi)).sum(1) / 2 + 2 * (s[20] / s[1]).log() - integral
    close(got, want, 1e4)
    fine = ode_log_prob(Hot(SMOOTH), lambda xt, t: Dirac(per_row(SMOOTH.alpha[t], xt) * xt), x, grid(SMOOTH, 100, 1000, SMOOTH.T))
    assert (fine + (x**2 + math.log(2 * math.pi)).sum(1) / 2).abs().max() < 0.03


def test_likelihood_with_probes_is_unbiased_and_linear_in_them():
    data, low = DATA["mixture"], 2000
    x = 0.5 * normal(4, 3, device="cpu")
    def run(**more): return ode_log_prob(Hot(SMOOTH), Oracle(data, SMOOTH), x, grid(SMOOTH, 6, low, SMOOTH.T), **more)
    whole = math.sqrt(3) * torch.eye(3, dtype=f64)[:, None].expand(3, 4, 3)            # mean of z zᵀ is I: no noise left
    close(run(probes=whole), run(), 1e5)
    close(ode_log_prob(Hot(SMOOTH), Oracle(data, SMOOTH), x[:1], grid(SMOOTH, 6, low, SMOOTH.T)), run()[:1], 1e5)    # one row
    one = run(probes=whole[:1])
    two = run(probes=whole[1:])
    close((one + 2 * two) / 3, run(), 1e5)


def test_likelihood_tells_the_denoiser_time_condition_and_target():
    seen = []
    def D(xt, t, shift):
        seen.append((int(t[0]), xt.requires_grad, shift))
        return Gaussian(xt / 2 + shift, torch.ones(()))
    x = normal(2, 3, device="cpu").requires_grad_()
    F = Hot(Schedule.linear(10))
    out = ode_log_prob(F, D, x, [10, 4, 1], shift=0.25)
    assert not out.requires_grad and {t for t, *_ in seen} == {1, 4, 10} and all(r and s == 0.25 for _, r, s in seen)
    def N(xt, t, s):
        assert (s == 0).all() and s.dtype == t.dtype
        return Dirac(xt / 2)
    N.needs_s = True
    assert torch.isfinite(ode_log_prob(F, N, x, [10, 4, 1])).all()


# ---------------------------------------------------------------------------------------------------------------- bad input


def still(xt, t): return Dirac(xt)
def likelihood(*times, schedule=Schedule.linear(10)): return ode_log_prob(Hot(schedule), still, torch.zeros(2, 1), times)


CASES = {
    "rho 0": (ValueError, lambda: karras(0.0), "rho > 0", "0.0"),
    "rho below 0": (ValueError, lambda: karras(-1.0), "rho > 0", "-1.0"),
    "rho NaN": (ValueError, lambda: karras(math.nan), "rho > 0", "nan"),
    "Heun for another family": (ValueError, lambda: Heun(still, Other()), "a family x_t = alpha_t x0", "Other"),
    "2M for another family": (ValueError, lambda: DPMSolver2M(still, Other()), "a family x_t = alpha_t x0", "Other"),
    "a likelihood down to the data": (ValueError, lambda: likelihood(10, 5, 0), "sigma > 0 and alpha > 0", "10 to 0"),
    "a likelihood without steps": (ValueError, lambda: likelihood(5, 5), "strictly decreasing", r"\[5, 5\]"),
    "a likelihood from beyond T": (ValueError, lambda: likelihood(11, 3), "between 10 and 0", "11 to 3"),
    "a likelihood from no signal": (
        ValueError, lambda: likelihood(3, 2, 1, schedule=Schedule([1.0, 0.7, 0.5, 0.0])), "sigma > 0 and alpha > 0", "3 to 1"),
}
test_the_message_says_what_was_expected_and_what_came = refuses(CASES)

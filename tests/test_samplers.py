"""Samplers: moments against matrices, wrappers against what they promise, learned variances against the bound, holes that agree."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import close, full, normal, refuses, rng, same_mean, unhooked
from hypothesis import given
from hypothesis import strategies as st
from strategies import runs, schedules, seeds, spans
from torch import nn

from udm_book.elbo import normal_kl, reverse_law
from udm_book.forward import row
from udm_book.hot import Hot, ddim, ddpm, markov_rho
from udm_book.objective import Loss
from udm_book.oracle import Mixture, Oracle
from udm_book.parameterization import EPS, X0, Denoiser, V
from udm_book.posterior import Categorical, Dirac, Gaussian, Laplace
from udm_book.reverse import fresh_noise, reuse_noise, reverse, sample
from udm_book.samplers import Clip, LastMean, LearnedVariance, Threshold, greedy, hybrid_loss, inpaint, invert, output_moments
from udm_book.schedule import Schedule, quadratic

KERNELS = [fresh_noise, reuse_noise, ddim(0.4), ddpm, greedy]
SHORT = Schedule.linear(12, 0.02, 0.4)


def eye(d): return torch.eye(d, dtype=torch.float64)


def spread(d, seed=0):
    a = normal(d, d, seed=seed, device="cpu") / d**0.5
    return a @ a.mT + 0.05 * eye(d)


def gaussian(d, seed=0): return Mixture.gaussian(normal(d, seed=seed + 9, device="cpu"), spread(d, seed))


# --------------------------------------------------------------------------------------------------------------- moments


def by_matrices(F, kernel, mean, cov, times, V, m, C):
    """The recursion with full matrices and no axes: x0_hat = mean + G (xt - alpha mean), V(t) the covariance of the guess."""
    for t, s in zip(times, times[1:]):
        a, b, c = (v.item() for v in kernel.bridge(F, torch.tensor([t]), torch.tensor([s])))
        al, si = F.schedule.alpha[t], F.schedule.sigma[t]
        G = al * cov @ torch.linalg.inv(al**2 * cov + si**2 * eye(len(cov)))
        K = a * G + b * eye(len(cov))
        m = a * (mean - al * G @ mean) + K @ m
        C = K @ C @ K.mT + c**2 * eye(len(cov)) + a**2 * V(t)
    return m, C


@pytest.mark.parametrize("kernel", KERNELS, ids=["fresh", "reuse", "ddim.4", "ddpm", "greedy"])
@pytest.mark.parametrize("times", [[12, 0], [12, 7, 6, 0], [9, 4], list(range(12, -1, -1))], ids=str)
def test_output_moments_are_the_recursion_of_matrices(kernel, times):
    F, data = Hot(SHORT), gaussian(3)
    mean, cov = data.means[0], spread(3)
    v, axes = torch.linspace(0.1, 2, 13, dtype=torch.float64), torch.rand(13, 3, generator=rng(3, "cpu"), dtype=torch.float64)
    start = normal(3, seed=5, device="cpu"), spread(3, 4)
    U = data.basis[0]
    for var, V in [(None, lambda t: 0 * eye(3)), (v, lambda t: v[t] * eye(3)), (axes, lambda t: U @ axes[t].diag() @ U.mT)]:
        got = output_moments(F, kernel, data, times, var, start)
        for x, y in zip(got, by_matrices(F, kernel, mean, cov, times, V, *start)): close(x, y, 1e3)
    plain = output_moments(F, kernel, data, times)
    for x, y in zip(plain, by_matrices(F, kernel, mean, cov, times, lambda t: 0 * eye(3), torch.zeros(3).double(), eye(3))): close(x, y, 1e3)


@given(runs(12), st.sampled_from(KERNELS[:-1]), seeds)
def test_exact_guesses_from_the_true_start_give_the_data(times, kernel, seed):
    F, data = Hot(SHORT), gaussian(2, seed % 1000)
    mean, cov, al, si = data.means[0], spread(2, seed % 1000), SHORT.alpha, SHORT.sigma
    exact = data.var[0] * si[:, None] ** 2 / (al[:, None] ** 2 * data.var[0] + si[:, None] ** 2)
    m, C = output_moments(F, kernel, data, times, exact, (al[-1] * mean, al[-1] ** 2 * cov + si[-1] ** 2 * eye(2)))
    close(m, mean, 1e3)
    close(C, cov, 1e3)


@pytest.mark.parametrize("kernel, times, v", [
    (ddpm, SHORT.times(5), None), (ddim(0.5), SHORT.times(3, quadratic), SHORT.sigma**2), (greedy, SHORT.times(4), None),
    (reuse_noise, SHORT.times(2), SHORT.sigma**2 / 3), (fresh_noise, SHORT.times(12), SHORT.sigma**2)])
def test_the_loop_has_these_moments(kernel, times, v):
    F, data, n = Hot(SHORT), gaussian(3, 7), 20_000
    oracle, g = Oracle(data, SHORT), rng(2, "cpu")
    def denoiser(x, t): return Dirac(oracle(x, t).mean) if v is None else Gaussian(oracle(x, t).mean, row(v[t], x))
    with torch.no_grad(): y = sample(F, denoiser, torch.randn(n, 3, generator=g, dtype=torch.float64), times, kernel, generator=g)
    m, C = output_moments(F, kernel, data, times, v)
    same_mean(y, m[None])
    i, j = torch.triu_indices(3, 3)
    same_mean((y - m)[:, i] * (y - m)[:, j], C[i, j][None])


def test_moments_of_images_keep_the_shape_of_the_mean_and_float32_data_answer_in_float64():
    data = Mixture.gaussian(torch.zeros(1, 2, 2), torch.eye(4))
    m, C = output_moments(Hot(SHORT), ddpm, data, [12, 0], start=(torch.ones(1, 2, 2), torch.eye(4)))
    assert m.shape == (1, 2, 2) and C.shape == (4, 4) and m.dtype == C.dtype == torch.float64
    al = SHORT.alpha[12]                                                           # N(0, I) data: E[x0 | xt] = alpha xt
    close(m, al.expand(1, 2, 2), 10)
    close(C, al**2 * eye(4), 10)


def test_moments_start_from_standard_normal_noise():
    data = Mixture.gaussian(torch.zeros(2), torch.tensor([[1.0, 0.3], [0.3, 0.5]]))                     # about 0, too
    for a, b in zip(output_moments(Hot(SHORT), ddpm, data, [12, 5, 0]), output_moments(Hot(SHORT), ddpm, data, [12, 5, 0], start=(torch.zeros(2), eye(2)))):
        assert a.isfinite().all() and torch.equal(a, b)


# ---------------------------------------------------------------------------------------------------------------- greedy


@given(spans(positive=True), seeds)
def test_greedy_is_the_mean_of_ddpm(span, seed):
    schedule, t, s = span
    F, x0, xt = Hot(schedule), normal(2, 3, seed=seed, device="cpu"), normal(2, 3, seed=seed + 1, device="cpu")
    tt, ss = full(x0, t), full(x0, s)
    assert torch.equal(greedy(F, x0, xt, tt, ss, None), F.step_posterior(x0, xt, tt, ss).mean)
    a, b, c = greedy.bridge(F, tt, ss)
    assert (c == 0).all() and torch.equal(a, ddpm.bridge(F, tt, ss)[0]) and torch.equal(b, ddpm.bridge(F, tt, ss)[1])


@given(runs(12))
def test_greedy_takes_no_random_numbers_and_collapses_standard_normal_data(times):
    F, g, h = Hot(SHORT), rng(0, "cpu"), rng(0, "cpu")
    one = Mixture.gaussian(torch.zeros(1).double(), eye(1))
    def mean(x, t): return Dirac(row(SHORT.alpha[t], x) * x)
    x = normal(4, 1, device="cpu")
    with torch.no_grad(): y = sample(F, mean, x, times, greedy, generator=g)
    *_, slow = reverse(F, mean, x, times, greedy, generator=g)
    assert torch.equal(g.get_state(), h.get_state())
    close(y, SHORT.alpha[12] * x, 100)
    close(slow.xt, y, 100)
    close(output_moments(F, greedy, one, times)[1].squeeze(), SHORT.alpha_bar[12], 100)


# -------------------------------------------------------------------------------------------------------------- wrappers


class Told:
    """A denoiser that wants the target time and a condition, and remembers what it was told."""
    needs_s = True
    def __init__(self): self.heard = []
    def __call__(self, xt, t, s, label=None):
        self.heard.append((t.tolist(), s.tolist(), label))
        return Gaussian(2 * xt, torch.full((1, 1), 0.3, dtype=xt.dtype))


def wide(xt, t): return Gaussian(2 * xt, torch.tensor(0.3, dtype=xt.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_last_mean_drops_the_variance_of_the_rows_that_end(dtype):
    x, t, s = normal(4, 3, dtype=dtype, device="cpu"), torch.tensor([5, 1, 9, 12]), torch.tensor([0, 0, 1, 11])
    told = Told()
    p, q = LastMean(wide)(x, t, s), LastMean(told)(x, t, s, label="c")
    for r in p, q:
        assert torch.equal(r.mean, 2 * x) and r.var.dtype == dtype
        assert torch.equal(r.var.expand(4, 1), torch.tensor([[0.0], [0.0], [0.3], [0.3]], dtype=dtype))
    assert told.heard == [([5, 1, 9, 12], [0, 0, 1, 11], "c")] and LastMean.needs_s
    assert isinstance(LastMean(lambda x, t: Dirac(x))(x, t, s), Dirac)


def test_a_run_with_last_mean_ends_on_the_mean_and_is_the_same_before():
    F, x = Hot(SHORT), normal(3, 2, device="cpu")
    plain, ended = ([f.xt for f in reverse(F, d, x, SHORT.times(4), ddpm, generator=rng(1, "cpu"))] for d in (wide, LastMean(wide)))
    assert all(map(torch.equal, plain[:-1], ended[:-1])) and torch.equal(ended[-1], 2 * ended[-2])


def test_wrappers_are_modules_that_find_their_network_and_pass_on_what_they_are_told():
    x, net = normal(2, 3, device="cpu"), nn.Linear(3, 3)
    for wrap in LastMean, Clip, Threshold:
        told = Told()
        assert not getattr(Clip(wide), "needs_s") and wrap(told).needs_s
        wrap(told)(x, full(x, 3), s=full(x, 2), label=7)
        assert told.heard == [([3, 3], [2, 2], 7)]
        assert len(list(wrap(Denoiser(net, SHORT, X0)).parameters())) == 2


@given(seeds, st.sampled_from([torch.float32, torch.float64]), st.sampled_from([(-1.0, 1.0), (0.0, 2.0), (-0.5, 3.0)]))
def test_clip_is_the_nearest_point_of_the_box_and_keeps_the_rest(seed, dtype, box):
    low, high = box
    m = 3 * normal(4, 2, 3, seed=seed, dtype=dtype, device="cpu")
    p = Clip(lambda x, t: Gaussian(m, m.abs()), low, high)(m, full(m, 1))
    assert torch.equal(p.mean, m.maximum(torch.tensor(low)).minimum(torch.tensor(high))) and torch.equal(p.var, m.abs())
    q = Clip(lambda x, t: Laplace(m, m.abs()), low, high)(m, full(m, 1))
    assert isinstance(q, Laplace) and torch.equal(q.mean, p.mean) and torch.equal(q.scale, m.abs())


def test_clip_has_the_range_of_images_by_default():
    x = torch.tensor([[-3.0, 0.5, 2.0]])
    assert torch.equal(Clip(lambda x, t: Dirac(x))(x, full(x, 1)).mean, torch.tensor([[-1.0, 0.5, 1.0]]))
    assert torch.equal(x, torch.tensor([[-3.0, 0.5, 2.0]]))


@given(seeds, st.floats(0.05, 1), st.floats(0.3, 3))
def test_thresholding_divides_by_the_order_statistic(seed, q, high):
    m = 2 * normal(3, 2, 5, seed=seed, device="cpu")
    got = Threshold(lambda x, t: Dirac(m), q, high)(m, full(m, 1)).mean
    for x, y in zip(m, got):
        ordered = sorted(x.abs().flatten().tolist())
        size = next(v for i, v in enumerate(ordered, 1) if i >= q * 10)             # at least a share q does not exceed it
        close(y, (x / max(1.0, size / high)).clamp(-high, high), 10)


def test_thresholding_by_default_leaves_what_is_in_range():
    m = torch.linspace(-1, 1, 1000)[None]
    assert torch.equal(Threshold(lambda x, t: Dirac(x))(m, full(m, 1)).mean, m)
    m[0, :5] = 7.0                                                                 # five of 1000 are too large: .995 does not see them
    assert torch.equal(Threshold(lambda x, t: Dirac(x))(m, full(m, 1)).mean, m.clamp(-1, 1))
    m[0, :6] = 7.0
    close(Threshold(lambda x, t: Dirac(x))(m, full(m, 1)).mean, m / 7)


# ------------------------------------------------------------------------------------------------------ learned variance


class Two(nn.Module):
    """A network of two halves: given tensors."""
    def __init__(self, y, raw):
        super().__init__()
        self.y, self.raw = nn.Parameter(y), nn.Parameter(raw)
    def forward(self, x, t, shift=0.0): return torch.cat([self.y, self.raw], 1)[: len(x)].to(x.dtype) + shift


def ends(schedule, t, s):
    """beta_tilde (or its stand-in) and beta of the step, as numbers, from the tables alone."""
    ab = schedule.alpha_bar.tolist()
    def pair(t, s):
        beta = 1 - ab[t] / ab[s]
        return beta * (1 - ab[s]) / (1 - ab[t]), beta
    return (pair(t, s) if s else (pair(2, 1)[0], pair(t, s)[1]))


@given(spans(positive=True), st.booleans(), st.floats(0, 1.2), seeds)
def test_the_learned_variance_is_log_linear_between_the_ends_for_any_stride(span, last, nu, seed):
    schedule, t, s = span
    s = 0 if last else s
    x, F = normal(2, 2, 3, seed=seed, device="cpu"), Hot(schedule)
    tt, ss = full(x, t), full(x, s)
    y = normal(2, 2, 3, seed=seed + 1, device="cpu")
    denoiser = LearnedVariance(Two(y, torch.full_like(y, 2 * nu - 1)), schedule, V)
    p = denoiser(x, tt, ss)
    low, high = ends(schedule, t, s)
    kappa = 1 / schedule.sigma[1] ** 2 / (schedule.alpha_bar[s] - schedule.alpha_bar[t]) / schedule.alpha_bar[t] ** 2
    close(reverse_law(F, ddpm, p, x, tt, ss).var, torch.full_like(x, low ** (1 - nu) * high**nu), 10 * kappa)
    close(p.mean, Denoiser(lambda x, t: y, schedule, V)(x, tt).mean, 10)
    assert (p.var >= 0).all()


def test_the_network_is_asked_at_the_present_state_and_time():
    heard, x = [], normal(2, 3, 2, device="cpu")
    def net(x, t, label):
        heard.append((x, t.tolist(), label))
        return torch.cat([x, x], 1)
    LearnedVariance(net, SHORT, EPS)(x, torch.tensor([4, 9]), torch.tensor([2, 0]), label="c")
    assert torch.equal(heard[0][0], x) and heard[0][1:] == ([4, 9], "c")


def test_ends_one_by_one():
    "nu = 0: no variance in the guess (at s = 0: the stand-in); nu = 1: sigma_t²; below 0: none."
    x, t, s = torch.zeros(4, 1, 2).double(), torch.tensor([5, 5, 12, 1]), torch.tensor([4, 0, 3, 0])
    def var(nu): return LearnedVariance(Two(x, torch.full_like(x, 2 * nu - 1)), SHORT, EPS)(x, t, s).var[:, 0, 0]
    floor = SHORT.sigma[1] ** 2 * markov_rho(SHORT, 2, 1) ** 2
    close(var(0.0), torch.stack([0 * floor, floor, 0 * floor, floor]))
    close(var(1.0), SHORT.sigma[t] ** 2, 100)
    assert var(-1.0)[0] == var(-1.0)[2] == 0 and 0 < var(-1.0)[3] < floor


@pytest.mark.parametrize("schedule", [Schedule.linear(1000), Schedule.cosine(1000), Schedule.su(1000)], ids=["linear", "cosine", "su"])
def test_float32_keeps_five_digits_for_every_neighbour(schedule):
    "A naive (Var - beta_tilde) / a² has no digit left at t = T."
    t = torch.arange(1, 1001)
    raw = torch.zeros(1000, 1, 1).double()
    learned = LearnedVariance(Two(raw, raw), schedule, V)
    for s in t - 1, t // 2:
        got, want = learned(raw.float(), t, s).var, learned(raw, t, s).var
        assert got.dtype == torch.float32 and ((got / want - 1).abs() < 1e-4).all()


@given(seeds, st.integers(1, 12), st.data())
def test_the_bound_is_the_kl_of_the_elbo_chapter(seed, t, data):
    s = data.draw(st.integers(0, t - 1))
    F, x0, xt = Hot(SHORT), normal(3, 2, 2, seed=seed, device="cpu"), normal(3, 2, 2, seed=seed + 1, device="cpu")
    raw = normal(3, 2, 2, seed=seed + 2, device="cpu").sigmoid() * 2 - 1
    learned, tt, ss = LearnedVariance(Two(0.3 * x0, raw), SHORT, X0), full(x0, t), full(x0, s)
    p = reverse_law(F, ddpm, learned(xt, tt, ss), xt, tt, ss)
    q = F.step_posterior(x0, xt, tt, ss)
    want = normal_kl(q.mean, q.var, p.mean, p.var) if s else p.nll(x0)
    got = learned.bound((0.7 * x0).square(), raw / 2 + 0.5, tt, ss).flatten(1).sum(1)
    close(got, want, 100 * (1 + want.abs()) / SHORT.sigma[1] ** 4)


def test_the_bound_is_least_where_the_guess_has_the_variance_of_its_error():
    "On a fine grid of nu, from far below to far above the ends."
    t, s, error = torch.tensor([7, 12, 3, 1]), torch.tensor([6, 4, 0, 0]), 0.02
    nu = torch.linspace(-1, 2, 30_001, dtype=torch.float64).expand(4, 1, -1)
    y = torch.zeros(4, 1, 1).double()
    best = nu.gather(-1, LearnedVariance(nn.Identity(), SHORT, EPS).bound(error + 0 * nu, nu, t, s).argmin(-1, keepdim=True))
    def var(nu): return LearnedVariance(Two(y, 2 * nu - 1), SHORT, EPS)(y, t, s).var
    assert (var(best - 1e-4) < error).all() and (var(best + 1e-4) > error).all()


def test_gradients_flow_through_the_guess_too():
    "So that the bound can be trained as a whole: the gradient of a KL through the posterior is that of `bound`."
    F, x0, xt, t = Hot(SHORT), normal(2, 1, 3, seed=1, device="cpu"), normal(2, 1, 3, seed=2, device="cpu"), torch.tensor([5, 5])
    net = Two(normal(2, 1, 3, seed=3, device="cpu"), 0.5 * normal(2, 1, 3, seed=4, device="cpu").tanh())
    learned = LearnedVariance(net, SHORT, EPS)
    for s in torch.tensor([2, 2]), torch.tensor([0, 0]):
        p = reverse_law(F, ddpm, learned(xt, t, s), xt, t, s)
        q = F.step_posterior(x0, xt, t, s)
        whole = normal_kl(q.mean, q.var, p.mean, p.var) if s[0] else p.nll(x0)
        y, nu = learned.heads(xt, t)
        parts = learned.bound((x0 - learned.centre(xt, t, y)).square(), nu, t, s)
        for a, b in zip(*(torch.autograd.grad(v.sum(), (net.y, net.raw)) for v in (whole, parts))): close(a, b, 1e3 * (1 + b.abs()))


def test_hybrid_loss_is_two_parts_and_the_second_leaves_the_mean_alone():
    F, x0 = Hot(SHORT), normal(5, 2, 3, seed=1, device="cpu")
    net = Two(normal(5, 2, 3, seed=2, device="cpu"), 0.5 * normal(5, 2, 3, seed=3, device="cpu"))
    learned, t, s = LearnedVariance(net, SHORT, V), torch.tensor([1, 2, 7, 12, 9]), torch.tensor([0, 0, 3, 11, 8])
    eps = torch.randn(x0.shape, generator=rng(4, "cpu"), dtype=torch.float64)
    xt = F(x0, t, eps)
    simple = (net.y - learned.target(x0, eps, t)).square().mean((1, 2))
    bound = learned.bound((x0 - learned(xt, t, s).mean).square(), net.raw / 2 + 0.5, t, s).mean((1, 2))
    for weight in 0.0, 2.5, None:
        got = hybrid_loss(F, learned, x0, t, s=s, weight=weight, generator=rng(4, "cpu"))
        close(got, simple + (0.012 if weight is None else weight) * bound, 100 * (1 + bound.abs()))
        grads = torch.autograd.grad(got.sum(), (net.y, net.raw))
        close(grads[0], torch.autograd.grad(simple.sum(), net.y, retain_graph=True)[0], 100)
        assert (grads[1].abs().sum() > 0) == (weight != 0)
    neighbours = hybrid_loss(F, learned, x0, t, generator=rng(4, "cpu"))
    objective = Loss(F, learned, hybrid_loss, times=lambda F, n, generator: (t, torch.ones(n)))
    assert torch.equal(neighbours, objective(x0, objective.draw(x0, rng(4, "cpu"))))
    close(neighbours, hybrid_loss(F, learned, x0, t, s=t - 1, generator=rng(4, "cpu")))


def test_hybrid_loss_draws_times_from_1_to_T_and_passes_conditions_on():
    seen = []
    def net(x, t, label):
        seen.append((t, label, x))
        return torch.cat([x, x], 1)
    x0 = normal(400, 1, 1, device="cpu")
    loss = hybrid_loss(Hot(SHORT), LearnedVariance(net, SHORT, EPS), x0, generator=rng(1, "cpu"), label="a")
    again = hybrid_loss(Hot(SHORT), LearnedVariance(net, SHORT, EPS), x0, generator=rng(1, "cpu"), label="a")
    assert torch.equal(loss, again) and loss.shape == (400,)
    t, label, x = seen[0]
    assert set(t.tolist()) == set(range(1, 13)) and label == "a"
    g = rng(1, "cpu")
    assert torch.equal(t, torch.randint(1, 13, (400,), generator=g))
    close(x, Hot(SHORT)(x0, t, torch.randn(x0.shape, generator=g, dtype=x0.dtype)), 10)      # the network sees xt, not x0



# ------------------------------------------------------------------------------------------------------------- inversion


@given(schedules(max_T=12).filter(lambda c: c.alpha[-1] > 0), st.data(), seeds)
def test_with_the_true_noise_inversion_goes_up_the_path(schedule, data, seed):
    "Both from the data and from a state on the way."
    times = data.draw(runs(schedule.T))
    x0, eps = normal(2, 3, seed=seed, device="cpu"), normal(2, 3, seed=seed + 1, device="cpu")
    F, denoiser = Hot(schedule), Denoiser(lambda x, t: eps, schedule, EPS)
    def path(t): return schedule.alpha[t] * x0 + schedule.sigma[t] * eps
    kappa = 100 / schedule.sigma[1] ** 2 / schedule.alpha[-1]
    close(invert(F, denoiser, x0, times), path(schedule.T), kappa)
    if len(times) > 2: close(invert(F, denoiser, path(times[-2]), times[:-1]), path(schedule.T), kappa)


def test_inversion_asks_where_it_stands_and_goes_up_with_what_it_hears():
    F, x0, told = Hot(SHORT), normal(2, 1, device="cpu"), Told()
    assert torch.isfinite(invert(F, told, x0, [12, 7, 3, 0], label="k")).all()
    assert [(t[0], s[0], k) for t, s, k in told.heard] == [(3, 2, "k"), (3, 2, "k"), (7, 6, "k")]
    a, b = SHORT.alpha, SHORT.sigma
    def mean(x, t): return Dirac(x.tanh())
    def noise(x, t): return (x - a[t] * x.tanh()) / b[t]
    x = a[3] * x0 + b[3] * noise(a[3] * x0, 3)
    x = a[7] * x.tanh() + b[7] * noise(x, 3)
    x = a[12] * x.tanh() + b[12] * noise(x, 7)
    close(invert(F, mean, x0, [12, 7, 3, 0]), x, 100)


def test_round_trips_get_better_with_steps():
    schedule, data = Schedule.linear(200, 1e-3, 0.05), gaussian(2)
    oracle, x0 = Oracle(data, schedule), data.sample(50, generator=rng(0, "cpu"))
    def mean(x, t): return Dirac(oracle(x, t).mean)
    lost = []
    for n in 10, 100:
        z = invert(Hot(schedule), mean, x0, schedule.times(n))
        lost.append((sample(Hot(schedule), mean, z, schedule.times(n), reuse_noise) - x0).square().mean().sqrt())
    assert lost[1] < lost[0] / 5                                                   # first order


# ------------------------------------------------------------------------------------------------------------ inpainting


def by_hand(known, mask, times, resample, g):
    """The procedure written out with the tables, random numbers in the same order."""
    a, b = SHORT.alpha, SHORT.sigma
    def draw(): return torch.randn(known.shape, generator=g, dtype=known.dtype)
    x = draw()
    for t, s in zip(times, times[1:]):
        for again in range(resample, 0, -1):
            guess = x.tanh()
            if s:
                q = Hot(SHORT).step_posterior(guess, x, full(x, t), full(x, s))
                new = q.mean + q.var.sqrt() * draw()
            else: new = guess
            x = torch.where(mask, a[s] * known + b[s] * draw(), new)
            if again > 1: x = a[t] / a[s] * x + (1 - (a[t] / a[s]) ** 2).sqrt() * draw()
    return x


@pytest.mark.parametrize("resample", [1, 2, 4])
@pytest.mark.parametrize("times", [[12, 0], [12, 5, 1, 0], [9, 4]], ids=str)
def test_inpainting_line_by_line(times, resample):
    known, mask = normal(3, 2, 2, seed=1, device="cpu"), torch.tensor([[True, False], [False, False]])
    got = inpaint(Hot(SHORT), lambda x, t: Dirac(x.tanh()), known, mask, times, ddpm, resample=resample, generator=rng(6, "cpu"))
    close(got, by_hand(known, mask, times, resample, rng(6, "cpu")), 1e4)
    assert (times[-1] == 0) == torch.equal(got[:, 0, 0], known[:, 0, 0])


def test_inpainting_calls_the_network_once_a_round_and_knows_its_default():
    told, known = Told(), torch.ones(2, 3)
    mask = torch.tensor([True, True, False])
    y = inpaint(Hot(SHORT), told, known, mask, [12, 4, 0], ddpm, resample=3, generator=rng(0, "cpu"), label=1)
    assert [(t[0], s[0], k) for t, s, k in told.heard] == [(12, 4, 1)] * 3 + [(4, 0, 1)] * 3
    assert torch.equal(y[:, :2], known[:, :2]) and y.shape == known.shape
    def mean(x, t): return Dirac(x.tanh())
    once, default = (inpaint(Hot(SHORT), mean, known, mask, [12, 4, 0], ddpm, generator=rng(0, "cpu"), **kw) for kw in (dict(resample=1), {}))
    assert torch.equal(once, default)


def test_known_pixels_have_the_law_of_their_time_whenever_the_network_looks():
    "Variance sigma_s² after a step to s, and again q(x_t | known) after going back up."
    states, n = [], 20_000
    def denoiser(x, t):
        states.append((t[0].item(), x[:, 0]))
        return Gaussian(0.5 * x, torch.tensor(0.2).double())
    known = torch.full((n, 2), 0.8, dtype=torch.float64)
    inpaint(Hot(SHORT), denoiser, known, torch.tensor([True, False]), [12, 6, 2, 0], ddpm, resample=2, generator=rng(0, "cpu"))
    assert [t for t, _ in states] == [12, 12, 6, 6, 2, 2]
    for t, x in states[1:]:
        m, v = 0.8 * SHORT.alpha[t], SHORT.sigma[t] ** 2
        same_mean(x[:, None], m[None, None])
        same_mean((x - m).square()[:, None], v[None, None])


def test_a_hole_whose_neighbour_says_nothing_is_filled_exactly():
    "Independent coordinates and exact guesses: the law of the data, in any number of steps."
    data = Mixture.gaussian(torch.tensor([0.3, -0.5]).double(), torch.diag(torch.tensor([1.0, 0.4]).double()))
    schedule = Schedule([1.0, 0.7, 0.3, 0.05, 0.0])                                # ends without signal: the start is true
    known = torch.full((20_000, 2), 1.7, dtype=torch.float64)
    for resample in 1, 3:
        y = inpaint(Hot(schedule), Oracle(data, schedule), known, torch.tensor([True, False]), [4, 2, 0], ddpm, resample=resample, generator=rng(1, "cpu"))
        same_mean(y[:, 1:], torch.tensor([[-0.5]]).double())
        same_mean((y[:, 1:] + 0.5).square(), torch.tensor([[0.4]]).double())


# -------------------------------------------------------------------------------------------------------------- compiled

WHOLE = """
import torch
from udm_book.hot import Hot
from udm_book.parameterization import EPS
from udm_book.posterior import Dirac
from udm_book.samplers import Clip, LastMean, LearnedVariance, Threshold, greedy
from udm_book.schedule import Schedule
F = Hot(Schedule.linear(12, 0.02, 0.4))
net, x = torch.nn.Conv1d(2, 4, 1).double(), torch.randn(4, 2, 3).double()
t, s = torch.tensor([3, 5, 9, 1]), torch.tensor([2, 0, 4, 0])
learned = LearnedVariance(lambda x, t: net(x), F.schedule, EPS)
ended, shrunk = LastMean(Clip(learned)), Threshold(lambda x, t: Dirac(net(x)[:, :2]), 0.9)
def everything(x, t, s):
    p = ended(x, t, s=s)
    return p.mean, p.var, shrunk(x, t).mean, greedy(F, p.mean, x, t, s, None), learned.bound(x, x, t, s)
compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")(x, t, s)
for a, b in zip(compiled, everything(x, t, s)): assert ((a - b).abs() <= 1e-12 * (1 + b.abs())).all()
"""


@pytest.mark.slow
def test_wrappers_compile_whole_and_equal_eager():
    "In a process without type checks, which torch.compile cannot see through where there are **conditions."
    out = subprocess.run([sys.executable, "-c", WHOLE], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert out.returncode == 0, out.stderr[-3000:]


def test_learned_variances_want_the_target_time_and_two_steps():
    assert LearnedVariance(nn.Identity(), Schedule([1.0, 0.5, 0.1]), EPS).needs_s


# ---------------------------------------------------------------------------------------------------------------- bad input

V_, T_ = ValueError, TypeError
X, TWO, FSHORT = torch.zeros(2, 2, 3), torch.tensor([1, 2]), Hot(SHORT)
LEARNED = LearnedVariance(lambda x, t: torch.cat([x, x], 1), SHORT, EPS)


def moments(kernel=ddpm, data=gaussian(2), times=(12, 0), **kw): return output_moments(FSHORT, kernel, data, times, **kw)


CASES = {
    "moments of several components": (V_, lambda: moments(data=Mixture.points(eye(2))), "one component", "2"),
    "moments of a function": (V_, lambda: moments(lambda *a: a), "steps a x0", "function.* on Hot"),
    "variances for too few times": (V_, lambda: moments(var=torch.zeros(12)), r"\(13,\) or \(13, 2\)", r"\(12,\)"),
    "variances for too many axes": (V_, lambda: moments(var=torch.zeros(13, 3)), r"\(13,\) or \(13, 2\)", r"\(13, 3\)"),
    "moments of a run upwards": (V_, lambda: moments(times=[3, 5]), "strictly decreasing", r"\[3, 5\]"),
    "a last mean of Laplace": (T_, lambda: LastMean(lambda x, t: Laplace(x, x.abs()))(X, TWO, TWO - 1), "a Dirac or Gaussian", "Laplace"),
    "an empty box": (V_, lambda: Clip(wide, 1.0, 1.0), "low < high", "1.0 and 1.0"),
    "a box upside down": (V_, lambda: Clip(wide, 2.0, -1.0), "low < high", "2.0 and -1.0"),
    "clipped tokens": (T_, lambda: Clip(lambda x, t: Categorical(torch.zeros(2, 3, 2)))(X, TWO), "Laplace to clip", "Categorical"),
    "quantile 0": (V_, lambda: Threshold(wide, 0.0), r"quantile in \(0, 1\]", "0.0"),
    "quantile above 1": (V_, lambda: Threshold(wide, 1.5), r"quantile in \(0, 1\]", "1.5"),
    "a learned variance of one step": (V_, lambda: LearnedVariance(nn.Identity(), Schedule([1.0, 0.5]), EPS), "T >= 2", "T = 1"),
    "a network without a second half": (
        V_, lambda: LearnedVariance(lambda x, t: x, SHORT, EPS)(X, TWO, TWO - 1), r"twice the channels of xt from the network, \(2, 4, 3\)", r"\(2, 2, 3\)"),
    "a loss at time 0": (V_, lambda: hybrid_loss(FSHORT, LEARNED, X, TWO - 1), "times in 1..12", "0 to 1"),
    "a loss beyond T": (V_, lambda: hybrid_loss(FSHORT, LEARNED, X, TWO + 11), "times in 1..12", "12 to 13"),
    "a loss at one time for two rows": (V_, lambda: hybrid_loss(FSHORT, LEARNED, X, TWO[:1]), "one time per row", r"\(1,\)"),
    "an inversion downwards": (V_, lambda: invert(FSHORT, wide, X, [0, 3, 12]), "strictly decreasing", r"\[0, 3, 12\]"),
    "no round": (V_, lambda: inpaint(FSHORT, wide, X, X > 0, [12, 0], ddpm, resample=0), "resample >= 1", "0"),
}
test_the_message_says_what_was_expected_and_what_came = refuses(CASES)

"""The estimators of the objective against normal densities written out, the bound, and each other."""
import pytest
import torch
from conftest import close, full, normal, per_row, refuses, rng, same_mean, unhooked
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch.distributions import Normal, kl_divergence

from udm_book.elbo import elbo
from udm_book.estimators import (one_noise_loss, pair, pair_loss, path_loss, rotate, single_loss, step_entropy,
                                 two_noise_loss)
from udm_book.hot import Hot
from udm_book.objective import Loss, network_loss
from udm_book.parameterization import EPS, ONE_STEP, Denoiser
from udm_book.posterior import Dirac, Gaussian
from udm_book.schedule import Schedule

SCHEDULE = Schedule.linear(8, 0.05, 0.6)
betas = st.lists(st.floats(0.02, 0.6), min_size=1, max_size=8)
shapes = st.sampled_from([(3, 1), (1, 2), (2, 1, 2, 2)])
LOSSES = [path_loss, pair_loss, single_loss]
NOISE = [two_noise_loss, one_noise_loss]
SIZE = 1e4          # how much a formula below may amplify: 1 / (β σ²) with β >= 0.02, squared errors below 100


def net(x, t, shift=0.0): return torch.sin(x) + per_row(t.to(x.dtype), x) / 8 + shift


def guess(x, t, shift=0.0): return Gaussian(net(x, t, shift), 0.3 + per_row(t.to(x.dtype), x) / 10)


class Chain:
    """Everything from the betas alone, for one time t, in Ho's letters."""
    def __init__(self, betas, t):
        b = torch.tensor([0.0, *betas], dtype=torch.float64)
        self.bar, self.beta, self.t = (1 - b).cumprod(0), b, t

    def states(self, x0, earlier, step):
        xs = self.bar[self.t - 1].sqrt() * x0 + (1 - self.bar[self.t - 1]).sqrt() * earlier
        return xs, (1 - self.beta[self.t]).sqrt() * xs + self.beta[self.t].sqrt() * step

    def bayes(self, x0, xt):
        "Ho equations 6 and 7."
        t, bar, beta = self.t, self.bar, self.beta
        a, b = bar[t - 1].sqrt() * beta[t] / (1 - bar[t]), (1 - beta[t]).sqrt() * (1 - bar[t - 1]) / (1 - bar[t])
        return a * x0 + b * xt, (1 - bar[t - 1]) / (1 - bar[t]) * beta[t], a

    def model(self, xt):
        "The law of x_{t-1} for the denoiser `guess`."
        g = guess(xt, full(xt, self.t))
        mean, var, a = self.bayes(g.mean, xt)
        return Normal(mean, (var + a**2 * g.var).sqrt().expand_as(mean))


def rows(x): return x.flatten(1).sum(1)


# ------------------------------------------------------------------------------------------------ three estimators of -J


@given(betas, seeds, shapes)
def test_path_is_minus_the_sum_of_log_densities(betas, seed, shape):
    F, T = Hot(Schedule.from_betas(betas)), len(betas)
    x0, noise = normal(*shape, seed=seed, device="cpu"), normal(T, *shape, seed=seed + 1, device="cpu")
    x, want = x0, torch.zeros(shape[0], dtype=torch.float64)
    for t in range(1, T + 1):
        xt = (1 - betas[t - 1]) ** 0.5 * x + betas[t - 1] ** 0.5 * noise[t - 1]
        want, x = want - rows(Chain(betas, t).model(xt).log_prob(x)), xt
    close(path_loss(F, guess, x0, noise=noise), want, T * SIZE)


@given(betas, seeds, shapes)
def test_pair_is_minus_T_log_densities(betas, seed, shape):
    F, T, t = Hot(Schedule.from_betas(betas)), len(betas), 1 + seed % len(betas)
    x0, noise = normal(*shape, seed=seed, device="cpu"), normal(2, *shape, seed=seed + 1, device="cpu")
    xs, xt = Chain(betas, t).states(x0, *noise)
    for got, want in zip(pair(F, x0, full(x0, t), noise, None), (xs, xt, noise[1])): close(got, want, SIZE)
    close(pair_loss(F, guess, x0, full(x0, t), noise=noise), -T * rows(Chain(betas, t).model(xt).log_prob(xs)), T * SIZE)


@given(betas, seeds, shapes)
def test_single_is_the_divergence_plus_the_entropy_and_a_likelihood_at_1(betas, seed, shape):
    F, T, t = Hot(Schedule.from_betas(betas)), len(betas), 1 + seed % len(betas)
    x0, noise = normal(*shape, seed=seed, device="cpu"), normal(*shape, seed=seed + 1, device="cpu")
    chain, tt = Chain(betas, t), full(x0, t)
    xt = chain.bar[t].sqrt() * x0 + (1 - chain.bar[t]).sqrt() * noise
    p, (mean, var, _) = chain.model(xt), chain.bayes(x0, xt)
    got, entropy = single_loss(F, guess, x0, tt, eps=noise), step_entropy(F, x0, tt)
    if t == 1:
        close(got, -T * rows(p.log_prob(x0)), T * SIZE)
        assert torch.equal(entropy, torch.zeros(shape[0], dtype=torch.float64))
    else:
        q = Normal(mean, var.sqrt().expand_as(mean))
        close(entropy, rows(q.entropy()), SIZE)
        close(got, T * rows(kl_divergence(q, p) + q.entropy()), T * SIZE)


@given(betas, seeds, shapes)
def test_averages_over_the_hidden_noise(betas, seed, shape):
    "Rao and Blackwell: pair -> single and two noises -> one noise, by a 3-point rule that is exact for squares."
    F, t = Hot(Schedule.from_betas(betas)), 1 + seed % len(betas)
    x0, eps = normal(*shape, seed=seed, device="cpu"), normal(*shape, seed=seed + 1, device="cpu")
    tt, likelihood, square = full(x0, t), 0.0, 0.0
    for node, weight in (-3**0.5, 1 / 6), (0.0, 2 / 3), (3**0.5, 1 / 6):
        noise = torch.stack(rotate(F, tt, eps, torch.full_like(eps, node)))
        likelihood = likelihood + weight * pair_loss(F, guess, x0, tt, noise=noise)
        square = square + weight * two_noise_loss(F, net, x0, tt, noise=noise)
    close(single_loss(F, guess, x0, tt, eps=eps), likelihood, len(betas) * SIZE)
    rho2 = F.schedule.beta[t] / F.schedule.sigma[t] ** 2
    close(rho2 * one_noise_loss(F, net, x0, tt, eps=eps) + x0[0].numel() * (1 - rho2), square, SIZE)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_mean_is_the_bound_plus_the_entropies(loss):
    F, x0 = Hot(SCHEDULE), normal(1, 2, device="cpu").expand(20_000, 2)
    terms = elbo(F, guess, x0, generator=rng(1, "cpu"))
    bound = terms.total - terms.prior + sum(step_entropy(F, x0, full(x0, t)) for t in range(1, 9))
    same_mean(loss(F, guess, x0, generator=rng(2, "cpu"))[:, None], bound[:, None])


def test_variances_fall_where_noise_is_averaged_out():
    F, x0 = Hot(SCHEDULE), normal(20_000, 1, device="cpu") / 2
    t = torch.randint(1, 9, (20_000,), generator=rng(0, "cpu"))
    rho2 = (SCHEDULE.beta / SCHEDULE.sigma**2)[t]
    two, one = (f(F, net, x0, t, generator=rng(3, "cpu")) for f in NOISE)
    many, few = (f(F, guess, x0, t, generator=rng(3, "cpu")) for f in (pair_loss, single_loss))
    assert (rho2 * one + 1 - rho2).var() < 0.8 * two.var() and few.var() < 0.8 * many.var()


# ------------------------------------------------------------------------------------------------------ Su's two losses


@given(betas, seeds, shapes)
def test_su_equations_11_and_15(betas, seed, shape):
    F, t = Hot(Schedule.from_betas(betas)), 1 + seed % len(betas)
    x0, eps = normal(*shape, seed=seed, device="cpu"), normal(*shape, seed=seed + 1, device="cpu")
    noise, tt = normal(2, *shape, seed=seed + 2, device="cpu"), full(x0, t)
    b = torch.tensor(betas, dtype=torch.float64).sqrt()                              # Su's letters from here on
    alpha, bar = (1 - b**2).sqrt(), torch.cat([b.new_ones(1), (1 - b**2).sqrt().cumprod(0)])
    bar_beta = (1 - bar**2).sqrt()
    xt = bar[t] * x0 + alpha[t - 1] * bar_beta[t - 1] * noise[0] + b[t - 1] * noise[1]
    close(two_noise_loss(F, net, x0, tt, noise=noise), rows((noise[1] - net(xt, tt)) ** 2), SIZE)
    ratio = bar_beta[t] / b[t - 1]
    close(one_noise_loss(F, net, x0, tt, eps=eps), rows((eps - ratio * net(bar[t] * x0 + bar_beta[t] * eps, tt)) ** 2), SIZE)


@given(betas, seeds, shapes)
def test_the_reflection(betas, seed, shape):
    F, t = Hot(Schedule.from_betas(betas)), 1 + seed % len(betas)
    x0, noise = normal(*shape, seed=seed, device="cpu"), normal(2, *shape, seed=seed + 1, device="cpu")
    tt = full(x0, t)
    eps, omega = rotate(F, tt, *noise)
    for again, was in zip(rotate(F, tt, eps, omega), noise): close(again, was, SIZE)
    close(eps**2 + omega**2, noise[0] ** 2 + noise[1] ** 2, SIZE)
    xs, xt, _ = pair(F, x0, tt, noise, None)
    close(F(x0, tt, eps), xt, SIZE)                                                  # ε is the total noise
    mean, var, _ = Chain(betas, t).bayes(x0, xt)
    close(mean + var.sqrt() * omega, xs, SIZE)                                       # ω is the noise of Bayes' bridge
    if t == 1: assert torch.equal(eps, noise[1]) and torch.equal(omega, noise[0])


def test_the_losses_of_the_library_are_these():
    "Su's network is ONE_STEP; divided by ρ it is Ho's."
    F, x0, t = Hot(SCHEDULE), normal(8, 3, device="cpu"), torch.arange(1, 9)
    rho = SCHEDULE.beta[1:].sqrt() / SCHEDULE.sigma[1:]
    ours = one_noise_loss(F, net, x0, t, generator=rng(4, "cpu"))
    one_step = network_loss(F, Denoiser(net, SCHEDULE, ONE_STEP), x0, t, generator=rng(4, "cpu"))
    total = network_loss(F, Denoiser(lambda x, t: net(x, t) / per_row(rho[t - 1], x), SCHEDULE, EPS), x0, t,
                         generator=rng(4, "cpu"))
    close(ours, 3 * total, SIZE)
    close(rho**2 * ours, 3 * one_step, SIZE)


# --------------------------------------------------------------------------------------- times, noise, types, conditions


@pytest.mark.parametrize("loss", LOSSES + NOISE)
def test_everything_is_drawn_from_the_generator(loss):
    F, x0, state = Hot(SCHEDULE), normal(6, 2, device="cpu"), torch.get_rng_state()
    f = net if loss in NOISE else guess
    g = rng(5, "cpu")
    t = {} if loss is path_loss else {"t": torch.randint(1, 9, (6,), generator=g)}
    n = 8 if loss is path_loss else 2 if loss in (pair_loss, two_noise_loss) else 1
    noise = torch.stack([torch.randn(6, 2, generator=g, dtype=torch.float64) for _ in range(n)])
    def drawn(noise): return {"eps" if loss in (single_loss, one_noise_loss) else "noise": noise}
    want = loss(F, f, x0, **t, **drawn(noise if n > 1 else noise[0]))
    assert torch.equal(loss(F, f, x0, generator=rng(5, "cpu")), want)
    assert torch.equal(state, torch.get_rng_state()) and want.shape == (6,)


@pytest.mark.parametrize("loss", [pair_loss, single_loss, *NOISE])
def test_times_are_uniform_from_1_to_T(loss):
    seen = []
    def watch(x, t):
        seen.append(t)
        return net(x, t) if loss in NOISE else guess(x, t)
    loss(Hot(SCHEDULE), watch, torch.zeros(20_000, 1), generator=rng(0, "cpu"))
    same_mean(torch.nn.functional.one_hot(seen[0], 10).double(), torch.tensor([0.0] + 8 * [1 / 8] + [0.0]).double())


@pytest.mark.parametrize("loss", [single_loss, one_noise_loss])
def test_losses_of_one_noise_are_objectives(loss):
    F, x0, f = Hot(SCHEDULE), normal(6, 2, device="cpu"), net if loss is one_noise_loss else guess
    with unhooked():                                                                # `net` is a function, not a module
        objective = Loss(F, f, loss)
        t, weight, eps = draws = objective.draw(x0, rng(5, "cpu"))
        assert torch.equal(objective(x0, draws), loss(F, f, x0, t, eps=eps)) and (weight == 1).all()


@pytest.mark.parametrize("loss", LOSSES + NOISE)
def test_float32_types_conditions_and_gradients(loss):
    F, x0 = Hot(SCHEDULE), normal(5, 1, 2, 2, device="cpu")
    f, shape = net if loss in NOISE else guess, (8, *x0.shape) if loss is path_loss else (2, *x0.shape)
    noise = normal(*shape, seed=9, device="cpu")
    noise = noise if loss in (path_loss, pair_loss, two_noise_loss) else noise[0]
    def drawn(noise): return {"eps" if loss in (single_loss, one_noise_loss) else "noise": noise}
    t = {} if loss is path_loss else {"t": torch.tensor([1, 2, 4, 7, 8])}
    wide, narrow = loss(F, f, x0, **t, **drawn(noise)), loss(F, f, x0.float(), **t, **drawn(noise.float()))
    assert narrow.dtype == torch.float32
    close(narrow, wide, 8 * SIZE, dtype=torch.float32)
    shift = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    moved = loss(F, f, x0, **t, **drawn(noise), shift=shift)
    assert (moved != wide).all() and torch.autograd.grad(moved.sum(), shift)[0] != 0
    assert step_entropy(F, x0.float(), torch.tensor([1, 2, 4, 7, 8])).dtype == torch.float32


def test_a_denoiser_that_asks_is_told_the_target_time():
    class Asks:
        needs_s = True
        def __call__(self, x, t, s):
            assert torch.equal(s, t - 1)
            return guess(x, t)
    for loss in LOSSES: loss(Hot(SCHEDULE), Asks(), normal(4, 2, device="cpu"))


# -------------------------------------------------------------------------------------------------------------- refusals


F8, DATA, V = Hot(SCHEDULE), torch.zeros(3, 2), ValueError


def point(x, t): return Dirac(x)
def at(*t): return torch.tensor(t)


CASES = {
    "a point guess on a path": (V, lambda: path_loss(F8, point, DATA), "variance at t = 1", "a step of variance 0"),
    "a point guess for a pair": (V, lambda: pair_loss(F8, point, DATA, at(3, 1, 2)), "variance at t = 1", "a step of variance 0"),
    "a point guess for one state": (V, lambda: single_loss(F8, point, DATA, at(1, 2, 2)), "variance at t = 1", "a step of variance 0"),
    "a path with too few noises": (
        V, lambda: path_loss(F8, guess, DATA, noise=DATA[None]), r"8 noises shaped as x0, \(8, 3, 2\)", r"\(1, 3, 2\)"),
    "one noise for a pair": (
        V, lambda: pair_loss(F8, guess, DATA, noise=DATA[None]), r"2 noises shaped as x0, \(2, 3, 2\)", r"\(1, 3, 2\)"),
    "two noises of another shape": (
        V, lambda: two_noise_loss(F8, net, DATA, noise=torch.zeros(2, 3, 1)), r"2 noises shaped as x0, \(2, 3, 2\)", r"\(2, 3, 1\)"),
    "a noise that would broadcast": (
        V, lambda: single_loss(F8, guess, DATA, eps=DATA[:, :1]), r"eps shaped as x0, \(3, 2\)", r"\(3, 1\)"),
    "a noise that would broadcast for Su": (
        V, lambda: one_noise_loss(F8, net, DATA, eps=DATA[:, :1]), r"eps shaped as x0, \(3, 2\)", r"\(3, 1\)"),
} | {
    f"{loss.__name__} at {what}": (V, lambda loss=loss, t=t: loss(F8, net if loss in NOISE else guess, DATA, t), expected, came)
    for loss in (pair_loss, single_loss, *NOISE)
    for what, t, expected, came in [
        ("time 0", at(0, 1, 2), r"times in 1\.\.8", "from 0 to 2"), ("time 9", at(1, 2, 9), r"times in 1\.\.8", "from 1 to 9"),
        ("too few times", at(1, 2), r"one time per row of x0, t of shape \(3,\)", r"\(2,\)")]
}
test_refusals = refuses(CASES)


def test_a_point_guess_will_do_at_later_times():
    for loss in pair_loss, single_loss: assert torch.isfinite(loss(F8, point, DATA, at(2, 3, 8))).all()

"""Exact posteriors of mixture data against quadrature, torch.distributions, Bayes and autograd."""
import pytest
import torch
from conftest import close, full, normal, rng, same_mean
from families import mixture, moments, quarters, spread
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from udm_book.oracle import Mixture, Oracle
from udm_book.schedule import Schedule

SCHEDULE = Schedule.linear(10, 0.05, 0.5)
times = st.integers(1, 10)
DATA = {"normal": mixture(1, 3, seed=1).cpu(), "mixture": mixture(3, 3, seed=2).cpu(), "images": mixture(2, 1, 2, 2, seed=3).cpu()}
each = pytest.mark.parametrize("data", DATA.values(), ids=DATA)


def reference(data, t=0):
    "The law of x_t by torch.distributions, covariances put together again from their eigenvalues."
    a, s = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    cov = data.basis @ data.var.diag_embed() @ data.basis.mT
    eye = torch.eye(cov.shape[-1], dtype=torch.float64)
    return MixtureSameFamily(Categorical(logits=data.log_weights), MultivariateNormal(a * data.means, a**2 * cov + s**2 * eye))


def states(data, seed, t=10, n=5):
    x = 2 * normal(n, *data.shape, seed=seed, device="cpu")
    return x, full(x, t)


@each
@given(seed=seeds, t=times)
def test_densities_are_those_of_torch(data, seed, t):
    x, tt = states(data, seed, t)
    for got, want in [(Oracle(data, SCHEDULE).log_prob(x, tt), reference(data, t).log_prob(x.flatten(1))),
                      (data.log_prob(x), reference(data).log_prob(x.flatten(1)))]:
        close(got, want, (10 + want.abs()) / 0.05)                       # the smallest variance is 0.05


@each
@given(seed=seeds, t=times)
def test_score_is_the_gradient_of_the_density(data, seed, t):
    x, tt = states(data, seed, t)
    x.requires_grad_()
    oracle = Oracle(data, SCHEDULE)
    slope, = torch.autograd.grad(oracle.log_prob(x, tt).sum(), x)
    close(oracle.score(x, tt), slope, (10 + slope.abs().max()) / 0.05)


@each
@given(seed=seeds, t=times)
def test_mean_and_covariance_are_tweedies(data, seed, t):
    "E[x0|xt] = (xt + sigma² ∇log p) / alpha and Cov[x0|xt] = sigma² / alpha² (1 + sigma² ∇∇log p), by autograd."
    x, tt = states(data, seed, t, n=1)
    a, s = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    def log_prob(v): return reference(data, t).log_prob(v)
    slope = torch.autograd.functional.jacobian(log_prob, x.flatten())
    curve = torch.autograd.functional.hessian(log_prob, x.flatten())
    q = Oracle(data, SCHEDULE)(x, tt)
    kappa = (10 + slope.abs().max()) ** 2 / 0.05**2 / a**2
    close(q.mean.flatten(), (x.flatten() + s**2 * slope) / a, kappa)
    close(q.cov[0], s**2 / a**2 * (torch.eye(len(slope), dtype=torch.float64) + s**2 * curve), kappa)


@each
@given(seed=seeds, t=times)
def test_the_posterior_obeys_bayes_rule(data, seed, t):
    "log p(x0|xt) + log p(xt) = log q(xt|x0) + log p(x0), at any x0."
    x, tt = states(data, seed, t)
    x0, oracle = normal(*x.shape, seed=seed + 1, device="cpu"), Oracle(data, SCHEDULE)
    q = torch.distributions.Normal(SCHEDULE.alpha[t] * x0, SCHEDULE.sigma[t]).log_prob(x).flatten(1).sum(1)
    left, right = oracle.log_prob(x, tt) - oracle(x, tt).nll(x0), q + data.log_prob(x0)
    close(left, right, (100 + left.abs()) / 0.05 / SCHEDULE.sigma[t] ** 2)


@pytest.mark.parametrize("t", [1, 5, 10])
def test_one_dimension_by_quadrature(t):
    "Mean, variance and evidence of p(x0) q(xt|x0) on a fine grid."
    data, grid = mixture(3, 1, seed=4).cpu(), torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    density = sum(w * torch.exp(-(grid - m) ** 2 / v / 2) / (2 * torch.pi * v) ** 0.5
                  for w, m, v in zip(data.log_weights.exp(), data.means.flatten(), data.var.flatten()))
    for x in -1.5, 0.0, 2.0:
        a, s = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
        joint = density * torch.exp(-(x - a * grid) ** 2 / s**2 / 2) / (2 * torch.pi) ** 0.5 / s * 1e-3
        mean = (joint * grid).sum() / joint.sum()
        xt = torch.tensor([[x]], dtype=torch.float64)
        q, oracle = Oracle(data, SCHEDULE)(xt, full(xt, t)), Oracle(data, SCHEDULE)
        close(q.mean[0, 0], mean, 1000)
        close(q.cov[0, 0, 0], (joint * (grid - mean) ** 2).sum() / joint.sum(), 1000)
        close(oracle.log_prob(xt, full(xt, t))[0], joint.sum().log(), 1000)


@each
def test_draws_have_the_mean_and_covariance_of_the_law(data):
    "Posterior and data, 40,000 draws: exact moments, and the same mixture drawn by torch, also in bounded features."
    n, x = 40_000, 0.5 * normal(1, *data.shape, device="cpu")
    for law in Oracle(data, SCHEDULE)(x.expand(n, *data.shape), full(x, 3).expand(n)), data.rows(n):
        m, cov = law.mean[0].flatten(), law.cov[0]
        i, j = torch.triu_indices(len(m), len(m))
        x0 = law.sample(generator=rng(1, "cpu"))
        same_mean(moments(x0), torch.cat([m, (cov + m[:, None] * m)[i, j]]))
        torch.manual_seed(0)
        parts = MultivariateNormal(law.means[0], law.basis @ law.var[0].diag_embed() @ law.basis.mT)
        same_mean(quarters(x0), quarters(MixtureSameFamily(Categorical(logits=law.log_weights[0]), parts).sample((n,))))
    x0 = data.sample(n, generator=rng(2, "cpu"))
    assert x0.shape == (n, *data.shape)
    same_mean(quarters(x0), quarters(data.rows(n).sample(generator=rng(3, "cpu"))))


def test_covariances_are_kept():
    cov = spread(3, 5)
    data = Mixture.gaussian(torch.arange(3.0, dtype=torch.float64), cov)
    close(data.rows(2).cov, cov.expand(2, 3, 3), 10)
    close(data.rows(2).mean, torch.arange(3.0, dtype=torch.float64).expand(2, 3), 10)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_singular_covariances_are_welcome_and_never_give_nan(size):
    "Eigenvalues that rounding pushes below 0 count as 0: at least one of these 50 is pushed."
    covs = torch.stack([size * a[:, None] * a for a in normal(50, 3, device="cpu", dtype=torch.float32)])
    assert (torch.linalg.eigvalsh(covs) < 0).any()
    data = Mixture(torch.full((50,), 1 / 50), torch.zeros(50, 3), covs)
    assert torch.isfinite(data.sample(500, generator=rng(0, "cpu"))).all()


def test_points_are_rows_of_the_data():
    x0 = normal(5, 1, 2, 2, device="cpu")
    data = Mixture.points(x0)
    draws = data.sample(20_000, generator=rng(0, "cpu"))
    hit = (draws[:, None] == x0).flatten(2).all(-1).double()
    same_mean(hit, torch.full((5,), 0.2, dtype=torch.float64))
    assert data.means.dtype == x0.dtype and data.shape == (1, 2, 2)
    assert torch.equal(Mixture.points(x0[:1]).sample(3, generator=rng(0, "cpu")), x0[:1].expand(3, 1, 2, 2))


def test_points_of_mass_stay_points():
    data = mixture(3, 2, atoms=True, seed=6).cpu()
    q = Oracle(data, SCHEDULE)(normal(50, 2, device="cpu"), torch.full((50,), 4))
    x0 = q.sample(generator=rng(0, "cpu"))
    assert (x0[:, None] == data.means).all(-1).any(1).all()
    assert q.var.abs().max() == 0


def test_rows_have_their_own_times():
    data = DATA["mixture"]
    x, t, oracle = normal(4, 3, device="cpu"), torch.tensor([1, 10, 3, 7]), Oracle(DATA["mixture"], SCHEDULE)
    for f in (lambda x, t: oracle(x, t).mean), (lambda x, t: oracle(x, t).cov), oracle.log_prob, oracle.score:
        close(f(x, t), torch.cat([f(x[i:i + 1], t[i:i + 1]) for i in range(4)]), 1000)
    assert oracle(x, t).sample().dtype == data.means.dtype


def test_draws_depend_on_the_generator_alone():
    data = DATA["mixture"]
    for draw in (lambda g: data.sample(20, generator=g)), (lambda g: Oracle(data, SCHEDULE)(*states(data, 0, 5)).sample(generator=g)):
        torch.manual_seed(1)
        before, a, b = torch.get_rng_state(), draw(rng(0, "cpu")), draw(rng(0, "cpu"))
        assert torch.equal(a, b) and torch.equal(before, torch.get_rng_state()) and not torch.equal(a, draw(rng(1, "cpu")))

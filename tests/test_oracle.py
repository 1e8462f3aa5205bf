"""Exact posteriors of mixture data against quadrature, torch.distributions, Bayes and autograd."""
import itertools
import math
from fractions import Fraction

import pytest
import torch
from conftest import close, full, normal, refuses, rng, same_mean
from families import mixture, moments, quarters, spread
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from udm_book import finite
from udm_book.edit import EditAny, EditDifferent
from udm_book.mask import AtRate, Exactly, Mask
from udm_book.oracle import LinearOracle, Mixture, Normal, Oracle, Table, TableOracle
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


# ----------------------------------------------------------------------------------------------------- linear observations


@given(seed=seeds, t=times, d=st.integers(1, 4))
def test_a_linear_oracle_at_work_on_the_hot_family_is_the_first_one(seed, t, d):
    cov, mean, (x, tt) = spread(d, seed), normal(d, seed=seed + 1, device="cpu"), states(mixture(1, d).cpu(), seed, t)
    want = Oracle(Mixture.gaussian(mean, cov), SCHEDULE)(x, tt)
    maps = SCHEDULE.alpha[:, None, None] * torch.eye(d, dtype=torch.float64)
    got = LinearOracle(mean, cov, maps, SCHEDULE.sigma)(x, tt)
    close(got.mean, want.mean, (1 + x.abs().max() + mean.abs().max()) / 0.05**2)          # at most the condition, squared
    close(got.basis @ got.var.diag_embed() @ got.basis.mT, want.cov, 1 / 0.05**2)
    close(got.nll(x), want.nll(x), (10 + want.nll(x).abs()) / 0.05**2 / SCHEDULE.sigma[t] ** 2)


@given(seed=seeds, m=st.integers(1, 4), level=st.sampled_from([0.3, 1.0]))
def test_a_linear_oracle_is_the_normal_law_given_some_of_its_coordinates(seed, m, level):
    "Joint density of (x0, xt) by torch, less that of xt: log p(x0 | xt) at any x0. Maps of every time, of any number of rows."
    n, cov, mean = 3, spread(3, seed), normal(3, seed=seed + 1, device="cpu")
    maps, noise = normal(3, m, n, seed=seed + 2, device="cpu"), torch.tensor([level, level, 2 * level], dtype=torch.float64)
    x0, xt = normal(3, n, seed=seed + 3, device="cpu"), 2 * normal(3, m, seed=seed + 4, device="cpu")
    got, want = LinearOracle(mean, cov, maps, noise)(xt, torch.tensor([1, 2, 0])).nll(x0), []
    for i, t in enumerate((1, 2, 0)):
        A = maps[t]
        S = A @ cov @ A.mT + noise[t] ** 2 * torch.eye(m, dtype=torch.float64)
        joint = torch.cat([torch.cat([cov, cov @ A.mT], 1), torch.cat([A @ cov, S], 1)])
        both = MultivariateNormal(torch.cat([mean, A @ mean]), joint).log_prob(torch.cat([x0[i], xt[i]]))
        want.append(MultivariateNormal(A @ mean, S).log_prob(xt[i]) - both)
    want = torch.stack(want)
    close(got, want, (10 + want.abs()) * (1 + maps.square().sum()) ** 2 / 0.05**2 / level**2)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_a_linear_oracle_has_no_scale_of_its_own(size):
    "Certain and uncertain directions at any size of the data, with and without noise."
    cov, mean, xt, A = spread(3, 1), normal(3, seed=2, device="cpu"), normal(2, 2, seed=3, device="cpu"), normal(2, 2, 3, seed=4, device="cpu")
    noise, t = torch.tensor([0.0, 0.5], dtype=torch.float64), torch.tensor([0, 1])
    one, other = LinearOracle(mean, cov, A, noise)(xt, t), LinearOracle(size * mean, size**2 * cov, A, size * noise)(size * xt, t)
    close(other.mean / size, one.mean, 1e4)
    close(other.var / size**2, one.var, 1e4)
    assert (one.var == 0).sum(1).tolist() == (other.var == 0).sum(1).tolist() == [2, 0]


def test_what_is_seen_for_certain_is_kept_and_the_rest_is_drawn():
    "Means of pairs without noise: a singular problem where the map repeats itself. Draws by exact moments."
    A = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0]], dtype=torch.float64)
    cov, mean, n = spread(4, 7), normal(2, 2, seed=8, device="cpu"), 40_000
    oracle = LinearOracle(mean, cov, torch.stack([torch.eye(4)[:3].double(), A]), torch.zeros(2, dtype=torch.float64))
    seen = torch.tensor([[0.7, -0.4, 0.7]], dtype=torch.float64)
    law = oracle(seen.expand(n, 3), torch.ones(n, dtype=torch.int64))
    x0 = law.sample(generator=rng(0, "cpu"))
    assert x0.shape == (n, 2, 2) and isinstance(law, Normal)
    close(x0.flatten(1) @ A.mT, seen.expand(n, 3), 1e3)
    two = A[:2]
    gain = cov @ two.mT @ torch.linalg.inv(two @ cov @ two.mT)
    m, rest = mean.flatten() + gain @ (seen[0, :2] - two @ mean.flatten()), cov - gain @ two @ cov
    i, j = torch.triu_indices(4, 4)
    close(law.mean[0].flatten(), m, 1e3)
    same_mean(moments(x0), torch.cat([m, (rest + m[:, None] * m)[i, j]]))
    assert law.nll(x0).shape == (n,) and not torch.isnan(oracle(seen, torch.tensor([1])).sample()).any()
    blind = LinearOracle(mean, cov, torch.zeros(2, 1, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    nothing = blind(torch.zeros(1, 1, dtype=torch.float64), torch.tensor([1]))
    close(nothing.basis[0] @ nothing.var[0].diag() @ nothing.basis[0].mT, cov, 10)
    close(nothing.mean[0], mean, 1)


# ------------------------------------------------------------------------------------------------------------------ tables

STATES = torch.tensor(list(itertools.product(range(2), repeat=3)))
CHANCES = [Fraction(k, 50) for k in (11, 2, 5, 4, 1, 8, 3, 16)]
PROBS = torch.tensor([float(p) for p in CHANCES], dtype=torch.float64)
P0 = dict(zip(map(tuple, STATES.tolist()), CHANCES))
WORLDS = {"mask": (finite.mask(3), Mask(2, Exactly(3))), "any": (finite.edit_any(3, 2), EditAny(2, Exactly(3))),
          "different": (finite.edit_different(3, 2), EditDifferent(2, Exactly(3)))}


@pytest.mark.parametrize("name", WORLDS)
def test_tables_are_bayes_rule_in_fractions(name):
    "All states at all times in one batch; the joint law, its marginals, and both as posteriors."
    exact, F = WORLDS[name]
    seen = [(t, x) for t in range(1, 4) for x in exact.marginal(P0, t)]
    xt, t = torch.tensor([[2 if v is None else v for v in x] for _, x in seen]), torch.tensor([t for t, _ in seen])
    joint, single = (TableOracle(F, STATES, PROBS, joint=j)(xt, t) for j in (True, False))
    laws = [exact.posterior(P0, x, t) for t, x in seen]
    want = torch.tensor([[float(law.get(x, 0)) for x in P0] for law in laws], dtype=torch.float64)
    close(joint.probs, want, 10)
    m = torch.stack([torch.stack([want[:, STATES[:, i] == v].sum(1) for v in range(2)], -1) for i in range(3)], 1)
    for law in joint, single, joint.marginals(): close(law.mean, m, 10)
    for x in STATES[:3]:
        close(joint.nll(x.expand(len(xt), 3)).neg().exp(), want[:, (STATES == x).all(1)][:, 0], 10)
    product = m.gather(-1, STATES[5].expand(len(xt), 3)[..., None]).prod(1)[:, 0]
    close(single.nll(STATES[5].expand(len(xt), 3)).neg().exp(), product, 30)


def test_tables_draw_sentences_and_marginals_draw_tokens():
    n, F = 40_000, Mask(2, Exactly(3))
    xt, t = torch.tensor([[2, 0, 2]]).expand(n, 3), torch.full((n,), 2)
    code = torch.tensor([4, 2, 1])
    joint = PROBS * (STATES[:, 1] == 0)
    joint /= joint.sum()
    for law, want in (TableOracle(F, STATES, PROBS)(xt, t), joint), (TableOracle(F, STATES, PROBS, joint=False)(xt, t), None):
        x = law.sample(generator=rng(0, "cpu"))
        assert x.shape == (n, 3) and (x[:, 1] == 0).all() and x.dtype == torch.int64
        if want is None:
            first, last = joint[STATES[:, 0] == 1].sum(), joint[STATES[:, 2] == 1].sum()
            want = torch.stack([(first if s[0] else 1 - first) * (last if s[2] else 1 - last) * (s[1] == 0) for s in STATES])
        same_mean(torch.nn.functional.one_hot((x * code).sum(1), 8).double(), want)


def test_a_table_knows_no_other_sentence_and_has_one_row_each():
    law = Table(PROBS.expand(2, 8), STATES, 2)
    assert law.nll(torch.tensor([[0, 0, 2], [0, 0, 0]])).tolist() == [math.inf, -math.log(0.22)]
    assert Table(PROBS.expand(2, 8), STATES, 5).mean.shape == (2, 3, 5)
    oracle = TableOracle(Mask(2, AtRate.even(4)), STATES, PROBS)
    assert {"states", "log_probs"} <= set(oracle.state_dict())
    draws = oracle(torch.tensor([[2, 2, 2]]), torch.tensor([4])).sample(generator=rng(0, "cpu"))
    assert torch.equal(draws, oracle(torch.tensor([[2, 2, 2]]), torch.tensor([4])).sample(generator=rng(0, "cpu")))


def test_chances_may_be_zero_or_of_few_bits():
    "A sentence of chance 0 stays impossible; float32 chances are read as the numbers they are."
    xt, t = torch.tensor([[2, 2, 2], [0, 2, 1]]), torch.tensor([3, 1])
    rare, coarse = torch.tensor([0, 0.3, 0.7, 0, 0, 0, 0, 0]), PROBS.float()
    for probs in rare, coarse:
        law = TableOracle(Mask(2, Exactly(3)), STATES, probs)(xt, t)
        assert torch.equal(law.probs, TableOracle(Mask(2, Exactly(3)), STATES, probs.double())(xt, t).probs)
        close(law.probs[0], probs.double() / probs.double().sum(), 1)
    law = TableOracle(Mask(2, Exactly(3)), STATES, rare)(xt, t)
    assert law.probs[1].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


def linear(cov=torch.eye(2), maps=torch.ones(3, 1, 2), noise=torch.ones(3)): return LinearOracle(torch.zeros(2), cov, maps, noise)
def table(probs, xt=((2, 2, 2),), t=(3,)): return TableOracle(Mask(2, Exactly(3)), STATES, probs)(torch.tensor(xt), torch.tensor(t))


CASES = {
    "a covariance of another size": (ValueError, lambda: linear(cov=torch.eye(3)), r"cov \(2, 2\)", r"\(3, 3\)"),
    "maps of other data": (ValueError, lambda: linear(maps=torch.ones(3, 1, 4)), r"maps \(T\+1, m, 2\)", r"\(3, 1, 4\)"),
    "too few levels": (ValueError, lambda: linear(noise=torch.ones(2)), r"T\+1 levels >= 0", r"\(2,\)"),
    "a level below 0": (ValueError, lambda: linear(noise=torch.tensor([0.0, 1.0, -1.0])), r"T\+1 levels >= 0", r"-1\.0"),
    "chances that sum to 2": (ValueError, lambda: table(2 * PROBS), "8 chances that sum to 1", r"8 of sum 2\.0"),
    "a negative chance": (ValueError, lambda: table(PROBS + torch.tensor([-0.3, 0.3, 0, 0, 0, 0, 0, 0])), "8 chances that sum to 1", "8 of sum 1"),
    "a chance that is NaN": (ValueError, lambda: table(PROBS * math.nan), "8 chances that sum to 1", "8 of sum nan"),
    "too few chances": (ValueError, lambda: table(torch.ones(1).double()), "8 chances", "1 of sum 1"),
    "a state that no sentence leads to": (ValueError, lambda: table(PROBS, ((2, 2, 2), (0, 2, 2)), (3, 3)), "some sentence leads to", r"\[0, 2, 2\]"),
}
test_the_message_says_what_was_expected_and_what_came = refuses(CASES)

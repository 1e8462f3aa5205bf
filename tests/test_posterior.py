"""The laws a denoiser may answer with: what they draw is what their nll says."""
import math

import pytest
import torch
from conftest import close, normal, rng, same_mean
from hypothesis import given
from strategies import dtypes, seeds, shapes
from torch.nn import functional as fn

from udm_book.posterior import Categorical, Dirac, Gaussian, Laplace, Posterior, per_row

N = 100_000
LAWS = {"gaussian": Gaussian, "laplace": Laplace}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("v", [0.3, 2.0])
def test_draws_fall_where_the_nll_says(name, v):
    "Shares of 12 cells between 1 - 2v and 1 + 2v, integrated from exp(-nll) by the midpoint rule (its error is below 1e-5)."
    def law(n): return LAWS[name](torch.ones(n, 1, dtype=torch.float64), torch.tensor(v, dtype=torch.float64))
    edges, fine = (torch.linspace(1 - 2 * v, 1 + 2 * v, k + 1, dtype=torch.float64) for k in (12, 2400))
    share = torch.exp(-law(2400).nll((fine[1:] + fine[:-1])[:, None] / 2)).view(12, 200).mean(1) * 4 * v / 12
    x = law(N).sample(generator=rng(0, "cpu"))
    same_mean(fn.one_hot(torch.bucketize(x[:, 0], edges), 14)[:, 1:-1].double(), share)


@pytest.mark.parametrize("name", LAWS)
def test_coordinates_are_drawn_independently_around_their_own_means(name):
    m, v = normal(2, 2, device="cpu").expand(N, 2, 2), torch.tensor([[0.5, 2.0], [1.0, 0.1]], dtype=torch.float64)
    x = LAWS[name](m, v).sample(generator=rng(1, "cpu")).flatten(1)
    variance = (v if name == "gaussian" else 2 * v.square()).flatten()
    i, j = torch.triu_indices(4, 4)
    off = x - m.flatten(1)
    same_mean(torch.cat([off, off[:, i] * off[:, j]], 1), torch.cat([torch.zeros(4), variance.diag()[i, j]]))


@pytest.mark.parametrize("name", LAWS)
@given(shape=shapes, dtype=dtypes, seed=seeds)
def test_nll_is_the_log_density_of_torch(name, shape, dtype, seed):
    "torch.distributions as an independent reference; a scalar and a full scale."
    m, x = normal(*shape, seed=seed, dtype=dtype, device="cpu"), normal(*shape, seed=seed + 1, dtype=dtype, device="cpu")
    if len(shape) == 1: return                                                      # no axis to sum over
    for v in torch.tensor(0.3, dtype=dtype), m.square() + 0.1:
        ref = torch.distributions.Normal(m, v.sqrt()) if name == "gaussian" else torch.distributions.Laplace(m, v)
        off = 1 + (x - m).abs()                                                     # a term is at most off² / v + 4
        close(LAWS[name](m, v).nll(x), per_row(-ref.log_prob(x)), per_row(off.square() / v + 4))


def test_dirac_is_one_point_with_the_squared_error():
    m, x = normal(3, 2, 2, device="cpu"), normal(3, 2, 2, seed=1, device="cpu")
    law = Dirac(m)
    assert law.sample() is m
    close(law.nll(x), torch.stack([((a - b) ** 2).sum() for a, b in zip(x, m)]), 20)
    half = Gaussian(m, torch.tensor(0.5, dtype=m.dtype)).nll(x) - math.log(math.pi) * 4 / 2
    close(law.nll(x), half, 40)


def test_gaussian_draws_use_one_normal_per_coordinate():
    m = normal(4, 3, device="cpu")
    x = Gaussian(m, torch.tensor(4.0, dtype=m.dtype)).sample(generator=rng(3, "cpu"))
    close(x, m + 2 * torch.randn(4, 3, generator=rng(3, "cpu"), dtype=m.dtype), 10)


def test_categorical_draws_follow_its_nll():
    "Frequencies of all V^2 pairs of tokens against exp(-nll)."
    V = 3
    logits = normal(1, 2, V, device="cpu")
    law = Categorical(logits.expand(N, 2, V))
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    want = torch.exp(-Categorical(logits.expand(9, 2, V)).nll(pairs))
    assert abs(want.sum() - 1) < 1e-12
    x = law.sample(generator=rng(0, "cpu"))
    assert x.dtype == torch.int64 and x.shape == (N, 2)
    same_mean((x[:, None] == pairs).all(-1).double(), want)
    close(law.mean[0], logits[0].exp() / logits[0].exp().sum(-1, keepdim=True), 1)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 2)])
def test_categorical_shapes(shape):
    law = Categorical(normal(*shape, 4, device="cpu"))
    x = law.sample(generator=rng(0, "cpu"))
    assert x.shape == shape and law.mean.shape == (*shape, 4)


def test_posteriors_are_frozen_and_abstract():
    with pytest.raises(AttributeError): Dirac(torch.zeros(1, 1)).mean = torch.ones(1, 1)
    with pytest.raises(TypeError): Posterior()


@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 2, 2)])
def test_per_row_sums_everything_but_the_batch(shape):
    x = normal(*shape, device="cpu")
    close(per_row(x), torch.stack([row.sum() for row in x]), 20)


@pytest.mark.parametrize("law", [Gaussian(torch.zeros(4, 3), torch.ones(())), Laplace(torch.zeros(4, 3), torch.ones(())),
                                 Categorical(torch.zeros(4, 3, 9))], ids=lambda law: type(law).__name__)
def test_draws_depend_on_the_generator_alone(law):
    torch.manual_seed(1)
    a = law.sample(generator=rng(0, "cpu"))
    b = law.sample(generator=rng(0, "cpu"))
    state = torch.get_rng_state()
    assert torch.equal(a, b) and not torch.equal(a, law.sample(generator=rng(1, "cpu")))
    assert torch.equal(state, torch.get_rng_state())


def test_categorical_nll_is_one_number_a_row_for_any_batch():
    for b in 1, 2:
        logits = normal(b, 2, 3, device="cpu")
        want = logits.logsumexp(-1).sum(1) - logits[:, 0, 2] - logits[:, 1, 0]
        close(Categorical(logits).nll(torch.tensor([[2, 0]]).expand(b, 2)), want, 4)

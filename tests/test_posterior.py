"""The laws a denoiser may answer with: what they draw is what their nll says."""
import math

import pytest
import torch
from conftest import close, normal, refuses, rng, same_mean
from hypothesis import given
from hypothesis import strategies as st
from strategies import dtypes, seeds, shapes
from torch.nn import functional as fn

from udm_book.posterior import Categorical, Dirac, Gaussian, Laplace, LazyCategorical, Posterior, inverse_cdf, per_row, tokenwise

N = 100_000
FIVE = 5.7e-7                                                               # beyond five standard errors of a normal law
nan, inf = math.nan, math.inf
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


@given(shape=shapes, dtype=dtypes, seed=seeds)
def test_a_number_as_scale_is_a_tensor_of_that_number(shape, dtype, seed):
    m, x = normal(*shape, seed=seed, dtype=dtype, device="cpu"), normal(*shape, seed=seed + 1, dtype=dtype, device="cpu")
    laws = [Laplace(m, scale) for scale in (0.3, torch.tensor(0.3, dtype=dtype))]
    assert laws[0].scale.dtype == dtype and Laplace(m, 2).scale == 2
    assert torch.equal(*[law.nll(x) for law in laws])
    assert torch.equal(*[law.sample(generator=rng(seed, "cpu")) for law in laws])


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


@pytest.mark.parametrize("shape", [(3,), (1,), (3, 2), (2, 3, 2, 2)])
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


# --------------------------------------------------------------------------------------------------- exact draws of tokens


@given(st.lists(st.integers(0, 5), min_size=1, max_size=9).filter(any), st.sampled_from([0.125, 1.0, 3.0, 1e-30, 1e30]), dtypes)
def test_inverse_cdf_names_each_token_on_exactly_its_share_of_the_stick(weights, scale, dtype):
    "Points in the middle between the multiples of 1 / sum, so that no rounding decides; whatever the length of the stick."
    p, n = torch.tensor([weights], dtype=dtype) * scale, sum(weights)
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    want = torch.arange(len(weights)).repeat_interleave(torch.tensor(weights))
    assert torch.equal(inverse_cdf(p, u[None])[0], want)
    assert torch.equal(inverse_cdf(p.expand(n, -1), u), want)


def test_pieces_hold_their_left_end_and_not_their_right_one():
    p, u = torch.tensor([[0, 1, 0, 2, 1, 0.0]]), torch.tensor([[0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1 - 2**-53]], dtype=torch.float64)
    assert inverse_cdf(p, u).tolist() == [[1, 1, 3, 3, 4, 4]]


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30).filter(any), st.sampled_from([0.0, 2**-53, 0.5, 1 - 2**-53]), dtypes)
def test_impossible_tokens_are_never_drawn(p, u, dtype):
    "Not by the smallest u, not by the largest, at any length of the stick."
    p = torch.tensor([p], dtype=dtype)
    token = inverse_cdf(p, torch.tensor([u], dtype=torch.float64))
    assert 0 <= token < p.shape[1] and p[0, token] > 0


def test_rare_tokens_keep_their_pieces_beside_a_likely_one():
    "A thousand tokens of 2^-40 after one of 3/4: the middle of each piece belongs to it. (float32 sums would lose them all.)"
    p = torch.full((1, 1001), 2.0**-40)
    p[0, 0] = 0.75
    middles = (0.75 + (torch.arange(1000).double() + 0.5) * 2.0**-40) / p.double().sum()
    assert torch.equal(inverse_cdf(p, middles[None])[0], torch.arange(1, 1001))


def test_the_sums_are_off_by_no_more_than_the_chapter_says():
    "Where u crosses from one token to the next, found by bisection, against sums without rounding."
    p = (3 * normal(1, 2000, device="cpu", dtype=torch.float32)).softmax(-1)
    exact = [math.fsum(p[0, :k + 1].tolist()) / math.fsum(p[0].tolist()) for k in range(0, 1999, 37)]
    low, high = torch.zeros(1, len(exact), dtype=torch.float64), torch.ones(1, len(exact), dtype=torch.float64)
    for _ in range(60):
        mid = (low + high) / 2
        left = inverse_cdf(p, mid) <= torch.arange(0, 1999, 37)
        low, high = torch.where(left, mid, low), torch.where(left, high, mid)
    assert (low - torch.tensor(exact, dtype=torch.float64)).abs().max() < 2000 * 2**-53


def test_a_row_without_numbers_names_no_token():
    p = torch.tensor([[0.5, nan, 0.5], [nan, nan, nan], [0, 0, 0]])
    assert inverse_cdf(p, torch.tensor([0.9, 0.1, 0.0], dtype=torch.float64)).tolist() == [3, 3, 3]


def tail(kinds, expected):
    "Pearson's chi-square of the counts, as the chance of a larger one."
    expected = torch.as_tensor(expected, dtype=torch.float64)
    value = ((kinds.bincount(minlength=len(expected)) - expected).square() / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), value / 2).item()


def test_chi_square_of_rare_tokens_beside_a_mask():
    "15,020 tokens share 1/1000. Gumbel numbers of 24 bits fail the same test, as the chapter shows; so it has power."
    chance, many, n = torch.tensor([0.999, 1e-5, 1e-7, 3e-8]), torch.tensor([1, 20, 5000, 10_000]), 2_000_000
    weight = chance.double() * many / (chance.double() * many).sum()
    kind = torch.arange(4).repeat_interleave(many)
    for order in torch.arange(len(kind)), torch.arange(len(kind)).flip(0):
        u = torch.rand(1, n, generator=rng(0, "cpu"), dtype=torch.float64)
        draws = inverse_cdf(chance.repeat_interleave(many)[order][None], u)[0]
        assert tail(kind[order][draws], n * weight) > FIVE
    u = torch.rand(n, 4, generator=rng(0, "cpu"), dtype=torch.float64) ** (1 / many.double())
    coarse = (chance.double().log() - (-((u * 2**24).floor() / 2**24).log()).log()).argmax(1)
    assert tail(coarse, n * weight) < FIVE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chi_square_of_draws_in_pieces(dtype):
    "40,000 rows of 64 tokens, in three pieces; a fifth of the tokens is impossible."
    logits = 3 * normal(64, device="cpu", dtype=dtype)
    logits[::5] = -inf
    x = Categorical(logits.expand(40_000, 64)).sample(generator=rng(1, "cpu"))
    possible = logits > -inf
    assert possible[x].all()
    assert tail((possible.cumsum(0) - 1)[x], 40_000 * logits[possible].double().softmax(0)) > FIVE


@pytest.mark.parametrize("n, V", [(9, 2**18), (8, 2**18), (3, 2**20 + 1), (0, 5), (1, 1)])
def test_pieces_leave_no_trace_in_the_draws(n, V):
    "Four rows a piece, the last one not full; one row; nothing to draw."
    logits = normal(n, V, device="cpu", dtype=torch.float32)
    u = torch.rand(n, generator=rng(3, "cpu"), dtype=torch.float64)
    x = Categorical(logits).sample(generator=rng(3, "cpu"))
    assert torch.equal(x, inverse_cdf(logits.softmax(-1), u)) and x.dtype == torch.int64
    assert torch.equal(Categorical(logits.view(n, 1, V)).sample(generator=rng(3, "cpu")), x[:, None])


def test_logits_of_few_bits_are_drawn_as_exactly_as_others():
    logits = (2 * normal(500, 40, device="cpu")).bfloat16()
    a, b = (Categorical(z).sample(generator=rng(0, "cpu")) for z in (logits, logits.float()))
    assert torch.equal(a, b)


# ---------------------------------------------------------------------------------------------- some positions and no other


@given(seeds, st.sampled_from([(3,), (2, 4), (1, 2, 3)]), dtypes)
def test_at_and_lazy_are_the_full_law_read_in_part(seed, shape, dtype):
    "float64 keeps to the roundings of a product of 5 terms, in any order."
    h, x = normal(*shape, 5, seed=seed, dtype=dtype, device="cpu"), torch.randint(4, shape, generator=rng(seed, "cpu"))
    head, where = normal(5, 4, seed=seed + 1, dtype=dtype, device="cpu"), torch.rand(shape, generator=rng(seed, "cpu")) < 0.5
    full, lazy = Categorical(h @ head), LazyCategorical(h, lambda v: v @ head)
    size = 5 + (h.abs() @ head.abs()).max()
    each = full.token_nll(x)
    assert each.shape == shape and isinstance(lazy.at(where), Categorical)
    close(each, -fn.log_softmax(h @ head, -1)[torch.nn.functional.one_hot(x, 4).bool()].view(shape), size)
    close(full.nll(x), each.reshape(shape[0], -1).sum(1), 20 * size)
    for law in full, lazy:
        close(law.at(where).logits, (h @ head)[where], size)
        close(law.at(where).nll(x[where]), each[where], size)
        assert law.at(where).sample(generator=rng(1, "cpu")).shape == (int(where.sum()),)
    assert torch.equal(lazy.logits, full.logits) and torch.equal(lazy.mean, full.mean) and torch.equal(lazy.nll(x), full.nll(x))
    assert torch.equal(lazy.token_nll(x), each)
    assert torch.equal(lazy.sample(generator=rng(2, "cpu")), full.sample(generator=rng(2, "cpu")))


def test_a_lazy_law_computes_what_is_asked_for():
    seen = []

    def head(h):
        seen.append(tuple(h.shape))
        return h
    law = LazyCategorical(normal(2, 3, 4, device="cpu"), head)
    assert not seen
    law.at(torch.tensor([[True, False, True], [False, False, True]]))
    law.at(torch.zeros(2, 3, dtype=torch.bool)).sample()
    assert seen == [(3, 4), (0, 4)]


def draw(logits): return Categorical(torch.tensor(logits)).sample()


CASES = {
    "tokens that are not independent": (TypeError, lambda: tokenwise(Dirac(torch.zeros(2, 1))), "Categorical or LazyCategorical", "Dirac"),
    "a scale of 0": (ValueError, lambda: Laplace(torch.zeros(2, 1), 0.0), "a scale above 0", "0.0"),
    "a scale that is no number": (ValueError, lambda: Laplace(torch.zeros(2, 1), nan), "a scale above 0", "nan"),
    "a logit that is NaN": (ValueError, lambda: draw([[0.0, nan], [0.0, 1.0]]), "logits that are not NaN", "1 positions without a law"),
    "a logit that is infinite": (ValueError, lambda: draw([[0.0, inf]]), "logits that are not NaN", "1 positions without a law"),
    "only impossible tokens": (ValueError, lambda: draw([[[-inf] * 3, [0.0] * 3]] * 2), "one of them above -inf", "2 positions without a law"),
}
test_the_message_says_what_was_expected_and_what_came = refuses(CASES)

"""The discrete decoder against high-precision arithmetic: every mass, their sum, both tails, both precisions."""
import math

import mpmath
import pytest
import torch
from conftest import close, normal, refuses, rng, same_mean
from families import mixture
from hypothesis import given
from hypothesis import strategies as st
from strategies import dtypes, seeds

from udm_book.elbo import elbo
from udm_book.hot import Hot
from udm_book.likelihood import Decoder, DiscreteGaussian, Levels, bits_per_dim, log_between, log_mass, pixel_var
from udm_book.oracle import Mixture, Oracle
from udm_book.posterior import Categorical, Dirac, Gaussian, Laplace
from udm_book.schedule import Schedule

ns = st.integers(2, 300)
means = st.floats(-3, 3)
sds = st.floats(-4, 2).map(lambda e: 10**e)
both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def exact(mid, half):
    """log(Phi(mid + half) - Phi(mid - half)) with sixty digits."""
    with mpmath.workdps(60):
        a, b = ((abs(mpmath.mpf(mid)) + s * mpmath.mpf(half)) / mpmath.sqrt(2) for s in (-1, 1))
        return float(mpmath.log((mpmath.erfc(a) - mpmath.erfc(b)) / 2))


def masses(n, mean, sd, dtype=torch.float64):
    return log_mass(torch.arange(n), torch.tensor(mean, dtype=dtype), torch.tensor(sd, dtype=dtype).square(), Levels(n=n))


# ---------------------------------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize("n", [2, 17, 32, 256, 1024, 65536])
@both
def test_levels_survive_the_round_trip_exactly(n, dtype):
    levels, k = Levels(n=n), torch.arange(n)
    x = levels.value(k, dtype)
    assert x.dtype == dtype and x[0] == -1 and x[-1] == 1 and torch.equal(levels.index(x), k)
    close(x, 2 * k.double() / (n - 1) - 1, C=2)
    assert torch.equal(levels.quantize(x), x) and levels.value(k).dtype == torch.float32


@pytest.mark.parametrize("scale", [lambda k: k / 255 * 2 - 1, lambda k: (k / 255 - 0.5) / 0.5, lambda k: k / 127.5 - 1,
                                   lambda k: 2 * (k / 255) - 1 + 2e-7])
def test_pixels_scaled_in_other_orders_are_recognised(scale):
    k = torch.arange(256)
    assert torch.equal(Levels().index(scale(k.float())), k)


@given(st.floats(-5, 5), st.floats(0.1, 5), ns, seeds, dtypes)
def test_the_nearest_level_is_the_nearest(low, width, n, seed, dtype):
    levels = Levels(low, low + width, n)
    x = low + width * (1.4 * torch.rand(20, generator=rng(seed, "cpu"), dtype=dtype) - 0.2)
    every = levels.value(torch.arange(n), dtype)
    got, want = (levels.quantize(x) - x).abs(), (every - x[:, None]).abs().amin(1)
    close(got, want, 8 + 2 * width)
    assert torch.equal(levels.nearest(levels.quantize(x)), levels.nearest(x))
    close(every[1] - every[0], levels.step, 8 + width)
    close(every[[0, -1]], torch.tensor([low, low + width]), 8 + width, dtype=torch.float32)


def test_dequantized_data_fill_their_bins():
    levels, k = Levels(n=17), torch.arange(17)
    x = levels.value(k)
    for u, shift in (0.0, -0.5), (0.5, 0.0), (0.75, 0.25):
        assert torch.equal(levels.dequantize(x, torch.full((17,), u)), x + shift / 8)
    spread = levels.dequantize(x.expand(1000, 17), torch.rand(1000, 17, generator=rng(0, "cpu")))
    assert torch.equal(levels.nearest(spread), k.expand(1000, 17))


def test_four_roundings_are_forgiven_and_no_more():
    "At the largest magnitude, whichever end it is at."
    for low, high in (-1.0, 1.0), (-3.0, 1.0), (-1.0, 3.0):
        levels, eps = Levels(low, high, 5), 3 * torch.finfo(torch.float32).eps if max(-low, high) == 3 else 2.0**-23
        middle = levels.value(torch.tensor([2])).double()
        near, far = ((middle + s * eps).float() for s in (4, 4.5))
        assert levels.index(near + 0.0).item() == 2
        with pytest.raises(ValueError, match="1 values off them"): levels.index(far)


def test_a_dtype_must_tell_levels_apart():
    "bfloat16, eps = 1/128, forgives 1/32: as much as half a step of 33 levels, and less than that of 25."
    for n in 17, 25:
        x = Levels(n=n).value(torch.arange(n), torch.bfloat16)
        assert torch.equal(Levels(n=n).index(x), torch.arange(n))
    with pytest.raises(ValueError, match="tells 33 levels apart"): Levels(n=33).index(torch.zeros(3, dtype=torch.bfloat16))


# ----------------------------------------------------------------------------------------------------------- one interval

mids = st.one_of(st.floats(-3, 3), st.floats(-100, 100), st.sampled_from([0.0, 0.5, 1e3, -3e4, 1e9]))
halves = st.one_of(st.floats(-9, 1.5).map(lambda e: 10**e), st.sampled_from([0.2, 0.25, 0.3, 0.5, 30.0]))


@given(mids, halves, dtypes)
def test_the_mass_of_an_interval_is_right_to_a_few_roundings(mid, half, dtype):
    mid, half = torch.tensor(mid, dtype=dtype), torch.tensor(half, dtype=dtype)
    want = exact(mid.item(), half.item())
    close(log_between(mid, half), want, 1 + mid.double().square() + half.double().log().abs(), C=4)


@pytest.mark.parametrize("half", [0.05, 0.1, 0.24, 0.26, 0.4, 0.49, 0.51, 0.7, 1.0, 3.0])
def test_where_the_two_ways_meet(half):
    "Just below and above h (m + h) = 1/4, in float64: the quadrature and the difference of tails."
    m = max(0.25 / half - half, 0)
    mid = torch.tensor([0.5 * m, 0.9 * m, m * (1 - 1e-12), m * (1 + 1e-12), 1.1 * m, m + 0.3, m + 1], dtype=torch.float64)
    want = torch.tensor([exact(v, half) for v in mid.tolist()], dtype=torch.float64)
    close(log_between(mid, torch.tensor(half, dtype=torch.float64)), want, 1 + mid.square() + abs(math.log(half)), C=4)


@given(mids, halves)
def test_the_slope_of_the_mass_is_right(mid, half):
    "d/dm log mass = (phi(m + h) - phi(m - h)) / mass, in both branches, and the slope in h alike."
    m, h = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (mid, half))
    slopes = torch.autograd.grad(log_between(m, h), (m, h))
    with mpmath.workdps(60):
        mass = mpmath.exp(mpmath.log((mpmath.erfc((abs(mid) - mpmath.mpf(half)) / mpmath.sqrt(2))
                                      - mpmath.erfc((abs(mid) + mpmath.mpf(half)) / mpmath.sqrt(2))) / 2))
        a, b = (mpmath.npdf(mid + s * mpmath.mpf(half)) for s in (-1, 1))
        want = float((b - a) / mass), float((a + b) / mass)
    for got, exactly in zip(slopes, want):
        assert torch.isfinite(got)
        if abs(mid) <= 100: close(got, exactly, (1 + mid**2) * (1 + 1 / half + abs(mid)), C=64)


@both
def test_extremes_give_finite_masses_and_slopes(dtype):
    mid = torch.tensor([0.0, 1e-30, 5.0, 40.0, 1e3, 1e6, 1e9], dtype=dtype)
    mid, half = (v.flatten().requires_grad_() for v in torch.meshgrid(torch.cat([-mid, mid]), mid[1:], indexing="ij"))
    out = log_between(mid, half)
    assert torch.isfinite(out).all() and (out <= 0).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), (mid, half)))


def test_a_row_of_intervals_may_share_its_width():
    mid = normal(5, 3, device="cpu")
    assert torch.equal(log_between(mid, torch.tensor(0.3).double()), log_between(mid, torch.full((5, 3), 0.3).double()))


# ------------------------------------------------------------------------------------------------------------------- bins


@given(ns, means, sds, dtypes)
def test_bins_sum_to_one_in_every_case(n, mean, sd, dtype):
    """Each of the n edges is computed twice, from the bin on either side, an eps of (1 + |mean|) apart."""
    kappa = 1 + abs(math.log(sd * n)) + (1 + abs(mean)) * (n / 2 + 1 / sd)
    close(masses(n, mean, sd, dtype).exp().sum(), 1.0, kappa, C=8)


@given(ns, means, sds)
def test_bins_tile_the_line(n, mean, sd):
    "The first j bins together are everything below the edge between j - 1 and j."
    levels, p = Levels(n=n), masses(n, mean, sd).exp()
    edges = -1 + levels.step * (torch.arange(1, n).double() - 0.5)
    kappa = 1 + abs(math.log(sd * n)) + (1 + abs(mean)) * (n / 2 + 1 / sd)
    close(p.cumsum(0)[:-1], torch.special.ndtr((edges - mean) / sd), kappa, C=16)


@given(st.integers(3, 300), means, sds, seeds)
def test_each_mass_is_the_integral_over_its_bin(n, mean, sd, seed):
    levels = Levels(n=n)
    k = seed % n
    low, high = (levels.value(torch.tensor(k), torch.float64).item() + s * levels.step / 2 for s in (-1, 1))
    with mpmath.workdps(50):
        z = [(mpmath.mpf(v) - mpmath.mpf(mean)) / mpmath.mpf(sd) / mpmath.sqrt(2) for v in (low, high)]
        low, high = z if z[0] + z[1] > 0 else (-z[1], -z[0])                           # in the tail, where nothing cancels
        mass = mpmath.erfc(-z[1]) if k == 0 else mpmath.erfc(z[0]) if k == n - 1 else mpmath.erfc(low) - mpmath.erfc(high)
        want = float(mpmath.log(mass / 2))
    kappa = (1 + abs(float(z[0])) + abs(float(z[1]))) ** 2 + (1 + abs(mean)) / sd * (1 + abs(want) ** 0.5) + n + abs(math.log(sd))
    close(masses(n, mean, sd)[k], want, kappa)


@both
def test_there_is_no_floor_in_the_tails(dtype):
    "A sure and wrong decoder pays half its squared distance in nats, less the logarithm of a few."
    out = masses(17, 1.0, 1e-4, dtype)
    want = torch.tensor([exact((1 - k / 8 + 1) / 1e-4, 1 / 16 / 1e-4) if 0 < k else
                         float(mpmath.log(mpmath.ncdf((-1 + 1 / 16 - 1) / mpmath.mpf(1e-4)))) for k in range(16)], dtype=torch.float64)
    assert out[0] < -1e8 and out[15] < -1e5 and out[16] == 0
    close(out[:16], want, want.abs(), C=64)


@pytest.mark.parametrize("sd", [0.001, 0.01, 0.3, 5.0])
def test_the_middle_of_an_even_number_of_levels_is_an_edge(sd):
    out = masses(256, 0.0, sd)
    close(out[127], out[128], 1 + abs(math.log(sd)) + 1 / sd)
    close(out, out.flip(0), 1 + out.abs() + 256 + 1 / sd)
    assert out[:128].exp().sum() < 0.5 + 1e-9


# -------------------------------------------------------------------------------------------------------------- the posterior


def posterior(seed=0, n=17, shape=(4, 2, 3), dtype=torch.float64):
    return DiscreteGaussian(normal(*shape, seed=seed, dtype=dtype, device="cpu"),
                            0.01 + normal(*shape, seed=seed + 1, dtype=dtype, device="cpu").square(), Levels(n=n))


@given(seeds, ns, dtypes)
def test_nll_is_a_sum_of_pixels_and_agrees_with_the_table(seed, n, dtype):
    q = posterior(seed, n, dtype=dtype)
    k = torch.randint(0, n, q.loc.shape, generator=rng(seed, "cpu"))
    x0, each = q.levels.value(k, dtype), log_mass(k, q.loc, q.var, q.levels)
    close(q.nll(x0), -each.flatten(1).double().sum(1), 1 + each.abs().flatten(1).sum(1))
    close(q.nll(x0), Categorical(q.logits).nll(k), 10 * n + each.abs().flatten(1).sum(1))
    assert q.logits.shape == (*q.loc.shape, n) and q.nll(x0).dtype == dtype


def test_variances_broadcast():
    loc, x0 = normal(4, 3, device="cpu"), Levels(n=5).value(torch.randint(0, 5, (4, 3), generator=rng(0, "cpu")), torch.float64)
    for var in torch.tensor(0.3), torch.full((4, 1), 0.3), torch.full((3,), 0.3):
        q, full = (DiscreteGaussian(loc, v.double(), Levels(n=5)) for v in (var, var.expand(4, 3)))
        assert torch.equal(q.nll(x0), full.nll(x0)) and torch.equal(q.logits, full.logits)
        assert torch.equal(q.sample(generator=rng(1, "cpu")), full.sample(generator=rng(1, "cpu")))


@pytest.mark.parametrize("n", [2, 5])
def test_draws_have_the_masses_and_the_mean(n):
    q = posterior(n=n, shape=(1, 4))
    many = DiscreteGaussian(q.loc.expand(40_000, 4), q.var.expand(40_000, 4), q.levels)
    x0 = many.sample(generator=rng(3, "cpu"))
    hit = (q.levels.index(x0)[..., None] == torch.arange(n)).double().flatten(1)
    same_mean(hit, q.logits.exp().flatten(1))
    same_mean(x0, q.mean)
    assert torch.equal(x0, many.sample(generator=rng(3, "cpu"))) and not torch.equal(x0, many.sample(generator=rng(4, "cpu")))


@both
def test_a_network_can_learn_through_the_decoder(dtype):
    "Slopes towards means and variances are finite, also where the guess is sure and wrong."
    loc = torch.tensor([[-1.0, 0.0, 0.3, 5.0]], dtype=dtype, requires_grad=True)
    log_var = torch.tensor([[-18.0, -3.0, 0.0, 18.0]], dtype=dtype, requires_grad=True)
    for level in -1.0, 0.0, 1.0:
        nll = DiscreteGaussian(loc, log_var.exp(), Levels(n=17)).nll(torch.full((1, 4), level, dtype=dtype))
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(nll.sum(), (loc, log_var)))


# ---------------------------------------------------------------------------------------------------------------- the decoder


def test_the_decoder_keeps_means_and_takes_variances():
    mean, var, levels = normal(3, 2, device="cpu"), torch.full((2,), 0.4).double(), Levels(n=9)
    for decoder, law, want in [(Decoder(levels), Gaussian(mean, var), var), (Decoder(levels, 0.1), Gaussian(mean, var), 0.1),
                               (Decoder(levels, 0.1), Dirac(mean), 0.1), (Decoder(levels, 0.1), Laplace(mean, var), 0.1)]:
        q = decoder(law)
        assert q.loc is mean and q.levels is levels and q.var.dtype == mean.dtype
        assert torch.equal(q.var, torch.as_tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("K", [1, 3])
def test_variances_of_a_mixture_are_the_diagonal_of_its_covariance(K):
    data = mixture(K, 1, 2, 2, seed=5).cpu()
    q = Oracle(data, Schedule.linear(10, 0.05, 0.5))(normal(6, 1, 2, 2, device="cpu"), torch.full((6,), 4))
    close(pixel_var(q).flatten(1), q.cov.diagonal(dim1=1, dim2=2), 10)
    assert pixel_var(q).shape == (6, 1, 2, 2)


def test_bits_are_nats_by_dimensions_and_log_two():
    x0, nats = torch.zeros(3, 1, 2, 4), torch.arange(6.0).reshape(3, 2)
    close(bits_per_dim(nats, x0), nats / 8 / math.log(2), nats)
    close(bits_per_dim(nats[:, 0], x0), nats[:, 0] / 8 / math.log(2), nats[:, 0])
    uniform = Categorical(torch.zeros(3, 1, 2, 4, 17)).nll(x0.long())
    close(bits_per_dim(uniform, x0), torch.full((3,), math.log2(17)), 4)


def chain(n=9, var=0.3):
    """Normal numbers moved to levels; a chain of one step that knows the normal law."""
    levels, data = Levels(n=n), Mixture.gaussian(torch.full((1,), 0.2).double(), torch.full((1, 1), var).double())
    return levels, data, Schedule([1.0, 0.7])


def test_a_chain_of_one_step_by_quadrature():
    levels, data, S = chain()
    F, eps = Hot(S), torch.linspace(-9, 9, 3601, dtype=torch.float64)
    x0 = levels.value(torch.tensor([1]), torch.float64)
    q = Oracle(data, S)((S.alpha[1] * x0 + S.sigma[1] * eps)[:, None], torch.ones(3601, dtype=torch.long))
    each = -log_mass(torch.tensor(1), q.mean[:, 0], pixel_var(q)[:, 0], levels)
    weight = torch.exp(-eps.square() / 2)
    want = (weight * each).sum() / weight.sum()
    terms = elbo(F, Oracle(data, S), x0.expand(40_000, 1), decoder=Decoder(levels), generator=rng(0, "cpu"))
    assert terms.steps.shape == (40_000, 0)
    same_mean(terms.data[:, None], want[None])
    a, s = S.alpha[1], S.sigma[1]
    close(terms.prior[:1], ((a * x0) ** 2 + s**2 - 1 - 2 * s.log()) / 2, 4)


def test_the_bound_is_above_the_entropy_of_the_levels():
    "Whatever the decoder's variance; equality needs the true law of the levels."
    levels, data, S = chain(33)
    p = log_mass(torch.arange(33), torch.tensor(0.2).double(), torch.tensor(0.3).double(), levels)
    entropy = -(p.exp() * p).sum()
    x0 = levels.quantize(data.sample(20_000, generator=rng(1, "cpu")))
    for var in None, 0.01, 1.0:
        total = elbo(Hot(S), Oracle(data, S), x0, decoder=Decoder(levels, var), generator=rng(2, "cpu")).total
        assert total.mean() > entropy - 5 * total.std() / 20_000**0.5


@given(st.integers(2, 40), means, st.floats(0.02, 2), seeds)
def test_dequantized_densities_bound_the_masses(n, mean, sd, seed):
    "E_u[-log p(x + step (u - 1/2))] - log step >= -log mass, also at the open edges; Gauss's nodes for u."
    import numpy as np
    v, w = (torch.as_tensor(a) for a in np.polynomial.legendre.leggauss(4))             # exact: log p is a square
    levels, k = Levels(n=n), torch.tensor([[seed % n]])
    x = levels.dequantize(levels.value(k, torch.float64).expand(4, 1), ((v + 1) / 2)[:, None])
    bound = (w / 2 * Gaussian(torch.full((4, 1), mean).double(), torch.tensor(sd**2).double()).nll(x)).sum() - math.log(levels.step)
    nll = -masses(n, mean, sd)[k[0, 0]]
    assert bound >= nll - 1e-12 * (1 + nll)
    inner = 0 < k[0, 0] < n - 1
    if inner and levels.step / sd < 1e-1:                                               # the gap is the KL of the two laws in the bin
        grid = torch.linspace(-0.5, 0.5, 2001, dtype=torch.float64) * levels.step + levels.value(k[0, 0], torch.float64)
        log_p = -((grid - mean) / sd) ** 2 / 2 - math.log(sd * math.sqrt(2 * math.pi))
        gap = torch.trapezoid(-(log_p + nll + math.log(levels.step)), dx=1 / 2000)
        assert abs(gap - (bound - nll)) < 1e-6 * (1 + nll)


# --------------------------------------------------------------------------------------------------------------- bad input

V, x = ValueError, torch.zeros(2, 3)
CASES = {
    "one level": (V, lambda: Levels(n=1), "n >= 2 levels", "n=1"),
    "levels in one place": (V, lambda: Levels(0.0, 0.0, 2), "low to a greater high", "high=0.0"),
    "levels upside down": (V, lambda: Levels(1.0, -1.0), "low to a greater high", "low=1.0"),
    "levels without end": (V, lambda: Levels(0.0, math.inf), "low to a greater high", "high=inf"),
    "levels from nowhere": (V, lambda: Levels(-math.inf, 0.0), "low to a greater high", "low=-inf"),
    "data between levels": (V, lambda: Levels(n=17).index(torch.tensor([0.0, 0.01, 0.125])), "17 levels from -1.0 to 1.0", "1 values .*0.01: rescale"),
    "data of another depth": (V, lambda: Levels(n=17).index(Levels().value(torch.arange(256))), "17 levels", "254 values .*rescale or quantize"),
    "data beyond the levels": (V, lambda: Decoder(Levels(n=17), 1.0)(Dirac(x)).nll(x + 2), "17 levels", "6 values .* 2:"),
    "NaN among data on levels": (V, lambda: Levels(n=17).index(x / 0), "17 levels", "6 values .*nan"),
    "levels that bfloat16 cannot tell": (V, lambda: Levels().index(x.bfloat16()), "tells 256 levels apart", "torch.bfloat16"),
    "a decoder without a variance": (V, lambda: Decoder(Levels())(Dirac(x)), "posterior with variances, or var", "Dirac and no var"),
    "a decoder of variance 0": (V, lambda: Decoder(Levels(), 0.0)(Dirac(x)), "variances > 0", "0.0"),
    "a decoder of a variance below 0": (V, lambda: Decoder(Levels())(Gaussian(x, x - 1)), "variances > 0", "-1.0"),
    "a decoder of variance NaN": (V, lambda: Decoder(Levels(), math.nan)(Dirac(x)), "variances > 0", "nan"),
}


test_the_message_says_what_was_expected_and_what_came = refuses(CASES)

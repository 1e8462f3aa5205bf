"""Schedules against direct products in 40 digits, times, look-ups, casts."""
import math

import mpmath as mp
import pytest
import torch
from conftest import close, normal
from hypothesis import given
from hypothesis import strategies as st
from strategies import alpha_bars, schedules, seeds

import udm_book.schedule as module
from udm_book.hot import Hot
from udm_book.parameterization import EPS, X0, Denoiser, V
from udm_book.schedule import Schedule, Tables, quadratic, uniform

mp.mp.dps = 40
T = 200


def f_cosine(t): return mp.cos((mp.mpf(t) / T + mp.mpf(".008")) / mp.mpf("1.008") * mp.pi / 2) ** 2


BETAS = {            # Ho's β_t for t = 1..T from the sources' formulas
    "linear": lambda t: mp.mpf("1e-4") + (mp.mpf(".02") - mp.mpf("1e-4")) * (t - 1) / (T - 1),
    "geometric": lambda t: mp.mpf("1e-4") * 200 ** (mp.mpf(t - 1) / (T - 1)),
    "cosine": lambda t: min(mp.mpf(".999"), 1 - f_cosine(t) / f_cosine(t - 1)),
    "su": lambda t: mp.mpf(".02") * t / T,
}


@pytest.mark.parametrize("name", BETAS)
def test_tables_are_direct_products_of_the_sources_formulas(name):
    schedule, alpha_bar = getattr(Schedule, name)(T), [mp.mpf(1)]
    for t in range(1, T + 1): alpha_bar.append(alpha_bar[-1] * (1 - BETAS[name](t)))
    a = torch.tensor([float(v) for v in alpha_bar], dtype=torch.float64)
    noise = torch.tensor([float(1 - v) for v in alpha_bar], dtype=torch.float64)
    # A factor 1 - β_t is good to eps / (1 - β_t); the cosine of an angle x near π/2 to eps x tan(x), which f = cos² bounds.
    lost = torch.tensor([1.0] + [float(2 / (1 - BETAS[name](t))) for t in range(1, T + 1)]).cumsum(0)
    if name == "cosine": lost = lost + 4 / a.sqrt()
    close(schedule.alpha_bar, a, lost * a)
    close(schedule.alpha, exact(mp.sqrt, alpha_bar), lost * a.sqrt())
    close(schedule.sigma, exact(lambda v: mp.sqrt(1 - v), alpha_bar), lost * a / noise.sqrt().clamp_min(1e-9))
    close(schedule.beta[1:], [float(BETAS[name](t)) for t in range(1, T + 1)], lost[1:])
    snr, kappa = [v / (1 - v) for v in alpha_bar[1:]], (lost / noise)[1:]
    close(schedule.snr[1:], exact(lambda v: v, snr), kappa * (a / noise)[1:])
    close(schedule.log_snr[1:], exact(mp.log, snr), kappa + 40)


def exact(f, values): return [float(f(v)) for v in values]


@given(alpha_bars())
def test_identities_of_the_tables(a):
    schedule = Schedule(a)
    close(schedule.alpha**2 + schedule.sigma**2, torch.ones(len(a)))
    close(schedule.alpha_bar, a)
    assert schedule.T == len(a) - 1
    assert schedule.alpha[0] == 1 and schedule.sigma[0] == 0 and schedule.beta[0] == 0
    assert schedule.snr[0] == math.inf and (schedule.snr.diff() < 0).all()
    close((1 - schedule.beta).cumprod(0), a, len(a))
    close(Schedule.from_betas(schedule.beta[1:]).alpha_bar, a, len(a))


@given(st.floats(0.1, 4))
def test_from_alpha_bar_divides_by_the_value_at_zero(c):
    schedule = Schedule.from_alpha_bar(lambda u: c * torch.exp(-3 * u), 10)
    close(schedule.alpha_bar, torch.exp(-3 * torch.arange(11, dtype=torch.float64) / 10), 4)


@pytest.mark.parametrize("name", ["linear", "geometric", "cosine"])
def test_betas_by_themselves_have_the_same_defaults(name):
    close(getattr(module, f"{name}_betas")(50), getattr(Schedule, name)(50).beta[1:], 100)


def test_parameters_of_the_constructors_are_used():
    assert Schedule.linear(5, 0.1, 0.3).beta[1:].tolist() == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3], rel=1e-14)
    assert Schedule.geometric(3, 0.1, 0.4).beta[1:].tolist() == pytest.approx([0.1, 0.2, 0.4], rel=1e-14)
    assert Schedule.cosine(5, max_beta=0.5).beta.max() == pytest.approx(0.5, rel=1e-14)
    angle = math.pi / 2 / 1.1
    first = 1 - (math.cos(0.2 * angle) / math.cos(0.1 * angle)) ** 2
    assert Schedule.cosine(10, offset=0.1).beta[1].item() == pytest.approx(first, rel=1e-12)


@pytest.mark.parametrize("mean, std, low, high", [(-0.4, 1.2, 0.03, 25.0), (0.5, 2.0, 0.1, 3.0)])
def test_lognormal_noise_lies_at_even_quantiles(mean, std, low, high):
    schedule, law = Schedule.lognormal(T, mean, std, low, high), lambda v: mp.ncdf((mp.log(v) - mean) / std)
    ratio = (schedule.sigma / schedule.alpha)[1:]
    close(ratio[[0, -1]], [low, high], 1000)             # the quantile near 1 magnifies roundings
    shares = torch.tensor([float((law(mp.mpf(r.item())) - law(low)) / (law(high) - law(low))) for r in ratio], dtype=torch.float64)
    close(shares, torch.linspace(0, 1, T, dtype=torch.float64), 50)


def test_lognormal_defaults_are_those_of_edm():
    ratio = (lambda s: s.sigma / s.alpha)(Schedule.lognormal(999))
    assert ratio[[1, -1]].tolist() == pytest.approx([0.03, 25.0], rel=1e-12)
    below = torch.special.ndtr((torch.tensor([0.03, 25.0], dtype=torch.float64).log() + 0.4) / 1.2)
    assert ratio[500].log().item() == pytest.approx(-0.4 + 1.2 * torch.special.ndtri(below.mean()).item(), rel=1e-12)


def test_prior_kl_is_the_divergence_of_two_normal_laws():
    schedule, m = Schedule.su(100), 1.3
    a, s = schedule.alpha[-1], schedule.sigma[-1]
    p, q = torch.distributions.Normal(a * m, s), torch.distributions.Normal(torch.zeros_like(a), 1.0)
    close(torch.distributions.kl_divergence(p, q), schedule.prior_kl(m**2), 4)
    assert schedule.prior_kl() == schedule.prior_kl(1.0)
    close(torch.tensor(Schedule([1.0, 0.5, 0.0]).prior_kl(7.0), dtype=torch.float64), 0.0)


def roots(schedule, u): return schedule.T * u.sqrt()                           # steps that shrink towards T


@given(st.integers(1, 60), st.data(), st.sampled_from([(uniform, 1), (quadratic, 2), (roots, 0.5)]))
def test_times_are_distinct_and_as_near_to_the_spacing_as_integers_can_be(T, data, how):
    schedule, (spacing, power) = Schedule.linear(T), how
    n = data.draw(st.integers(1, T))
    times = schedule.times(n, spacing=spacing)
    assert len(times) == n + 1 and times[0] == T and times[-1] == 0
    assert all(t > s for t, s in zip(times, times[1:]))
    wish = [T * (1 - i / n) ** power for i in range(n + 1)]
    for i, (got, want) in enumerate(zip(times, wish)):      # off by rounding, or held in place by its neighbours
        held = got == n - i and want < got or i and got == times[i - 1] - 1 and want > got
        assert abs(got - want) <= 0.5 + 1e-9 or held
    if n == T: assert times == list(range(T, -1, -1))


@given(schedules(), seeds, st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), st.integers(1, 4))
def test_at_looks_up_and_rounds_once(schedule, seed, dtype, ndim):
    t = torch.randint(0, schedule.T + 1, (5,), generator=torch.Generator().manual_seed(seed))
    like = torch.zeros([5] + [2] * (ndim - 1), dtype=dtype)
    for got, table in zip(schedule.at(t, like), (schedule.alpha, schedule.sigma)):
        assert got.shape == (5,) + (1,) * (ndim - 1)
        assert torch.equal(got.flatten(), table[t].to(dtype))


def test_at_works_inside_inference_mode_and_serves_autograd_after_it():
    schedule, x = Schedule.linear(5), torch.ones(2, 2)
    with torch.inference_mode(): schedule.at(torch.tensor([1, 2]), x)
    x.requires_grad_()
    (schedule.at(torch.tensor([1, 2]), x)[0] * x).sum().backward()
    assert torch.equal(x.grad, schedule.alpha[[1, 2]].float()[:, None].expand(2, 2))


# ---------------------------------------------------------------------------------------------------------------- casts

CASTS = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64, "float": torch.float32}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("P", [EPS, X0, V], ids=lambda P: P.name)
def test_casting_a_network_leaves_all_tables_in_float64(cast, P):
    schedule = Schedule.linear(10)
    D, F = Denoiser(torch.nn.Linear(2, 2), schedule, P, var=torch.arange(11.0) / 10), Hot(schedule)
    before = {k: v.clone() for k, v in [*D.affine.state_dict().items(), *D.var.state_dict().items(), *schedule.state_dict().items()]}
    schedule.at(torch.tensor([1]), torch.zeros(1, 1))                              # fills the cache
    for module in D, F: getattr(module, cast)()
    assert D.net.weight.dtype == CASTS[cast]
    for table in D.affine, D.mix, D.var, schedule:
        for k, v in table.state_dict().items():
            assert v.dtype == torch.float64
            if k in before: assert torch.equal(v, before[k])
    F.to(torch.bfloat16)
    assert schedule.alpha.dtype == torch.float64
    x = torch.ones(3, 2, dtype=torch.bfloat16)
    assert F(x, torch.tensor([1, 5, 10]), x).dtype == torch.bfloat16


def test_float_on_the_table_itself_is_explicit():
    schedule = Schedule.linear(1000)
    wide = schedule.sigma.clone()
    schedule.at(torch.tensor([1]), torch.zeros(1, 1, dtype=torch.float64))
    assert schedule.float() is schedule and schedule.alpha.dtype == schedule.sigma.dtype == torch.float32
    assert schedule.at(torch.tensor([1]), torch.zeros(1, 1, dtype=torch.float64))[1].item() == wide[1].float().double().item()
    assert Schedule.linear(5).double().alpha.dtype == torch.float64


def test_a_float32_schedule_is_wrong_in_the_fourth_digit():
    "The reason for float64 tables: 1 - alpha_bar at t = 1 cancels; rounding may cost eps / (2 · 1e-4), about 6e-4."
    b = torch.linspace(1e-4, 0.02, 1000)
    sigma = (1 - (1 - b).cumprod(0)[0]).sqrt()
    error = abs(sigma / Schedule.linear(1000).sigma[1] - 1)
    assert 1e-5 < error < 6e-4


def test_a_schedule_moves_and_loads_with_its_module():
    F = Hot(Schedule.linear(6)).to("meta")
    assert F.schedule.alpha.device.type == "meta" and F.schedule.alpha.dtype == torch.float64
    a, b, x, t = Schedule.linear(6), Schedule.cosine(6), torch.zeros(6, 1), torch.arange(1, 7)
    a.at(t, x)
    a.load_state_dict(b.state_dict())
    assert all(map(torch.equal, a.at(t, x), b.at(t, x)))


def test_tables_keep_the_order_of_their_columns():
    table = Tables(b=torch.tensor([1.0, 2.0]), a=torch.tensor([3.0, 4.0]))
    b, a = table.at(torch.tensor([1, 0]), normal(2, device="cpu"))
    assert b.tolist() == [2.0, 1.0] and a.tolist() == [4.0, 3.0]


def test_for_the_times_of_a_run_the_columns_are_numbers():
    "And those of the tables as they stand: moved, cast or loaded."
    schedule, x, t = Schedule.linear(20), normal(2, 3, 4, device="cpu"), torch.tensor([7, 7])
    def numbers(of=7):
        t.number = of
        return schedule.on(t, x)
    assert all(torch.equal(a, b) for a, b in zip(schedule.on(t, x), schedule.at(t, x)))
    assert all(isinstance(v, float) for v in numbers())
    for change in (lambda: None, lambda: schedule.float(), lambda: schedule.load_state_dict(Schedule.cosine(20).state_dict()),
                   lambda: schedule.to("cpu", torch.float64)):
        change()
        for k in 0, 7, 20: assert numbers(k) == (schedule.alpha[k].item(), schedule.sigma[k].item())

"""The likelihood objective, the loss in the network's own space, and both with their random numbers set apart."""
import pytest
import torch
from conftest import close, full, normal, per_row, refuses, rng, same_mean
from families import mixture
from hypothesis import given
from hypothesis import strategies as st
from strategies import schedules, seeds

from udm_book.edit import EditAny
from udm_book.hot import Hot
from udm_book.mask import AtRate
from udm_book.objective import Loss, Objective, comb, independent_times, network_loss, nll, noised, stratified_times
from udm_book.oracle import Oracle
from udm_book.parameterization import EPS, X0, Denoiser, V
from udm_book.posterior import Categorical, Dirac
from udm_book.schedule import Schedule

SCHEDULE = Schedule.linear(8, 0.05, 0.6)


def cubic(x, t, shift=0.0): return x**3 / 10 + per_row(t.to(x.dtype), x) / 8 + shift


@given(schedules(), seeds)
def test_nll_of_a_dirac_is_the_squared_error(schedule, seed):
    F, x0 = Hot(schedule), normal(5, 2, 3, seed=seed, device="cpu")
    t = torch.randint(1, F.T + 1, (5,), generator=rng(seed, "cpu"))
    got = nll(F, lambda xt, t: Dirac(cubic(xt, t)), x0, t, generator=rng(seed, "cpu"))
    xt = F.sample(x0, t, generator=rng(seed, "cpu"))
    want = torch.stack([((cubic(xt[i:i + 1], t[i:i + 1]) - x0[i]) ** 2).sum() for i in range(5)])
    close(got, want, 6 * (1 + want))


def test_the_exact_posterior_has_the_least_nll():
    "Entropy below cross entropy by KL: at every time the oracle beats oracles of other data, by more than 5 standard errors."
    data, n = mixture(2, 2, seed=1).cpu(), 20_000
    x0, F = data.sample(n, generator=rng(0, "cpu")), Hot(SCHEDULE)
    for t in 1, 4, 8:
        best = nll(F, Oracle(data, SCHEDULE), x0, full(x0, t), generator=rng(t, "cpu"))
        for other in mixture(1, 2, seed=1).cpu(), mixture(2, 2, seed=2).cpu():
            gap = nll(F, Oracle(other, SCHEDULE), x0, full(x0, t), generator=rng(t, "cpu")) - best
            assert gap.mean() > 5 * gap.std() / n**0.5


@pytest.mark.parametrize("P", [EPS, X0, V], ids=lambda P: P.name)
def test_network_loss_is_the_error_in_x0_over_its_weight(P):
    "`|y - y_hat|² out² = |x0 - x0_hat|²`: the definition of a parameterization's weight."
    F, D, x0 = Hot(SCHEDULE), Denoiser(cubic, SCHEDULE, P), normal(6, 2, 2, device="cpu")
    t = torch.tensor([1, 2, 3, 5, 7, 8])
    loss = network_loss(F, D, x0, t, generator=rng(3, "cpu"))
    weight = P.weight(SCHEDULE.alpha, SCHEDULE.sigma)[t]
    error = nll(F, D, x0, t, generator=rng(3, "cpu")) / 4                           # the mean over four coordinates
    close(loss * weight, error, 20 * (1 + weight) * (1 + loss))
    close(network_loss(F, D, x0, t, weight=lambda t: t + 0.5, generator=rng(3, "cpu")), (t + 0.5) * loss, 20 * (1 + loss))


def test_times_are_drawn_uniformly_from_1_to_T():
    seen = []
    def net(x, t):
        seen.append(t)
        return x
    D = Denoiser(net, SCHEDULE, EPS)
    network_loss(Hot(SCHEDULE), D, torch.zeros(40_000, 1), generator=rng(0, "cpu"))
    same_mean(torch.nn.functional.one_hot(seen[0], 10).double(), torch.tensor([0.0] + 8 * [1 / 8] + [0.0]).double())


def test_times_and_noise_come_from_the_generator_alone():
    F, D, x0 = Hot(SCHEDULE), Denoiser(cubic, SCHEDULE, EPS), normal(8, 2, device="cpu")
    state = torch.get_rng_state()
    a, b = (network_loss(F, D, x0, generator=rng(1, "cpu")) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(state, torch.get_rng_state())
    nll(F, D, x0, torch.arange(1, 9), generator=rng(1, "cpu"))
    assert torch.equal(state, torch.get_rng_state())


def test_conditions_reach_the_network_and_gradients_its_weights():
    F, x0, t = Hot(SCHEDULE), normal(3, 2, device="cpu"), torch.tensor([1, 4, 8])
    D = Denoiser(cubic, SCHEDULE, X0)
    plain, moved = (network_loss(F, D, x0, t, generator=rng(0, "cpu"), shift=s) for s in (0.0, 1.0))
    assert (plain != moved).all()
    assert (nll(F, D, x0, t, generator=rng(0, "cpu"), shift=1.0) != nll(F, D, x0, t, generator=rng(0, "cpu"))).all()
    layer = torch.nn.Linear(2, 2).double()
    network_loss(F, Denoiser(lambda x, t: layer(x), SCHEDULE, V), x0, t).sum().backward()
    assert layer.weight.grad.abs().min() > 0


# ---------------------------------------------------------------------------------------------------- randomness set apart


class Bend(torch.nn.Module):
    "A network with one weight, which answers each row by itself."
    def __init__(self):
        super().__init__()
        self.bend = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def forward(self, x, t, shift=0.0): return self.bend * x**3 + per_row(t.to(x.dtype), x) / 8 + shift


class Guess(torch.nn.Module):
    "A law of tokens that depends on the time."
    def forward(self, xt, t): return Categorical(torch.nn.functional.one_hot(xt, 3).double() * per_row(t.double(), xt).unsqueeze(-1))


def rows(draws, part): return draws[part] if isinstance(draws, torch.Tensor) else tuple(rows(d, part) for d in draws)


@given(st.integers(1, 40), seeds)
def test_a_comb_is_even_and_turns(n, seed):
    u = comb(n, rng(seed, "cpu"))
    assert u.dtype == torch.float64 and (0 <= u).all() and (u < 1).all()
    turn = torch.rand(1, generator=rng(seed, "cpu"), dtype=torch.float64)
    assert u[0] == turn and ((u.sort().values * n).floor() == torch.arange(n)).all()                # one tooth in each n-th
    close(u.sort().values.diff(), torch.full((n - 1,), 1 / n, dtype=torch.float64))
    assert n == 1 or (u.diff() < 0).sum() <= 1


@pytest.mark.parametrize("times", [independent_times, stratified_times])
def test_each_time_is_uniform_by_itself_and_weighs_1(times):
    F, g, n = Hot(SCHEDULE), rng(0, "cpu"), 3
    drawn = [times(F, n, g) for _ in range(4000)]
    t = torch.stack([t for t, _ in drawn])
    assert t.dtype == torch.int64 and all((weight == 1).all() and weight.shape == (n,) for _, weight in drawn)
    for row in t.T:
        same_mean(torch.nn.functional.one_hot(row, 10).double(), torch.tensor([0.0] + 8 * [1 / 8] + [0.0]).double())
    again, state = times(F, n, rng(0, "cpu"))[0], torch.get_rng_state()
    assert torch.equal(again, t[0]) and torch.equal(times(F, n, rng(0, "cpu"))[0], again) and torch.equal(state, torch.get_rng_state())
    torch.manual_seed(3)
    a = times(F, n)[0]
    torch.manual_seed(3)
    assert torch.equal(times(F, n)[0], a)                                           # without a generator the global one
    if torch.cuda.is_available(): assert all(v.is_cuda for v in times(F, n, rng(0, "cuda")))


@given(st.integers(1, 12), st.integers(1, 60), seeds)
def test_stratified_times_are_as_even_as_can_be(T, n, seed):
    "Each time comes n/T times, rounded down or up."
    t, _ = stratified_times(Hot(Schedule.linear(T, 0.05, 0.6)), n, rng(seed, "cpu"))
    counts = t.bincount(minlength=T + 1)
    assert counts[0] == 0 and len(counts) == T + 1
    assert ((counts[1:] == n // T) | (counts[1:] == -(-n // T))).all()


def test_independent_times_are_independent():
    t = torch.stack([independent_times(Hot(SCHEDULE), 2, g)[0] for g in [rng(1, "cpu")] for _ in range(20_000)])
    same_mean(torch.nn.functional.one_hot(8 * (t[:, 0] - 1) + t[:, 1] - 1, 64).double(), torch.full((64,), 1 / 64).double())


def test_a_loss_is_that_of_its_draws():
    F, x0, D = Hot(SCHEDULE), normal(12, 2, device="cpu"), Denoiser(Bend(), SCHEDULE, EPS)
    def times(F, n, generator):
        t, _ = independent_times(F, n, generator)
        return t, t.double() / 3
    for loss in network_loss, nll:
        objective = Loss(F, D, loss, times=times)
        t, weight, eps = draws = objective.draw(x0, rng(2, "cpu"))
        g = rng(2, "cpu")
        assert torch.equal(t, torch.randint(1, 9, (12,), generator=g))
        assert torch.equal(eps, torch.randn(12, 2, generator=g, dtype=torch.float64))
        assert torch.equal(objective(x0, draws), weight * loss(F, D, x0, t, eps)) and torch.equal(weight, t.double() / 3)
        assert (objective(x0, draws) != objective(x0, draws, shift=1.0)).all()
    assert isinstance(Loss(F, D), Objective) and Loss(F, D).loss is network_loss and Loss(F, D).times is stratified_times
    assert dict(Loss(F, D).named_parameters()).keys() == {"denoiser.net.bend"}


@pytest.mark.parametrize("loss", [network_loss, nll])
def test_draws_belong_to_rows(loss):
    "Pure, and shared out in any way the same losses: what two processes need to be as one."
    F, x0 = Hot(SCHEDULE), normal(9, 2, device="cpu")
    objective = Loss(F, Denoiser(Bend(), SCHEDULE, V), loss)
    draws, state = objective.draw(x0[:1].expand(9, 2), rng(3, "cpu")), torch.get_rng_state()     # of x0 the shape alone is read
    whole = objective(x0, draws)
    assert torch.equal(whole, objective(x0, draws)) and torch.equal(state, torch.get_rng_state())
    for parts in ((slice(4), slice(4, 9)), (slice(0, 9, 2), slice(1, 9, 2))):
        for part in parts: close(objective(x0[part], rows(draws, part)), whole[part], 20 * (1 + whole[part]))


def test_noise_of_two_tensors_is_shared_out_too():
    F, x0 = EditAny(3, AtRate.even(8)), torch.randint(0, 3, (6, 5), generator=rng(1, "cpu"))
    objective = Loss(F, Guess(), nll)
    draws = objective.draw(x0, rng(3, "cpu"))
    whole = objective(x0, draws)
    close(torch.cat([objective(x0[part], rows(draws, part)) for part in (slice(2), slice(2, 6))]), whole, 10 * (1 + whole))


def test_stratified_losses_have_the_mean_of_all_times_and_scatter_less():
    F, n = Hot(SCHEDULE), 16
    D, x0 = Denoiser(Bend(), SCHEDULE, EPS), normal(1, 50, device="cpu").expand(n, 50)
    means = {}
    for times in independent_times, stratified_times:
        objective, g = Loss(F, D, times=times), rng(4, "cpu")
        with torch.no_grad(): means[times] = torch.stack([objective(x0, objective.draw(x0, g)).mean() for _ in range(1000)])
    every = torch.arange(1, 9).repeat(2000)
    with torch.no_grad(): want = network_loss(F, D, x0[:1].expand(len(every), 50), every, generator=rng(5, "cpu"))
    for found in means.values():
        assert abs(found.mean() - want.mean()) < 5 * (found.var() / len(found) + want.var() / len(want)).sqrt()
    ratio = means[stratified_times].var() / means[independent_times].var()
    assert ratio * (1 + 5 * (4 / 1000) ** 0.5) < 1                                  # the standard error of a ratio of two variances


def test_what_is_given_is_not_drawn():
    F, x0, t, eps = Hot(SCHEDULE), normal(4, 2, device="cpu"), torch.tensor([1, 8, 3, 5]), normal(4, 2, seed=1, device="cpu")
    got = noised(F, x0, t, eps, None)
    assert got[0] is t and got[1] is eps and torch.equal(got[2], F(x0, t, eps))
    assert torch.equal(network_loss(F, Denoiser(cubic, SCHEDULE, X0), x0, t, eps), (cubic(got[2], t) - x0).square().mean(1))
    g = rng(6, "cpu")
    t, eps, xt = noised(F, x0, None, None, rng(6, "cpu"))
    assert torch.equal(t, torch.randint(1, 9, (4,), generator=g)) and torch.equal(eps, torch.randn(4, 2, generator=g, dtype=x0.dtype))
    assert torch.equal(xt, F(x0, t, eps))


F8, D8, X8 = Hot(SCHEDULE), Denoiser(cubic, SCHEDULE, EPS), torch.zeros(3, 2)
T8 = torch.tensor([1, 4, 8])
CASES = {
    "a loss at time 0": (ValueError, lambda: noised(F8, X8, T8 - 1, None, None), r"times in 1\.\.8", "0 to 7"),
    "a loss beyond T": (ValueError, lambda: network_loss(F8, D8, X8, T8 + 1), r"times in 1\.\.8", "2 to 9"),
    "a likelihood beyond T": (ValueError, lambda: nll(F8, D8, X8, T8 + 1), r"times in 1\.\.8", "2 to 9"),
    "two times for three rows": (ValueError, lambda: Loss(F8, D8)(X8, (T8[:2], torch.ones(2), X8)), r"t of shape \(3,\)", r"\(2,\)"),
    "noise of other rows": (ValueError, lambda: Loss(F8, D8)(X8, (T8, torch.ones(3), X8[:2])), r"eps shaped as x0, \(3, 2\)", r"\(2, 2\)"),
    "times that are no integers": (TypeError, lambda: nll(F8, D8, X8, T8 / 1), "integer times", "torch.float32"),
}
test_the_message_says_what_was_expected_and_what_came = refuses(CASES)

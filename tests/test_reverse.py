"""Kernels, the loop, and the collapsed loop."""
import pytest
import torch
from conftest import close, full, normal, per_row, rng, run_bound, same_mean, unhooked
from families import Other, mixture
from hypothesis import given
from hypothesis import strategies as st
from strategies import runs, seeds

from udm_book.forward import Forward
from udm_book.hot import Hot, ddim, ddpm
from udm_book.oracle import Oracle
from udm_book.parameterization import EPS, X0, Denoiser, V
from udm_book.posterior import Dirac, Gaussian
from udm_book.reverse import (
    Kernel, MixNoise, Step, Wrapper, bar, clock, coefficients, fresh_noise, reuse_noise, reverse, rowwise, sample)
from udm_book.schedule import Schedule

KERNELS = {"fresh": fresh_noise, "reuse": reuse_noise, "mix.5": MixNoise(0.5), "mix1": MixNoise(1.0), "ddpm": ddpm,
           "ddim.3": ddim(0.3), "mix by time": MixNoise(lambda F, t, s: (t - s) / F.T)}
kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
SCHEDULE = Schedule.linear(10, 0.05, 0.5)
slope = 0.5


def net(x, t): return slope * x.sin() + per_row(t.to(x.dtype), x) / 50         # moves by at most `slope` times its input


# ---------------------------------------------------------------------------------------------- the collapsed loop is one


@kernels
@pytest.mark.parametrize("P", [EPS, X0, V], ids=lambda P: P.name)
@given(var=st.sampled_from([None, 0.3]), data=st.data(), seed=seeds, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_sample_is_the_end_of_reverse(kernel, P, var, data, seed, dtype):
    "Same random stream, any sub-sequence, also one that stops early; with gradients, without, from reused buffers."
    F, times = Hot(SCHEDULE), data.draw(runs(SCHEDULE.T))
    times = times[:data.draw(st.integers(2, len(times)))]
    D = Denoiser(net, SCHEDULE, P, None if var is None else torch.full((11,), var))
    xT = normal(2, 3, seed=seed, dtype=dtype, device="cpu")
    a, b, c = (rng(seed, "cpu") for _ in range(3))
    steps = list(reverse(F, D, xT, times, kernel, generator=a))
    skip, out = D.affine.skip.abs().tolist(), D.affine.out.abs().tolist()
    kappa = run_bound(F, kernel, xT, steps, lambda t: skip[t] + out[t] * slope)
    slow = sample(F, D, xT, times, kernel, generator=b)
    with torch.no_grad(): quick = sample(F, D, xT, times, kernel, generator=c)
    assert torch.equal(slow, quick) and quick.dtype == dtype
    assert torch.equal(a.get_state(), b.get_state()) and torch.equal(a.get_state(), c.get_state())
    close(quick, steps[-1].xt, kappa)


@kernels
def test_coefficients_are_the_kernel_fed_with_unit_vectors(kernel):
    F, times, unit = Hot(SCHEDULE), [10, 7, 3, 2], torch.eye(3, dtype=torch.float64)
    for (t, s), row in zip(zip(times, times[1:]), coefficients(F, kernel, times)):
        want = kernel(F, unit[:, :1], unit[:, 1:2], full(unit, t), full(unit, s), unit[:, 2:]).flatten()
        close(torch.tensor(row, dtype=torch.float64), want, 1 / SCHEDULE.sigma[t])


def test_the_result_is_never_the_start_itself():
    xT = normal(2, 3, device="cpu")
    end = sample(Hot(SCHEDULE), lambda x, t: Dirac(x), xT, [10, 0], ddpm)
    assert torch.equal(end, xT) and end is not xT
    x0 = normal(2, 3, seed=1, device="cpu")
    assert sample(Hot(SCHEDULE), lambda x, t: Dirac(x0), xT, [10, 0], ddpm) is x0


def test_only_affine_families_and_kernels_collapse():
    class Plain(Hot):
        affine = Forward.affine
    def transition(F, posterior, xt, t, s, *, generator): return xt
    assert coefficients(Plain(SCHEDULE), ddpm, [2, 1]) is None
    assert coefficients(Hot(SCHEDULE), transition, [2, 1]) is None
    class Own(Kernel):
        def __call__(self, F, x0, xt, t, s, fresh): return x0
    t, s = torch.tensor([2]), torch.tensor([1])
    assert ddpm.bridge(Plain(SCHEDULE), t, s) is None and Own().bridge(Hot(SCHEDULE), t, s) is None
    D, xT = Denoiser(net, SCHEDULE, V), normal(2, 3, device="cpu")
    a, b = (sample(F, D, xT, [10, 5, 1], ddpm, generator=rng(1, "cpu")) for F in (Hot(SCHEDULE), Plain(SCHEDULE)))
    close(a, b, 20)


def test_parameters_get_the_same_gradient_through_both_loops():
    layer, F, xT, slopes = torch.nn.Linear(3, 3).double(), Hot(SCHEDULE), normal(2, 3, device="cpu"), []
    for last in sample, lambda *a, **k: list(reverse(*a, **k))[-1].xt:
        D = Denoiser(lambda x, t: layer(x), SCHEDULE, V)
        slopes.append(torch.autograd.grad(last(F, D, xT, [10, 6, 3, 0], ddpm, generator=rng(0, "cpu")).square().sum(), layer.weight)[0])
    close(*slopes, slopes[0].abs().max())
    assert slopes[0].abs().min() > 0


# ------------------------------------------------------------------------------------------------------------ step by step


@kernels
def test_the_loop_is_guess_then_noise_then_kernel(kernel):
    "Written out with its own random stream: the posterior draws first, then the fresh noise, only where it is used."
    F, xT, times = Hot(SCHEDULE), normal(3, 2, device="cpu"), [10, 6, 5, 1, 0]
    def D(x, t): return Gaussian(net(x, t), torch.tensor(0.2, dtype=x.dtype))
    g, x = rng(5, "cpu"), xT
    for (t, s), step in zip(zip(times, times[1:]), reverse(F, D, xT, times, kernel, generator=rng(5, "cpu"))):
        tt, ss = full(x, t), full(x, s)
        x0 = D(x, tt).sample(generator=g)
        fresh = torch.randn(x.shape, generator=g, dtype=x.dtype) if s and kernel is not reuse_noise else None
        x = kernel(F, x0, x, tt, ss, fresh) if s else x0
        assert step.t == s and torch.equal(step.x0, x0) and torch.equal(step.xt, x)


@given(st.integers(3, 10), seeds)
def test_reusing_noise_in_two_steps_is_one_step(t, seed):
    F, (x0, xt) = Hot(SCHEDULE), (normal(4, 2, seed=seed + k, device="cpu") for k in (0, 1))
    def go(x, t, s): return reuse_noise(F, x0, x, full(x, t), full(x, s), None)
    close(go(go(xt, t, 2), 2, 1), go(xt, t, 1), (1 + xt.abs() + x0.abs()) / SCHEDULE.sigma[1] ** 2)


def test_mixing_keeps_the_variance_of_the_noise():
    F, x0 = Hot(SCHEDULE), torch.zeros(1, 1, dtype=torch.float64)
    t, s, one = full(x0, 8), full(x0, 4), torch.ones_like(x0)
    for rho in 0.0, 0.3, 0.5, 1.0:
        keep = MixNoise(rho)(F, x0, SCHEDULE.sigma[8] * one, t, s, 0 * one) / SCHEDULE.sigma[4]
        add = MixNoise(rho)(F, x0, 0 * one, t, s, one) / SCHEDULE.sigma[4]
        close(add, torch.full_like(add, rho))
        close(keep**2 + add**2, one)


def test_shares_and_what_kernels_draw():
    F = Hot(SCHEDULE)
    assert fresh_noise.share(F, 3, 1) == 1 and reuse_noise.share(F, 3, 1) == 0 and MixNoise(0.4).share(F, 3, 1) == 0.4
    assert fresh_noise.draws and ddpm.draws and not reuse_noise.draws
    with pytest.raises(TypeError): Kernel()


def test_a_kernel_without_use_for_noise_draws_none():
    F, xT, g = Hot(SCHEDULE), normal(3, 2, device="cpu"), rng(2, "cpu")
    before = g.get_state()
    for run in sample, lambda *a, **k: list(reverse(*a, **k)):
        run(F, Denoiser(net, SCHEDULE, EPS), xT, range(10, -1, -1), reuse_noise, generator=g)
        assert torch.equal(g.get_state(), before)
        run(F, Denoiser(net, SCHEDULE, EPS), xT, [10, 0], ddpm, generator=g)                # nor a last step
        assert torch.equal(g.get_state(), before)


@pytest.mark.parametrize("run", [sample, lambda *a, **k: list(reverse(*a, **k))], ids=["sample", "reverse"])
def test_denoisers_get_times_of_each_row_the_target_if_they_ask_and_the_conditions(run):
    seen = []
    class D:
        needs_s = True
        def __call__(self, xt, t, *, s, label):
            seen.append((t.tolist(), s.tolist(), label))
            return Dirac(xt)
    run(Hot(SCHEDULE), D(), normal(2, 1, device="cpu"), [10, 4, 0], ddpm, label=7)
    assert seen == [([10, 10], [4, 4], 7), ([4, 4], [0, 0], 7)]


def test_wrappers_are_modules_that_need_what_they_wrap_needs():
    layer = torch.nn.Linear(2, 2)
    assert Wrapper(layer).denoiser is layer and len(list(Wrapper(layer).parameters())) == 2 and not Wrapper(layer).needs_s
    layer.needs_s = True
    assert Wrapper(layer).needs_s


def test_conditions_of_rows_are_told_from_those_of_the_run():
    rows, one = torch.zeros(3, 2), torch.tensor(3)
    assert rowwise(dict(label=rows, scale=one, wrong=rows[:2], name="abc"), 3).keys() == {"label"}


def test_transitions_work_on_the_posterior_itself():
    calls = []
    def transition(F, posterior, xt, t, s, *, generator):
        calls.append((t.tolist(), s.tolist(), generator))
        return posterior.mean + xt
    g, xT = rng(0, "cpu"), normal(2, 1, device="cpu")
    D = lambda x, t: Gaussian(2 * x, torch.ones((), dtype=x.dtype))                 # noqa: E731
    steps = list(reverse(Hot(SCHEDULE), D, xT, [10, 4, 0], transition, generator=g))
    assert calls == [([10, 10], [4, 4], g), ([4, 4], [0, 0], g)]
    assert torch.equal(steps[0].x0, 2 * xT) and torch.equal(steps[1].xt, 2 * (3 * xT) + 3 * xT)
    assert torch.equal(sample(Hot(SCHEDULE), D, xT, [10, 4, 0], transition, generator=g), steps[1].xt)


@pytest.mark.parametrize("kernel", [ddpm, lambda F, posterior, xt, t, s, *, generator: xt], ids=["kernel", "transition"])
def test_families_that_do_not_start_at_the_data_end_with_the_guess(kernel):
    class Encoded(Hot):
        starts_at_data = False
    xT = normal(2, 1, device="cpu")
    *_, before, last = reverse(Encoded(SCHEDULE), lambda x, t: Dirac(3 * x), xT, [10, 5, 0], kernel)
    assert last.t == 0 and torch.equal(last.xt, 3 * before.xt) and torch.equal(last.x0, last.xt)
    assert before.t == 5 and torch.equal(before.x0, 3 * xT) and not torch.equal(before.xt, before.x0)


class Grain(Forward):
    "x_t = (1 - t/4) x0 + eps / 2: the noise of t = 0 stays."
    T, invertible, normal, starts_at_data = 4, True, True, False
    def fade(self, x, t): return x * (1 - per_row(t, x) / 4)
    def forward(self, x0, t, eps): return self.fade(x0, t) + eps / 2
    def sample_noise(self, x0, *, generator=None): return torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    def infer_noise(self, x0, xt, t, fresh): return 2 * (xt - self.fade(x0, t))
    def prior(self, like, *, generator=None): return like


class EndsAtZero(Grain): ends_with_guess = False


GRAIN_KERNELS = {"fresh": fresh_noise, "reuse": reuse_noise, "mix.5": MixNoise(0.5)}


@pytest.mark.parametrize("kernel", GRAIN_KERNELS.values(), ids=GRAIN_KERNELS)
def test_the_last_step_is_a_guess_or_a_step_as_the_family_says(kernel):
    "Written out: with ends_with_guess = False the kernel is taken to s = 0 too, with noise of its own."
    xT = normal(3, 2, device="cpu")
    def D(x, t): return Gaussian(net(x, t), torch.tensor(0.2, dtype=x.dtype))
    for F in Grain(), EndsAtZero():
        g, x = rng(5, "cpu"), xT
        *_, last = reverse(F, D, xT, [4, 1, 0], kernel, generator=rng(5, "cpu"))
        for t, s in (4, 1), (1, 0):
            x0, guess_only = D(x, full(x, t)).sample(generator=g), s == 0 and F.ends_with_guess
            fresh = F.sample_noise(x0, generator=g) if kernel is not reuse_noise and not guess_only else None
            x = x0 if guess_only else kernel(F, x0, x, full(x, t), full(x, s), fresh)
        assert last.t == 0 and torch.equal(last.x0, x0) and torch.equal(last.xt, x)
        assert torch.equal(last.xt, last.x0) == F.ends_with_guess
        assert torch.equal(sample(F, D, xT, [4, 1, 0], kernel, generator=rng(5, "cpu")), x)


def test_a_transition_takes_the_last_step_too_where_the_family_says():
    def transition(F, posterior, xt, t, s, *, generator): return xt + 1
    xT = normal(3, 2, device="cpu")
    for F, want in (Grain(), 2 * (xT + 1)), (EndsAtZero(), xT + 2):
        *_, last = reverse(F, lambda x, t: Dirac(2 * x), xT, [4, 1, 0], transition)
        assert torch.equal(last.xt, want) and torch.equal(last.x0, 2 * (xT + 1))


@pytest.mark.parametrize("ends", [True, False])
def test_both_loops_end_alike(ends):
    class Ending(Hot): ends_with_guess = ends
    F, xT, a, b = Ending(SCHEDULE), normal(2, 3, device="cpu"), rng(1, "cpu"), rng(1, "cpu")
    D = Denoiser(net, SCHEDULE, V)
    *_, last = reverse(F, D, xT, [10, 4, 0], ddpm, generator=a)
    close(sample(F, D, xT, [10, 4, 0], ddpm, generator=b), last.xt, 20)
    assert torch.equal(a.get_state(), b.get_state())


def test_only_noise_that_says_it_is_normal_is_mixed():
    F, x, t = Hot(SCHEDULE), torch.zeros(2, 3), torch.tensor([4, 4])
    assert F.normal and not Other().normal and Other().ends_with_guess and Other().starts_at_data and not Other().invertible
    assert torch.isfinite(MixNoise(0.5)(F, x, x, t, t - 1, x)).all()
    for rho in 0.0, 0.5, lambda F, t, s: 0.5:
        with pytest.raises(TypeError, match="expected a family with normal noise to mix; got Other"):
            MixNoise(rho)(Other(), x, x, t, t - 1, x)


def test_times_may_be_any_iterable_of_integers():
    import numpy as np
    F, D, xT = Hot(SCHEDULE), Denoiser(net, SCHEDULE, V), normal(2, 1, device="cpu")
    runs = [SCHEDULE.times(5), tuple(SCHEDULE.times(5)), np.array(SCHEDULE.times(5)), iter(SCHEDULE.times(5))]
    with unhooked(): a, *rest = (sample(F, D, xT, times, reuse_noise) for times in runs)
    assert all(torch.equal(a, b) for b in rest)
    assert torch.equal(sample(F, D, xT, range(10, -1, -1), reuse_noise), sample(F, D, xT, list(range(10, -1, -1)), reuse_noise))


def test_unsound_runs_are_refused_before_the_first_step():
    "`reverse` is checked when called, not when first iterated."
    with pytest.raises(ValueError, match="strictly decreasing"):
        reverse(Hot(SCHEDULE), lambda x, t: Dirac(x), torch.zeros(1, 1), [1, 1], ddpm)


def test_progress_goes_to_the_terminal_where_asked(capfd):
    F, D, xT = Hot(SCHEDULE), Denoiser(net, SCHEDULE, V), normal(2, 1, device="cpu")
    for run in sample, lambda *a, **k: list(reverse(*a, **k)):
        run(F, D, xT, [10, 5, 0], ddpm)
        assert capfd.readouterr() == ("", "")
        run(F, D, xT, [10, 5, 0], ddpm, progress=True)
        assert "2/2" in capfd.readouterr().err


def test_progress_is_off_unless_asked_and_rows_may_be_numbers():
    import inspect

    from tqdm import tqdm
    steps = [1]
    assert bar(steps, 1, False) is steps and isinstance(bar(steps, 1, True), tqdm)
    assert not any(inspect.signature(f).parameters["progress"].default for f in (reverse, sample))
    F, xT = Hot(SCHEDULE), normal(3, device="cpu")
    assert torch.equal(sample(F, lambda x, t: Dirac(x / 2), xT, [10, 0], ddpm), xT / 2)


def test_clock_has_a_row_for_each_time():
    a, b = clock([7, 0], torch.zeros(3, 2))
    assert a.tolist() == [7, 7, 7] and b.tolist() == [0, 0, 0] and a.dtype == torch.int64


def test_steps_show_the_draw_or_the_mean_of_the_law():
    a, b = normal(3, 2, device="cpu"), normal(3, 2, seed=1, device="cpu")
    assert Step(1, a, b).x0 is b and Step(1, a, Dirac(b)).x0 is b


# --------------------------------------------------------------------------------------------------- what exactness costs


def test_the_mean_instead_of_a_sample_loses_exactly_the_posterior_variance():
    "One step from T: the variance of E[x0 | x_T] is alpha² v² / (alpha² v + sigma²), far below v (statement: use samples)."
    F, v, n = Hot(Schedule.linear(10, 0.01, 0.3)), 0.8, 40_000
    data = mixture(1, 1).gaussian(torch.zeros(1).double(), torch.tensor([[v]]).double())
    oracle = Oracle(data, F.schedule)
    xT = F.sample(data.sample(n, generator=rng(0, "cpu")), torch.full((n,), 10), generator=rng(1, "cpu"))
    mean = sample(F, lambda x, t: Dirac(oracle(x, t).mean), xT, [10, 0], ddpm)
    drawn = sample(F, oracle, xT, [10, 0], ddpm, generator=rng(2, "cpu"))
    a, s = F.schedule.alpha[-1] ** 2, F.schedule.sigma[-1] ** 2
    same_mean(mean**2, (a * v**2 / (a * v + s))[None])
    same_mean(drawn**2, torch.tensor([v]))
    assert a * v**2 / (a * v + s) < 0.3 * v

"""Cold diffusion: the two samplers as kernels, hot diffusion as a member, errors that telescope, ranks, exact guesses."""
from functools import partial

import pytest
import torch
from conftest import DEVICE, close, full, normal, refuses, rng, same_mean
from hypothesis import given
from hypothesis import strategies as st
from strategies import runs, schedules, seeds
from torch import nn

from udm_book.cold import Cold, Restorer
from udm_book.degradations import Blend, Blur, Cover, Custom, Pool, matrix
from udm_book.forward import normal_like, row
from udm_book.hot import Hot
from udm_book.objective import nll
from udm_book.oracle import LinearOracle
from udm_book.posterior import Dirac, Gaussian, Laplace
from udm_book.reverse import MixNoise, fresh_noise, reuse_noise, reverse, sample

SIZE = (1, 4, 4)
inf, nan = float("inf"), float("nan")


def blur(): return Blur(4, [0, 0.4, 0.8, 1.5, 3.0, inf]).to(DEVICE)
def pool(): return Pool(4).to(DEVICE)
def cover(): return Cover.disc(4, 4).to(DEVICE)
def fade(): return Blend.fade(5, 0.3).to(DEVICE)
def wave(): return Custom(lambda x, t: x + row(t, x) * torch.sin(3 * x), 4)


LINEAR = {"blur": blur, "pool": pool, "cover": cover}
ALL = LINEAR | {"fade": fade, "wave": wave}
kinds, linear = st.sampled_from(list(ALL)), st.sampled_from(list(LINEAR))


def pictures(n, k=1, seed=0, **more):
    """k sets of n pictures."""
    x = normal(k, n, *SIZE, seed=seed, **more)
    return x[0] if k == 1 else x


def levels(D, seed=0, first=None):
    r = torch.rand(D.T + 1, generator=rng(seed, "cpu"), dtype=torch.float64) + 0.2
    if first is not None: r[0] = first
    return r


def moving(law, seed=0):
    """A denoiser that has nothing to do with the data."""
    g = rng(seed)
    return lambda xt, t: law(torch.tanh(2 * xt) + torch.randn(xt.shape, generator=g, dtype=xt.dtype, device=xt.device))


def times_of(draw, T):
    s, t = sorted(draw(st.sets(st.integers(0, T), min_size=2, max_size=2)))
    return t, s


# ---------------------------------------------------------------------------------------------------------- the family


@given(kinds, seeds, st.floats(0, 3))
def test_the_state_is_the_damage_plus_the_level_times_the_noise(kind, seed, scale):
    D = ALL[kind]()
    r, (x0, eps) = levels(D, seed), pictures(D.T + 1, 2, seed)
    t, F = torch.arange(D.T + 1, device=DEVICE), Cold(D, scale, r)
    close(F(x0, t, eps), D(x0, t) + row(r.to(DEVICE)[t], x0) * eps, 20)
    close(Cold(D)(x0, t, eps), D(x0, t) + eps, 20)                                           # levels are 1 unless given
    later, eps = t[1:], eps[1:]
    close(F.infer_noise(x0[1:], F(x0[1:], later, eps), later), eps, 20 / 0.2)                # |x| < 20, r > 0.2
    noise = F.sample_noise(x0, generator=rng(seed))
    assert torch.equal(noise, scale * normal_like(x0, rng(seed)))
    assert torch.equal(F.sample(x0, t, generator=rng(seed)), F(x0, t, noise))
    assert torch.equal(F.prior(x0, generator=rng(seed)), F(x0, full(x0, D.T), noise))


def test_a_level_may_vanish_at_the_data_and_anything_numeric_will_do_for_levels():
    D, x0 = pool(), pictures(2)
    F = Cold(D, 1.0, [0.0, 1.0, 2.0])
    assert F.table.levels.tolist() == [0, 1, 2] and F.table.levels.dtype == torch.float64
    assert torch.equal(F(x0, full(x0, 0), normal_like(x0, rng())), x0) and F.T == 2
    assert torch.equal(Cold(D).table.levels, torch.ones(3, dtype=torch.float64, device=F.table.levels.device))


@pytest.mark.parametrize("scale, first, starts, ends", [(0.0, 1.0, True, False), (0.0, 0.0, True, True), (0.5, 0.0, True, True), (0.5, 1.0, False, False)])
def test_what_the_class_says_of_its_ends(scale, first, starts, ends):
    F = Cold(pool(), scale, [first, 1.0, 1.0])
    assert F.starts_at_data is starts and F.ends_with_guess is ends and F.normal is True and F.invertible
    x0 = pictures(3)
    noise = F.sample_noise(x0, generator=rng())
    assert torch.equal(F(x0, full(x0, 0), noise), x0) is starts


def test_no_noise_takes_no_random_numbers():
    g, h, x0 = rng(), rng(), pictures(3)
    F = Cold(pool())
    assert torch.equal(F.sample_noise(x0, generator=g), torch.zeros_like(x0))
    sample(F, lambda xt, t: Dirac(xt), F.prior(x0, generator=g), [2, 1, 0], fresh_noise, generator=g)
    assert torch.equal(g.get_state(), h.get_state())


def test_any_law_of_noise():
    def coin(like, generator=None): return torch.randint(0, 2, like.shape, generator=generator, device=like.device).to(like) * 2 - 1
    F, x0, t = Cold(pool(), 0.3, law=coin), pictures(3), torch.tensor([1, 2, 2], device=DEVICE)
    assert F.sample_noise(x0, generator=rng()).abs().eq(0.3).all() and not F.normal
    close(F.infer_noise(x0, F.sample(x0, t, generator=rng()), t), F.sample_noise(x0, generator=rng()), 20)
    with pytest.raises(TypeError, match="normal noise to mix; got Cold"): MixNoise(0.5)(F, x0, x0, t, t - 1, x0)
    assert Cold(pool(), 0.3, law=normal_like).normal


# ------------------------------------------------------------------------------------------------------- the two samplers


@given(kinds, st.data(), seeds, st.floats(1e-6, 1e6))
def test_equal_levels_of_any_size_give_algorithm_two(kind, data, seed, size):
    D = ALL[kind]()
    t, s = times_of(data.draw, D.T)
    guess, xt = pictures(3, 2, seed)
    t, s = full(xt, t), full(xt, s)
    F = Cold(D, 0.0, torch.full((D.T + 1,), size))
    close(reuse_noise(F, guess, xt, t, s, None), xt + D(guess, s) - D(guess, t), 60)


@given(kinds, st.data(), seeds, st.sampled_from([0.0, 1e-9, 1.0]))
def test_unequal_levels_leave_their_ratio(kind, data, seed, scale):
    D = ALL[kind]()
    t, s = times_of(data.draw, D.T)
    r, (guess, xt) = levels(D, seed, data.draw(st.sampled_from([None, 0.0]))), pictures(3, 2, seed)
    want = D(guess, full(xt, s)) + r[s].item() / r[t].item() * (xt - D(guess, full(xt, t)))
    close(reuse_noise(Cold(D, scale, r), guess, xt, full(xt, t), full(xt, s), None), want, 60 * 6)


@given(kinds, st.data(), seeds)
def test_fresh_noise_is_algorithm_one_and_the_limit_of_small_scales(kind, data, seed):
    D = ALL[kind]()
    t, s = times_of(data.draw, D.T)
    r, (guess, xt, e) = levels(D, seed), pictures(3, 3, seed)
    t, s = full(xt, t), full(xt, s)
    cold = fresh_noise(Cold(D, 0.0, r), guess, xt, t, s, Cold(D, 0.0, r).sample_noise(guess))
    assert torch.equal(cold, D(guess, s))
    for scale in 1.0, 1e-5: close(fresh_noise(Cold(D, scale, r), guess, xt, t, s, scale * e) - cold, scale * r[s[0]].item() * e, 60)


@given(kinds, st.data(), st.floats(0, 1), seeds)
def test_without_noise_a_mixture_keeps_a_share_of_the_difference(kind, data, share, seed):
    D = ALL[kind]()
    t, s = times_of(data.draw, D.T)
    guess, xt = pictures(3, 2, seed)
    t, s, F = full(xt, t), full(xt, s), Cold(D)
    want = D(guess, s) + (1 - share**2) ** 0.5 * (xt - D(guess, t))
    close(MixNoise(share)(F, guess, xt, t, s, F.sample_noise(xt)), want, 60)


@pytest.mark.parametrize("kind", ALL)
def test_a_run_ends_with_the_step_of_its_kernel_unless_the_last_level_is_zero(kind):
    D, T = ALL[kind](), ALL[kind]().T
    def denoiser(xt, t): return Dirac(torch.tanh(xt + row(t, xt)))
    xT = pictures(2)
    for kernel in fresh_noise, reuse_noise:
        states = [step.xt for step in reverse(Cold(D), denoiser, xT, range(T, -1, -1), kernel)]
        x = xT
        for t, got in zip(range(T, 0, -1), states):
            guess = denoiser(x, full(x, t)).mean
            x = D(guess, full(x, t - 1)) + (x - D(guess, full(x, t)) if kernel is reuse_noise else 0)
            close(got, x, 1e4)                                                     # at most 5 steps that stretch at most 5-fold
        assert torch.equal(sample(Cold(D), denoiser, xT, range(T, -1, -1), kernel), states[-1])
    short = Cold(D, levels=[0.0] + [1.0] * T)
    before, last = list(reverse(short, denoiser, xT, [T, 1, 0], reuse_noise))
    assert torch.equal(last.xt, denoiser(before.xt, full(xT, 1)).mean)


@given(schedules(12), st.data(), seeds, st.sampled_from([fresh_noise, reuse_noise, MixNoise(0.4)]))
def test_hot_diffusion_is_a_fading_picture_with_fading_noise(schedule, data, seed, kernel):
    fade = Custom(lambda x, t: schedule.at(t, x)[0] * x, schedule.T, linear=True)
    F, H = Cold(fade, 1.0, schedule.sigma), Hot(schedule)
    t, s = times_of(data.draw, schedule.T)
    x0, xt, eps = pictures(3, 3, seed, device="cpu")
    t, s, small = full(x0, t), full(x0, s), schedule.sigma[t].item()
    assert torch.equal(F.sample(x0, t, generator=rng(seed, "cpu")), H.sample(x0, t, generator=rng(seed, "cpu")))
    close(F.infer_noise(x0, xt, t), H.infer_noise(x0, xt, t, None), 20 / small)
    close(kernel(F, x0, xt, t, s, eps), kernel(H, x0, xt, t, s, eps), 20 / small)
    assert F.ends_with_guess and F.starts_at_data and F.normal


# --------------------------------------------------------------------------------------------------- what is forgiven


@given(runs(8), st.floats(0, 1e4), seeds)
def test_for_a_fixed_picture_that_is_added_no_guess_can_go_wrong(times, size, seed):
    x0, v = pictures(2, 2, seed)
    F = Cold(Custom(lambda x, t: x + row(t, x) * v, 8))
    g = rng(seed)
    def nonsense(xt, t): return Dirac(size * torch.randn(xt.shape, generator=g, dtype=xt.dtype, device=xt.device))
    close(sample(F, nonsense, F.prior(x0), times, reuse_noise), x0, 8 * (6 * size + 60))
    naive = sample(F, nonsense, F.prior(x0), times, fresh_noise)
    assert size < 1 or (naive - x0).abs().max() > size / 100                          # while all of the last error stays here


@given(linear, st.data(), st.floats(0.01, 100), seeds)
def test_errors_telescope_and_keep_their_bound(kind, data, size, seed):
    D = LINEAR[kind]()
    A = torch.stack([matrix(D, SIZE, t) for t in range(D.T + 1)]).to(DEVICE)
    times = data.draw(runs(D.T))
    x0, delta = pictures(2, seed=seed), size * normal(D.T + 1, 2, *SIZE, seed=seed + 1)
    F, error, reach = Cold(D), 0.0, 0.0
    def wrong(xt, t): return Dirac(x0 + delta[t[0]])
    for t, step in zip(times, reverse(F, wrong, F.prior(x0), times, reuse_noise)):
        lost, part = A[step.t] - A[t], delta[t].flatten(1)
        error, reach = error + part @ lost.mT, reach + torch.linalg.matrix_norm(lost, 2) * part.norm(dim=1)
        close((step.xt - D(x0, full(x0, step.t))).flatten(1), error, 100 * (6 + 6 * size))
        assert (error.norm(dim=1) <= reach * (1 + 1e-9)).all()


@given(linear, seeds)
def test_an_error_that_never_changes_disappears_as_far_as_the_end_shows_it(kind, seed):
    D = LINEAR[kind]()
    x0, delta = pictures(2, 2, seed)
    F = Cold(D)
    end = sample(F, lambda xt, t: Dirac(x0 + delta), F.prior(x0), range(D.T, -1, -1), reuse_noise)
    close(end, x0 + delta - D(delta, full(x0, D.T)), 200)
    close(sample(F, lambda xt, t: Dirac(x0 + delta), F.prior(x0), range(D.T, -1, -1), fresh_noise), x0 + delta, 20)


def test_pooled_blocks_are_never_touched_again():
    "Each block mean that is still visible stays as it is, whatever the guesses; naive sampling forgets it."
    D, x0 = pool(), pictures(5)
    F, xT = Cold(D), D(pictures(5), full(x0, 2))
    end = {k: D(sample(F, moving(Dirac), xT, [2, 1, 0], k), full(x0, 2)) for k in (fresh_noise, reuse_noise)}
    close(end[reuse_noise], xT, 200)
    assert (end[fresh_noise] - xT).abs().max() > 0.01


# ------------------------------------------------------------------------------------- ranks, and guesses that are drawn


def law(d=16, seed=3):
    a = normal(d, d, seed=seed) / d**0.5
    return normal(*SIZE, seed=seed + 1), a @ a.mT + 0.05 * torch.eye(d, dtype=torch.float64, device=DEVICE)


def oracle(D, r=0.0, steps=None):
    mean, cov = law()
    maps = torch.stack([matrix(D, SIZE, t) for t in range(D.T + 1)]).to(DEVICE)
    return LinearOracle(mean, cov, maps, r * (torch.ones(D.T + 1) if steps is None else steps).double().to(DEVICE))


def draw(n, seed):
    mean, cov = law()
    return mean + (normal(n, 16, seed=seed) @ torch.linalg.cholesky(cov).mT).view(n, *SIZE)


def moments(x):
    x = x.flatten(1)
    i, j = torch.triu_indices(x.shape[1], x.shape[1])
    return torch.cat([x, x[:, i] * x[:, j]], 1)


@pytest.mark.parametrize("kernel", [fresh_noise, reuse_noise], ids=["naive", "improved"])
@pytest.mark.parametrize("D, left", [(pool, 1), (blur, 1), (lambda: Pool(4, [1, 2]).to(DEVICE), 4)], ids=["pool", "blur", "half"])
def test_means_bring_back_no_more_dimensions_than_the_end_has(D, left, kernel):
    D, exact = D(), oracle(D())
    F = Cold(D)
    y = sample(F, lambda xt, t: Dirac(exact(xt, t).mean), F.prior(draw(40, 1)), range(D.T, -1, -1), kernel).flatten(1)
    values = torch.linalg.svdvals(y - law()[0].flatten())
    assert values[left - 1] > 1e-3 * values[0] and values[left] < 1e-6 * values[0]


@pytest.mark.parametrize("kernel", [fresh_noise, reuse_noise], ids=["naive", "improved"])
@pytest.mark.parametrize("kind, scale, times", [("pool", 0.0, [2, 1, 0]), ("blur", 0.0, [5, 0]), ("cover", 0.0, [4, 3, 1, 0]), ("blur", 0.7, [5, 3, 0])])
def test_samples_of_the_exact_posterior_give_the_law_of_the_data(kind, scale, times, kernel):
    D, n, exact = LINEAR[kind](), 6000, oracle(LINEAR[kind](), scale)
    F = Cold(D, scale, torch.ones(D.T + 1))
    g = rng(4)
    with torch.no_grad(): y = sample(F, exact, F.prior(draw(n, 2), generator=g), times, kernel, generator=g)
    mean, cov = law()
    truth = cov + scale**2 * torch.eye(16, dtype=cov.dtype, device=DEVICE)                # with r_0 > 0 the noise of time 0 stays
    i, j = torch.triu_indices(16, 16)
    m = mean.flatten()
    same_mean(moments(y), torch.cat([m, truth[i, j] + m[i] * m[j]])[None])


def test_with_drawn_guesses_and_no_noise_both_samplers_are_one():
    D, x0 = pool(), draw(20, 3)
    F, exact = Cold(D), oracle(D)
    ends = [sample(F, exact, F.prior(x0), [2, 1, 0], k, generator=rng(1)) for k in (fresh_noise, reuse_noise)]
    close(*ends, 1e3)


def test_with_noise_in_the_process_means_are_enough_in_the_limit_of_small_steps():
    "The variance of what is generated approaches that of the data, one over the number of steps at a time."
    missing = []
    for T in 20, 40, 80:
        D, fades = Blur.geometric(4, T, 0.2, 12.0).to(DEVICE), torch.linspace(0, 1, T + 1, dtype=torch.float64)
        F, exact = Cold(D, 0.5, fades), oracle(D, 0.5, fades)
        units = torch.cat([torch.zeros(1, 16), torch.eye(16)]).double().to(DEVICE).view(17, *SIZE)
        y = sample(F, lambda xt, t: Dirac(exact(xt, t).mean), units, range(T, -1, -1), reuse_noise).flatten(1)
        M, A = (y[1:] - y[:1]).mT, matrix(D, SIZE, T).to(DEVICE)
        made = M @ (A @ law()[1] @ A.mT + 0.25 * torch.eye(16, dtype=y.dtype, device=DEVICE)) @ M.mT
        missing.append((torch.linalg.matrix_norm(made - law()[1]) / torch.linalg.matrix_norm(law()[1])).item())
    assert missing[2] < 0.1 and all(1.6 < a / b < 2.4 for a, b in zip(missing, missing[1:])), missing


# ------------------------------------------------------------------------------------------------------------ restorers


@given(seeds, st.floats(0.1, 5))
def test_the_objective_is_the_absolute_error(seed, width):
    D, x0 = cover(), pictures(6, seed=seed)
    t = torch.randint(1, D.T + 1, (6,), generator=rng(seed, "cpu")).to(DEVICE)
    def net(xt, t): return torch.tanh(xt) * row(t, xt)
    guess, size = net(D(x0, t), t), torch.tensor(width, dtype=torch.float64, device=DEVICE)
    l1 = (x0 - guess).abs().flatten(1).sum(1)
    close(nll(Cold(D), Restorer(net, partial(Laplace, scale=size)), x0, t), l1 / size + 16 * (2 * size).log(), 16 * 100)
    close(nll(Cold(D), Restorer(net), x0, t), (x0 - guess).square().flatten(1).sum(1), 16 * 1000)


def test_a_restorer_is_a_module_that_hands_on_conditions():
    heard = []
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))
        def forward(self, xt, t, label=None):
            heard.append(label)
            return self.weight * xt
    restorer, x = Restorer(Net(), partial(Gaussian, var=torch.tensor(0.5))), torch.ones(2, 3)
    answer = restorer(x, torch.tensor([1, 2]), label="seven")
    assert isinstance(answer, Gaussian) and answer.var == 0.5 and torch.equal(answer.mean, 2 * x) and heard == ["seven"]
    assert [name for name, _ in restorer.named_parameters()] == ["net.weight"]
    assert isinstance(Restorer(Net())(x, torch.tensor([1, 2])), Dirac)


# ------------------------------------------------------------------------------------------------------------ bad input

V, T = ValueError, TypeError
some, when = torch.zeros(2, *SIZE), torch.tensor([1, 2])
CASES = {
    "too few levels": (V, lambda: Cold(Pool(4), 1.0, [1.0, 1.0]), "3 levels > 0", r"\[1\.0, 1\.0\]"),
    "one level for all": (V, lambda: Cold(Pool(4), 1.0, torch.tensor(0.3)), "3 levels > 0", r"\[0\.3"),
    "a level of 0 in the middle": (V, lambda: Cold(Pool(4), 1.0, [1.0, 0.0, 1.0]), "3 levels > 0", r"\[1\.0, 0\.0, 1\.0\]"),
    "a level of 0 at the end": (V, lambda: Cold(Pool(4), 1.0, [0.0, 1.0, 0.0]), "3 levels > 0", r"\[0\.0, 1\.0, 0\.0\]"),
    "a negative first level": (V, lambda: Cold(Pool(4), 1.0, [-1.0, 1.0, 1.0]), "the first >= 0", r"\[-1\.0"),
    "a level NaN": (V, lambda: Cold(Pool(4), 1.0, [0.0, nan, 1.0]), "3 levels > 0", "nan"),
    "a first level NaN": (V, lambda: Cold(Pool(4), 1.0, [nan, 1.0, 1.0]), "3 levels > 0", "nan"),
    "an infinite level": (V, lambda: Cold(Pool(4), 1.0, [0.0, 1.0, inf]), "3 levels > 0", "inf"),
    "an infinite first level": (V, lambda: Cold(Pool(4), 1.0, [inf, 1.0, 1.0]), "3 levels > 0", "inf"),
    "a negative scale": (V, lambda: Cold(Pool(4), -1.0), "finite scale >= 0", "-1.0"),
    "an infinite scale": (V, lambda: Cold(Pool(4), inf), "finite scale >= 0", "inf"),
    "a scale NaN": (V, lambda: Cold(Pool(4), nan), "finite scale >= 0", "nan"),
    "noise of another shape": (V, lambda: Cold(Pool(4))(some, when, some[:1]), "eps shaped as x0", r"\(1, 1, 4, 4\)"),
    "a law that draws another shape": (V, lambda: Cold(Pool(4), 1.0, law=lambda x, g: x[:1]).sample(some, when), "eps shaped as x0", r"\(1, 1, 4, 4\)"),
    "a state of another shape": (V, lambda: Cold(Pool(4)).infer_noise(some, some[:, :, :2], when), "xt shaped as x0", r"\(2, 1, 2, 4\)"),
    "one time for two rows": (V, lambda: Cold(Pool(4))(some, when[:1], some), r"t of shape \(2,\)", r"\(1,\)"),
    "times that are not integers": (T, lambda: Cold(Pool(4)).infer_noise(some, some, when / 1), "integer times", "float32"),
}

test_the_message_says_what_was_expected_and_what_came = refuses(CASES)

"""Every law of the framework for every family of the registry (design: L0-L4 and what keeps them honest).

Deterministic laws hold to `C eps kappa`, with kappa the size of the terms (and 1 / sigma_t where noise is solved for).
Statistical ones compare N = 40,000 rows with N independent rows, at 5 standard errors: a mean off by 0.035 standard
deviations fails, a variance off by 5 %, the share of a state by 0.018. The mean instead of a sample, σ_t for σ_s or a
forgotten square root in the mixing move some variance of these families by more than 10 % (test_mutations.py plants them).
"""
import pytest
import torch
from conftest import DEVICE, close, full, on_device, per_row, rng, run_bound, same_mean, unhooked
from families import FAMILIES
from hypothesis import given
from strategies import seeds
from torch.utils._pytree import tree_leaves, tree_map

from udm_book.posterior import Dirac
from udm_book.reverse import reuse_noise, reverse, sample

pytestmark = on_device
N = 40_000
every = pytest.mark.parametrize("name", FAMILIES)
each_kernel = pytest.mark.parametrize("name, kernel", [(n, k) for n, f in FAMILIES.items() for k in f.kernels])
exact_ones = [(n, k) for n, f in FAMILIES.items() if f.denoiser for k in f.kernels]


def case(name, n=4, seed=0):
    """A family, its process, n data and noise for them."""
    family = FAMILIES[name]
    F, x0 = family.forward(), family.data(n, seed)
    return family, F, x0, F.sample_noise(x0, generator=rng(seed + 1))


def times(F, n, seed):
    """Random s < t for n rows."""
    t = torch.randint(1, F.T + 1, (n,), generator=rng(seed), device=DEVICE)
    return t, (torch.rand(n, generator=rng(seed + 1), device=DEVICE) * t).long()


def few(F):
    """A run of three steps at most."""
    return sorted({F.T, F.T // 2, 1, 0}, reverse=True)


def scale(family, F, t, *x):
    """kappa of `x_t` and of the noise inferred from it, row by row: the largest terms, and those over its level at t."""
    level = family.level(F)
    if level is None: return torch.zeros(()), torch.zeros(())              # nothing is rounded
    terms = sum(v.flatten(1).abs().amax(1) for v in x) + 1
    return terms, terms / level[t]


def same(a, b, kappa=1.0, **more):
    """Rounding apart for numbers (kappa for each row), equal for tokens."""
    kappa = torch.as_tensor(kappa)
    close(a, b, per_row(kappa, a) if kappa.ndim == 1 else kappa, **more) if a.is_floating_point() else \
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def end_of(family, F, n, seed):
    """Data as the reverse process ends with them: guesses, or x_0."""
    x0 = family.data(n, seed)
    return x0 if F.ends_with_guess else F.sample(x0, full(x0, 0), generator=rng(seed + 1))


# -------------------------------------------------------------------------------------------------- L0, L1: consistency


@every
def test_L0_time_zero_is_the_data(name):
    _, F, x0, eps = case(name)
    if F.starts_at_data: assert torch.equal(F(x0, full(x0, 0), eps), x0)


@every
@given(seed=seeds)
def test_L1_inferred_noise_explains_what_is_seen(name, seed):
    family, F, x0, eps = case(name, seed=seed)
    t, _ = times(F, len(x0), seed)
    xt = F(x0, t, eps)
    again = F(x0, t, F.infer_noise(x0, xt, t, F.sample_noise(x0, generator=rng(seed + 9))))
    same(again, xt, scale(family, F, t, x0, xt)[0])


@every
@given(seed=seeds)
def test_L2_inferred_noise_is_the_noise_where_F_can_be_solved_for_it(name, seed):
    family, F, x0, eps = case(name, seed=seed)
    t, _ = times(F, len(x0), seed)
    if F.invertible: same(F.infer_noise(x0, F(x0, t, eps), t, None), eps, scale(family, F, t, x0, eps)[1])


# -------------------------------------------------------------------------------------- L2, L3, L4: laws in distribution


@every
def test_L2_inferred_noise_has_the_law_q(name):
    family, F, x0, _ = case(name, 1)
    x0 = x0.expand(N, *x0.shape[1:])
    for t in {F.T, F.T // 2, 1}:
        xt = F.sample(x0, full(x0, t), generator=rng(t))
        inferred = F.infer_noise(x0, xt, full(x0, t), F.sample_noise(x0, generator=rng(t + 1)))
        same_mean(family.noise_features(inferred), family.noise_features(F.sample_noise(x0, generator=rng(t + 2))))


@each_kernel
def test_L3_kernels_carry_the_law_from_t_to_s(name, kernel):
    family, F, x0, _ = case(name, 1, seed=3)
    x0 = x0.expand(N, *x0.shape[1:])
    for t, s in {(F.T, F.T // 2), (2, 1), (F.T, 1)}:
        xt = F.sample(x0, full(x0, t), generator=rng(t))
        fresh = F.sample_noise(x0, generator=rng(t + 1))
        xs = family.kernels[kernel](F, x0, xt, full(x0, t), full(x0, s), fresh)
        same_mean(family.features(xs), family.features(F.sample(x0, full(x0, s), generator=rng(t + 2))))


@pytest.mark.parametrize("name, kernel", exact_ones)
def test_L4_exact_denoiser_and_true_start_give_the_data_in_any_number_of_steps(name, kernel):
    family, F, x0, _ = case(name, N, seed=11)
    xT = F.sample(x0, full(x0, F.T), generator=rng(12))
    want = family.features(end_of(family, F, N, 13))
    for times in [F.T, 0], few(F):
        with torch.no_grad():
            same_mean(family.features(sample(F, family.denoiser(F), xT, times, family.kernels[kernel], generator=rng(14))), want)


@pytest.mark.parametrize("name, transition", [(n, k) for n, f in FAMILIES.items() for k in f.marginal])
def test_L4_marginals_are_enough_where_one_position_moves_at_a_time(name, transition):
    family, F, x0, _ = case(name, N, seed=11)
    xT = F.sample(x0, full(x0, F.T), generator=rng(12))
    x = sample(F, family.marginal_denoiser(F), xT, range(F.T, -1, -1), family.marginal[transition], generator=rng(14))
    same_mean(family.features(x), family.features(family.data(N, 13)))


# ------------------------------------------------------------------------------------------------------------- the loops


@every
@given(seed=seeds)
def test_true_data_keep_a_deterministic_run_on_its_path(name, seed):
    "A denoiser that knows x0: every state of a run that draws nothing is F_s(x0, eps), whatever the times."
    family, F, x0, eps = case(name, seed=seed)
    if not F.invertible: return
    times = sorted({F.T, *torch.randint(0, F.T, (5,), generator=rng(seed), device=DEVICE).tolist()}, reverse=True)
    for step in reverse(F, lambda xt, t: Dirac(x0), F(x0, full(x0, F.T), eps), times, reuse_noise):
        s, guess = full(x0, step.t), step.t == 0 and F.ends_with_guess
        same(step.xt, x0 if guess else F(x0, s, eps), len(times) * scale(family, F, s, x0, eps)[0])


@pytest.mark.parametrize("name, kernel", exact_ones)
def test_sample_is_the_end_of_reverse_with_and_without_gradients(name, kernel):
    family, F, x0, eps = case(name)
    xT, denoiser, kernel = F(x0, full(x0, F.T), eps), family.denoiser(F), family.kernels[kernel]
    for times in range(F.T, -1, -1), few(F)[:-1], [F.T, 0]:
        a, b, c = (rng(7) for _ in range(3))
        steps = list(reverse(F, denoiser, xT, times, kernel, generator=a))
        plain = sample(F, denoiser, xT, times, kernel, generator=b)
        with torch.no_grad(): quick = sample(F, denoiser, xT, times, kernel, generator=c)
        assert torch.equal(plain, quick) and torch.equal(a.get_state(), b.get_state()) and torch.equal(a.get_state(), c.get_state())
        assert [step.t for step in steps] == list(times)[1:]
        same(quick, steps[-1].xt, run_bound(F, kernel, xT, steps, family.gain(F)) if F.affine() else 0)


@pytest.mark.parametrize("name, kernel", exact_ones)
def test_gradients_of_sample_are_those_of_reverse(name, kernel):
    family, F, x0, eps = case(name)
    if F.affine() is None: return                       # one loop serves both
    xT, denoiser, kernel = F(x0, full(x0, F.T), eps), family.denoiser(F), family.kernels[kernel]
    alpha, sigma = (v.tolist() for v in F.affine())
    times, slopes = few(F), []
    for last in sample, lambda *a, **k: list(reverse(*a, **k))[-1].xt:
        start = xT.clone().requires_grad_()
        slopes += torch.autograd.grad(last(F, denoiser, start, times, kernel, generator=rng(7)).sum(), start)
    gains = [(1 + alpha[t]) * family.gain(F)(t) * xT[0].numel() + 1 for t in times[:-1]]
    close(*slopes, len(times) * torch.tensor(gains).prod())


@pytest.mark.parametrize("name, kernel", exact_ones)
def test_reverse_writes_to_no_state_it_was_given_or_gave(name, kernel):
    family, F, x0, eps = case(name)
    xT = F(x0, full(x0, F.T), eps)
    before, seen, copies = xT.clone(), [], []
    with torch.no_grad():
        for step in reverse(F, family.denoiser(F), xT, range(F.T, -1, -1), family.kernels[kernel], generator=rng(1)):
            seen += [step.xt, step.x0]
            copies += [step.xt.clone(), step.x0.clone()]
        sample(F, family.denoiser(F), xT, range(F.T, -1, -1), family.kernels[kernel], generator=rng(1))
    assert torch.equal(xT, before) and all(map(torch.equal, seen, copies))
    assert len({x.data_ptr() for x in [xT, *seen[::2]]}) == F.T + 1


@pytest.mark.parametrize("name, kernel", exact_ones)
def test_same_seed_same_sample(name, kernel):
    family, F, x0, eps = case(name, 50)
    xT = F(x0, full(x0, F.T), eps)
    a, b, c = (sample(F, family.denoiser(F), xT, few(F), family.kernels[kernel], generator=rng(k)) for k in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


# ------------------------------------------------------------------------------------------------------------- mechanics


def all_of(family, F):
    """Everything the family computes from given noise, as one function."""
    def f(x0, xt, t, s, fresh):
        noise = F.infer_noise(x0, xt, t, fresh)
        return tree_leaves((F(x0, s, fresh), noise, [k(F, x0, xt, t, s, fresh) for k in family.kernels.values()]))
    return f


def inputs(name, n=4, seed=0):
    family, F, x0, eps = case(name, n, seed)
    t, s = times(F, n, seed)
    return family, F, (x0, F(x0, t, eps), t, s, F.sample_noise(x0, generator=rng(seed + 5)))


@every
@given(seed=seeds)
def test_a_batch_of_mixed_times_is_the_loop_over_rows(name, seed):
    family, F, args = inputs(name, seed=seed)
    rows = [all_of(family, F)(*tree_map(lambda v: v[i:i + 1], args)) for i in range(4)]
    for whole, *parts in zip(all_of(family, F)(*args), *rows):
        same(whole, torch.cat(parts), scale(family, F, args[2], *args[:2], args[4])[1])


@every
def test_state_dict_round_trip(name):
    family, F, args = inputs(name)
    other, state = family.again(), F.state_dict()
    differs = any(not torch.equal(v, state[k]) for k, v in other.state_dict().items())
    before = all_of(family, other)(*args)
    other.load_state_dict(state)
    after, want = all_of(family, other)(*args), all_of(family, F)(*args)
    assert all(map(torch.equal, after, want))
    if differs: assert not all(map(torch.equal, after, before))


@every
def test_compiled_equals_eager(name):
    family, F, args = inputs(name)
    torch._dynamo.reset()
    with unhooked():
        compiled = torch.compile(all_of(family, F), fullgraph=True, backend="aot_eager")(*args)
        for a, b in zip(compiled, all_of(family, F)(*args)): same(a, b, scale(family, F, args[2], *args[:2], args[4])[1])


@every
@given(seed=seeds)
def test_float32_is_float64_up_to_rounding(name, seed):
    family, F, args = inputs(name, seed=seed)
    if not args[0].is_floating_point(): return
    args = [v.float() if v.is_floating_point() else v for v in args]
    wide = [v.double() if v.is_floating_point() else v for v in args]
    for a, b in zip(all_of(family, family.forward().float())(*args), all_of(family, F)(*wide)):
        assert a.dtype == torch.float32
        same(a, b, scale(family, F, args[2], *args[:2], args[4])[1])

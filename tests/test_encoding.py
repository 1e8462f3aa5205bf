"""Encoders: codes against Hot, prices against enumeration and quadrature, the bound against closed forms, gradients, the end of the loop."""
import copy
import itertools
import math

import pytest
import torch
from conftest import DEVICE, close, full, normal, refuses, rng, same_mean, unhooked
from hypothesis import given
from hypothesis import strategies as st
from strategies import runs, schedules, seeds, spans
from torch import nn

from udm_book.elbo import elbo, normal_kl, prior_kl, step_kl
from udm_book.encoding import Embedding, Encoded, MeanCode, Spread, code_kl, encoding_loss, push
from udm_book.forward import row
from udm_book.hot import Hot, ddim, ddpm
from udm_book.objective import nll
from udm_book.oracle import Table
from udm_book.posterior import Categorical, Dirac, Gaussian, Laplace
from udm_book.reverse import MixNoise, fresh_noise, reuse_noise, reverse, sample
from udm_book.schedule import Schedule

S = Schedule.linear(6, 0.05, 0.6)
V, L, W = 3, 2, 2                                       # letters, length, numbers for each letter
KERNELS = [fresh_noise, reuse_noise, MixNoise(0.5), ddpm, ddim(0.3)]
NOISY = [fresh_noise, MixNoise(0.5), ddpm, ddim(0.3), MeanCode(ddpm), MeanCode(MixNoise(0.5))]


class Square(nn.Module):
    """Two numbers to three, not linear, without parameters."""
    def forward(self, x): return torch.stack([x[:, 0], x[:, 1], x[:, 0] * x[:, 1] - 1], 1)


class Dial(nn.Module):
    """The datum times c, for which the law of the code of a normal guess is known."""
    def __init__(self, c):
        super().__init__()
        self.c = nn.Parameter(torch.tensor(float(c), dtype=torch.float64))
    def forward(self, x): return self.c * x
    def push(self, posterior): return Gaussian(self.c * posterior.mean, self.c**2 * posterior.var)


class Words(Embedding):
    """Three letters in the plane, always the same."""
    def __init__(self, seed=0):
        super().__init__(V, W)
        self.double().to(DEVICE).weight.data = normal(V, W, seed=seed)


def encoded(encoder, *code, schedule=S):
    """The process on the device of the laws; the tables of `schedule` stay where they are."""
    return Encoded(encoder, copy.deepcopy(schedule), code).to(DEVICE)


def words(schedule=S, seed=0): return encoded(Words(seed), L, W, schedule=schedule)


def letters(n, seed=0): return torch.randint(V, (n, L), generator=rng(seed), device=DEVICE)


def table(n, seed=0):
    """Laws of the letters, independent by position."""
    return Categorical(normal(n, L, V, seed=seed))


SENTENCES = torch.tensor(list(itertools.product(range(V), repeat=L)), device=DEVICE)


# ------------------------------------------------------------------------------------------------------------ the process


@given(spans(), seeds)
def test_it_is_hot_on_the_codes(span, seed):
    schedule, t, s = span
    F, x0 = encoded(Square(), 3, schedule=schedule), normal(4, 2, seed=seed)
    z, t = Square()(x0), full(x0, t)
    eps, hot = F.sample_noise(x0, generator=rng(seed)), Hot(schedule).to(DEVICE)
    assert torch.equal(F(x0, t, eps), hot(z, t, eps))
    xt = normal(4, 3, seed=seed + 1)
    assert torch.equal(F.infer_noise(x0, xt, t), hot.infer_noise(z, xt, t))
    assert torch.equal(F.encode(x0), z) and F.T == schedule.T and F.schedule is F.codes.schedule
    assert torch.equal(F(x0, 0 * t, eps), z)                                # the code is what stands at t = 0
    assert F.invertible and F.normal and not F.starts_at_data and F.ends_with_guess and F.affine() is None


def test_noise_has_the_shape_of_the_codes_and_the_dtype_of_the_encoder():
    x, ids = normal(5, 2).float(), letters(5)
    for encoder, data, dtype in [(Square(), x, torch.float32), (Square(), x.double(), torch.float64), (Square(), ids, torch.float32),
                                 (nn.Linear(2, 3).double(), x, torch.float64), (nn.Embedding(V, 3), ids, torch.float32),
                                 (nn.BatchNorm1d(2, affine=False).double(), x, torch.float64)]:
        F = encoded(encoder, 4, 3)
        for draw in F.sample_noise, F.prior:
            eps = draw(data, generator=rng(1))
            assert eps.shape == (5, 4, 3) and eps.dtype == dtype and eps.device.type == DEVICE.type
            assert torch.equal(eps, draw(data, generator=rng(1))) and not torch.equal(eps, draw(data, generator=rng(2)))
    n = encoded(Square(), 1).sample_noise(normal(40_000, 1), generator=rng(3))
    same_mean(torch.cat([n, n**2, n**4], 1), torch.tensor([[0.0, 1.0, 3.0]], device=DEVICE))


@given(runs(6), st.sampled_from([*KERNELS, MeanCode(ddpm)]), seeds)
def test_the_loop_returns_the_last_guess(times, kernel, seed):
    "Codes on the way, a datum at the end, whatever its kind."
    F, g = words(), rng(seed)
    def guess(xt, t): return Categorical(xt @ normal(W, V, seed=4) * 2)
    steps = list(reverse(F, guess, F.prior(letters(3), generator=g), times, kernel, generator=g))
    assert all(step.xt.shape == (3, L, W) for step in steps[:-1])
    end = steps[-1].xt
    assert end.shape == (3, L) and end.dtype == torch.int64 and 0 <= end.min() and end.max() < V
    again = sample(F, guess, F.prior(letters(3), generator=rng(seed)), times, kernel, generator=rng(seed))
    assert again.shape == (3, L) and again.dtype == torch.int64
    x0 = normal(3, 2, seed=seed).float()
    plain = encoded(Square(), 3)
    assert torch.equal(sample(plain, lambda xt, t: Dirac(x0), plain.prior(x0), times, kernel), x0)


@given(st.integers(2, 6), st.sampled_from(KERNELS), seeds)
def test_kernels_step_between_codes(t, kernel, seed):
    F, x0, xt = words(), letters(4, seed), normal(4, L, W, seed=seed)
    fresh = normal(4, L, W, seed=seed + 1)
    got = kernel(F, x0, xt, full(x0, t), full(x0, t - 1), fresh)
    a, b, c = (row(v, xt) for v in kernel.bridge(F.codes, full(x0, t), full(x0, t - 1)))
    close(got, a * F.encode(x0) + b * xt + c * fresh, 50)


def exact(F, states, probs):
    """Bayes: the law of listed data, given their noisy codes."""
    def guess(xt, t):
        a, s = F.schedule.at(t, xt[:, None])
        far = ((xt[:, None] - a * F.encode(states)) / s).square().flatten(2).sum(-1)
        return Table((probs.log() - far / 2).softmax(1), states, V)
    return guess


@pytest.mark.parametrize("kernel", KERNELS, ids=["fresh", "reuse", "mix.5", "ddpm", "ddim.3"])
@pytest.mark.parametrize("times", [[6, 0], [6, 4, 1, 0], range(6, -1, -1)], ids=str)
def test_exact_guesses_from_the_true_start_give_the_law_of_the_sentences(kernel, times):
    F, probs = words(), torch.softmax(normal(V**L, seed=3), 0)
    n = 20_000
    x0 = SENTENCES[torch.multinomial(probs, n, True, generator=rng(4))]
    with torch.no_grad(): y = sample(F, exact(F, SENTENCES, probs), F.sample(x0, full(x0, 6), generator=rng(5)), times, kernel, generator=rng(6))
    same_mean((y[:, None] == SENTENCES).all(-1).double(), probs[None])


# ----------------------------------------------------------------------------------------------------- guesses of the code


@given(seeds)
def test_the_embedding_knows_mean_and_spread_of_its_codes(seed):
    "Against the list of all sentences, for independent letters and for a joint law with the same marginals."
    E, guess = Words(seed), table(3, seed)
    each = torch.stack([guess.token_nll(x.expand(3, L)).sum(1) for x in SENTENCES], 1).neg().exp()
    codes = E(SENTENCES)
    joint = Table(torch.softmax(normal(3, V**L, seed=seed + 1), 1), SENTENCES, V)
    for posterior, probs in (guess, each), (joint, joint.probs):
        law = push(E, posterior)
        mean = torch.einsum("bn,nlw->blw", probs, codes)
        close(law.mean, mean, E.weight.abs().max())
        far = (codes - mean[:, None]).square().sum((2, 3))
        close(law.var, (probs * far).sum(1), 20 * E.weight.square().max())
    sure = push(E, Categorical(torch.where(nn.functional.one_hot(letters(3), V) > 0, 0.0, -math.inf)))
    assert (sure.var >= 0).all()
    close(sure.mean, E(letters(3)).detach(), 10)
    assert push(Words(seed).float(), table(3)).mean.dtype == torch.float32


def test_points_and_normal_guesses():
    x = normal(4, 2)
    law = push(Square(), Dirac(x))
    assert isinstance(law, Dirac) and torch.equal(law.mean, Square()(x))
    law = push(Dial(-2.0).to(DEVICE), Gaussian(x, torch.tensor(0.5, device=DEVICE)))
    assert torch.equal(law.mean, -2 * x) and law.var == 2
    assert torch.equal(push(Dial(-2.0).to(DEVICE), Dirac(x)).mean, -2 * x)          # a point needs no method push


@given(st.sampled_from([fresh_noise, MixNoise(0.4), ddpm]), seeds)
def test_the_step_with_the_mean_code(kernel, seed):
    F, guess, xt = words(seed=seed), table(4, seed), normal(4, L, W, seed=seed)
    t, s = full(xt, 5), full(xt, 2)
    fresh = torch.randn(xt.shape, generator=rng(seed), dtype=xt.dtype, device=DEVICE)
    got = MeanCode(kernel)(F, guess, xt, t, s, generator=rng(seed))
    assert torch.equal(got, kernel(F.codes, push(F.encoder, guess).mean, xt, t, s, fresh))


def test_of_a_point_the_mean_code_is_the_code_and_the_streams_agree():
    F, x0, xt = encoded(Square(), 3), normal(4, 2), normal(4, 3, seed=1)
    for kernel in KERNELS:
        a, b = rng(1), rng(1)
        ends = [sample(F, lambda xt, t: Dirac(x0 + 0 * xt[:, :2]), xt, [6, 3, 1], k, generator=g) for k, g in ((kernel, a), (MeanCode(kernel), b))]
        close(ends[0], ends[1], 50)
        assert torch.equal(a.get_state(), b.get_state())


# --------------------------------------------------------------------------------------------------------------- the prices


@given(schedules(), seeds)
def test_the_prior_term(schedule, seed):
    F, x0 = encoded(Square(), 3, schedule=schedule), normal(5, 2, seed=seed)
    a, s = schedule.alpha[-1].item() ** 2, schedule.sigma[-1].item() ** 2
    size = Square()(x0).square().sum(1)
    close(prior_kl(F, x0), (a * size - 3 * a - 3 * math.log(s)) / 2, 10 + a * size + abs(math.log(s)))


@given(spans(positive=True), seeds)
def test_a_point_pays_half_the_difference_of_the_signal_to_noise_ratios(span, seed):
    schedule, t, s = span
    F, x0, hat = encoded(Square(), 3, schedule=schedule), normal(4, 2, seed=seed), normal(4, 2, seed=seed + 1)
    for kernel in ddpm, MeanCode(ddpm):
        got = step_kl(F, Dirac(hat), x0, normal(4, 3), full(x0, t), full(x0, s), kernel)
        want = (schedule.snr[s] - schedule.snr[t]) / 2 * (Square()(x0) - Square()(hat)).square().sum(1).cpu()
        torch.testing.assert_close(got.cpu(), want, rtol=1e-8, atol=1e-12)          # SNRs may nearly cancel


def test_a_normal_code_pays_for_its_variance_too():
    F, x0, hat, v = encoded(Dial(3.0), 2), normal(4, 2), normal(4, 2, seed=1), torch.tensor(0.3, device=DEVICE).double()
    for kernel in NOISY:
        inner = getattr(kernel, "kernel", kernel)
        a, _, c = (row(w, x0) for w in inner.bridge(F.codes, full(x0, 4), full(x0, 2)))
        wide = c**2 + (0 if isinstance(kernel, MeanCode) else (3 * a) ** 2 * v)
        got = step_kl(F, Gaussian(hat, v), x0, normal(4, 2, seed=2), full(x0, 4), full(x0, 2), kernel)
        close(got, normal_kl(3 * a * x0, c**2, 3 * a * hat, wide).detach(), 1e3)


@given(st.sampled_from(NOISY), seeds)
def test_many_codes_pay_the_average_over_draws_or_the_mean(kernel, seed):
    F, x0, guess = words(seed=seed), letters(4, seed), table(4, seed)
    t, s = full(x0, 5), full(x0, 3)
    inner = getattr(kernel, "kernel", kernel)
    a, _, c = inner.bridge(F.codes, t, s)
    probs = torch.stack([guess.token_nll(x.expand(4, L)).sum(1) for x in SENTENCES], 1).neg().exp()
    z, codes = F.encode(x0), F.encode(SENTENCES)
    far = (probs * (z[:, None] - codes).square().sum((2, 3))).sum(1)
    if isinstance(kernel, MeanCode): far = (z - torch.einsum("bn,nlw->blw", probs, codes)).square().sum((1, 2))
    xt = normal(4, L, W, seed=seed)
    want = (a / c).square() / 2 * far
    close(step_kl(F, guess, x0, xt, t, s, kernel), want.detach(), 100 * (a / c).square() * codes.detach().square().max())
    assert torch.equal(step_kl(F, guess, x0, xt, t, s, kernel), code_kl(F, guess, z, xt, t, s, kernel))


def test_the_charge_for_draws_is_above_the_divergence_from_the_mixture():
    "One number for each of two letters: the divergence by quadrature."
    F = Encoded(Embedding(2, 1).double(), S, (1, 1))
    F.encoder.weight.data = torch.tensor([[-1.0], [0.7]], dtype=torch.float64)
    t, s, xt, x0 = torch.tensor([5]), torch.tensor([3]), torch.zeros(1, 1, 1).double(), torch.tensor([[1]])
    a, _, c = (v.item() for v in ddpm.bridge(F.codes, t, s))
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    def bell(m): return (-((x - m) / c).square() / 2).exp() / (c * math.sqrt(2 * math.pi))
    for p in 0.0, 0.1, 0.5, 0.99:
        guess = Categorical(torch.tensor([[[1 - p, p]]], dtype=torch.float64).log())
        q, parts = bell(0.7 * a), (1 - p) * bell(-a) + p * bell(0.7 * a)
        kl = (torch.xlogy(q, q) - torch.xlogy(q, parts)).sum().item() * (x[1] - x[0]).item()
        drawn, mean = (step_kl(F, guess, x0, xt, t, s, k).item() for k in (ddpm, MeanCode(ddpm)))
        assert kl <= drawn + 1e-9 and mean <= drawn + 1e-12
        if p == 0: assert abs(kl - drawn) < 1e-6 * drawn + 1e-9


def test_prices_keep_float32():
    F, x0, xt = words().float(), letters(3), normal(3, L, W).float()
    guess = Categorical(normal(3, L, V).float())
    for kernel in ddpm, MeanCode(ddpm):
        assert step_kl(F, guess, x0, xt, full(x0, 4), full(x0, 3), kernel).dtype == torch.float32
        assert encoding_loss(F, lambda xt, t: guess, x0, kernel=kernel).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------- the bound


def dial_guess(F):
    """The exact law of x0 ~ N(0, 1) given its noisy code c x0."""
    def guess(xt, t):
        a, s = F.schedule.at(t, xt)
        v = (a * F.encoder.c) ** 2 + s**2
        return Gaussian(a * F.encoder.c / v * xt, s**2 / v)
    return guess


@pytest.mark.parametrize("c", [0.3, 1.0, 4.0])
def test_the_bound_of_the_dial_is_its_closed_form(c):
    "Entropy of the data plus KL(N(0, alpha² c² + sigma²) ‖ N(0, 1)); with the mean code each step pays u/2 for log(1 + u)/2."
    F, x0 = encoded(Dial(c), 1), normal(20_000, 1, seed=1)
    end, H = S.alpha[-1].item() ** 2 * c**2 + S.sigma[-1].item() ** 2, math.log(2 * math.pi * math.e) / 2
    whole = H + (end - 1 - math.log(end)) / 2
    u = (S.snr[1:-1] - S.snr[2:]) * c**2 / (1 + c**2 * S.snr[2:])
    with torch.no_grad():
        for kernel, want in (ddpm, whole), (MeanCode(ddpm), whole + (u - u.log1p()).sum().item() / 2):
            terms = elbo(F, dial_guess(F), x0, kernel=kernel, generator=rng(2))
            same_mean(terms.total[:, None], (torch.tensor([want], device=DEVICE).double())[None])
            loss = encoding_loss(F, dial_guess(F), x0, kernel=kernel, generator=rng(3))
            same_mean(loss[:, None], (torch.tensor([want], device=DEVICE).double())[None])


@pytest.mark.parametrize("c", [1.0, 10.0])
def test_the_output_of_the_dial_has_the_closed_variance(c):
    F, x0 = encoded(Dial(c), 1), normal(20_000, 1)
    a, s = S.alpha[-1].item() ** 2 * c**2, S.sigma[-1].item() ** 2
    with torch.no_grad(): y = sample(F, dial_guess(F), F.prior(x0, generator=rng(1)), [6, 4, 1, 0], ddpm, generator=rng(2))
    same_mean(torch.cat([y, y**2], 1), torch.tensor([[0.0, (a + s * (a + s)) / (a + s) ** 2]], device=DEVICE).double())


def silent(F):
    """The same process without noise, so that every x_t is alpha_t phi(x0)."""
    zero = lambda x, generator=None: torch.zeros(len(x), *F.code, dtype=torch.float64, device=DEVICE)
    F.sample_noise = F.codes.sample_noise = zero
    return F


class Told(nn.Module):
    """A guess that depends on t, s and a condition."""
    needs_s = True
    def forward(self, xt, t, s, shift):
        logits = xt @ normal(W, V, seed=8).to(xt) + (t + 3 * s).view(-1, 1, 1) * normal(V, seed=9).to(xt) / 9
        return Categorical(logits + shift)


@pytest.mark.parametrize("kernel", [ddpm, MeanCode(ddpm), fresh_noise])
def test_the_loss_averaged_over_t_is_the_bound(kernel):
    F, x0 = silent(words()), letters(4)
    shift = normal(4, 1, V)
    each = [encoding_loss(F, Told(), x0, full(x0, t), kernel=kernel, shift=shift) for t in range(2, 7)]
    want = elbo(F, Told(), x0, kernel=kernel, shift=shift)
    close(torch.stack(each).mean(0).detach(), want.total.detach(), 100 * want.total.detach())
    assert want.steps.shape == (4, 5) and want.steps.requires_grad


def test_the_decoder_reads_the_last_guess():
    F, x0 = silent(encoded(Dial(2.0), 2)), normal(4, 2)
    def guess(xt, t): return Dirac(xt * t[:, None] / 3)
    wide = lambda posterior: Gaussian(posterior.mean, torch.tensor(0.2, device=DEVICE).double())
    each = torch.stack([encoding_loss(F, guess, x0, full(x0, t), decoder=wide) for t in range(2, 7)])
    close(each.mean(0).detach(), elbo(F, guess, x0, decoder=wide).total.detach(), 1e4)


def test_with_one_step_it_is_the_loss_of_a_vae():
    F, x0 = encoded(Square(), 3, schedule=Schedule([1.0, 0.64])), normal(4, 2)
    half, s2, one = torch.tensor([0.5, 0.36, 1.0], dtype=torch.float64, device=DEVICE)
    def guess(xt, t):
        assert (t == 1).all()
        return Gaussian(xt[:, :2], half)
    z = Square()(x0)
    x1 = 0.8 * z + 0.6 * torch.randn(z.shape, generator=rng(1), dtype=z.dtype, device=DEVICE)
    want = normal_kl(0.8 * z, s2, 0 * z, one) + Gaussian(x1[:, :2], half).nll(x0)
    close(encoding_loss(F, guess, x0, generator=rng(1)), want, 100)
    close(elbo(F, guess, x0, generator=rng(1)).total, want, 100)


def test_times_are_drawn_from_2_to_T_alike():
    F, x0, seen = words(), letters(3000), []
    def guess(xt, t):
        seen.append(t)
        return Categorical(xt.new_zeros(len(xt), L, V))
    a, b, c = (encoding_loss(F, guess, x0, generator=rng(k)) for k in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert (seen[0] == 1).all() and seen[1].min() == 2 and seen[1].max() == 6 and len(seen) == 6
    same_mean(nn.functional.one_hot(seen[1] - 2, 5).double(), torch.full((1, 5), 0.2, device=DEVICE))


def test_the_two_looks_have_noises_of_their_own():
    F, x0, seen = words(), letters(200), []
    def guess(xt, t):
        seen.append(F.codes.infer_noise(F.encode(x0), xt, t).detach())
        return Categorical(xt.new_zeros(len(xt), L, V))
    encoding_loss(F, guess, x0, generator=rng(1))
    same_mean((seen[0] * seen[1]).flatten()[:, None], torch.zeros(1, 1, device=DEVICE))
    for eps in seen: same_mean(torch.stack([eps.flatten(), eps.flatten() ** 2], 1), torch.tensor([[0.0, 1.0]], device=DEVICE))


def test_the_encoder_is_called_once():
    calls = []
    class Counted(Square):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)
    F = encoded(Counted(), 3)
    def guess(xt, t): return Gaussian(xt[:, :2], torch.ones((), device=DEVICE))
    F.encoder.push = lambda posterior: Dirac(posterior.mean[:, [0, 1, 0]])
    encoding_loss(F, guess, normal(5, 2))
    assert calls == [5]


# --------------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("loss", [
    lambda F, x: encoding_loss(F, dial_guess(F), x, generator=rng(3)),
    lambda F, x: encoding_loss(F, dial_guess(F), x, generator=rng(3), kernel=MeanCode(ddpm)),
    lambda F, x: elbo(F, dial_guess(F), x, generator=rng(3)).total,
    lambda F, x: prior_kl(F, x),
    lambda F, x: nll(F, dial_guess(F), x, full(x, 3), generator=rng(3))], ids=["loss", "mean code", "bound", "prior", "eq. 18"])
def test_the_gradient_reaches_the_encoder(loss):
    "It is the difference quotient by the scale of the codes."
    F, x0, h = encoded(Dial(1.5), 1), normal(50, 1), 1e-5
    def at(c):
        with torch.no_grad(): F.encoder.c.fill_(c)
        return loss(F, x0).mean()
    slope, = torch.autograd.grad(at(1.5), F.encoder.c)
    quotient = (at(1.5 + h) - at(1.5 - h)) / (2 * h)
    assert abs(slope) > 1e-3 and abs(slope - quotient) < 1e-6 * (1 + abs(slope))


def test_letters_get_gradients_from_both_sides_of_a_step():
    "Through the code that is compared and through the code of the guess."
    F, x0, guess = words(), torch.zeros(2, L, dtype=torch.int64, device=DEVICE), table(2)
    for kernel in ddpm, MeanCode(ddpm):
        price = step_kl(F, guess, x0, normal(2, L, W), full(x0, 4), full(x0, 3), kernel).sum()
        slope, = torch.autograd.grad(price, F.encoder.weight)
        assert (slope.abs().sum(1) > 0).all()                               # letters 1 and 2 occur in the guess alone


def test_the_encoder_is_part_of_the_state():
    a, b = words(seed=1), words(Schedule(S.alpha_bar**1.5), seed=2)
    b.load_state_dict(a.state_dict())
    x0, eps = letters(4), normal(4, L, W)
    assert torch.equal(a(x0, full(x0, 3), eps), b(x0, full(x0, 3), eps)) and "encoder.weight" in a.state_dict()


# ---------------------------------------------------------------------------------------------------------------- bad input

CPU = Encoded(Square(), S, (3,))
X, Z, T4 = torch.zeros(2, 2), torch.zeros(2, 3), torch.full((2,), 4)
with unhooked(): MANY = Encoded(Embedding(V, W), S, (L, W))
IDS = torch.zeros(2, L, dtype=torch.int64)
def unsure(xt, t): return Categorical(torch.zeros(len(xt), L, V))


CASES = {
    "codes of another shape": (ValueError, lambda: Encoded(Square(), S, (2,)).encode(X), r"codes of shape \(2, 2\)", r"\(2, 3\)"),
    "codes of another shape in a process": (ValueError, lambda: Encoded(Square(), S, (4,))(X, T4, Z), r"codes of shape \(2, 4\)", r"\(2, 3\)"),
    "states of another shape": (ValueError, lambda: CPU.infer_noise(X, X, T4), r"xt shaped as x0, \(2, 3\)", r"\(2, 2\)"),
    "times that are not integers": (TypeError, lambda: CPU(X, T4.float(), Z), "integer times", "float32"),
    "a law that the encoder cannot follow": (
        TypeError, lambda: push(Square(), Laplace(X, torch.ones(()))), "a Dirac guess, or an encoder with a method push", "Laplace and Square"),
    "the mean code of a transition": (TypeError, lambda: MeanCode("ddpm"), "a kernel, e.g. ddpm", "str"),
    "the mean code of a mean code": (TypeError, lambda: MeanCode(MeanCode(ddpm)), "a kernel, e.g. ddpm", "MeanCode"),
    "a bound without noise": (ValueError, lambda: elbo(MANY, unsure, IDS, kernel=reuse_noise), "a kernel that adds noise", "ReuseNoise"),
    "a bound without noise, mean code": (ValueError, lambda: elbo(MANY, unsure, IDS, kernel=MeanCode(MixNoise(0.0))), "adds noise", "MixNoise.rho=0.0."),
    "a loss without noise": (ValueError, lambda: encoding_loss(MANY, unsure, IDS, kernel=reuse_noise), "a kernel that adds noise", "ReuseNoise"),
    "a loss at t = 1": (ValueError, lambda: encoding_loss(MANY, unsure, IDS, torch.ones(2).long()), "a kernel that adds noise", "MixNoise"),
    "a kernel that is not linear": (TypeError, lambda: elbo(MANY, unsure, IDS, kernel="ddpm"), "a x0 . b xt . c fresh", "'ddpm' on Hot"),
    "a last guess without a density": (
        ValueError, lambda: elbo(CPU, lambda xt, t: Dirac(xt[:, :2]), X), "a last guess with a density", "variance 0"),
    "a loss whose last guess has no density": (
        ValueError, lambda: encoding_loss(CPU, lambda xt, t: Dirac(xt[:, :2]), X), "a last guess with a density", "variance 0"),
    "no posterior": (TypeError, lambda: encoding_loss(CPU, lambda xt, t: xt, X), "return a Posterior", "Tensor"),
}
test_the_message_says_what_was_expected_and_what_came = refuses(CASES)


def test_a_spread_is_what_an_encoder_may_return():
    "The price of a guess whose law of codes is only known by mean and spread."
    F = Encoded(Square(), S, (3,))
    F.encoder.push = lambda posterior: Spread(torch.zeros(2, 3), torch.full((2,), 0.5))
    got = step_kl(F, Gaussian(X, torch.ones(())), X, Z, T4, T4 - 1, ddpm)
    close(got, ((S.snr[3] - S.snr[4]) / 2 * (1 + 0.5)).expand(2), 50, dtype=torch.float32)

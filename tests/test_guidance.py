"""Guidance: the exact classifier and the exact guess, both scales, one call, tokens by the formula, and what comes out of a run."""
import functools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import close, full, normal, refuses, rng, same_mean, unhooked
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import nn

from udm_book.conditional import LabelledOracle
from udm_book.forward import row
from udm_book.guidance import (ClassifierGuided, Guided, NoisyClassifier, check_labels, halves, label_gradient, label_loss, strength,
                               tilt, tilted_logits, twice, weight)
from udm_book.hot import Hot, ddim, ddpm
from udm_book.mask import CarryOver, Exactly, Mask, Reveal
from udm_book.network import MLP, TokenDenoiser, Transformer, UNet
from udm_book.objective import Loss, nll
from udm_book.oracle import Mixture
from udm_book.parameterization import EPS, SCORE, X0, Denoiser, V, convert
from udm_book.posterior import Categorical, Dirac, Gaussian, Laplace, LazyCategorical
from udm_book.reverse import reuse_noise, reverse, sample
from udm_book.samplers import Clip, LearnedVariance
from udm_book.schedule import Schedule, Tables
from udm_book.score import DPMSolver2M, Heun, ode_log_prob, score

SHORT = Schedule.linear(12, 0.02, 0.4)
F = Hot(SHORT)
NULL = 3
with unhooked():
    _a = normal(5, 2, 2, device="cpu") / 2
    ORACLE = LabelledOracle(Mixture(torch.tensor([0.3, 0.1, 0.2, 0.15, 0.25], dtype=torch.float64), normal(5, 2, seed=1, device="cpu"),
                                    _a @ _a.mT + 0.05 * torch.eye(2).double()), SHORT, torch.tensor([0, 1, 2, 1, 0]))
KAPPA = 1e3 / SHORT.sigma[1] ** 2
scales = st.floats(-3, 8)
times = st.integers(1, 12)


def exact(xt, t, y=None): return Dirac(ORACLE(xt, t, y).mean)


def points(t, seed=0, n=6):
    x = 1.5 * normal(n, 2, seed=seed, device="cpu")
    return x, full(x, t), torch.arange(n) % 3


@functools.cache
def random_net(classes=3, out=2, dtype=torch.float64):
    with unhooked():
        torch.manual_seed(0)
        net = MLP(2, 16, classes=classes, out=out)
        for p in net.parameters(): nn.init.normal_(p, std=0.3)
    return net.to(dtype)


class Counting(nn.Module):
    """A denoiser that notes the rows of each call and what it was told."""
    def __init__(self, inner=exact, needs_s=False):
        super().__init__()
        self.inner, self.needs_s, self.told = inner, needs_s, []
    def forward(self, xt, t, y=None, **cond):
        self.told.append((t.tolist(), None if y is None else y.tolist(), cond))
        return self.inner(xt, t, y)
    def rows(self): return [len(t) for t, *_ in self.told]


# ------------------------------------------------------------------------------------------------------------ classifier


def test_a_classifier_averages_over_positions():
    net = NoisyClassifier(lambda x, t: torch.stack([x.mean(1), t[:, None, None] + 0 * x.mean(1)], 1))
    x, t = normal(3, 2, 4, 5, device="cpu"), torch.tensor([1, 2, 3])
    close(net(x, t), torch.stack([x.flatten(1).mean(1), t.double()], 1), 10)
    close(NoisyClassifier(lambda x, t: x[:, :, 0])(x, t), x[:, :, 0].mean(2), 10)               # a line of positions
    flat = normal(3, 2, device="cpu")
    assert torch.equal(NoisyClassifier(lambda x, t: x)(flat, t), flat)
    assert NoisyClassifier(UNet(1, 8, (1, 2), blocks=1, attention=(), out=7))(torch.zeros(2, 1, 4, 4), t[:2]).equal(torch.zeros(2, 7))


@given(seeds, times)
def test_the_loss_of_labels_is_minus_the_log_chance_of_what_is_seen(seed, t):
    x0, tt, y = points(t, seed)
    eps = normal(6, 2, seed=seed + 1, device="cpu")
    close(label_loss(F, ORACLE.label_log_prob, x0, tt, eps, y=y), -ORACLE.label_log_prob(F(x0, tt, eps), tt)[torch.arange(6), y], 1e3)
    a, b = (label_loss(F, ORACLE.label_log_prob, x0, y=y, generator=rng(seed, "cpu")) for _ in range(2))
    g = rng(seed, "cpu")
    drawn = torch.randint(1, 13, (6,), generator=g)
    assert torch.equal(a, b) and torch.equal(a, label_loss(F, ORACLE.label_log_prob, x0, drawn, F.sample_noise(x0, generator=g), y=y))
    c, d = (label_loss(F, ORACLE.label_log_prob, x0, tt, y=y, generator=rng(seed, "cpu")) for _ in range(2))
    assert torch.equal(c, d)


def test_the_loss_is_an_objective_that_trains():
    torch.manual_seed(0)
    model = NoisyClassifier(MLP(2, 16, depth=1, out=3))
    objective = Loss(F, model, label_loss)
    x0 = ORACLE.data.sample(100, generator=rng(0, "cpu")).float()
    y = ORACLE.label_log_prob(x0.double(), full(x0, 1)).argmax(1)
    draws = objective.draw(x0, rng(1, "cpu"))
    optimizer, first = torch.optim.Adam(model.parameters(), 1e-2), objective(x0, draws, y=y).mean()
    assert abs(first - math.log(3)) < 1e-6                                          # the network starts without an opinion
    for _ in range(20):
        optimizer.zero_grad()
        objective(x0, draws, y=y).mean().backward()
        optimizer.step()
    assert objective(x0, draws, y=y).mean() < 0.9 * first


@given(seeds, times)
def test_the_gradient_is_that_of_the_log_softmax(seed, t):
    x, tt, y = points(t, seed)
    W, b = normal(3, 2, seed=seed + 5, device="cpu"), normal(3, seed=seed + 6, device="cpu")
    def linear(x, t): return x @ W.mT + b + row(t, x)
    p = linear(x, tt).softmax(1)
    close(label_gradient(linear, x, tt, y), W[y] - p @ W, 100)
    close(label_gradient(ORACLE.label_log_prob, x, tt, y), ORACLE_slope(x, tt, y), KAPPA)


def ORACLE_slope(x, t, y): return score(exact(x, t, y).mean, x, t, SHORT) - ORACLE.score(x, t)


def test_adding_a_function_of_the_state_to_all_logits_changes_nothing():
    x, t, y = points(5)
    def other(x, t): return ORACLE.label_log_prob(x, t) + ORACLE.log_prob(x, t)[:, None]
    close(label_gradient(other, x, t, y), label_gradient(ORACLE.label_log_prob, x, t, y), KAPPA)


class ByTime(torch.nn.Module):
    """A classifier whose trained factors are looked up by the time, which the backward pass needs again."""
    def __init__(self):
        super().__init__()
        self.factors = torch.nn.Embedding(50, 3, dtype=torch.float64)

    def forward(self, xt, t): return self.factors(t) * xt.sum(1, keepdim=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_gradient_leaves_everything_as_it_was(mode):
    net, by_time = random_net(None, 3), ByTime()
    with mode():
        x, t, y = points(5)
        kept = x.clone()
        g = label_gradient(net, x, t, y)
        assert torch.equal(x, kept) and not g.requires_grad and not x.requires_grad
        guided = ClassifierGuided(exact, F, net, 2.0)
        assert sample(F, guided, x, [12, 6, 0], ddpm, generator=rng(0, "cpu"), y=y).isfinite().all()
        label_gradient(by_time, x, t, y)
    assert all(p.grad is None for p in [*net.parameters(), *by_time.parameters()])
    assert torch.equal(g.clone(), label_gradient(net, *points(5)))


def test_gradients_flow_through_the_gradient_where_they_are_asked_for():
    x, t, y = points(5)
    net = random_net(None, 3)
    x.requires_grad_()
    (got,) = torch.autograd.grad(label_gradient(net, x, t, y)[:, 0].sum(), x)
    h = torch.tensor([1e-5, 0.0]).double()
    x = x.detach()
    want = (label_gradient(net, x + h, t, y) - label_gradient(net, x - h, t, y))[:, 0] / 2e-5
    assert torch.allclose(got[:, 0], want, atol=1e-7) and x.grad is None


# ------------------------------------------------------------------------------------------------------ classifier guidance


@given(seeds, times)
def test_with_the_exact_classifier_the_guess_is_that_of_the_label(seed, t):
    x, tt, y = points(t, seed)
    close(ClassifierGuided(exact, F, ORACLE.label_log_prob)(x, tt, y=y).mean, exact(x, tt, y).mean, KAPPA / SHORT.alpha[12])


@given(seeds, times, scales)
def test_the_score_is_the_weighted_sum(seed, t, scale):
    x, tt, y = points(t, seed)
    classifier, plain = random_net(None, 3), Denoiser(random_net(), SHORT, V)
    got = score(ClassifierGuided(plain, F, classifier, scale)(x, tt, y=y).mean, x, tt, SHORT)
    close(got, score(plain(x, tt).mean, x, tt, SHORT) + scale * label_gradient(classifier, x, tt, y), KAPPA / SHORT.alpha[12])
    each = torch.linspace(-1, 4, 6, dtype=torch.float64)
    together = ClassifierGuided(plain, F, classifier, each)(x, tt, y=y).mean
    for i, one in enumerate(each.tolist()):
        alone = ClassifierGuided(plain, F, classifier, one)(x[i:i + 1], tt[i:i + 1], y=y[i:i + 1]).mean
        close(alone[0], together[i], KAPPA)


def test_a_linear_world_has_the_mean_of_the_step_in_closed_form():
    """Data N(0, 1), a label read from x0 with error variance r: p(x_s | x_t, y) is known, and so is its mean, for any stride."""
    r, reading = 0.3, 1.7
    def classifier(x, t):                                       # two logits, far apart: the log-softmax of the second is this one
        alpha, sigma = SHORT.at(t, x)
        z = -(reading - alpha * x).square() / (2 * (sigma.square() + r))
        return torch.cat([-(1 - z.exp()).log().neg(), z], 1)    # their exponentials sum to 1
    def plain(x, t): return Dirac(SHORT.at(t, x)[0] * x)
    x = normal(5, 1, device="cpu")
    for t, s in (12, 11), (12, 3), (7, 2), (5, 4):
        guess = ClassifierGuided(plain, F, classifier)(x, full(x, t), y=full(x, 1))
        keep, a, b = SHORT.alpha[t] / SHORT.alpha[s], SHORT.alpha[s], SHORT.sigma[s]
        var, error = 1 - keep**2, b**2 + r                      # p(x_s | x_t) = N(keep x_t, var); the reading: a x_s + error
        want = keep * x + var * a / (a**2 * var + error) * (reading - a * keep * x)
        close(F.step_posterior(guess.mean, x, full(x, t), full(x, s)).mean, want, 1e4)


def test_the_denoiser_hears_of_labels_only_where_told_and_laws_keep_their_variance():
    x, t, y = points(4)
    quiet, loud = Counting(), Counting()
    ClassifierGuided(quiet, F, ORACLE.label_log_prob)(x, t, y=y, extra=1)
    ClassifierGuided(loud, F, ORACLE.label_log_prob, tell=True)(x, t, y=y)
    assert quiet.told == [([4] * 6, None, {"extra": 1})] and loud.told == [([4] * 6, y.tolist(), {})]
    wide = ClassifierGuided(lambda x, t: Gaussian(x, torch.tensor(0.3, dtype=torch.float64)), F, ORACLE.label_log_prob)(x, t, y=y)
    assert isinstance(wide, Gaussian) and wide.var == 0.3
    assert not ClassifierGuided(exact, F, ORACLE.label_log_prob).needs_s and ClassifierGuided(Heun(exact, F), F, ORACLE.label_log_prob).needs_s


def test_where_nothing_is_seen_nothing_moves():
    end = Schedule([1.0, 0.5, 0.0])
    x, t = normal(3, 2, device="cpu"), torch.tensor([2, 2, 1])
    got = ClassifierGuided(lambda x, t: Dirac(0 * x), Hot(end), lambda x, t: x, 2.0)(x, t, y=torch.tensor([0, 1, 0])).mean
    assert torch.equal(got[:2], 0 * x[:2]) and got[2].abs().max() > 0.1
    shift = ClassifierGuided(exact, F, ORACLE.label_log_prob).tables.shift
    close(shift[1:], (SHORT.sigma**2 / SHORT.alpha)[1:])


def test_a_run_looks_up_the_same_shift():
    x, t, y = points(7)
    guided, seven = ClassifierGuided(exact, F, ORACLE.label_log_prob, 2.0), points(7)[1]
    seven.number = 7
    close(guided(x, seven, y=y).mean, guided(x, t, y=y).mean, 100)


# -------------------------------------------------------------------------------------------------- classifier-free guidance


@given(seeds, times, scales, st.sampled_from([X0, EPS, V, SCORE]))
def test_guesses_are_combined_whatever_the_network_speaks(seed, t, scale, P):
    x, tt, y = points(t, seed)
    def net(x, t, y): return convert(ORACLE(x, t, y).mean, x, t, SHORT, X0, P)
    got = Guided(Denoiser(net, SHORT, P), scale, NULL)(x, tt, y=y).mean
    far, near = exact(x, tt, full(x, NULL)).mean, exact(x, tt, y).mean
    close(got, (1 - scale) * far + scale * near, 10 * KAPPA)
    close(Guided.beyond(exact, scale, NULL)(x, tt, y=y).mean, (1 + scale) * near - scale * far, KAPPA)


@given(seeds, times, scales)
def test_it_is_the_guidance_of_the_classifier_in_the_two_guesses(seed, t, scale):
    x, tt, y = points(t, seed)
    a, b = Guided(exact, scale, NULL)(x, tt, y=y), ClassifierGuided(exact, F, ORACLE.label_log_prob, scale)(x, tt, y=y)
    close(a.mean, b.mean, 10 * KAPPA / SHORT.alpha[12])


def test_one_call_of_twice_the_rows_the_label_first():
    x, t, y = points(4)
    counting = Counting()
    Guided(counting, 2.0, NULL)(x, t, y=y, context=torch.arange(6.0), mode="m", few=torch.zeros(2))
    (told, labels, cond), = counting.told
    assert told == [4] * 12 and labels == y.tolist() + [NULL] * 6
    assert cond["context"].tolist() == [*range(6)] * 2 and cond["mode"] == "m" and cond["few"].shape == (2,)
    for scale, heard in (1.0, y.tolist()), (0.0, [NULL] * 6), (1, y.tolist()), (torch.tensor(0.0), [NULL] * 6):
        counting = Counting()
        got = Guided(counting, scale, NULL)(x, t, y=y)
        assert counting.told == [([4] * 6, heard, {})] and torch.equal(got.mean, exact(x, t, torch.tensor(heard)).mean)


def test_a_scale_for_each_row_is_a_loop_over_rows():
    x, t, y = points(4)
    each = torch.tensor([-1.0, 0.0, 1.0, 2.5, 7.0, 0.1])
    together = Guided(exact, each, NULL)(x, t, y=y).mean
    for i in range(6):
        alone = Guided(exact, each[i].item(), NULL)(x[i:i + 1], t[i:i + 1], y=y[i:i + 1]).mean
        close(alone[0], together[i], 1e3)
    beyond = Guided.beyond(exact, each - 1, NULL)(x, t, y=y).mean
    close(beyond, together, 1e9)                                                                    # each - 1 in float32


def test_scales_stay_exact_and_follow_the_module():
    guided = Guided(MLP(2, 8, classes=3), torch.tensor([3.7, 1.1], dtype=torch.float64), NULL)
    assert guided.half().scale.scale.tolist() == [3.7, 1.1] and guided.scale.scale.dtype == torch.float64
    assert Guided(exact, 3.7, NULL).scale == 3.7 and Guided(exact, 2, NULL).scale == 2.0
    assert guided.to("meta").scale.scale.device.type == "meta"
    x, t, y = (v[:2] for v in points(3))
    low = Guided(lambda x, t, y: Dirac(x * y[:, None]), torch.tensor([2.0, 3.0]).double(), NULL)(x.float(), t, y=y).mean
    assert low.dtype == torch.float32


@pytest.mark.parametrize("scale", [2.0, torch.tensor([2.0, -1.0, 0.0, 1.0, 3.0, 0.5]).double()])
@pytest.mark.parametrize("solver", [Heun, DPMSolver2M, lambda d, F: d, lambda d, F: Clip(d)])
def test_solvers_go_around_it_and_a_run_is_its_own_loop(solver, scale):
    x, _, y = points(12)
    counting = Counting()
    guided = solver(Guided(counting, scale, NULL), F)
    with torch.no_grad(): got = sample(F, guided, x, [12, 8, 5, 2, 0], reuse_noise, y=y)
    assert set(counting.rows()) == {12} and len(counting.told) == (7 if solver is Heun else 4)
    def by_hand(xt, t, y):
        s = row(torch.as_tensor(scale).expand(6), xt)
        far = exact(xt, t, full(xt, NULL)).mean
        return Dirac(far + s * (exact(xt, t, y).mean - far))
    *_, last = reverse(F, solver(by_hand, F), x, [12, 8, 5, 2, 0], reuse_noise, y=y)
    close(got, last.xt, 1e3 * KAPPA)


def test_inner_denoisers_may_ask_for_the_target_time_and_have_variances():
    x, t, y = points(9)
    s = full(x, 4)
    counting = Counting(lambda x, t, y: Gaussian(x * row(y, x), row(y + 1.0, x)), needs_s=True)
    guided = Guided(counting, 2.0, NULL)
    p = guided(x, t, s=s, y=y)
    assert guided.needs_s and counting.told[0][2]["s"].tolist() == [4] * 12
    assert isinstance(p, Gaussian) and torch.equal(p.var, row(y + 1.0, x).expand(6, 2)) and torch.allclose(p.mean, x * row(2.0 * y - 3, x))
    for var in torch.tensor(0.5), torch.full((1, 2), 0.5), torch.full((2,), 0.5), torch.full((12, 1), 0.5):
        q = Guided(lambda x, t, y: Gaussian(x, var.double()), 2.0, NULL)(x, t, y=y)
        assert torch.equal(q.var, torch.full((6, 2), 0.5).double())
    net = random_net(3, 4, torch.float32)
    learned = Guided(LearnedVariance(lambda x, t, y: net(x.flatten(1), t, y).view(len(x), 2, 2), SHORT, EPS), 2.0, NULL)
    image = x.float()[:, None]
    with torch.no_grad(): assert sample(F, learned, image, [12, 6, 0], ddpm, generator=rng(0, "cpu"), y=y).isfinite().all()


def test_a_square_batch_keeps_its_variances():
    "Six rows of twelve numbers, with a variance for each number: as many as rows of the double batch."
    x, t, y = normal(6, 12, device="cpu"), torch.full((6,), 3), torch.arange(6) % 3
    var = torch.linspace(1, 2, 12, dtype=torch.float64)
    assert torch.equal(Guided(lambda x, t, y: Gaussian(x, var), 2.0, NULL)(x, t, y=y).var, var.expand(6, 12))


def test_times_of_a_run_stay_numbers():
    seen = []
    def denoiser(x, t, y): seen.append((getattr(t, "number", None), len(t))); return Dirac(x)
    x, _, y = points(12)
    sample(F, Guided(denoiser, 2.0, NULL), x, [12, 7, 0], ddim(), y=y)
    assert seen == [(12, 12), (7, 12)] and not hasattr(twice(x), "number")
    assert torch.equal(twice(x)[:6], x) and torch.equal(twice(x)[6:], x)


def test_the_likelihood_of_a_guided_flow_can_be_read():
    x, t, y = points(12)
    for guided in Guided(exact, 2.0, NULL), ClassifierGuided(exact, F, ORACLE.label_log_prob, 2.0):
        one = ode_log_prob(F, guided, x, [12, 9, 6, 3, 1], y=y)
        assert one.isfinite().all() and one.shape == (6,)
    close(ode_log_prob(F, Guided(exact, 2.0, NULL), x, [12, 9, 6, 3, 1], y=y), one, 1e9)
    assert nll(F, Guided(exact, 2.0, NULL), x, t, y=y, generator=rng(0, "cpu")).shape == (6,)


COMPILED = """
import torch
from udm_book.guidance import Guided
from udm_book.network import MLP
from udm_book.parameterization import Denoiser, V
from udm_book.schedule import Schedule
torch.manual_seed(0)
net, schedule = MLP(2, 16, classes=3), Schedule.linear(12, .02, .4)
for p in net.parameters(): torch.nn.init.normal_(p, std=.3)
x, t, y = torch.randn(6, 2), torch.full((6,), 5), torch.arange(6) % 3
for scale in 2.5, torch.linspace(-1, 3, 6):
    guided = Guided(Denoiser(net, schedule, V), scale, 3)
    whole = torch.compile(lambda x, t, y: guided(x, t, y=y).mean, fullgraph=True, backend="aot_eager")
    assert (whole(x, t, y) - guided(x, t, y=y).mean).abs().max() < 1e-6
"""


@pytest.mark.slow
def test_guidance_compiled_is_guidance():
    "In a process without type checks, which torch.compile cannot see through where there are **conditions."
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=root)


# ------------------------------------------------------------------------------------------------------------------ tokens


@given(seeds, scales)
def test_tokens_follow_the_normalised_product_of_powers(seed, scale):
    a, b = 2 * normal(2, 3, 4, 5, seed=seed, device="cpu")
    power = a.softmax(-1) ** scale * b.softmax(-1) ** (1 - scale)
    want = power / power.sum(-1, keepdim=True)
    got = tilt(Categorical(a + 3), Categorical(b - 7), float(scale))
    assert isinstance(got, Categorical)
    close(got.mean, want, 1e4)
    eye, where = torch.eye(5).double(), normal(3, 4, seed=seed + 1, device="cpu") > 0
    lazy = tilt(*(LazyCategorical(z, lambda f: f @ eye) for z in (a, b)), float(scale))
    assert isinstance(lazy, LazyCategorical)
    close(lazy.mean, want, 1e4)
    close(lazy.at(where).mean, want[where], 1e4)


@given(seeds)
def test_each_token_takes_the_scale_of_its_row_along(seed):
    a, b = normal(2, 3, 4, 5, seed=seed, device="cpu")
    each, where = torch.tensor([2.0, -1.0, 0.5]).double(), normal(3, 4, seed=seed + 1, device="cpu") > 0
    head = nn.Linear(5, 6).double()
    lazy = tilt(LazyCategorical(a, head), LazyCategorical(b, head), strength(each))
    full_ = tilt(Categorical(head(a)), Categorical(head(b)), strength(each))
    for i in range(3):
        alone = tilt(Categorical(head(a[i:i + 1])), Categorical(head(b[i:i + 1])), each[i].item())
        close(full_.mean[i], alone.mean[0], 1e3)
    close(lazy.mean, full_.mean, 1e3)
    close(lazy.at(where).mean, full_.mean[where], 1e3)


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0])
def test_what_either_law_excludes_stays_out(scale):
    inf = -math.inf
    a, b = torch.tensor([[0.0, inf, 1.0, inf]]), torch.tensor([[0.5, inf, inf, 0.0]])
    assert tilted_logits(a, b, scale).tolist() == [[pytest.approx(0.5 - 0.5 * scale), inf, inf, inf]]
    assert Categorical(tilted_logits(a, b, scale)).sample(generator=rng(0, "cpu")).tolist() == [0]


class Bag(nn.Module):
    """Features of tokens that hear the label."""
    def __init__(self): super().__init__(); self.calls = []
    def forward(self, x, t, y):
        self.calls.append(len(x))
        return torch.nn.functional.one_hot((x + y[:, None] + t[:, None]) % 5, 5).double()


@pytest.mark.parametrize("scale", [2.0, torch.tensor([2.0, -1.0, 0.5])])
def test_tokens_are_guided_with_one_call_and_read_where_needed(scale):
    torch.manual_seed(0)
    body, heads = Bag(), []
    inner = TokenDenoiser(body, 5, 4).double()
    nn.init.normal_(inner.head.weight)
    def denoiser(x, t, y):
        p = inner(x, t, y=y)
        return LazyCategorical(p.features, lambda f: (heads.append(f.shape[:-1]), p.head(f))[1])
    F_, x, t, y = Mask(4, Exactly(6)), torch.full((3, 6), 4), torch.full((3,), 6), torch.tensor([0, 1, 2])
    guided = Guided(denoiser, scale, NULL)
    new = Reveal()(F_, guided(x, t, y=y), x, t, t - 1, generator=rng(0, "cpu"))
    assert body.calls == [6] and (new < 4).sum() == 3 and heads == [(3,), (3,)]                 # one token a row, twice
    assert sample(F_, CarryOver(guided, 4), x, [6, 3, 0], reuse_noise, generator=rng(0, "cpu"), y=y).max() < 4
    with_, without = inner(x, t, y=y).logits, inner(x, t, y=full(x, NULL)).logits
    w = torch.as_tensor(scale).double().reshape(-1, 1, 1)
    close(guided(x, t, y=y).mean, (without + w * (with_ - without)).softmax(-1), 1e3)


def test_a_transformer_with_labels_is_guided():
    torch.manual_seed(0)
    net = TokenDenoiser(Transformer(5, 6, 16, 1, 2, classes=3), 16, 4)
    for p in net.parameters(): nn.init.normal_(p, std=0.2)
    x, t, y = torch.full((2, 6), 4), torch.tensor([6, 5]), torch.tensor([0, 2])
    got = Guided(net, 2.0, NULL)(x, t, y=y).mean
    a, b = (net(x, t, y=k).mean for k in (y, full(x, NULL)))
    assert torch.allclose(got, (a**2 / b) / (a**2 / b).sum(-1, keepdim=True), atol=1e-5)


# ------------------------------------------------------------------------------------------------------- what comes out


def test_guided_runs_on_a_line_have_the_closed_forms():
    """Data N(0, 1), given the label N(m, v). The flow: variance v^g; the noisy way: (v - v^2g) / ((1 - v)(2g - 1)), m (1 - v^g) / (1 - v)."""
    m, v, g, n = 1.5, 0.25, 2.0, 4000
    line = Schedule.cosine(1000)
    G = Hot(line)
    def denoiser(x, t, y):
        a, s = line.at(t, x)
        return Dirac(torch.where(row(y, x) == 0, m + a * v / (a**2 * v + s**2) * (x - a * m), a * x))
    x, y = normal(n, 1, device="cpu"), torch.zeros(n, dtype=torch.long)
    with torch.no_grad():
        flow = sample(G, Heun(Guided(denoiser, g, 1), G), x, line.times(200), reuse_noise, y=y)
        noisy = sample(G, Guided(denoiser, g, 1), x, line.times(500), ddpm, generator=rng(1, "cpu"), y=y)
    sinh = math.sqrt(1 / v - 1)
    mean = g * m * (sinh / math.sqrt(v) + math.asinh(sinh)) / 2 / (sinh / math.sqrt(v))         # the integral of cosh² to there
    same_mean(torch.cat([flow, (flow - mean).square()], 1), torch.tensor([[mean, v**g]]))
    centre, spread = m * (1 - v**g) / (1 - v), (v - v ** (2 * g)) / ((1 - v) * (2 * g - 1))
    same_mean(torch.cat([noisy, (noisy - centre).square()], 1), torch.tensor([[centre, spread]]))
    tilted = v / (g + (1 - g) * v)
    assert (flow.var() - tilted).abs() > 5 * tilted * (2 / n) ** 0.5 and (noisy.var() - tilted).abs() > 5 * tilted * (2 / n) ** 0.5


# ---------------------------------------------------------------------------------------------------------------- refused


x, t, y = torch.zeros(3, 2), torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2])
V_, T_ = ValueError, TypeError
def plain(x, t, y=None): return Dirac(x)
CASES = {
    "no label": (V_, lambda: Guided(plain, 2.0, NULL)(x, t), r"labels y=..., one per row, of shape \(3,\)", "none"),
    "no label at scale 0": (V_, lambda: sample(F, Guided(plain, 0.0, NULL), x, [12, 0], ddpm), "labels y=", "none"),
    "a label too few": (V_, lambda: Guided(plain, 2.0, NULL)(x, t, y=y[:2]), r"of shape \(3,\)", r"\(2,\) of torch.int64"),
    "float labels": (V_, lambda: check_labels(y / 1, t), "integer labels", r"\(3,\) of torch.float32"),
    "no label for a classifier": (V_, lambda: ClassifierGuided(plain, F, lambda x, t: x)(x, t), "labels y=", "none"),
    "an infinite scale": (V_, lambda: Guided(plain, math.inf, NULL), "a finite scale", "inf"),
    "a NaN among scales": (V_, lambda: Guided(plain, torch.tensor([1.0, math.nan]), NULL), "a finite scale", "nan"),
    "a matrix of scales": (V_, lambda: ClassifierGuided(plain, F, plain, torch.ones(3, 2)), "one for each row", "tensor"),
    "scales for other rows": (V_, lambda: Guided(plain, torch.ones(2), NULL)(x, t, y=y), "one for each of 3 rows", "2"),
    "one scale in a row": (V_, lambda: weight(Tables(scale=torch.ones(1)), x), "one for each of 3 rows", "1"),
    "a family without a normal end": (V_, lambda: ClassifierGuided(plain, Mask(4, Exactly(3)), plain), "x_t = alpha_t x0", "Mask"),
    "tokens moved by a gradient": (T_, lambda: ClassifierGuided(lambda x, t: Categorical(x), F, lambda x, t: x)(x, t, y=y % 2), "a Dirac or Gaussian to move", "Categorical"),
    "a law that cannot be tilted": (T_, lambda: Guided(lambda x, t, y: Laplace(x, 1.0), 2.0, NULL)(x, t, y=y), "a Categorical or LazyCategorical", "Laplace"),
    "two such laws": (T_, lambda: tilt(Laplace(x, 1.0), Laplace(x, 1.0), 2.0), "a Categorical or LazyCategorical", "Laplace"),
    "halves of such a law": (T_, lambda: halves(Laplace(x, 1.0), 1), "a Categorical or LazyCategorical", "Laplace"),
}
test_refused_input = refuses(CASES)

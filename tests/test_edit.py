"""Edits against exact enumeration: laws of noise and states, the merged step, exactly t differences, the bound."""
import itertools
import math
from collections import Counter
from functools import lru_cache

import pytest
import torch
from conftest import DEVICE, close, full, on_device, refuses, rng, unhooked
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import nn

from udm_book import finite
from udm_book.edit import Differing, EditAny, EditDifferent, MustDiffer, restore, split
from udm_book.elbo import elbo, prior_kl, step_kl
from udm_book.mask import AtRate, Exactly
from udm_book.oracle import TableOracle
from udm_book.posterior import Categorical, Dirac, LazyCategorical
from udm_book.reverse import fresh_noise, reuse_noise, reverse, sample

pytestmark = on_device
V, L = 3, 3
RULES = {EditAny: finite.edit_any, EditDifferent: finite.edit_different}
both = pytest.mark.parametrize("rule", RULES)
RATES = torch.tensor([0.0, 0.2, 0.5, 0.9], dtype=torch.float64)


def tokens(*rows): return torch.tensor(rows, device=DEVICE)
def listed(length=L, vocab=V): return list(itertools.product(range(vocab), repeat=length))
def every(length=L, vocab=V): return torch.tensor(listed(length, vocab), device=DEVICE)
def apart(x, y): return [i for i, (a, b) in enumerate(zip(x, y)) if a != b]
def put(x, i, v): return (*x[:i], v, *x[i + 1:])
def logits_of(*shape, seed=0, scale=2.0): return scale * torch.randn(*shape, generator=rng(seed), dtype=torch.float64, device=DEVICE)
def exactly(rule, length=L, vocab=V): return rule(vocab, Exactly(length)).to(DEVICE)
def rated(rule, rates=RATES, vocab=V): return rule(vocab, AtRate(rates)).to(DEVICE)
def repeat(xt, n): return tokens(xt).expand(n, -1)


@lru_cache(None)
def counted(rule, length=L, vocab=V):
    """q(x_t | x0) for all pairs, in fractions."""
    F = RULES[rule](length, vocab)
    return {(x0, t): F.law(x0, t) for x0 in listed(length, vocab) for t in range(length + 1)}


def fit(x, law, z=5.0):
    """The shares of the rows of `x` are those of `law`, within z standard errors; for rare ones within z counts."""
    n, seen = len(x), Counter(map(tuple, x.tolist()))
    strange = set(seen) - {y for y, p in law.items() if p > 0}
    assert not strange, f"impossible: {list(strange)[:3]}"
    for y, p in law.items():
        p = float(p)
        assert abs(seen[y] / n - p) <= z * (max(p * (1 - p), 1 / n) / n) ** 0.5, (y, seen[y] / n, p)


def weights(seed=0, length=L, vocab=V):
    w = torch.empty(vocab**length, dtype=torch.float64, device=DEVICE).exponential_(generator=rng(seed))
    return w / w.sum()


def back(x0, xt, t, rule):
    """One step back given both ends: statements book.edit-posterior-1 and -2."""
    D = apart(x0, xt)
    return {**({xt: 1 - len(D) / t} if len(D) < t else {}), **{put(xt, i, x0[i]): 1 / t for i in D}}


def merged(q, xt, t, rule):
    """The merged step from the laws `q[i][v]` of the tokens: statement book.edit-merged."""
    moves = {put(xt, i, v): q[i][v] for i in range(len(xt)) for v in range(len(q[i])) if v != xt[i]}
    Z = sum(moves.values())
    if rule is EditAny: moves[xt] = max(0.0, t - Z)
    return {x: p / sum(moves.values()) for x, p in moves.items()}


# --------------------------------------------------------------------------------------------------- the forward process


@both
@pytest.mark.parametrize("vocab, length", [(3, 3), (2, 3), (4, 2)])
def test_the_chance_of_every_state_is_the_counted_one(rule, vocab, length):
    F, states = exactly(rule, length, vocab), every(length, vocab)
    for t in range(length + 1):
        for x0 in listed(length, vocab)[:: vocab + 1]:
            got = F.log_prob(repeat(x0, len(states)), states, full(states, t)).exp()
            close(got, [float(counted(rule, length, vocab)[x0, t].get(x, 0)) for x in listed(length, vocab)])


@both
def test_with_rates_each_token_has_its_own_coin(rule):
    F, states = rated(rule), every()
    for t, r in enumerate(RATES.tolist()):
        other = r / V if rule is EditAny else r / (V - 1)
        own = 1 - other * (V - 1)
        want = [math.prod(own if a == b else other for a, b in zip(x, (0, 1, 1))) for x in listed()]
        close(F.log_prob(repeat((0, 1, 1), len(states)), states, full(states, t)).exp(), want)


@both
@pytest.mark.parametrize("hits", [lambda: Exactly(L), lambda: AtRate(RATES)])
def test_draws_have_the_law_that_log_prob_says(rule, hits):
    F, x0, states = rule(V, hits()).to(DEVICE), repeat((0, 1, 1), 20_000), every()
    for t in (1, 2, F.T):
        want = F.log_prob(x0[:len(states)], states, full(states, t)).exp().tolist()
        fit(F.sample(x0, full(x0, t), generator=rng(t)), dict(zip(listed(), want)))


@both
def test_inferred_noise_has_the_law_of_the_noise_given_both_ends(rule):
    "Order and tokens together, against the list of all noises that explain the pair."
    F, model = exactly(rule, 3, 2), RULES[rule](3, 2)
    for t, xt in [(1, (0, 0, 1)), (2, (0, 0, 1)), (2, (0, 1, 0)), (3, (1, 1, 1)), (2, (1, 1, 1))]:
        x0 = (0, 1, 1)
        if not model.law(x0, t).get(xt): continue
        a, b = repeat(x0, 30_000), repeat(xt, 30_000)
        u, token = F.infer_noise(a, b, full(a, t), F.sample_noise(a, generator=rng(t)))
        assert torch.equal(F(a, full(a, t), (u, token)), b)
        want = {(*order, *tokens_): p for (order, tokens_), p in model.infer_noise(x0, xt, t).items()}
        fit(torch.cat([u.argsort(1), token], 1), want)


@given(seeds, st.integers(1, 6), st.integers(2, 5))
def test_rule_two_reads_its_noise_off(seed, length, vocab):
    F = exactly(EditDifferent, length, vocab)
    x0 = torch.randint(0, vocab, (5, length), generator=rng(seed), device=DEVICE)
    t = torch.randint(1, length + 1, (5,), generator=rng(seed + 1), device=DEVICE)
    xt = F(x0, t, eps := F.sample_noise(x0, generator=rng(seed + 2)))
    u, token = F.infer_noise(x0, xt, t, F.sample_noise(x0, generator=rng(seed + 3)))
    assert torch.equal(F.hits.at(u, t), F.hits.at(eps[0], t)) and torch.equal(token[xt != x0], eps[1][xt != x0])


@both
@pytest.mark.parametrize("t", [1, 2, 4])
def test_a_guess_that_differs_too_much_is_explained_in_t_places(rule, t):
    "Impossible together with xt: t of its tokens, chosen at random, become those of xt, the others stay."
    F, x0, xt = exactly(rule, 5), repeat((0, 0, 0, 0, 0), 4000), repeat((1, 2, 1, 2, 1), 4000)
    again = F(x0, full(x0, t), F.infer_noise(x0, xt, full(x0, t), F.sample_noise(x0, generator=rng(1))))
    assert ((again == x0) | (again == xt)).all() and ((again == xt).sum(1) == t).all()
    assert ((again == xt).double().mean(0) - t / 5).abs().max() < 5 * (0.25 / 4000) ** 0.5


def test_a_guess_that_differs_too_little_gets_fresh_edits_under_rule_two():
    F, x0, xt = exactly(EditDifferent, 4), repeat((0, 0, 0, 0), 4000), repeat((0, 2, 0, 0), 4000)
    t = full(x0, 3)
    again = F(x0, t, F.infer_noise(x0, xt, t, F.sample_noise(x0, generator=rng(1))))
    assert ((again != x0).sum(1) == 3).all() and (again[:, 1] == 2).all()
    assert (again[:, 0] == 1).double().mean() > 0.25 and (again[:, 0] == 2).double().mean() > 0.25


def test_rule_one_starts_from_random_tokens_whatever_it_is_shown():
    F, like = exactly(EditAny), repeat((2, 2, 2), 20_000)
    x = F.prior(like, generator=rng(1))
    assert x.shape == like.shape and x.dtype == like.dtype and torch.equal(x, F.prior(like, generator=rng(1)))
    fit(x, finite.uniform(listed()))


def test_rule_two_starts_from_edited_data():
    F, like = exactly(EditDifferent), repeat((2, 0, 1), 20_000)
    x = F.prior(like, generator=rng(1))
    assert torch.equal(x, F.prior(like, generator=rng(1)))
    fit(x, counted(EditDifferent)[(2, 0, 1), L])


@both
def test_a_run_that_reuses_the_noise_is_exact_with_the_joint_posterior(rule):
    F, p = exactly(rule), weights(1)
    x0 = every()[torch.multinomial(p, 6000, True, generator=rng(2))]
    for times in [3, 2, 1, 0], [3, 1, 0]:
        x = sample(F, TableOracle(F, every(), p), F.prior(x0, generator=rng(3)), times, reuse_noise, generator=rng(4))
        fit(x, dict(zip(listed(), p.tolist())))


# ------------------------------------------------------------------------------------------------ exactly t differences


@given(seeds, st.sampled_from([1.0, 5.0]))
def test_split_says_how_likely_the_present_token_is(seed, scale):
    logits, xt = logits_of(4, L, V, seed=seed, scale=scale), every()[seed % 20: seed % 20 + 4]
    q = logits.softmax(-1)
    own = q.gather(-1, xt[..., None])[..., 0]
    keep, change, others = split(logits, xt)
    close(keep.exp(), own)
    close(change.exp(), 1 - own)
    close(others.softmax(-1), q.scatter(-1, xt[..., None], 0.0) / (1 - own)[..., None], 1 / (1 - own)[..., None])


def test_what_a_sure_guess_leaves_over_is_not_lost():
    "1 - q is summed from the other tokens: e^-40 in float32, where q itself rounds to 1."
    logits = torch.tensor([[[40.0, 0.0, -math.inf]]], device=DEVICE)
    keep, change, _ = split(logits, tokens((0,)))
    close(change[0], [-40.0], 40)
    assert keep.item() == 0


def listed_law(logits, xt, t):
    """Independent tokens given exactly t differences, by listing (b, n)."""
    states = every(xt.shape[1], logits.shape[-1])
    each = logits.double().log_softmax(-1)[:, torch.arange(xt.shape[1]), states].sum(-1).exp()
    kept = torch.where((states != xt[:, None]).sum(-1) == t[:, None], each, 0.0)
    return kept / kept.sum(1, keepdim=True)


@given(seeds, st.integers(0, L), st.sampled_from([1.0, 6.0]), st.booleans())
def test_differing_is_the_conditioned_law(seed, t, scale, holes):
    xt, states = every()[[seed % 27, 5]], every()
    logits = logits_of(2, L, V, seed=seed, scale=scale)
    if holes: logits[:, 0, 0], logits[:, 2] = -math.inf, logits[:, 2].scatter(-1, (xt[:, 2:] + 1) % V, -math.inf)
    if holes and not (0 < t or (xt[:, 0] > 0).all()): return           # it must differ at 0 then
    p = Differing(logits, xt, t := torch.tensor([t, max(t, 1)], device=DEVICE))
    want = listed_law(logits, xt, t)
    got = torch.stack([p.nll(x.expand(2, -1)) for x in states], 1).neg().exp()
    close(got, want, 10)
    one_hot = nn.functional.one_hot(states, V).double()
    close(p.mean, torch.einsum("bn,nlv->blv", want, one_hot), 10)
    close(p.nll(p.mode).neg().exp(), want.amax(1), 10)
    assert ((p.mode != xt).sum(1) == t).all()


def test_tokens_that_are_certain_stay_or_go_and_the_rest_pays():
    "The first token must stay, the second must go: with t = 2 one of the others differs."
    logits, xt = logits_of(1, 4, V, seed=6), tokens((1, 1, 0, 2))
    logits[0, 0, [0, 2]], logits[0, 1, 1] = -math.inf, -math.inf
    p = Differing(logits, xt, torch.tensor([2], device=DEVICE))
    assert p.mean.isfinite().all()
    close(p.mean[0, :2, 1], [1.0, 0.0])
    close((1 - p.mean[0, 2:3, 0]) + (1 - p.mean[0, 3:, 2]), [1.0])
    assert (p.sample(generator=rng(1)) != xt)[0, :2].tolist() == [False, True]


@pytest.mark.parametrize("t", range(L + 1))
def test_differing_draws_from_the_conditioned_law(t):
    logits, xt = logits_of(2, L, V, seed=t, scale=1.0), tokens((0, 1, 2), (2, 2, 0))
    times = torch.tensor([t, L - t], device=DEVICE)
    want = listed_law(logits, xt, times)
    many = [v.repeat_interleave(10_000, 0) for v in (logits, xt, times)]
    x = Differing(*many).sample(generator=rng(t))
    assert torch.equal(x, Differing(*many).sample(generator=rng(t)))
    for i in range(2): fit(x[10_000 * i: 10_000 * (i + 1)], dict(zip(listed(), want[i].tolist())))


def test_differing_holds_for_long_sentences_in_single_precision():
    logits = logits_of(3, 300, 4, seed=1, scale=3.0).float()
    xt, t = torch.zeros(3, 300, dtype=torch.long, device=DEVICE), torch.tensor([0, 150, 300], device=DEVICE)
    p = Differing(logits, xt, t)
    x = p.sample(generator=rng(2))
    assert ((x != xt).sum(1) == t).all() and ((p.mode != xt).sum(1) == t).all() and p.mean.dtype == torch.float32
    close((1 - p.mean[..., 0]).sum(1), t, 300)
    assert p.table.shape == (3, 301, 301) and p.table.dtype == torch.float64
    assert p.nll(x).isfinite().all() and (p.nll(p.mode) <= p.nll(x)).all() and p.nll(x).dtype == torch.float32
    assert (p.nll(xt)[1:] == math.inf).all() and abs(p.nll(xt)[0]) < 1e-4


def test_differing_can_be_trained_through():
    xt, x0, t = tokens((0, 0, 0, 0), (1, 0, 2, 2)), tokens((0, 1, 2, 0), (1, 0, 2, 0)), torch.tensor([2, 1], device=DEVICE)
    logits = logits_of(2, 4, V, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: Differing(z, xt, t).nll(x0), logits)


class Net(nn.Module):
    """Independent tokens that depend on state, time and condition; lazily if asked."""
    def __init__(self, lazy=False, needs_s=False):
        super().__init__()
        self.table, self.lazy, self.needs_s, self.asked = logits_of(5, V, 4, seed=8), lazy, needs_s, []
    def forward(self, xt, t, s=None, shift=0.0):
        self.asked.append(None if s is None else s.tolist())
        features = self.table[t][torch.arange(len(xt))[:, None], xt]
        def head(h): return h[..., :V] * (1 + h[..., V:]) + shift * torch.arange(V, device=h.device)
        return LazyCategorical(features, head) if self.lazy else Categorical(head(features))


def test_must_differ_wraps_any_guess_of_independent_tokens():
    xt, t = every()[:4], torch.tensor([1, 2, 3, 2], device=DEVICE)
    plain = Net()(xt, t, shift=0.5)
    for net in Net(), Net(lazy=True):
        drawn, best = MustDiffer(net)(xt, t, shift=0.5), MustDiffer(net, best=True)(xt, t, shift=0.5)
        assert torch.equal(drawn.logits, plain.logits) and torch.equal(drawn.xt, xt) and torch.equal(drawn.t, t)
        mode = Differing(plain.logits, xt, t).mode
        assert isinstance(best, Categorical) and torch.equal(best.sample(), mode) and (best.nll(mode) == 0).all()
    assert not MustDiffer(Net()).needs_s and MustDiffer(Net(needs_s=True)).needs_s
    net = Net(needs_s=True)
    sample(exactly(EditDifferent), MustDiffer(net), xt, [3, 2, 1, 0], reuse_noise, generator=rng(1))
    assert net.asked == [[2] * 4, [1] * 4, [0] * 4]


@pytest.mark.parametrize("best", [False, True])
def test_a_guess_with_t_differences_changes_one_token_a_step(best):
    F, xt = exactly(EditDifferent), every()
    for step in reverse(F, MustDiffer(Net(), best), xt, [3, 2, 1, 0], reuse_noise, generator=rng(5)):
        assert ((step.xt != xt).sum(1) == 1).all() and ((step.xt != step.x0).sum(1) == step.t).all()
        assert (step.xt == xt)[step.x0 == xt].all()
        xt = step.xt


# ------------------------------------------------------------------------------------------------------- the merged step


@both
@pytest.mark.parametrize("t, xt, sharp", [(1, (0, 1, 2), 0.0), (1, (2, 0, 0), 6.0), (2, (0, 0, 1), 1.0), (3, (0, 1, 2), 0.0)])
def test_restore_has_the_merged_law(rule, t, xt, sharp):
    "Also where the guess expects more than t differences, or fewer."
    F, n = exactly(rule), 20_000
    logits = logits_of(1, L, V, seed=t, scale=1.0) + sharp * nn.functional.one_hot(tokens(xt), V)
    x, lots = repeat(xt, n), logits.expand(n, -1, -1)
    got = restore(F, Categorical(lots), x, full(x, t), full(x, t - 1), generator=rng(t))
    fit(got, merged(logits[0].softmax(-1).tolist(), xt, t, rule))
    lazy = LazyCategorical(lots / 2, lambda h: 2 * h)
    assert torch.equal(restore(F, lazy, x, full(x, t), full(x, t - 1), generator=rng(t)), got)
    assert torch.equal(x, repeat(xt, n))


def test_restore_reads_each_row_and_its_time():
    F, n = exactly(EditAny), 8000
    logits, xt, t = logits_of(3, L, V, seed=4, scale=1.0), tokens((0, 0, 0), (1, 2, 0), (2, 2, 2)), torch.tensor([3, 2, 1], device=DEVICE)
    many = [v.repeat(n, *[1] * (v.ndim - 1)) for v in (logits, xt, t)]
    x = restore(F, Categorical(many[0]), many[1], many[2], many[2] - 1, generator=rng(6))
    for i in range(3):
        fit(x[i::3], merged(logits[i].softmax(-1).tolist(), tuple(xt[i].tolist()), t[i].item(), EditAny))


@both
def test_merged_runs_from_exact_marginals_give_the_data(rule):
    F, p = exactly(rule), weights(2)
    x0 = every()[torch.multinomial(p, 10_000, True, generator=rng(2))]
    oracle = TableOracle(F, every(), p, joint=False)
    fit(sample(F, oracle, F.prior(x0, generator=rng(3)), [3, 2, 1, 0], restore, generator=rng(4)), dict(zip(listed(), p.tolist())))


@both
def test_with_exact_marginals_the_merged_step_is_the_step_with_the_joint_posterior(rule):
    F, p, states = exactly(rule), weights(3), every()
    for t in (1, 2, 3):
        joint, single = (TableOracle(F, states, p, joint=j)(states, full(states, t)) for j in (True, False))
        for i in range(0, 27, 4):
            want = Counter()
            for x0, w in zip(listed(), joint.probs[i].tolist()):
                if w:
                    for x, q in back(x0, listed()[i], t, rule).items(): want[x] += w * q
            got = merged(single.mean[i].tolist(), listed()[i], t, rule)
            close(torch.tensor([got.get(x, 0.0) for x in listed()], device=DEVICE, dtype=torch.float64), [want[x] for x in listed()], 10)


def test_a_guess_that_changes_nothing_is_a_rest_under_rule_one():
    F, xt = exactly(EditAny), every()
    sure = Categorical(nn.functional.one_hot(xt, V).double().log())
    assert torch.equal(restore(F, sure, xt, full(xt, 2), full(xt, 1), generator=rng(1)), xt)


@both
@pytest.mark.parametrize("t, s", [(3, 1), (2, 1)])
def test_with_rates_reused_noise_moves_each_token_by_itself(rule, t, s):
    F, n, xt = rated(rule), 20_000, (0, 1, 1)
    q = logits_of(1, L, V, seed=2, scale=1.0)
    guess, x = Categorical(q.expand(n, -1, -1)).sample(generator=rng(1)), repeat(xt, n)
    stay, p = (RATES[s] / RATES[t]).item(), q[0].softmax(-1).tolist()
    want = {y: math.prod((1 - stay) * p[i][v] + stay * (v == xt[i]) for i, v in enumerate(y)) for y in listed()}
    fit(reuse_noise(F, guess, x, full(x, t), full(x, s), F.sample_noise(x, generator=rng(3))), want)


# -------------------------------------------------------------------------------------------------------------- the bound


def kl(p, q): return sum(a * math.log(a / q[x]) if q.get(x) else math.inf for x, a in p.items() if a)


@both
def test_the_prior_term_is_the_divergence_from_random_tokens(rule):
    flat = {x: V**-L for x in listed()}
    F = exactly(rule)
    want = kl({x: float(p) for x, p in counted(rule)[(0, 1, 1), L].items()}, flat)
    got = prior_kl(F, tokens((0, 1, 1), (2, 2, 2)))
    close(got, torch.full_like(got, want), 10)
    F, states = rated(rule), every()
    law = F.log_prob(states[:1].expand(27, -1), states, full(states, F.T)).exp().tolist()
    got = prior_kl(F, states[:2])
    assert got.dtype == torch.float64 and got.shape == (2,)
    close(got, torch.full_like(got, kl(dict(zip(listed(), law)), flat)), 10)


@both
@given(seeds, st.sampled_from([0.0, 5.0]))
def test_a_term_is_the_divergence_of_the_two_steps(rule, seed, sharp):
    F, t, i = exactly(rule), seed % L + 1, seed % 27
    xt = listed()[i]
    logits = logits_of(1, L, V, seed=seed) + sharp * nn.functional.one_hot(tokens(xt), V)
    step = merged(logits[0].softmax(-1).tolist(), xt, t, rule)
    x0s = [x for x in listed() if counted(rule)[x, t].get(xt)]
    x0, n = tokens(*x0s), len(x0s)
    for guess in Categorical(logits.expand(n, -1, -1)), LazyCategorical(logits.expand(n, -1, -1), lambda h: h):
        got = step_kl(F, guess, x0, repeat(xt, n), full(x0, t), full(x0, t - 1), restore)
        want = torch.tensor([kl(back(x, xt, t, rule), step) for x in x0s], device=DEVICE, dtype=torch.float64)
        assert torch.equal(got == math.inf, want == math.inf)
        close(got[got < math.inf], want[want < math.inf], 100)


@both
def test_terms_have_finite_gradients(rule):
    F, xt, x0 = exactly(rule), tokens((0, 1, 2)), tokens((1, 1, 1))
    def term(z): return step_kl(F, Categorical(z), x0, xt, full(x0, 2), full(x0, 1), restore)
    for sharp in (-4, 4):                               # more than t differences expected, and fewer
        logits = (logits_of(1, L, V, scale=0.5) + sharp * nn.functional.one_hot(xt, V)).requires_grad_()
        assert term(logits).isfinite() and torch.autograd.gradcheck(term, logits)
    fresh = torch.zeros(1, 4, 2, device=DEVICE, dtype=torch.float64).requires_grad_()       # expects just t = 2 differences
    xt, x0, F = tokens((0, 0, 0, 0)), tokens((1, 1, 0, 0)), exactly(rule, 4, 2)
    step_kl(F, Categorical(fresh), x0, xt, full(x0, 2), full(x0, 1), restore).sum().backward()
    assert fresh.grad.isfinite().all()
    xt, x0 = tokens((0, 1, 2)), tokens((1, 1, 1))
    for s in (0, 1):
        F = rated(rule)
        assert torch.autograd.gradcheck(lambda z: step_kl(F, Categorical(z), x0, xt, full(x0, 2), full(x0, s), reuse_noise), logits)


def test_the_weights_of_a_term_are_summed_in_double_precision():
    logits, xt = logits_of(1, 200, V, seed=7).float(), torch.zeros(1, 200, dtype=torch.long, device=DEVICE)
    x0 = xt.index_fill(1, torch.tensor([5], device=DEVICE), 1)
    guess, change = Categorical(logits), split(logits, xt)[1].double()
    got = step_kl(exactly(EditDifferent, 200), guess, x0, xt, full(xt, 1), full(xt, 0), restore)
    close(got - guess.token_nll(x0)[:, 5].double(), change.exp().sum(1).log(), 10)


@both
@pytest.mark.parametrize("t, s", [(3, 2), (3, 1), (1, 0), (3, 0)])
def test_with_rates_a_term_is_the_divergence_of_products(rule, t, s):
    F, states, xt = rated(rule), every(), (0, 1, 1)
    q = logits_of(1, L, V, seed=5)
    p, stay = q[0].softmax(-1).tolist(), (RATES[s] / RATES[t]).item()
    def law(chance): return {y: math.prod((1 - stay) * chance(i, v) + stay * (v == xt[i]) for i, v in enumerate(y)) for y in listed()}
    model = law(lambda i, v: p[i][v])
    want = [kl(law(lambda i, v, x0=x0: float(v == x0[i])), model) for x0 in listed()]
    got = step_kl(F, Categorical(q.expand(27, -1, -1)), states, repeat(xt, 27), full(states, t), full(states, s), reuse_noise)
    close(got, want, 100)
    if s == 0: close(got, Categorical(q.expand(27, -1, -1)).nll(states), 100)


def test_tokens_that_a_guess_rules_out_cost_nothing_where_they_are_wrong():
    "At s = 0 a guess may give the present token chance 0, if it differs from the truth."
    F, x0, xt = rated(EditDifferent), tokens((0, 1, 2)), tokens((1, 1, 2))
    logits = torch.zeros(1, L, V, device=DEVICE).double()
    logits[0, 0, 1] = -math.inf
    close(step_kl(F, Categorical(logits), x0, xt, full(x0, 1), full(x0, 0), reuse_noise), [math.log(2) + 2 * math.log(3)], 10)
    F = exactly(EditDifferent)
    close(step_kl(F, Categorical(logits), x0, xt, full(x0, 1), full(x0, 0), restore), [math.log((1 + 4 / 3) / (1 / 2))], 10)


@both
def test_the_bound_holds_for_every_sentence(rule):
    "Against -log p(x0) of the whole chain from random tokens, by matrices; the mean of elbo is the sum over x_t."
    F, states, n = exactly(rule), every(), 27
    net = [logits_of(n, L, V, seed=t) + (5 if rule is EditAny else 0) * nn.functional.one_hot(states, V) for t in range(L + 1)]
    bound, x = prior_kl(F, states).clone(), torch.full((n,), 1 / n, device=DEVICE).double()
    for t in range(L, 0, -1):
        step = torch.tensor([[merged(net[t][i].softmax(-1).tolist(), xt, t, rule).get(y, 0.0) for y in listed()]
                             for i, xt in enumerate(listed())], device=DEVICE, dtype=torch.float64)
        x = x @ step
        for j in range(n):
            xt = states[j].expand(n, -1)
            chance = F.log_prob(states, xt, full(xt, t)).exp()
            terms = step_kl(F, Categorical(net[t][j].expand(n, -1, -1)), states, xt, full(xt, t), full(xt, t - 1), restore)
            bound += torch.where(chance > 0, chance * terms, 0.0)
    assert (bound >= -x.log()).all()
    def denoiser(xt, t): return Categorical(torch.stack(net)[t, (xt * torch.tensor([9, 3, 1], device=DEVICE)).sum(1)])
    x0 = states[[7]].expand(4000, -1)
    got = elbo(F, denoiser, x0, kernel=restore, generator=rng(1)).total
    assert (got.mean() - bound[7]).abs() < 5 * got.std() / 4000**0.5


# --------------------------------------------------------------------------------------------------------------- refusals


def flat(xt, t): return Categorical(torch.zeros(len(xt), L, V))
def sure(xt, t): return Categorical(nn.functional.one_hot(xt, V).double().log())
def nonsense(xt, t): return Categorical(torch.full((len(xt), L, V), math.nan))


X = torch.tensor([[0, 1, 2], [2, 2, 2]])
ONE, TWO, RATED = EditAny(V, Exactly(L)), EditDifferent(V, Exactly(L)), EditAny(V, AtRate(RATES))
JOINT = TableOracle(ONE, torch.tensor(listed()), torch.full((27,), 1 / 27))
def go(F=ONE, denoiser=flat, times=(3, 2), transition=restore): return sample(F, denoiser, X, times, transition)
def by_hand(gap): return restore(ONE, flat(X, X[:, 0]), X, torch.tensor([3, 3]), torch.tensor([3 - gap, 2]))
def given_t(*t, logits=None): return Differing(torch.zeros(2, L, V) if logits is None else logits, X, torch.tensor(t)).sample()


CASES = {
    "a joint posterior to restore from": (TypeError, lambda: go(denoiser=JOINT), "tokens are independent", "Table"),
    "a single guess to restore from": (TypeError, lambda: go(denoiser=lambda xt, t: Dirac(xt)), "tokens are independent", "Dirac"),
    "a joint posterior that must differ": (TypeError, lambda: go(denoiser=MustDiffer(JOINT), transition=reuse_noise), "Categorical", "Table"),
    "more differences than tokens": (ValueError, lambda: given_t(3, 4), "can differ in t places", "1 rows"),
    "fewer than none": (ValueError, lambda: given_t(-1, 0), "in t places", "1 rows"),
    "differences that the guess rules out": (ValueError, lambda: given_t(0, 1, logits=sure(X, X).logits), "in t places", "1 rows"),
    "no law at all": (ValueError, lambda: given_t(1, 1, logits=nonsense(X, X).logits), "in t places", "2 rows"),
    "a best guess that cannot be": (ValueError, lambda: Differing(sure(X, X).logits, X, torch.tensor([1, 0])).mode, "t places", "1 rows"),
    "restore with rates": (TypeError, lambda: go(F=RATED), "Exactly t hits", "AtRate: use reuse_noise"),
    "restore two at once": (ValueError, lambda: go(times=(3, 1)), "t to s = t - 1", r"steps of \[2\]"),
    "restore two at once in one row": (ValueError, lambda: by_hand(2), "t to s = t - 1", r"steps of \[1, 2\]"),
    "nothing to restore": (ValueError, lambda: go(F=TWO, denoiser=sure), "may differ from xt", "2 rows"),
    "restore from NaN": (ValueError, lambda: go(denoiser=nonsense), "may differ from xt", "2 rows"),
    "a bound for the baseline": (TypeError, lambda: elbo(ONE, flat, X, kernel=fresh_noise), "restore, or reuse_noise with AtRate", "FreshNoise"),
    "a bound for reused noise, exactly t": (TypeError, lambda: elbo(TWO, flat, X, kernel=reuse_noise), "AtRate", r"ReuseNoise\(\) with Exactly"),
    "a bound for two at once": (ValueError, lambda: elbo(ONE, flat, X, times=[3, 1, 0], kernel=restore), "s = t - 1", r"\[2\]"),
    "a bound for restore with rates": (TypeError, lambda: elbo(RATED, flat, X, kernel=restore), "Exactly t hits", "AtRate"),
}
test_the_message_says_what_was_expected_and_what_came = refuses(CASES)


def test_single_steps_by_hand_are_accepted():
    with unhooked(): assert by_hand(1).shape == X.shape

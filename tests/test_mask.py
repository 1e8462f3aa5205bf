"""Masks: which positions are hit, counted by brute force; steps, guesses and bounds against enumeration."""
import itertools
import math
from collections import Counter
from fractions import Fraction

import pytest
import torch
from conftest import DEVICE, full, refuses, rng
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from udm_book import finite
from udm_book.elbo import data_nll, elbo, prior_kl, step_kl
from udm_book.mask import AtRate, CarryOver, Exactly, Mask, Reveal, bound_loss, randomly, surest
from udm_book.oracle import TableOracle
from udm_book.posterior import Categorical, Dirac, LazyCategorical
from udm_book.reverse import Wrapper, fresh_noise, reuse_noise, reverse, sample

COUNT, RATE = Mask(2, Exactly(3)).to(DEVICE), Mask(2, AtRate([0.0, 0.3, 0.7, 1.0])).to(DEVICE)
FORMS = {"count": COUNT, "rate": RATE}
WORDS = list(itertools.product(range(2), repeat=3))
STATES = list(itertools.product(range(3), repeat=3))            # 2 is the mask


def rows(x, n=1): return torch.tensor(x, device=DEVICE).expand(n, -1)
def times(n, t): return torch.full((n,), t, device=DEVICE)
def holes(x): return [i for i, v in enumerate(x) if v == 2]
def fill(x, y, where): return tuple(y[i] if i in where else v for i, v in enumerate(x))
def subsets(positions): return [s for k in range(len(positions) + 1) for s in itertools.combinations(positions, k)]


def set_chance(F, S, t):
    """The chance that exactly the positions S of three are hit at t, from the definition."""
    if F is COUNT: return 1 / math.comb(3, t) if len(S) == t else 0.0
    r = (0.0, 0.3, 0.7, 1.0)[t]
    return r ** len(S) * (1 - r) ** (3 - len(S))


def open_chance(F, x, where, t, s):
    """The chance that of the holes of x at t just those in `where` are open at s."""
    n, k = len(holes(x)), len(where)
    if F is COUNT: return 1 / math.comb(n, k) if n - k == s else 0.0
    kept = (0.0, 0.3, 0.7, 1.0)[s] / (0.0, 0.3, 0.7, 1.0)[t]
    return (1 - kept) ** k * kept ** (n - k)


def follows(x, law):
    """The rows follow `law`, outcome -> chance: each frequency within 5 standard errors, nothing impossible."""
    seen = Counter(map(tuple, x.tolist()))
    assert all(law.get(y, 0) > 0 for y in seen), "an impossible outcome"
    for y, p in law.items(): assert abs(seen[y] / len(x) - p) <= 5 * math.sqrt(p * (1 - p) / len(x)) + 1e-12, (y, p, seen[y] / len(x))


# ------------------------------------------------------------------------------------------------------------ which are hit


def test_hits_by_hand():
    u = torch.tensor([[0.5, 0.1, 0.9, 0.3]], dtype=torch.float64)
    want = [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]]
    assert [Exactly(4).at(u, torch.tensor([t])).int().tolist()[0] for t in range(5)] == want
    halves = AtRate([0.0, 0.1, 0.5, 0.95])
    assert [halves.at(u, torch.tensor([t])).int().tolist()[0] for t in range(4)] == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]]
    assert not AtRate.even(2).at(torch.tensor([[0.0, 0.5]]).double(), torch.tensor([0])).any()
    assert AtRate.even(2).at(torch.tensor([[0.0, 0.5]]).double(), torch.tensor([1])).tolist() == [[True, False]]
    mixed = Exactly(4).at(u.expand(2, -1), torch.tensor([1, 3]))
    assert mixed.int().tolist() == [want[1], want[3]]


def test_times_and_shares():
    assert (Exactly(1).T, Exactly(4).T, AtRate.even(1).T, AtRate.even(5).T, COUNT.T) == (1, 4, 1, 5, 3)
    assert Exactly(4).left(torch.tensor([4, 3, 2]), torch.tensor([1, 0, 1])).tolist() == [0.75, 1.0, 0.5]
    assert RATE.hits.left(times(1, 2), times(1, 1)).item() == pytest.approx(1 - 0.3 / 0.7)
    assert AtRate.even(4).table.share.dtype == torch.float64 and Exactly(4).table.share.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert AtRate([0.0, 0.5, 1.0]).T == 2 and AtRate.even(4).table.share.tolist() == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("l, odds", [(3, 0.0), (4, 0.25), (4, 1.0), (1, 0.5)])
def test_chances_of_sets_are_sums_over_sets(l, odds):
    r = [0.0, 0.2, 0.6, 1.0]
    rate, count = AtRate(torch.tensor(r, dtype=torch.float64)), Exactly(l)
    sets = subsets(range(l))
    for n in range(l + 1):
        around = [S for S in sets if set(range(n)) <= set(S)]
        for t in range(l + 1):
            want = sum(odds ** (t - n) for S in around if len(S) == t) / math.comb(l, t)
            got = count.log_prob(torch.tensor([n]), l, torch.tensor([t]), odds).exp().item()
            assert got == pytest.approx(want, rel=1e-13, abs=0)
        for t in range(4):
            want = sum(odds ** (len(S) - n) * r[t] ** len(S) * (1 - r[t]) ** (l - len(S)) for S in around)
            got = rate.log_prob(torch.tensor([n]), l, torch.tensor([t]), odds).exp().item()
            assert got == pytest.approx(want, rel=1e-13, abs=0)


@pytest.mark.parametrize("seen, t", [((0, 0, 0), 1), ((0, 1, 0), 1), ((0, 1, 0), 2), ((0, 0, 0), 2), ((1, 0, 1), 3), ((0, 0, 0), 3)])
def test_the_order_inferred_in_the_count_form_is_uniform_where_it_may_be(seen, t):
    "Given that some positions are among the first t, all orders of which that is true are equally likely."
    n, must = 12_000, tuple(i for i in range(3) if seen[i])
    u = Exactly(3).infer(torch.tensor(seen).bool().expand(n, -1), times(n, t).cpu(), torch.rand(n, 3, generator=rng(t, "cpu"), dtype=torch.float64), 0.5)
    possible = [order for order in itertools.permutations(range(3)) if set(must) <= set(order[:t])]
    follows(u.argsort(1), {order: 1 / len(possible) for order in possible})
    assert (u.sort(1).values == torch.arange(3).double() / 3).all()


def test_more_hits_seen_than_the_time_allows_are_hit_first():
    u = Exactly(3).infer(torch.tensor([[True, True, False]]), torch.tensor([1]), torch.tensor([[0.6, 0.5, 0.1]]).double(), 0.0)
    assert (u * 3).round().tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("odds", [0.0, 0.25, 1.0])
def test_the_numbers_inferred_in_the_rate_form_have_their_law(odds):
    "A fine grid for the fresh number: seen hits are uniform below r; the others are hits in proportion, uniform on either side."
    n, r = 10_000, 0.4
    fresh = ((torch.arange(n).double() + 0.5) / n)[:, None].expand(n, 2)
    u = AtRate([0.0, r, 0.9]).infer(torch.tensor([True, False]).expand(n, 2), torch.ones(n, dtype=torch.long), fresh, odds)
    assert (u[:, 0] < r).all() and u[:, 0].sort().values.sub(fresh[:, 0] * r).abs().max() < 1e-6
    hit, chance = u[u[:, 1] < r, 1], r * odds / (1 - r + r * odds)
    spared = u[u[:, 1] >= r, 1]
    assert abs(len(hit) / n - chance) <= 1 / n
    for part, low, high in [(hit, 0, r), (spared, r, 1)]:
        if len(part):
            even = low + (torch.arange(len(part)).double() + 0.5) / len(part) * (high - low)
            assert (part.sort().values - even).abs().max() < 2 / len(part) and part.max() < high


def test_masks_at_a_rate_show_every_hit():
    "Holes lie below r, visible tokens above, each spread evenly, also where the fresh number is 0."
    fresh = torch.tensor([[0.0, 0.0, 0.25], [0.5, 0.75, 0.5]], device=DEVICE).double()
    u = RATE.infer_noise(rows((0, 1, 1), 2), rows((2, 1, 2), 2), times(2, 1), fresh)
    want = torch.stack([0.3 * fresh[:, 0], 0.3 + 0.7 * fresh[:, 1], 0.3 * fresh[:, 2]], 1)
    assert (u - want).abs().max() < 1e-15 and torch.equal(RATE(rows((0, 1, 1), 2), times(2, 1), u), rows((2, 1, 2), 2))


def test_rate_one_hits_all_and_explains_any():
    u = AtRate.even(1).infer(torch.tensor([[True, False]]), torch.tensor([1]), torch.tensor([[0.5, 0.5]]).double(), 0.5)
    assert AtRate.even(1).at(u, torch.tensor([1])).all() and u.isfinite().all()
    u = AtRate.even(1).infer(torch.tensor([[True, False]]), torch.tensor([1]), torch.tensor([[0.5, 0.5]]).double(), 0.0)
    assert u.tolist() == [[0.5, 1.0]]


def test_how_many_leave():
    n, t, s = torch.tensor([3, 2, 1, 0]), torch.tensor([3, 2, 3, 3]), torch.tensor([1, 0, 2, 1])
    assert Exactly(3).leave(n, t, s, None).tolist() == [2, 2, 0, 0]
    many = times(8000, 2)
    left = RATE.hits.leave(many, many, times(8000, 1), rng(1))
    p = 1 - 0.3 / 0.7
    follows(left[:, None], {(0,): (1 - p) ** 2, (1,): 2 * p * (1 - p), (2,): p * p})
    assert torch.equal(left, RATE.hits.leave(many, many, times(8000, 1), rng(1)))


# ------------------------------------------------------------------------------------------------------------ the forward law


@pytest.mark.parametrize("form", FORMS)
def test_the_law_of_xt(form):
    F = FORMS[form]
    for x0, t in itertools.product(WORDS, range(4)):
        law = {fill(x0, (2, 2, 2), S): set_chance(F, S, t) for S in subsets(range(3))}
        got = F.log_prob(rows(x0, 27), torch.tensor(STATES, device=DEVICE), times(27, t)).exp().tolist()
        for x, p in zip(STATES, got): assert p == pytest.approx(law.get(x, 0), rel=1e-13, abs=0)
        if F is COUNT: assert {tuple(2 if v is None else v for v in x): float(p) for x, p in finite.mask(3).law(x0, t).items()} == pytest.approx(
            {x: p for x, p in law.items() if p})
    n = 8000
    follows(F.sample(rows((0, 1, 1), n), times(n, 2), generator=rng(2)), {x: p for x in STATES if (p := {
        fill((0, 1, 1), (2, 2, 2), S): set_chance(F, S, 2) for S in subsets(range(3))}.get(x, 0))})


def test_the_noise_is_a_number_for_each_position():
    x0 = rows((0, 1, 1), 5000)
    u = COUNT.sample_noise(x0, generator=rng(3))
    assert u.shape == x0.shape and u.dtype == torch.float64 and torch.equal(u, COUNT.sample_noise(x0, generator=rng(3)))
    assert abs(u.mean().item() - 0.5) < 5 / math.sqrt(12 * 15000) and u.min() < 0.01 and u.max() > 0.99
    assert RATE.sample_noise(rows((0, 1, 1, 0, 1)), generator=rng(3)).shape == (1, 5)       # rates know no length
    assert COUNT.prior(x0).eq(2).all() and COUNT.prior(x0).shape == x0.shape and COUNT.prior(x0).dtype == torch.int64
    assert torch.equal(COUNT.prior(x0), COUNT(x0, times(5000, 3), u))


def test_the_inferred_order_is_the_counted_one():
    "All fresh orders once: the inferred ones have the law q(eps | x0, xt) exactly, and lead to xt."
    fresh = torch.tensor(list(itertools.permutations(range(3))), device=DEVICE).double() / 3
    small = finite.mask(3)
    for x0, t in itertools.product(WORDS, (1, 2, 3)):
        for x in small.law(x0, t):
            xt = rows(tuple(2 if v is None else v for v in x), 6)
            eps = COUNT.infer_noise(rows(x0, 6), xt, times(6, t), fresh)
            assert torch.equal(COUNT(rows(x0, 6), times(6, t), eps), xt)
            law = {order: Fraction(n, 6) for order, n in Counter(map(tuple, eps.argsort(1).tolist())).items()}
            assert law == finite.then(small.infer_noise(x0, x, t), lambda e: finite.sure(e[0]))


@given(st.integers(1, 8), st.integers(2, 9), seeds)
def test_inferred_noise_leads_to_xt(l, vocab, seed):
    g = rng(seed, "cpu")
    x0, t = torch.randint(0, vocab, (6, l), generator=g), torch.randint(1, l + 1, (6,), generator=g)
    for F in Mask(vocab, Exactly(l)), Mask(vocab, AtRate.even(l)):
        xt = F.sample(x0, t, generator=g)
        eps = F.infer_noise(x0, xt, t, F.sample_noise(x0, generator=g))
        assert torch.equal(F(x0, t, eps), xt) and torch.equal(F(x0, torch.zeros_like(t), eps), x0)
        assert not (xt == vocab).any() or F.log_prob(x0, xt, t).isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("t, s", [(3, 2), (3, 1), (2, 1), (2, 0)])
def test_keeping_the_noise_opens_holes_by_chance_alone(form, t, s):
    F, n, x = FORMS[form], 8000, (2, 1, 2) if t == 2 else (2, 2, 2)
    x0, xt = rows((0, 1, 1), n), rows(x, n)
    xs = reuse_noise(F, x0, xt, times(n, t), times(n, s), F.sample_noise(x0, generator=rng(t + s)))
    follows(xs, {fill(x, (0, 1, 1), w): p for w in subsets(holes(x)) if (p := open_chance(F, x, w, t, s))})


def test_a_guess_that_disagrees_replaces_what_is_visible():
    xs = reuse_noise(COUNT, rows((0, 0, 1)), rows((2, 1, 2)), times(1, 2), times(1, 1), torch.tensor([[0.2, 0.5, 0.1]], device=DEVICE).double())
    assert xs.tolist() == [[0, 0, 2]]


# ------------------------------------------------------------------------------------------------------------ guesses


class Lookup(torch.nn.Module):
    """Arbitrary conditionals for each of the 27 states, certain of what is visible unless `leaky`."""
    def __init__(self, leaky=False, dtype=torch.float64):
        super().__init__()
        p = torch.rand(27, 3, 2, generator=rng(11, "cpu"), dtype=torch.float64) + 0.1
        for x in STATES:
            for i, v in enumerate(x):
                if v < 2 and not leaky: p[self.code(torch.tensor([x]))[0], i] = torch.tensor([v == 0, v == 1]).double()
        self.register_buffer("logits", (p / p.sum(-1, keepdim=True)).log().to(dtype))
        self.to(DEVICE)

    @staticmethod
    def code(x): return (x * 3 ** torch.arange(3, device=x.device)).sum(1)
    def forward(self, xt, t): return Categorical(self.logits[self.code(xt)])
    def chance(self, x, i, v): return self.logits[self.code(torch.tensor([x]))[0], i, v].exp().item()


NET, LEAKY = Lookup(), Lookup(leaky=True)


def test_carry_over_is_certain_of_what_is_visible_and_leaves_the_rest():
    xt = torch.tensor([[2, 1, 0, 2]])
    logits = torch.randn(1, 4, 3, generator=rng(4, "cpu"))
    guess = CarryOver(lambda x, t, **cond: Categorical(logits + cond["c"]), 2)(xt, torch.tensor([2]), c=torch.arange(3.0))
    want = (logits + torch.arange(3.0)).softmax(-1)
    want[0, 1], want[0, 2] = torch.tensor([0.0, 1, 0]), torch.tensor([1.0, 0, 0])
    assert torch.allclose(guess.mean, want) and (guess.mean[0, 1:3] == want[0, 1:3]).all() and guess.logits.dtype == torch.float32
    assert torch.equal(guess.logits[0, [0, 3]], (logits + torch.arange(3.0))[0, [0, 3]])

    class Told(torch.nn.Module):
        needs_s = True
    assert isinstance(CarryOver(NET, 2), Wrapper) and not CarryOver(NET, 2).needs_s and CarryOver(Told(), 2).needs_s


def test_carry_over_keeps_what_a_leaky_network_forgets():
    xT, n = COUNT.prior(rows((0, 0, 0), 400)), 400
    def changed(denoiser):
        before = xT
        count = 0
        for step in reverse(COUNT, denoiser, xT, range(3, -1, -1), reuse_noise, generator=rng(5)):
            count += ((before < 2) & (before != step.xt)).sum().item()
            before = step.xt
        return count
    assert changed(CarryOver(LEAKY, 2)) == 0 < n // 10 < changed(LEAKY)


# ------------------------------------------------------------------------------------------------------------ filling holes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("x, t, s", [((2, 2, 2), 3, 2), ((2, 2, 2), 3, 1), ((2, 0, 2), 2, 1), ((2, 0, 2), 2, 0), ((2, 2, 2), 3, 0)])
def test_reveal_against_enumeration(form, x, t, s):
    "Holes chosen by chance, filled independently by the guess at x; nothing else is touched."
    F, n, law = FORMS[form], 10_000, Counter()
    for where in subsets(holes(x)):
        for words in itertools.product(range(2), repeat=len(where)):
            y = fill(x, dict(zip(where, words)), where)
            law[y] += open_chance(F, x, where, t, s) * math.prod(NET.chance(x, i, y[i]) for i in where)
    xt = rows(x, n)
    before = xt.clone()
    xs = Reveal()(F, NET(xt, times(n, t)), xt, times(n, t), times(n, s), generator=rng(6))
    follows(xs, {y: p for y, p in law.items() if p})
    assert torch.equal(xt, before)
    assert torch.equal(xs, Reveal()(F, NET(xt, times(n, t)), xt, times(n, t), times(n, s), generator=rng(6)))


def test_reveal_and_reuse_noise_have_one_law():
    "For guesses with independent tokens: by the tables of the two steps, two holes at once."
    n, x = 10_000, rows((2, 2, 2), 10_000)
    law = Counter()
    for where in itertools.combinations(range(3), 2):
        for y in WORDS: law[fill((2, 2, 2), y, where)] += math.prod(NET.chance((2, 2, 2), i, y[i]) for i in range(3)) / 3
    guess = NET(x, times(n, 3)).sample(generator=rng(7))
    follows(reuse_noise(COUNT, guess, x, times(n, 3), times(n, 1), COUNT.sample_noise(x, generator=rng(8))), law)
    follows(Reveal()(COUNT, NET(x, times(n, 3)), x, times(n, 3), times(n, 1), generator=rng(9)), law)


def test_surest_takes_the_largest_probability_whatever_is_drawn():
    p = torch.tensor([[[0.6, 0.4], [0.1, 0.9], [0.3, 0.7]]], device=DEVICE).expand(500, -1, -1)
    x, t = rows((2, 2, 2), 500), times(500, 3)
    one = Reveal(surest)(COUNT, Categorical(p.log()), x, t, t - 1, generator=rng(1))
    assert (one[:, [0, 2]] == 2).all() and set(one[:, 1].tolist()) == {0, 1}
    two = Reveal(surest)(COUNT, Categorical(p.log()), x, t, t - 2, generator=rng(1))
    assert (two[:, 0] == 2).all() and (two[:, 1:] < 2).all()
    seen = rows((2, 1, 2), 500)
    next_one = Reveal(surest)(COUNT, Categorical(p.log()), seen, t - 1, t - 2, generator=rng(1))
    assert (next_one[:, 0] == 2).all() and (next_one[:, 1] == 1).all() and (next_one[:, 2] < 2).all()


def test_random_order_is_uniform_and_follows_the_generator():
    hidden = torch.ones(6000, 3, dtype=torch.bool, device=DEVICE)
    guess = Categorical(torch.zeros(6000, 3, 2, device=DEVICE))
    score = randomly(guess, hidden, rng(2))
    follows(score.argsort(1), {order: 1 / 6 for order in itertools.permutations(range(3))})
    assert score.dtype == torch.float64 and torch.equal(score, randomly(guess, hidden, rng(2)))


def test_the_head_is_asked_only_where_a_word_is_needed():
    asked = []
    def head(features):
        asked.append(len(features))
        return features @ torch.eye(4, 2, device=DEVICE)
    x = rows((2, 1, 2), 50)
    xs = Reveal()(COUNT, LazyCategorical(torch.randn(50, 3, 4, generator=rng(3), device=DEVICE), head), x, times(50, 2), times(50, 1), generator=rng(4))
    assert asked == [50] and ((xs == 2).sum(1) == 1).all()
    step_kl(COUNT, LazyCategorical(torch.randn(50, 3, 4, generator=rng(3), device=DEVICE), head), rows((0, 1, 1), 50), x, times(50, 2), times(50, 1), Reveal())
    assert asked == [50, 100]


TRUTH = {"random": [0.22, 0.04, 0.10, 0.08, 0.02, 0.16, 0.06, 0.32], "parity": [0.25, 0, 0, 0.25, 0, 0.25, 0.25, 0]}


@pytest.mark.parametrize("name", TRUTH)
@pytest.mark.parametrize("order", [randomly, surest])
def test_one_hole_at_a_time_from_exact_marginals_is_exact(name, order):
    F, n = COUNT, 10_000
    oracle = TableOracle(F, torch.tensor(WORDS, device=DEVICE), torch.tensor(TRUTH[name], dtype=torch.float64, device=DEVICE), joint=False).to(DEVICE)
    end = sample(F, oracle, F.prior(rows((0, 0, 0), n)), range(3, -1, -1), Reveal(order), generator=rng(10))
    follows(end, {x: p for x, p in zip(WORDS, TRUTH[name]) if p})


def test_all_holes_at_once_lose_the_parity():
    oracle = TableOracle(COUNT, torch.tensor(WORDS, device=DEVICE), torch.tensor(TRUTH["parity"], dtype=torch.float64, device=DEVICE), joint=False).to(DEVICE)
    end = sample(COUNT, oracle, COUNT.prior(rows((0, 0, 0), 4000)), [3, 0], Reveal(), generator=rng(12))
    follows(end, dict.fromkeys(WORDS, 1 / 8))


# ------------------------------------------------------------------------------------------------------------ the bound


def divergence(F, net, x0, x, t, s, carried):
    """KL(q(x_s|x_t,x0) ‖ p(x_s|x_t)) by listing the sets of holes that open; visible words are guessed too unless carried."""
    total = 0.0
    for where in subsets(holes(x)):
        if p := open_chance(F, x, where, t, s):
            guessed = [*where, *([] if carried else [i for i in range(3) if x[i] < 2])]
            total -= p * sum(math.log(net.chance(x, i, x0[i])) for i in guessed)
    return total


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("net, kernel, carried", [(NET, Reveal(), True), (LEAKY, Reveal(), True), (NET, reuse_noise, True), (LEAKY, reuse_noise, False)])
def test_the_divergence_of_a_step(form, net, kernel, carried):
    F = FORMS[form]
    for x0, (t, s) in itertools.product(WORDS[1:7:2], [(1, 0), (2, 1), (3, 2), (3, 1), (2, 0), (3, 0)]):
        states = [x for S in subsets(range(3)) if set_chance(F, S, t) for x in [fill(x0, (2, 2, 2), S)]]
        b, xt = len(states), torch.tensor(states, device=DEVICE)
        got = step_kl(F, net(xt, times(b, t)), rows(x0, b), xt, times(b, t), times(b, s), kernel)
        assert got.shape == (b,) and got.dtype == torch.float64
        for x, v in zip(states, got.tolist()): assert v == pytest.approx(divergence(F, net, x0, x, t, s, carried), rel=1e-12, abs=1e-15)
        if s == 0: assert torch.equal(got, data_nll(F, net(xt, times(b, t)), rows(x0, b), xt, times(b, t), kernel))


def test_the_bound_is_the_mean_over_orders():
    "The sum over all states of the exported terms, and the mean over all orders of the code lengths."
    for x0 in WORDS:
        orders = list(itertools.permutations(range(3)))
        mean = -sum(math.log(NET.chance(fill(x0, (2, 2, 2), order[k:]), i, x0[i])) for order in orders for k, i in enumerate(order)) / 6
        total = 0.0
        for t in (1, 2, 3):
            states = torch.tensor([fill(x0, (2, 2, 2), S) for S in itertools.combinations(range(3), t)], device=DEVICE)
            b = len(states)
            total += step_kl(COUNT, NET(states, times(b, t)), rows(x0, b), states, times(b, t), times(b, t - 1), Reveal()).mean().item()
        assert total == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_elbo_and_bound_loss_agree(form):
    F, n = FORMS[form], 6000
    x0 = rows((0, 1, 1), n)
    want = sum(set_chance(F, S, t) * divergence(F, NET, (0, 1, 1), fill((0, 1, 1), (2, 2, 2), S), t, t - 1, True)
               for t in (1, 2, 3) for S in subsets(range(3)))
    for kernel in (Reveal(), reuse_noise):
        terms = elbo(F, NET, x0, kernel=kernel, generator=rng(13))
        loss = bound_loss(F, NET, x0, kernel=kernel, generator=rng(14))
        for drawn in (terms.total, loss):
            assert abs(drawn.mean().item() - want) < 5 * drawn.std().item() / n**0.5
        assert not terms.prior.any() and terms.prior.dtype == torch.float64 and terms.prior.shape == (n,)
        assert torch.equal(loss, bound_loss(F, NET, x0, kernel=kernel, generator=rng(14)))


def test_the_loss_of_given_times_and_its_weight():
    "T times the step's divergence at the very state; a hole weighs l / t."
    x0, t = rows((0, 1, 1), 3), torch.tensor([1, 2, 3], device=DEVICE)
    xt = COUNT.sample(x0, t, generator=rng(15))
    loss = bound_loss(COUNT, NET, x0, t, kernel=Reveal(), generator=rng(15))
    each = torch.where(xt == 2, NET(xt, t).token_nll(x0), 0.0).sum(1)
    assert torch.allclose(loss, 3 / t * each, rtol=1e-13) and torch.equal(loss, 3 * step_kl(COUNT, NET(xt, t), x0, xt, t, t - 1, Reveal()))
    class Told:
        needs_s = True
        def __call__(self, xt, t, s, c):
            assert torch.equal(s, t - 1) and c == 7
            return NET(xt, t)
    assert torch.equal(loss, bound_loss(COUNT, Told(), x0, t, kernel=Reveal(), generator=rng(15), c=7))


def test_float32_networks_are_summed_in_their_precision():
    x0, t = rows((0, 1, 1), 64), times(64, 2)
    a, b = (bound_loss(COUNT, Lookup(dtype=d), x0, t, kernel=Reveal(), generator=rng(16)) for d in (torch.float32, torch.float64))
    assert (a - b).abs().max() < 32 * torch.finfo(torch.float32).eps * b.max()


def test_gradients_reach_the_network():
    net = Lookup()
    logits = net.logits.clone().requires_grad_()
    net.logits = logits
    bound_loss(COUNT, CarryOver(net, 2), rows((0, 1, 1), 40), kernel=Reveal(), generator=rng(17)).mean().backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------------ bad input

x, V, T = torch.zeros(2, 3, dtype=torch.long), ValueError, TypeError
t2, stop = torch.tensor([2, 2]), Mask(2, AtRate(torch.tensor([0.0, 0.5])))
F3 = Mask(2, Exactly(3))
def even(xt, t): return Categorical(torch.zeros(*xt.shape, 2))


CASES = {
    "no position": (V, lambda: Exactly(0), "length of at least 1", "0"),
    "a rate above 1": (V, lambda: AtRate(torch.tensor([0.0, 1.5])), "rise from 0 to at most 1", "1.5"),
    "a last rate above 1": (V, lambda: AtRate(torch.tensor([0.0, 0.5, 1.5])), "rise from 0 to at most 1", "1.5"),
    "a rate at time 0": (V, lambda: AtRate(torch.tensor([0.1, 0.5])), "rise from 0", "0.1"),
    "a rate that stays": (V, lambda: AtRate(torch.tensor([0.0, 0.5, 0.5])), "rise from 0", "0.5, 0.5"),
    "a rate NaN": (V, lambda: AtRate(torch.tensor([0.0, math.nan])), "rise from 0", "nan"),
    "one rate": (V, lambda: AtRate(torch.tensor([0.0])), "rise from 0", r"\[0.0\]"),
    "rates with two axes": (V, lambda: AtRate(torch.tensor([[0.0, 1.0]])), "rise from 0", r"\[0.0, 1.0\]"),
    "no time": (V, lambda: AtRate.even(0), "T >= 1", "0"),
    "one word": (V, lambda: Mask(1, Exactly(3)), "at least 2 tokens", "1"),
    "words as floats": (T, lambda: F3.sample_noise(x / 1), r"tokens \(b, l\) of dtype int64", "torch.float32"),
    "words as int32": (T, lambda: F3.sample_noise(x.int()), "dtype int64", "torch.int32"),
    "sentences without a batch": (T, lambda: F3.sample_noise(x[0]), r"tokens \(b, l\)", r"\(3,\)"),
    "sentences of another length": (V, lambda: F3.sample_noise(x[:, :2]), "sentences of 3 tokens", "2"),
    "noise of another shape": (V, lambda: F3(x, t2, torch.zeros(2, 4).double()), r"eps shaped as x0, \(2, 3\)", r"\(2, 4\)"),
    "a joint law for the merged step": (T, lambda: Reveal()(F3, Dirac(torch.zeros(2, 3)), F3.prior(x), t2, t2 - 1),
                                        "Categorical or LazyCategorical guess", "Dirac"),
    "a joint law in the bound": (T, lambda: elbo(F3, TableOracle(F3, x[:1], torch.ones(1)), x, kernel=Reveal()), "whose tokens are independent", "Table"),
    "an order without a law": (T, lambda: bound_loss(F3, even, x, kernel=Reveal(surest)), r"reuse_noise or Reveal\(randomly\)", "Reveal"),
    "fresh noise in the bound": (T, lambda: bound_loss(F3, even, x, kernel=fresh_noise), "reuse_noise or Reveal", "FreshNoise"),
    "rates that end below 1 in the bound": (V, lambda: prior_kl(stop, x), "end at 1", "0.5"),
    "t = 0 in the bound": (V, lambda: bound_loss(F3, even, x, t2 - 2, kernel=Reveal()), r"times in 1\.\.3", "0 to 0"),
}

test_the_message_says_what_was_expected_and_what_came = refuses(CASES)

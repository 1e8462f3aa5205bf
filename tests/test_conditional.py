"""Labels: the oracle of each against its own data, their average against none; hidden labels, counted and in step."""
import pytest
import torch
from conftest import close, full, normal, refuses, rng, same_mean, unhooked
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import nn

from udm_book.conditional import DropLabels, LabelledOracle
from udm_book.hot import Hot, ddpm, reuse_noise
from udm_book.network import MLP, UNet
from udm_book.objective import Loss, Objective, network_loss
from udm_book.oracle import Mixture, Oracle
from udm_book.parameterization import EPS, V, Denoiser
from udm_book.reverse import sample
from udm_book.schedule import Schedule

SHORT = Schedule.linear(12, 0.02, 0.4)
F = Hot(SHORT)
OF = torch.tensor([0, 1, 2, 1, 0])                          # labels of five components
NULL = 3
W = torch.tensor([0.3, 0.1, 0.2, 0.15, 0.25], dtype=torch.float64)


def parts(seed=0, shape=(2,)):
    d = torch.Size(shape).numel()
    a = normal(5, d, d, seed=seed, device="cpu") / d**0.5
    return normal(5, *shape, seed=seed + 1, device="cpu"), a @ a.mT + 0.05 * torch.eye(d).double()


def labelled(seed=0, shape=(2,)): return LabelledOracle(Mixture(W, *parts(seed, shape)), SHORT, OF)


# ---------------------------------------------------------------------------------------------------------------- oracle


@given(seeds, st.integers(1, 12), st.integers(0, 2))
def test_with_a_label_it_is_the_oracle_of_the_components_that_have_it(seed, t, y):
    oracle, (means, covs), mine = labelled(seed), parts(seed), OF == y
    alone = Oracle(Mixture(W[mine] / W[mine].sum(), means[mine], covs[mine]), SHORT)
    x = 2 * normal(4, 2, seed=seed + 2, device="cpu")
    p, q = oracle(x, full(x, t), full(x, y)), alone(x, full(x, t))
    kappa = 1e3 / SHORT.sigma[1] ** 2
    close(p.mean, q.mean, kappa)
    close(p.cov, q.cov, kappa)
    close(p.nll(x), q.nll(x), kappa)


@given(seeds, st.integers(1, 12))
def test_without_a_label_it_is_the_average_over_the_labels(seed, t):
    oracle, x = labelled(seed), 2 * normal(4, 2, seed=seed + 2, device="cpu")
    tt, plain = full(x, t), Oracle(labelled(seed).data, SHORT)(x, full(x, t))
    chances = oracle.label_log_prob(x, tt).exp()
    close(chances.sum(1), torch.ones(4), 10)
    means = torch.stack([oracle(x, tt, full(x, y)).mean for y in range(3)], 1)
    close((chances[..., None] * means).sum(1), plain.mean, 100)
    for same in oracle(x, tt), oracle(x, tt, None), oracle(x, tt, full(x, NULL)):
        close(same.mean, plain.mean, 100)
        close(same.cov, plain.cov, 1e3)


@given(seeds, st.integers(1, 12))
def test_chances_of_labels_are_those_of_bayes_rule(seed, t):
    oracle, (means, covs), x = labelled(seed), parts(seed), normal(3, 2, seed=seed + 2, device="cpu")
    tt = full(x, t)
    joint = []
    for y in range(3):
        mine = OF == y
        joint.append(Oracle(Mixture(W[mine] / W[mine].sum(), means[mine], covs[mine]), SHORT).log_prob(x, tt) + W[mine].sum().log())
    close(oracle.label_log_prob(x, tt), torch.stack(joint, 1).log_softmax(1), 1e3 / SHORT.sigma[1] ** 2)


def test_rows_may_ask_for_different_labels_and_images_keep_their_shape():
    oracle, x = labelled(3, (1, 2, 2)), normal(4, 1, 2, 2, device="cpu")
    t, y = torch.tensor([1, 5, 9, 12]), torch.tensor([2, 0, NULL, 1])
    p = oracle(x, t, y)
    assert p.mean.shape == x.shape and oracle.classes == 3
    for i in range(4): close(oracle(x[i:i + 1], t[i:i + 1], y[i:i + 1]).mean[0], p.mean[i], 100)


def test_runs_with_a_label_end_with_the_law_of_the_label():
    oracle, g, n = labelled(7), rng(1, "cpu"), 8000
    mine = OF == 1
    own = Mixture(W[mine] / W[mine].sum(), *(v[mine] for v in parts(7)))
    xT = F.sample(own.sample(n, generator=g), torch.full((n,), 12), generator=g)
    x = sample(F, oracle, xT, [12, 5, 0], reuse_noise, generator=g, y=torch.ones(n, dtype=torch.long))
    want = own.sample(n, generator=rng(2, "cpu"))
    i, j = torch.triu_indices(2, 2)
    same_mean(torch.cat([x, x[:, i] * x[:, j]], 1), torch.cat([want, want[:, i] * want[:, j]], 1))


def test_the_oracle_moves_and_is_saved_with_its_labels():
    oracle = labelled()
    assert torch.equal(oracle.state_dict()["labels"], OF) and oracle.float().labels.dtype == torch.int64
    x = torch.zeros(1, 2)
    assert oracle(x, full(x, 3), full(x, 1)).mean.dtype == torch.float32


# --------------------------------------------------------------------------------------------------------------- dropping


class Heard(Objective):
    """An objective that returns what it is told: labels plus a hundred times its own draws."""
    def __init__(self):
        super().__init__()
        self.denoiser = nn.Linear(1, 1)
    def draw(self, x0, generator=None): return (torch.rand(len(x0), generator=generator),)
    def forward(self, x0, draws, y, extra=0.0): return y + 100 * draws[0] + extra


def dropped(share, n, seed=0):
    outer, x, y = DropLabels(Heard(), 9, share), torch.zeros(n, 1), torch.arange(n) % 5
    draws = outer.draw(x, rng(seed, "cpu"))
    told = outer(x, draws, y=y) - 100 * draws[1][0]
    assert (((told - y).abs() < 1e-3) | ((told - 9).abs() < 1e-3)).all()
    return ((told - 9).abs() < 1e-3).double(), y


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_dropped_at_the_given_rate_whatever_they_are(share):
    hidden, y = dropped(share, 50_000)
    assert (hidden.mean() == share) if share in (0, 1) else abs(hidden.mean() - share) < 5 * (share * (1 - share) / 50_000) ** 0.5
    for k in range(5): assert abs(hidden[y == k].mean() - share) <= 5 * (share * (1 - share) / 10_000) ** 0.5


def test_a_tenth_is_dropped_by_default_and_neighbours_are_independent():
    outer, x = DropLabels(Heard(), 9), torch.zeros(50_000, 1)
    hidden = outer.draw(x, rng(3, "cpu"))[0].double()
    assert abs(hidden.mean() - 0.1) < 5 * (0.09 / 50_000) ** 0.5
    assert abs((hidden[1:] * hidden[:-1]).mean() - 0.01) < 5 * (0.0099 / 50_000) ** 0.5


def test_it_is_pure_in_its_draws_and_rows_stay_in_step():
    net = Denoiser(UNet(1, 8, (1,), blocks=1, attention=(), classes=4), SHORT, V)
    for p in net.parameters(): nn.init.normal_(p, std=0.3)
    outer, x, y = DropLabels(Loss(F, net), 4, 0.5), normal(16, 1, 4, 4, dtype=torch.float32, device="cpu"), torch.arange(16) % 4
    draws = outer.draw(x, rng(0, "cpu"))
    whole = outer(x, draws, y=y)
    assert torch.equal(whole, outer(x, draws, y=y)) and whole.shape == (16,)
    hidden, rest = draws
    assert hidden.any() and not hidden.all() and all(len(d) == 16 for d in rest)
    some = torch.tensor([3, 9, 14])
    got = outer(x[some], (hidden[some], tuple(d[some] for d in rest)), y=y[some])
    assert (got - whole[some]).abs().max() < 1e-5
    t, weight, eps = rest
    assert torch.allclose(whole, network_loss(F, net, x, t, eps, y=torch.where(hidden, 4, y)) * weight)
    assert not torch.allclose(whole, network_loss(F, net, x, t, eps, y=y))


def test_it_asks_only_for_the_shape_of_the_data_and_is_an_objective_of_the_same_denoiser():
    inner = Heard()
    outer = DropLabels(inner, 9)
    assert outer.denoiser is inner.denoiser and isinstance(outer, Objective) and len(list(outer.parameters())) == 2
    a, b = (outer.draw(x, rng(1, "cpu")) for x in (torch.zeros(7, 3), torch.full((1, 3), torch.nan).expand(7, 3)))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1][0], b[1][0]) and a[0].dtype == torch.bool
    y = torch.arange(7)
    assert torch.equal(outer(torch.zeros(7, 3), a, y=y, extra=2.0), outer(torch.zeros(7, 3), a, y=y) + 2)


def test_other_conditions_pass_and_a_run_hears_its_labels():
    heard = []
    def net(x, t, y): heard.append(y.tolist()); return 0 * x
    x = normal(3, 2, device="cpu")
    sample(F, Denoiser(net, SHORT, EPS), x, [12, 3, 0], ddpm, y=torch.tensor([2, 0, 1]))
    assert heard == [[2, 0, 1]] * 2


def test_points_take_labels_too():
    net = MLP(2, 16, classes=3)
    for p in net.parameters(): nn.init.normal_(p, std=0.3)
    x, t = normal(4, 2, dtype=torch.float32, device="cpu"), torch.full((4,), 5)
    assert torch.equal(net(x, t), net(x, t, torch.full((4,), 3))) and not torch.allclose(net(x, t), net(x, t, torch.full((4,), 1)))


V_, x = ValueError, torch.zeros(5, 1)
with unhooked(): data = Mixture(W, *parts())
CASES = {
    "a label too few": (V_, lambda: LabelledOracle(data, SHORT, OF[:4]), "a label for each of 5 components", r"\[0, 1, 2, 1\]"),
    "a gap in the labels": (V_, lambda: LabelledOracle(data, SHORT, OF * 2), "from 0 on without a gap", r"\[0, 2, 4, 2, 0\]"),
    "a share above 1": (V_, lambda: DropLabels(Heard(), 9, 1.5), r"a share of dropped labels in \[0, 1\]", "1.5"),
    "a share below 0": (V_, lambda: DropLabels(Heard(), 9, -0.1), r"a share of dropped labels in \[0, 1\]", "-0.1"),
    "no labels to drop": (V_, lambda: DropLabels(Heard(), 9)(x, DropLabels(Heard(), 9).draw(x)), "labels y=", "none"),
}
test_refused_input = refuses(CASES)

"""The registry of the laws: a family is one line of FAMILIES and then has to keep every law of test_laws.py."""
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from conftest import DEVICE, normal, rng
from torch import Tensor

from udm_book.forward import Forward
from udm_book.hot import Hot, ddim, ddpm
from udm_book.oracle import Mixture, Oracle
from udm_book.posterior import Posterior
from udm_book.reverse import MixNoise, fresh_noise, reuse_noise
from udm_book.schedule import Schedule


@dataclass(frozen=True)
class Family:
    """What the laws need to know.

    `features` turns rows into columns whose means tell laws apart; `denoiser` is exact, or None; `again` makes a forward
    process of the same kind with other tables.
    """
    forward: Callable[[], Forward]
    data: Callable[[int, int], Tensor]                      # (n, seed) -> n independent rows
    denoiser: Callable[[Forward], Callable] | None
    kernels: dict
    features: Callable[[Tensor], Tensor]
    noise_features: Callable[[Tensor], Tensor]
    again: Callable[[], Forward]
    gain: Callable | None = None                            # of the denoiser: see run_bound


def moments(x):
    """Every coordinate and every product of two: the columns `(n, d + d (d + 1) / 2)`."""
    x = x.flatten(1)
    i, j = torch.triu_indices(x.shape[1], x.shape[1])
    return torch.cat([x, x[:, i] * x[:, j]], 1)


def quarters(x):
    """Moments, fourth powers and the share below -1, -1/2, … 1 of each coordinate: beyond normal laws."""
    low = torch.cat([(x.flatten(1) < c).to(x.dtype) for c in (-1.0, -0.5, 0.0, 0.5, 1.0)], 1)
    return torch.cat([moments(x), x.flatten(1) ** 4, low], 1)


# ------------------------------------------------------------------------------------------------------------------ hot

NORMAL_KERNELS = {"fresh": fresh_noise, "reuse": reuse_noise, "mix.5": MixNoise(0.5), "ddpm": ddpm, "ddim.3": ddim(0.3)}


def spread(d, seed):
    """A covariance of size d with eigenvalues between 0.05 and about 1."""
    a = normal(d, d, seed=seed, device="cpu") / d**0.5 / 2
    return a @ a.mT + 0.05 * torch.eye(d, dtype=torch.float64)


def mixture(K, *shape, atoms=False, seed=0):
    """K normal laws at different places with different full covariances (or points of mass), on rows of `shape`."""
    d = torch.Size(shape).numel()
    weights = torch.arange(1.0, K + 1, dtype=torch.float64)
    means = 1.2 * normal(K, *shape, seed=seed, device="cpu")
    covs = torch.stack([(0 if atoms else 1) * spread(d, seed + k) for k in range(K)])
    return Mixture(weights / weights.sum(), means, covs).to(DEVICE)


def oracle_gain(data):
    """x0 given xt moves by at most `alpha var / (alpha² var + sigma²)` times as much as xt, var a variance of a component."""
    def of(F):
        alpha, sigma = F.affine()
        return lambda t: (alpha[t] * data.var / (alpha[t] ** 2 * data.var + sigma[t] ** 2)).max().item()
    return of


def hot(schedule, data):
    """Normal noise on data from `data`, with the exact posterior."""
    return Family(
        forward=lambda: Hot(schedule()).to(DEVICE),
        data=lambda n, seed: data.sample(n, generator=rng(seed)),
        denoiser=lambda F: Oracle(data, F.schedule),
        kernels=NORMAL_KERNELS,
        features=quarters,
        noise_features=quarters,
        again=lambda: Hot(Schedule(schedule().alpha_bar ** 1.5)).to(DEVICE),
        gain=oracle_gain(data),
    )


def random_schedule():
    """Uneven steps that end without any signal."""
    a = torch.rand(9, generator=rng(5, "cpu"), dtype=torch.float64).mul(0.98).add(0.01).sort(descending=True).values
    return Schedule([1.0, *a.tolist(), 0.0])


# ---------------------------------------------------------------- a discrete family of the tests: exactly t masks of l


class ExactMask(Forward):
    """At time t exactly t of the l = T tokens are masked. The noise is a permutation; position i goes when eps[i] < t."""
    mask = -1

    def __init__(self, length):
        super().__init__()
        self.T = length

    def forward(self, x0, t, eps):
        return torch.where(eps < t[:, None], self.mask, x0)

    def sample_noise(self, x0, *, generator=None):
        return torch.rand(x0.shape, generator=generator, device=x0.device).argsort(1)

    def infer_noise(self, x0, xt, t, fresh):
        return (fresh + self.T * (xt != self.mask)).argsort(1).argsort(1)   # masked ones first, each part in the order of fresh

    def prior(self, like, *, generator=None):
        return torch.full_like(like, self.mask)


class Other(Forward):
    """A family that nothing is registered for and that is not normal: what must be refused."""
    T = 4
    def forward(self, x0, t, eps): return x0
    def sample_noise(self, x0, *, generator=None): return x0
    def infer_noise(self, x0, xt, t, fresh): return fresh
    def prior(self, like, *, generator=None): return like


@dataclass(frozen=True, eq=False)
class Table(Posterior):
    """Any law on the rows of `states`: probabilities `(b, len(states))`."""
    probs: Tensor
    states: Tensor

    @property
    def mean(self):
        return self.probs @ self.states.double()

    def sample(self, *, generator=None):
        return self.states[torch.multinomial(self.probs, 1, generator=generator)[:, 0]]

    def nll(self, x0):
        return -self.probs[(x0[:, None] == self.states).all(-1)].log()


STATES = torch.tensor(list(itertools.product(range(2), repeat=3)), device=DEVICE)
PRIOR = torch.tensor([0.22, 0.04, 0.10, 0.08, 0.02, 0.16, 0.06, 0.32], dtype=torch.float64, device=DEVICE)


def fill_in(xt, t):
    """Bayes: the data that agree with every token in sight."""
    fits = ((xt[:, None] == STATES) | (xt[:, None] == ExactMask.mask)).all(-1)
    joint = PRIOR * fits
    return Table(joint / joint.sum(1, keepdim=True), STATES)


def one_hot(x):
    """A column for every row of tokens that occurs at all (masks count as a token)."""
    code = ((x + 1) * 5 ** torch.arange(x.shape[1], device=x.device)).sum(1)
    return torch.nn.functional.one_hot(code, 5 ** x.shape[1]).double()


masks = Family(
    forward=lambda: ExactMask(3),
    data=lambda n, seed: STATES[torch.multinomial(PRIOR.expand(n, -1), 1, generator=rng(seed))[:, 0]],
    denoiser=lambda F: fill_in,
    kernels={"fresh": fresh_noise, "reuse": reuse_noise},
    features=one_hot,
    noise_features=one_hot,
    again=lambda: ExactMask(3),
)

FAMILIES = {
    "linear, normal": hot(lambda: Schedule.linear(8, 0.05, 0.6), mixture(1, 1, seed=1)),
    "cosine, mixture": hot(lambda: Schedule.cosine(7), mixture(2, 1, seed=2)),
    "geometric, normal in 3-D": hot(lambda: Schedule.geometric(6, 0.02, 0.8), mixture(1, 3, seed=3)),
    "su, mixture in 3-D": hot(lambda: Schedule.su(60), mixture(3, 3, seed=4)),
    "no signal left, images": hot(random_schedule, mixture(2, 1, 2, 2, seed=5)),
    "linear, points": hot(lambda: Schedule.linear(8, 0.05, 0.6), mixture(3, 2, atoms=True, seed=6)),
    "exact masks": masks,
}

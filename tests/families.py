"""The registry of the laws: a family is one line of FAMILIES and then has to keep every law of test_laws.py."""
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from conftest import DEVICE, normal, rng
from torch import Tensor
from torch.nn import functional as fn

from udm_book.cold import Cold
from udm_book.degradations import Degradation
from udm_book.edit import EditAny, EditDifferent, restore
from udm_book.encoding import Encoded
from udm_book.forward import Forward
from udm_book.hot import Hot, ddim, ddpm
from udm_book.mask import AtRate, Exactly, Mask, Reveal, surest
from udm_book.oracle import LinearOracle, Mixture, Oracle, TableOracle
from udm_book.posterior import Laplace
from udm_book.reverse import MixNoise, fresh_noise, reuse_noise
from udm_book.schedule import Schedule


@dataclass(frozen=True)
class Family:
    """What the laws need to know.

    `features` turns rows into columns whose means tell laws apart; `denoiser` is exact, or None; `again` makes a forward
    process of the same kind with other tables. `level` is the table that inferred noise is divided by; None: nothing is
    rounded. `marginal` holds transitions that are exact one step at a time with a denoiser that knows marginals only.
    """
    forward: Callable[[], Forward]
    data: Callable[[int, int], Tensor]                      # (n, seed) -> n independent rows
    denoiser: Callable[[Forward], Callable] | None
    kernels: dict
    features: Callable[[Tensor], Tensor]
    noise_features: Callable[[Tensor], Tensor]
    again: Callable[[], Forward]
    gain: Callable | None = None                            # of the denoiser: see run_bound
    level: Callable[[Forward], Tensor] = lambda F: None
    marginal: dict = field(default_factory=dict)
    marginal_denoiser: Callable[[Forward], Callable] | None = None


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
        level=lambda F: F.schedule.sigma,
    )


def random_schedule():
    """Uneven steps that end without any signal."""
    a = torch.rand(9, generator=rng(5, "cpu"), dtype=torch.float64).mul(0.98).add(0.01).sort(descending=True).values
    return Schedule([1.0, *a.tolist(), 0.0])


# -------------------------------------------------------------------------------------------------- cold and encoded


class Maps(Degradation):
    """Matrices `A_t` on three numbers: the identity, a turn that shrinks, two that lose a direction, one that keeps their sum."""
    linear = True

    def __init__(self, scale=1.0):
        super().__init__()
        A = [[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0.75, 0.5, 0], [-0.5, 0.75, 0], [0, 0, 1]], [[0.5, 0.5, 0], [-0.5, 0.75, 0], [0, 0.25, 0]],
             [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0.25]], [[0.5, 0.5, 0.5]] * 3]
        self.register_buffer("A", scale * torch.tensor(A, dtype=torch.float64))

    @property
    def T(self):
        return len(self.A) - 1

    def forward(self, x0, t):
        return torch.einsum("bij,bj->bi", self.A[t].to(x0), x0)


def cold(kernels, denoiser=True, levels=None, **options):
    """Normal data that lose a direction after the other, with the exact posterior."""
    data = mixture(1, 3, seed=7)
    mean, cov = data.means[0], data.basis[0] @ data.var[0].diag() @ data.basis[0].T

    def oracle(F): return LinearOracle(mean, cov, F.D.A, F.table.levels * F.scale)
    rising = None if levels is None else torch.tensor(levels, dtype=torch.float64)
    return Family(
        forward=lambda: Cold(Maps(), levels=rising, **options).to(DEVICE),
        data=lambda n, seed: data.sample(n, generator=rng(seed)),
        denoiser=oracle if denoiser else None,
        kernels=kernels,
        features=quarters,
        noise_features=quarters,
        again=lambda: Cold(Maps(0.5), levels=torch.linspace(0, 2, 5), **options).to(DEVICE),
        level=lambda F: F.table.levels,
    )


def laplace_like(x, generator=None):
    """Noise that is not normal."""
    return Laplace(torch.zeros_like(x), torch.ones((), dtype=x.dtype, device=x.device)).sample(generator=generator)


def encoded():
    """A code of two numbers for data of three, with the exact posterior of the data."""
    data, schedule = mixture(1, 3, seed=8), Schedule.linear(8, 0.05, 0.6)
    mean, cov = data.means[0], data.basis[0] @ data.var[0].diag() @ data.basis[0].T

    def make(scale=1.0):
        code = torch.nn.Linear(3, 2, bias=False, dtype=torch.float64)
        with torch.no_grad(): code.weight.copy_(scale * torch.tensor([[1.0, 0.5, -0.25], [0.0, 0.75, 1.0]]))
        return Encoded(code.requires_grad_(False), schedule, (2,)).to(DEVICE)

    return Family(
        forward=make,
        data=lambda n, seed: data.sample(n, generator=rng(seed)),
        denoiser=lambda F: LinearOracle(mean, cov, F.schedule.alpha[:, None, None] * F.encoder.weight, F.schedule.sigma),
        kernels=NORMAL_KERNELS,
        features=quarters,
        noise_features=quarters,
        again=lambda: make(2.0),
        level=lambda F: F.schedule.sigma,
    )


# --------------------------------------------------------------------------------------------------------------- tokens


def sentences(V, l, seed):
    """All sentences of l tokens out of V, and uneven chances for them."""
    states = torch.tensor(list(itertools.product(range(V), repeat=l)), device=DEVICE)
    chances = torch.rand(len(states), generator=rng(seed, "cpu"), dtype=torch.float64).add(0.05).to(DEVICE)
    return states, chances / chances.sum()


def code(x, base):
    """A column for every row of numbers below `base` that can occur."""
    number = (x * base ** torch.arange(x.shape[1], device=x.device)).sum(1)
    return fn.one_hot(number, base ** x.shape[1]).double()


def tokens(make, V, l, marginal=None, seed=9):
    """Sentences with the exact joint posterior. Of the noise, the order counts or the quarter that a number lies in, and the token."""
    states, chances = sentences(V, l, seed)

    def noise_features(eps):
        u, *rest = eps if isinstance(eps, tuple) else (eps,)
        cells = 4 if isinstance(make().hits, AtRate) else l
        place = (4 * u).long() if isinstance(make().hits, AtRate) else u.argsort(1).argsort(1)
        return code(place * V + rest[0], cells * V) if rest else code(place, cells)

    def again():
        F = make()
        if isinstance(F.hits, AtRate): F.hits = AtRate(F.hits.table.share.cpu() ** 1.5).to(DEVICE)
        return F

    return Family(
        forward=lambda: make().to(DEVICE),
        data=lambda n, seed: states[torch.multinomial(chances.expand(n, -1), 1, generator=rng(seed))[:, 0]],
        denoiser=lambda F: TableOracle(F, states, chances),
        kernels={"fresh": fresh_noise, "reuse": reuse_noise},
        features=lambda x: code(x, V + 1),
        noise_features=noise_features,
        again=again,
        marginal=marginal or {},
        marginal_denoiser=lambda F: TableOracle(F, states, chances, joint=False),
    )


class Other(Forward):
    """A family that nothing is registered for and that is not normal: what must be refused."""
    T = 4
    def forward(self, x0, t, eps): return x0
    def sample_noise(self, x0, *, generator=None): return x0
    def infer_noise(self, x0, xt, t, fresh): return fresh
    def prior(self, like, *, generator=None): return like


FAMILIES = {
    "linear, normal": hot(lambda: Schedule.linear(8, 0.05, 0.6), mixture(1, 1, seed=1)),
    "cosine, mixture": hot(lambda: Schedule.cosine(7), mixture(2, 1, seed=2)),
    "geometric, normal in 3-D": hot(lambda: Schedule.geometric(6, 0.02, 0.8), mixture(1, 3, seed=3)),
    "su, mixture in 3-D": hot(lambda: Schedule.su(60), mixture(3, 3, seed=4)),
    "no signal left, images": hot(random_schedule, mixture(2, 1, 2, 2, seed=5)),
    "linear, points": hot(lambda: Schedule.linear(8, 0.05, 0.6), mixture(3, 2, atoms=True, seed=6)),
    "cold": cold({"fresh": fresh_noise, "reuse": reuse_noise}),
    "cold, constant noise": cold({"fresh": fresh_noise, "reuse": reuse_noise, "mix.5": MixNoise(0.5)}, scale=0.3),
    "cold, rising noise": cold({"fresh": fresh_noise, "reuse": reuse_noise, "mix.5": MixNoise(0.5)}, scale=0.5, levels=[0, 0.25, 0.5, 1, 2]),
    "cold, Laplace noise": cold({"fresh": fresh_noise, "reuse": reuse_noise}, denoiser=False, scale=0.5, law=laplace_like),
    "encoded": encoded(),
    "masks": tokens(lambda: Mask(2, Exactly(3)), 2, 3, {"reveal": Reveal(), "surest": Reveal(surest)}),
    "masks at a rate": tokens(lambda: Mask(3, AtRate.even(4)), 3, 2),
    "any edits": tokens(lambda: EditAny(2, Exactly(3)), 2, 3, {"restore": restore}),
    "any edits at a rate": tokens(lambda: EditAny(3, AtRate.even(4)), 3, 2),
    "different edits": tokens(lambda: EditDifferent(3, Exactly(3)), 3, 3, {"restore": restore}),
    "different edits at a rate": tokens(lambda: EditDifferent(3, AtRate(torch.tensor([0.0, 0.25, 0.5, 2 / 3]))), 3, 2),
}

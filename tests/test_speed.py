"""Speed, counted exactly: aten calls of a step, synchronisations, buffers. The network is free: it makes no call."""
import pytest
import torch
from conftest import normal, rng, unhooked
from torch.utils._python_dispatch import TorchDispatchMode

from udm_book.elbo import elbo
from udm_book.hot import Hot, ddim, ddpm
from udm_book.mask import AtRate, Exactly, Mask, Reveal
from udm_book.objective import network_loss
from udm_book.parameterization import EPS, X0, Denoiser, V
from udm_book.posterior import Categorical, Dirac, Gaussian, LazyCategorical
from udm_book.reverse import reuse_noise, sample
from udm_book.samplers import Clip, LastMean
from udm_book.schedule import Schedule
from udm_book.score import DPMSolver2M, Heun

SCHEDULE = Schedule.linear(100)
F = Hot(SCHEDULE)
SYNCS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_to_copy", "isfinite", "any", "all")
P = pytest.mark.parametrize("P", [EPS, X0, V], ids=lambda P: P.name)


class Calls(TorchDispatchMode):
    """The names of all aten calls. `keep` holds on to their results, so that no address is used twice.

    (A kept result of a random factory is detached by autograd, so calls are counted without.)
    """
    def __init__(self, keep=False):
        super().__init__()
        self.names, self.results, self.keep = [], [], keep

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        self.names.append(f._schema.name.removeprefix("aten::"))
        self.results.append(out if self.keep else None)
        return out

    def addresses(self, name):
        return {x.data_ptr() for n, x in zip(self.names, self.results) if n == name}


def run(kernel, P, steps, dtype=torch.float32, keep=False, wrap=lambda D: D, **options):
    """Calls of a run of this many steps, none of which is the last one, once the schedule's views exist."""
    D, xT = wrap(Denoiser(lambda x, t: x, SCHEDULE, P, **options)), normal(2, 1, 4, 4, dtype=dtype, device="cpu")
    with unhooked(), torch.no_grad():
        sample(F, D, xT, [2, 1], kernel)
        with Calls(keep) as calls: sample(F, D, xT, range(steps + 1, 0, -1), kernel)
    return calls


def per_step(kernel, P, dtype=torch.float32, **more):
    """What 30 steps call more often than 20, for each step."""
    long, short = run(kernel, P, 30, dtype, **more), run(kernel, P, 20, dtype, **more)
    return {n: (long.names.count(n) - short.names.count(n)) / 10 for n in long.names}


@P
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kernel, most", [(ddpm, 6), (ddim(0.5), 6), (reuse_noise, 4)], ids=["ddpm", "ddim.5", "ddim"])
def test_calls_of_a_step(kernel, most, P, dtype):
    calls = per_step(kernel, P, dtype)
    assert 0 < sum(calls.values()) <= most, calls
    assert not any(calls.get(name) for name in SYNCS), calls
    assert calls.get("normal_", 0) == (kernel is not reuse_noise)


# In a run a denoiser makes 2 calls beside its network, with a table of variances 3; the kernel makes 2, with noise 4.
WRAPPED = {
    "clip": (Clip, reuse_noise, 5, {}),
    "clip ddpm": (Clip, ddpm, 7, {}),
    "last mean": (LastMean, ddpm, 6, {}),                                                       # nothing to drop: as without
    "variance": (lambda D: D, ddpm, 11, dict(var=SCHEDULE.sigma.square())),                     # the draw of x0 makes 4
    "variance, last mean": (LastMean, ddpm, 15, dict(var=SCHEDULE.sigma.square())),
    "dpm-solver++(2M)": (lambda D: DPMSolver2M(D, F), reuse_noise, 8, {}),
    "dpm-solver++(2M), clip": (lambda D: DPMSolver2M(Clip(D), F), reuse_noise, 8, {}),
    "sde-dpm-solver++(2M)": (lambda D: DPMSolver2M(D, F), ddpm, 10, {}),
    "heun": (lambda D: Heun(D, F), reuse_noise, 8 + 4, {}),                                     # two calls of the denoiser
    "heun, clip": (lambda D: Heun(Clip(D), F), reuse_noise, 8 + 4, {}),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_calls_of_wrappers_and_solvers(name, dtype):
    "Nothing waits for a GPU: a `_to_copy` here changes the precision of a weight, not its device."
    wrap, kernel, most, options = WRAPPED[name]
    calls = per_step(kernel, EPS, dtype, wrap=wrap, **options)
    assert 0 < sum(calls.values()) <= most, calls
    assert not any(calls.get(call) for call in SYNCS if call != "_to_copy"), calls


@pytest.mark.parametrize("chunk, network", [(1, 100), (8, 14)])
def test_the_bound_calls_the_network_once_for_a_chunk_of_times(chunk, network):
    "99 steps in pieces of `chunk` rows, and the last one by itself."
    seen, x0 = [], normal(1, 1, 4, 4, dtype=torch.float32, device="cpu")

    def net(x, t):
        seen.append(len(x))
        return x
    with unhooked(), torch.no_grad(), Calls() as calls:
        elbo(F, Denoiser(net, SCHEDULE, EPS), x0, decoder=lambda p: Gaussian(p.mean, torch.ones(())), chunk=chunk)
    assert len(seen) == network and max(seen) == chunk and sum(seen) == 100
    assert len(calls.names) <= 80 * network + 100 + 50                      # for each piece, each draw of noise, and the run
    assert calls.names.count("randn") == 100 and not {"erf", "special_log_ndtr"} & set(calls.names)


@P
def test_calls_of_the_training_loss(P):
    D, x0 = Denoiser(lambda x, t: x, SCHEDULE, P), normal(2, 1, 4, 4, dtype=torch.float32, device="cpu")
    with unhooked():
        network_loss(F, D, x0)
        with Calls() as calls: network_loss(F, D, x0)
    assert 0 < len(calls.names) <= 12, calls.names
    assert not set(SYNCS) & set(calls.names), calls.names


@pytest.mark.parametrize("kernel", [ddpm, reuse_noise], ids=["ddpm", "ddim"])
def test_without_gradients_a_run_has_two_states_and_one_noise_however_long(kernel):
    for steps in 3, 40:
        calls = run(kernel, EPS, steps, keep=True, wrap=lambda D: lambda xt, t: Dirac(xt))
        assert len(calls.addresses("add_")) == 2                                     # the states: each step ends with add_
        assert len(calls.addresses("normal_")) == (kernel is ddpm)
        assert calls.names.count("empty_like") <= 3


def test_the_forward_process_into_out_makes_no_tensor_of_its_size():
    x0, eps, t = normal(2, 300, device="cpu"), normal(2, 300, seed=1, device="cpu"), torch.tensor([1, 100])
    out = torch.empty_like(x0)
    with unhooked():
        F(x0, t, eps, out=out)
        with Calls(keep=True) as calls: F(x0, t, eps, out=out)
        made = [x for x in calls.results if isinstance(x, torch.Tensor) and x.numel() >= 600]
    assert {x.data_ptr() for x in made} == {out.data_ptr()}, calls.names


def test_a_deterministic_run_draws_nothing():
    g = rng(0, "cpu")
    before = g.get_state()
    with torch.no_grad():
        sample(F, Denoiser(lambda x, t: x, SCHEDULE, V), normal(2, 3, device="cpu"), range(100, -1, -1), reuse_noise, generator=g)
    assert torch.equal(g.get_state(), before)


# ------------------------------------------------------------------------------------------------------------ masked text


def written(hits, times, vocab=50, b=3, l=8):
    """A run of Reveal from nothing but masks: how many rows the head saw in each step, and how many positions moved."""
    family, seen, moved = Mask(vocab, hits), [], []
    features = normal(b, l, 4, dtype=torch.float32, device="cpu")
    weights = normal(4, vocab, dtype=torch.float32, device="cpu")

    def head(h):
        seen.append(h.shape[:-1].numel())
        return h @ weights

    step = Reveal()

    def watched(F, posterior, xt, t, s, *, generator):
        xs = step(F, posterior, xt, t, s, generator=generator)
        moved.append(int((xs != xt).sum()))
        return xs
    start = torch.full((b, l), vocab)
    end = sample(family, lambda xt, t: LazyCategorical(features, head), start, times, watched, generator=rng(0, "cpu"))
    assert (end < vocab).all() and sum(moved) == b * l
    return seen, moved


@pytest.mark.parametrize("stride", [1, 3])
def test_the_head_sees_only_the_rows_that_move_in_a_step(stride):
    "One position of each sentence a step, or three: 24 rows in a run, instead of 24 in every step."
    times = [*range(8, 0, -stride), 0]
    seen, moved = written(Exactly(8), times)
    assert seen == moved == [3 * (t - s) for t, s in zip(times, times[1:])]
    seen, moved = written(AtRate.even(8), times)
    assert seen == moved and sum(seen) == 24


def test_the_loop_asks_no_transition_for_a_mean_that_nobody_reads():
    seen = []

    def head(h):
        seen.append(len(h))
        return h
    steps = sample(Mask(5, Exactly(4)), lambda xt, t: LazyCategorical(torch.zeros(2, 4, 5), head), torch.full((2, 4), 5), [4, 2, 0],
                   lambda F, posterior, xt, t, s, *, generator: xt)
    assert not seen and steps.shape == (2, 4)


@pytest.mark.parametrize("n, V", [(64, 2**16), (2, 2**16), (2, 2**21)])
def test_tokens_are_drawn_without_a_float64_tensor_of_the_size_of_the_logits(n, V):
    "Pieces of at most 2^20 numbers (or a row); 64 rows of 2^16 logits are four of them."
    logits = normal(n, 1, V, dtype=torch.float32, device="cpu")
    with unhooked(), torch.no_grad(), Calls(keep=True) as calls: Categorical(logits).sample()
    wide = [x.numel() for x in calls.results if isinstance(x, torch.Tensor) and x.dtype == torch.float64]
    assert max(wide) == min(n * V, max(V, 2**20))
    assert calls.names.count("cumsum") == max(1, n * V // 2**20 if V <= 2**20 else n)

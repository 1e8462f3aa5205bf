"""Speed, counted exactly: aten calls of a step, synchronisations, buffers. The network is free: it makes no call."""
import pytest
import torch
from conftest import normal, rng, unhooked
from torch.utils._python_dispatch import TorchDispatchMode

from udm_book.hot import Hot, ddim, ddpm
from udm_book.objective import network_loss
from udm_book.parameterization import EPS, X0, Denoiser, V
from udm_book.reverse import reuse_noise, sample
from udm_book.schedule import Schedule

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


def run(kernel, P, steps, dtype=torch.float32, keep=False):
    """Calls of a run of this many steps, none of which is the last one, once the schedule's views exist."""
    D, xT = Denoiser(lambda x, t: x, SCHEDULE, P), normal(2, 1, 4, 4, dtype=dtype, device="cpu")
    with unhooked(), torch.no_grad():
        sample(F, D, xT, [2, 1], kernel)
        with Calls(keep) as calls: sample(F, D, xT, range(steps + 1, 0, -1), kernel)
    return calls


def per_step(kernel, P, dtype=torch.float32):
    """What 30 steps call more often than 20, for each step."""
    long, short = run(kernel, P, 30, dtype), run(kernel, P, 20, dtype)
    return {n: (long.names.count(n) - short.names.count(n)) / 10 for n in long.names}


@P
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kernel, most", [(ddpm, 10), (ddim(0.5), 10), (reuse_noise, 8)], ids=["ddpm", "ddim.5", "ddim"])
def test_calls_of_a_step(kernel, most, P, dtype):
    calls = per_step(kernel, P, dtype)
    assert 0 < sum(calls.values()) <= most, calls
    assert not any(calls.get(name) for name in SYNCS), calls
    assert calls.get("normal_", 0) == (kernel is not reuse_noise)


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
        calls = run(kernel, EPS, steps, keep=True)
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

"""Set-up of all tests: type checks, hypothesis, the device, and the two comparisons with their derived bounds."""
import os
from contextlib import contextmanager
from importlib.util import find_spec

import hypothesis
import jaxtyping
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=30)
hypothesis.settings.load_profile("tests")

# While tests run, shape annotations are enforced: this must happen before anything imports the library.
HOOK = jaxtyping.install_import_hook("udm_book", "beartype.beartype")

ASKED = os.environ.get("UDM_DEVICE", "cpu")
MISSING = ASKED.startswith("cuda") and not torch.cuda.is_available()
DEVICE = torch.device("cpu" if MISSING else ASKED)
on_device = pytest.mark.skipif(MISSING, reason=f"UDM_DEVICE={ASKED}, and this machine has no such device")


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"laws on {ASKED}" + (": SKIPPED, this machine has no such device" if MISSING else ""))
    if find_spec("diffusers") is None:
        terminalreporter.write_line("comparisons with diffusers: SKIPPED, it is not installed (make test-all installs it)")


@contextmanager
def unhooked():
    """The library as users have it, without type checks; `torch.compile` cannot trace them."""
    was = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", was)


def refuses(cases):
    """A test for each case of bad input, `name: (error, call, what is expected, what came)`, as users have it: without type checks.

    Assign it to a name that starts with `test_`, and the cases to `CASES`, where test_bad_input.py collects them.
    """
    @pytest.mark.parametrize("name", cases)
    def test(name):
        error, call, expected, came = cases[name]
        with unhooked(), pytest.raises(error, match=f"expected.*{expected}.*got.*{came}") as caught: call()
        assert type(caught.value) is error
    return test


def rng(seed=0, device=DEVICE):
    """A generator on the device of the laws."""
    return torch.Generator(device).manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float64, device=DEVICE):
    """Standard normal numbers that depend on `seed` alone."""
    return torch.randn(shape, generator=rng(seed, device), dtype=dtype, device=device)


def full(x, t):
    """Time `t` for every row of `x`."""
    return torch.full((len(x),), t, device=x.device)


def per_row(v, like):
    """One number per row, broadcasting against `like`."""
    return v.reshape(-1, *[1] * (like.ndim - 1))


def close(a, b, kappa=1.0, C=32, dtype=None):
    """`|a - b| <= C eps kappa`: kappa is the size of the largest intermediate term, times its amplification.

    C counts roundings: 32 covers some ten operations on either side. `dtype`: the less precise of the two computations.
    """
    dtype = dtype or a.dtype
    b = torch.as_tensor(b, dtype=torch.float64, device=a.device)
    error, bound = (a.double() - b).abs(), C * torch.finfo(dtype).eps * torch.as_tensor(kappa, device=a.device).double().abs()
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    ok = error <= bound
    assert ok.all(), f"largest error {error[~ok].max() if (~ok).any() else error.max():.3g} of {(~ok).sum()} against {bound.max():.3g}"


def same_mean(a, b, z=5.0):
    """Means of the columns of independent samples `(n, k)`, `(m, k)` differ by less than z standard errors.

    `b` may be a tuple of exact means. At z = 5 a correct column fails once in 1.7 million seeds; seeds are fixed.
    """
    a = a.double()
    se = a.var(0) / len(a)
    if isinstance(b, torch.Tensor) and b.ndim == a.ndim and len(b) > 1:
        b = b.double()
        se, b = se + b.var(0) / len(b), b.mean(0)
    error, bound = (a.mean(0) - b).abs(), z * se.sqrt() + 1e-12
    assert (error <= bound).all(), f"{(error / bound * z).max():.1f} standard errors: {a.mean(0).tolist()} against {b.tolist()}"


def run_bound(F, kernel, xT, steps, gain):
    """How far rounding may drive two ways of the same run apart, in units of eps.

    A step adds its largest terms, `alpha_s |x0| + b (|xt| + alpha_t |x0|) + c |fresh|`, and multiplies what was there by
    `(alpha_s + b alpha_t) gain(t) + b`, where a denoiser's answers move by at most `gain(t)` times as much as its input.
    """
    alpha, sigma = (v.tolist() for v in F.affine())
    error, size, width = 0.0, xT.abs().max().item(), xT[0].numel() ** 0.5
    for t, step in zip([F.T, *(step.t for step in steps)], steps):
        s, data = step.t, step.x0.abs().max().item()
        rho = float(kernel.share(F, torch.tensor(t, device=xT.device), torch.tensor(s, device=xT.device)))
        b = (1 - rho**2) ** 0.5 * sigma[s] / sigma[t]
        terms = alpha[s] * data + b * (size + alpha[t] * data) + rho * sigma[s] * 6      # |fresh| < 6
        error = ((alpha[s] + b * alpha[t]) * gain(t) * width + b) * error + terms
        size = step.xt.abs().max().item()
    return error

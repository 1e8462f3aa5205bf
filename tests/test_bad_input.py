"""Unsound input raises ValueError or TypeError, and the message says what was expected and what came.

Type checks are off here: users do not have them, and the library's own message is what is tested.
"""
import ast
import importlib
import math
from pathlib import Path

import pytest
import torch
from conftest import refuses, unhooked
from families import Other

from udm_book.data import check_data, digits, energy_distance, nearest_distance
from udm_book.hot import Hot, ddim, ddpm
from udm_book.network import TimeEmbedding, UNet
from udm_book.objective import network_loss, nll
from udm_book.oracle import Mixture, Oracle
from udm_book.parameterization import EPS, X0, Denoiser
from udm_book.posterior import Dirac
from udm_book.reverse import MixNoise, fresh_noise, reuse_noise, reverse, sample
from udm_book.schedule import Schedule
from udm_book.train import EMA, fit

S = Schedule.linear(10)
F = Hot(S)
D = Denoiser(lambda x, t: x, S, EPS)
x, t = torch.zeros(3, 2), torch.tensor([1, 5, 10])
eye = torch.eye(2)
nan, inf = math.nan, math.inf
LIBRARY = Path(__file__).resolve().parent.parent / "udm_book"


@pytest.fixture(autouse=True)
def as_users_have_it():
    with unhooked(): yield


def spoiled(value): return x.index_put((torch.tensor(1), torch.tensor(1)), torch.tensor(value))
def mix(weights=(0.5, 0.5), means=eye, covs=torch.stack([eye, eye])): return Mixture(torch.tensor(weights), means, covs)
def run(times=(10, 5, 0), xT=x, D=D, kernel=ddpm): return sample(F, D, xT, times, kernel)
def loop(times=(10, 5, 0), xT=x, D=D, kernel=ddpm): return list(reverse(F, D, xT, times, kernel))
def no_signal(): return Schedule([1.0, 0.5, 0.0])


V, T = ValueError, TypeError
CASES = {
    # schedules
    "starts below 1": (V, lambda: Schedule([0.9, 0.5]), "start at 1", "0.9"),
    "not decreasing": (V, lambda: Schedule([1.0, 0.5, 0.6]), "decrease strictly", "0.5 then 0.6 at t = 2"),
    "constant": (V, lambda: Schedule([1.0, 0.5, 0.5]), "decrease strictly", "0.5 then 0.5 at t = 2"),
    "below 0": (V, lambda: Schedule([1.0, 0.5, -0.1]), ">= 0", "-0.1 at t = 2"),
    "NaN in a schedule": (V, lambda: Schedule([1.0, nan, 0.1]), "finite", "nan"),
    "two axes": (V, lambda: Schedule(torch.ones(2, 2)), r"T\+1 >= 2 numbers", r"shape \(2, 2\)"),
    "one entry": (V, lambda: Schedule([1.0]), r"T\+1 >= 2 numbers", r"shape \(1,\)"),
    "no step": (V, lambda: Schedule.from_betas([]), "0 < beta <= 1", r"\[\]"),
    "beta 0": (V, lambda: Schedule.from_betas([0.1, 0.0]), "0 < beta <= 1", r"\[0.1, 0.0\]"),
    "beta above 1": (V, lambda: Schedule.from_betas([0.1, 1.5]), "0 < beta <= 1", "1.5"),
    "beta NaN": (V, lambda: Schedule.from_betas([0.1, nan]), "0 < beta <= 1", "nan"),
    "many betas": (V, lambda: Schedule.from_betas([0.1] * 20 + [2.0]), "0 < beta <= 1", r"0.1.* 2.0"),
    "betas with two axes": (V, lambda: Schedule.from_betas(torch.full((2, 2), 0.1)), "T numbers beta", "0.1"),
    "linear from 0": (V, lambda: Schedule.linear(5, 0.0, 0.1), "0 < beta <= 1", "0.0"),
    "geometric from 0": (V, lambda: Schedule.geometric(5, 0.0, 0.1), "0 < beta <= 1", "0.0"),
    "geometric from below 0": (V, lambda: Schedule.geometric(5, -0.1, 0.1), "0 < beta <= 1", "nan"),
    "beta 1 twice": (V, lambda: Schedule.from_betas([1.0, 1.0]), "decrease strictly", "0.0 then 0.0"),
    "increasing function": (V, lambda: Schedule.from_alpha_bar(lambda u: 1 + u, 4), "decrease strictly", "1.25 at t = 1"),
    "T = 0": (V, lambda: Schedule.cosine(0), "T numbers", r"\[\]"),
    "no steps in a run": (V, lambda: S.times(0), "between 1 and T = 10", "n = 0"),
    "more steps than times": (V, lambda: S.times(11), "between 1 and T = 10", "n = 11"),
    # the forward process
    "noise of another shape": (V, lambda: F(x, t, torch.zeros(3, 3)), r"eps shaped as x0, \(3, 2\)", r"\(3, 3\)"),
    "noise that would broadcast": (V, lambda: F(x, t, torch.zeros(1, 2)), r"eps shaped as x0, \(3, 2\)", r"\(1, 2\)"),
    "state of another shape": (V, lambda: F.infer_noise(x, torch.zeros(3), t, None), r"xt shaped as x0, \(3, 2\)", r"\(3,\)"),
    "one time for all": (V, lambda: F(x, torch.tensor([5]), x), r"one time per row of x0, t of shape \(3,\)", r"\(1,\)"),
    "a scalar time": (V, lambda: F(x, torch.tensor(5), x), r"one time per row of x0, t of shape \(3,\)", r"\(\)"),
    "times with two axes": (V, lambda: F(x, t[:, None], x), r"t of shape \(3,\)", r"\(3, 1\)"),
    "float times": (T, lambda: F(x, t / 1, x), "integer times t", "torch.float32"),
    "bool times": (T, lambda: F(x, t > 3, x), "integer times t", "torch.bool"),
    "integer data": (T, lambda: F.sample(x.long(), t), "floating-point data", "torch.int64"),
    "chain noise of another shape": (V, lambda: F.step(x, t, t - 1, torch.zeros(2, 2)), r"eps shaped as xs, \(3, 2\)", r"\(2, 2\)"),
    "chain with too few times": (V, lambda: F.step(x, t[:2], t - 1, x), r"t of shape \(3,\)", r"\(2,\)"),
    "kernel on another shape": (V, lambda: ddpm(F, x, torch.zeros(3, 3), t, t - 1, x), r"\(3, 2\)", r"\(3, 3\)"),
    "posterior at another shape": (V, lambda: F.step_posterior(x, torch.zeros(2, 2), t, t - 1), r"\(3, 2\)", r"\(2, 2\)"),
    # runs
    "a repeated time": (V, lambda: run([10, 5, 5, 0]), "strictly decreasing", r"\[10, 5, 5, 0\]"),
    "rising times": (V, lambda: run([0, 10]), "strictly decreasing", r"\[0, 10\]"),
    "a time beyond T": (V, lambda: run([11, 0]), "between 10 and 0", "11 to 0"),
    "a time below 0": (V, lambda: run([10, -1]), "between 10 and 0", "10 to -1"),
    "a time below 0 after others": (V, lambda: run([10, 5, -1]), "between 10 and 0", "10 to -1"),
    "one time": (V, lambda: run([10]), "at least two times", r"\[10\]"),
    "no time": (V, lambda: run([]), "at least two times", r"\[\]"),
    "a float time in a run": (T, lambda: run([10, 5.0, 0]), "Python integers", "'float'"),
    "a bool time in a run": (T, lambda: run([10, True, False]), "Python integers", "'bool'"),
    "tensor times in a run": (T, lambda: run(torch.tensor([10, 0])), "Python integers", "'Tensor'"),
    "NaN at the start": (V, lambda: run(xT=spoiled(nan)), "finite xT", "1 values"),
    "infinity at the start": (V, lambda: run(xT=spoiled(inf)), "finite xT", "1 values"),
    "no row at the start": (V, lambda: run(xT=x[:0]), "at least one row", r"\(0, 2\)"),
    "a scalar start": (V, lambda: run(xT=torch.tensor(1.0)), "at least one row", r"\(\)"),
    "integers at the start": (T, lambda: run(xT=x.long()), "floating-point xT", "torch.int64"),
    "the loop checks its times": (V, lambda: loop([5, 5]), "strictly decreasing", r"\[5, 5\]"),
    "the loop checks its start": (V, lambda: loop(xT=spoiled(nan)), "finite xT", "1 values"),
    "a tensor for a posterior": (T, lambda: run(D=lambda x, t: x), "return a Posterior", "Tensor"),
    "a tuple for a posterior": (T, lambda: loop(D=lambda x, t: (x, t)), "return a Posterior", "tuple"),
    "a guess of another shape": (V, lambda: loop(D=lambda x, t: Dirac(x[:1]), kernel=reuse_noise), r"\(1, 2\)", r"\(3, 2\)"),
    "a guess of another shape, collapsed": (V, lambda: run(D=lambda x, t: Dirac(x[:1]), kernel=fresh_noise), r"\(3, 2\)", r"\(1, 2\)"),
    # kernels
    "rho above 1": (V, lambda: MixNoise(1.1), r"rho of fresh noise in \[0, 1\]", "1.1"),
    "rho below 0": (V, lambda: MixNoise(-0.1), r"rho of fresh noise in \[0, 1\]", "-0.1"),
    "rho NaN": (V, lambda: MixNoise(nan), r"in \[0, 1\]", "nan"),
    "rho of time above 1": (V, lambda: run(kernel=MixNoise(lambda F, t, s: t)), r"rho of fresh noise in \[0, 1\]", "from t = 10"),
    "noise that is not normal": (T, lambda: MixNoise(0.5)(Other(), x, x, t, t - 1, x), "family with normal noise to mix", "Other"),
    "eta above 1": (V, lambda: ddim(1.5), r"eta in \[0, 1\]", "1.5"),
    "eta below 0": (V, lambda: ddim(-1), r"eta in \[0, 1\]", "-1"),
    "eta NaN": (V, lambda: ddim(nan), r"eta in \[0, 1\]", "nan"),
    # losses
    "t = 0 in the nll": (V, lambda: nll(F, D, x, t - 1), r"times in 1\.\.10", "0 to 9"),
    "t > T in the nll": (V, lambda: nll(F, D, x, t + 1), r"times in 1\.\.10", "2 to 11"),
    "too few times in the nll": (V, lambda: nll(F, D, x, t[:2]), r"t of shape \(3,\)", r"\(2,\)"),
    "float times in the nll": (T, lambda: nll(F, D, x, t / 1), "integer times", "torch.float32"),
    "t = 0 in the loss": (V, lambda: network_loss(F, D, x, t - 1), r"times in 1\.\.10", "0 to 9"),
    "NaN as time in the loss": (T, lambda: network_loss(F, D, x, t * nan), "integer times", "torch.float32"),
    "too few times in the loss": (V, lambda: network_loss(F, D, x, t[:2]), r"t of shape \(3,\)", r"\(2,\)"),
    # denoisers
    "EPS without signal": (V, lambda: Denoiser(None, no_signal(), EPS), "alpha > 0 for EPS", "alpha = 0 at t = 2: use X0 or V"),
    "variances for other times": (V, lambda: Denoiser(None, S, X0, torch.ones(10)),
                                  r"one variance for each time 0\.\.T, shape \(11,\)", r"\(10,\)"),
    "negative variances": (V, lambda: Denoiser(None, S, X0, -torch.ones(11)), "variances >= 0", r"-1\.0"),
    "NaN among variances": (V, lambda: Denoiser(None, S, X0, nan * torch.ones(11)), "variances >= 0", "nan"),
    "a network of another shape": (V, lambda: Denoiser(lambda x, t: x[:, :1], S, X0)(x, t), r"shape of xt, \(3, 2\)", r"\(3, 1\)"),
    # oracles
    "weights that sum to 2": (V, lambda: mix((1.0, 1.0)), "2 positive weights that sum to 1", r"\[1.0, 1.0\]"),
    "a weight of 0": (V, lambda: mix((1.0, 0.0)), "positive weights", r"\[1.0, 0.0\]"),
    "a weight NaN": (V, lambda: mix((0.5, nan)), "positive weights", "nan"),
    "too many weights": (V, lambda: mix((0.5, 0.25, 0.25)), "2 positive weights", "0.25, 0.25"),
    "covariances of another size": (V, lambda: mix(covs=torch.ones(2, 3, 3)), r"shape \(2, 2, 2\)", r"\(2, 3, 3\)"),
    "covariances that are not symmetric": (V, lambda: mix(covs=torch.stack([eye, eye + torch.tensor([[0, 1.0], [0, 0]])])),
                                           "symmetric", "one that is not"),
    "covariances that are not positive": (V, lambda: mix(covs=torch.stack([eye, -eye])), "positive semi-definite", "eigenvalue -1"),
    "small covariances that are not positive": (V, lambda: mix(covs=1e-8 * torch.stack([eye, -eye])), "positive semi-definite", "eigenvalue"),
    "a small component that is not positive": (
        V, lambda: mix(covs=torch.stack([1e8 * eye, eye * torch.tensor([1.0, -1.0])])), "positive semi-definite", "eigenvalue -1"),
    "NaN among covariances": (V, lambda: mix(covs=torch.full((2, 2, 2), nan)), "finite means and covariances", "NaN or infinite"),
    "NaN among means": (V, lambda: mix(means=nan * eye), "finite means and covariances", "NaN or infinite"),
    "an oracle at another precision": (T, lambda: Oracle(mix(), S)(x.double(), t), "dtype of the data, torch.float32", "torch.float64"),
    "an oracle with too few times": (V, lambda: Oracle(mix(), S)(x, t[:1]), r"one time per row of xt, t of shape \(3,\)", r"\(1,\)"),
    "an oracle at another shape": (V, lambda: Oracle(mix(), S)(torch.zeros(3, 5), t), r"rows shaped as the data, \(2,\)", r"\(5,\)"),
    # networks
    "an odd embedding": (V, lambda: TimeEmbedding(5), "even width of at least 4", "5"),
    "a narrow embedding": (V, lambda: TimeEmbedding(2), "even width of at least 4", "2"),
    # data and training
    "integer pictures": (T, lambda: check_data(x.byte()), r"floating-point data in \[-1.0, 1.0\]", "torch.uint8"),
    "no data": (V, lambda: check_data(x[:0]), "at least one row", "none"),
    "NaN in data": (V, lambda: check_data(spoiled(nan)), "finite data", "1 values"),
    "infinity in data": (V, lambda: check_data(spoiled(-inf)), "finite data", "1 values"),
    "data above the range": (V, lambda: check_data(x + 255), r"data in \[-1.0, 1.0\]", r"\[255, 255\]: rescale"),
    "data below the range": (V, lambda: check_data(x - 2), r"data in \[-1.0, 1.0\]", r"\[-2, -2\]: rescale"),
    "sets of unlike data": (V, lambda: energy_distance(x, torch.zeros(3, 5)), "data of one size", "rows of 2 and 5 numbers"),
    "a set of one row": (V, lambda: energy_distance(x, x[:1]), "at least two rows in each set", "3 and 1"),
    "NaN in a set": (V, lambda: nearest_distance(spoiled(nan), x), "finite data", "1 values"),
    "nothing held out": (V, lambda: digits(0), "between 1 and 1796", "0"),
    "all held out": (V, lambda: digits(1797), "between 1 and 1796", "1797"),
    "no training step": (V, lambda: fit(UNet(1, 8, (1, 2)), None, x, 0), "at least one step", "0"),
    "a training batch beyond the data": (V, lambda: fit(UNet(1, 8, (1, 2)), None, x, 1, batch=4, progress=False), "between 1 and 3", "4"),
    "decay 1": (V, lambda: EMA(UNet(1, 8, (1, 2)), 1.0), r"decay in \[0, 1\)", "1.0"),
    "decay below 0": (V, lambda: EMA(UNet(1, 8, (1, 2)), -0.1), r"decay in \[0, 1\)", "-0.1"),
}


test_the_message_says_what_was_expected_and_what_came = refuses(CASES)


def raised_at(call):
    """File and line of the library that raised."""
    with pytest.raises((ValueError, TypeError)) as caught: call()
    frames = [f for f in caught.traceback if Path(f.path).parent == LIBRARY]
    return Path(frames[-1].path).stem, frames[-1].lineno + 1


def test_every_error_of_the_library_has_a_case():
    "Each `raise ValueError` and `raise TypeError` is where some case ends, here or beside a module's tests (the ledger has its own)."
    files = [path for path in sorted(Path(__file__).parent.glob("test_*.py")) if "\nCASES = " in path.read_text(encoding="utf-8")]
    reached = {raised_at(call) for path in files for _, call, _, _ in importlib.import_module(path.stem).CASES.values()}
    missing = []
    for path in LIBRARY.glob("[a-z]*.py"):
        if path.stem == "ledger": continue
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Raise) and getattr(getattr(node.exc, "func", None), "id", "") in ("ValueError", "TypeError"):
                lines = {(path.stem, n) for n in range(node.lineno, node.end_lineno + 1)}
                if not lines & reached: missing.append(f"{path.name}:{node.lineno}: {text.splitlines()[node.lineno - 1].strip()}")
    assert not missing, "errors without a case:\n" + "\n".join(missing)

"""Measurements of a run: equal to their parts computed here, with real data as the floor, and a report that says how."""
import math
from dataclasses import replace

import pytest
import torch
from conftest import close, refuses, rng
from torch.utils.data import TensorDataset

from udm_book.config import Config, model
from udm_book.data import digits, energy_distance, mmd
from udm_book.elbo import elbo
from udm_book.hot import ddpm
from udm_book.likelihood import Decoder, Levels
from udm_book.measure import bits, distances, error, guesses, nearest, report
from udm_book.parameterization import Denoiser, V
from udm_book.posterior import Dirac
from udm_book.runs import Data, Run
from udm_book.samplers import Clip
from udm_book.text import Grams

D = digits()


def hot(n=30, m=40, labels=False, data="digits"):
    config = Config(data, size=8, channels=1, width=8, mults=(1,), blocks=1, attention=(), T=10, labels=labels)
    train, held = (TensorDataset(D.train[:n], D.train_labels[:n]), TensorDataset(D.held_out[:m], D.held_out_labels[:m])) if labels else (
        D.train[:n], D.held_out[:m])
    facts = dict(shape=[1, 8, 8], classes=[*"0123456789"] if labels else [], rows=[n, m], digest="")
    F, denoiser, _ = model(config, facts)
    return Run(config, facts, 3, F, denoiser.eval(), Data(train, held, facts))


def words(family, n=50):
    x = torch.randint(0, 4, (2 * n, 5), generator=rng(device="cpu"))
    facts = dict(shape=[5], vocab=[*"?abc"], rows=[n, n], digest="")
    F, denoiser, _ = model(Config("lines.txt", family, width=8, depth=1), facts, x[:n])
    return Run(Config("lines.txt", family, width=8, depth=1), facts, 3, F, denoiser.eval(), Data(x[:n], x[n:], facts))


def test_nearest_looks_at_all_data_whatever_the_rows():
    x, data = D.held_out[:9], D.train[:25]
    want = torch.cdist(x.flatten(1).double(), data.flatten(1).double()).amin(1).median().item()
    for i in 0, 7, 24: assert all(nearest(data[i:i + 1], data, rows) < 1e-6 for rows in (1, 7, 25, 100)), "the datum itself"
    for rows in 1, 7, 25, 100: assert math.isclose(nearest(x, data, rows), want, rel_tol=1e-12)


def test_distances_are_those_of_samples_and_of_real_pictures():
    run = hot()
    found = distances(run, 500, sampler="ddim", steps=3, seed=4)
    assert found["n"] == 30, "no more than there are to train on, nor held out"
    new, held = run.sample(30, sampler="ddim", steps=3, seed=4), D.held_out[:30]
    assert found["energy"]["samples"] == energy_distance(new, held) and found["mmd"]["samples"] == mmd(new, held)
    close(torch.tensor(found["energy"]["real"], dtype=torch.float64), energy_distance(D.train[:30], held), 100)
    close(torch.tensor(found["mmd"]["real"], dtype=torch.float64), mmd(D.train[:30], held), 100)
    assert found["nearest"] == dict(samples=nearest(new, D.train[:30]), real=nearest(held, D.train[:30]))
    assert (found["seed"], found["sampler"], found["steps"], found["guidance"]) == (4, "ddim", 3, 1.0)
    few = distances(run, 8, steps=2)
    assert few["n"] == 8 and few["sampler"] == "ddim" and few["mmd"]["real"] != found["mmd"]["real"]


def test_samples_have_the_labels_of_the_held_out_pictures():
    run, seen = hot(labels=True), []
    ask = run.denoiser.forward
    run.denoiser.forward = lambda xt, t, y: (seen.append(y), ask(xt, t, y=y))[1]
    distances(run, 12, steps=2)
    assert seen and all(torch.equal(y, D.held_out_labels[:12]) for y in seen)


@pytest.mark.parametrize("data, n", [("digits", 17), ("folder", 256)])
def test_bits_of_pictures_are_the_bound_of_a_decoded_chain(data, n):
    run = hot(m=6, data=data)
    if n == 256: run = replace(run, known=Data(run.known.train, ((D.held_out[:6] + 1) * 127.5).round() / 127.5 - 1, run.facts))
    x0 = run.known.held_out
    found = bits(run, 64, 4, seed=2)
    decoder = Decoder(Levels(n=n), (run.F.schedule.sigma[1] / run.F.schedule.alpha[1]).square().item())
    nats = elbo(run.F, Clip(run.denoiser), x0, times=run.F.schedule.times(4), kernel=ddpm, decoder=decoder, generator=rng(2, "cpu")).total
    each = nats / (64 * math.log(2))
    close(torch.tensor(found["bits"]).double(), each.mean().item(), 1e3 * found["bits"], dtype=torch.float32)
    assert math.isclose(found["error"], each.std().item() / 6**0.5, rel_tol=1e-3)
    assert (found["n"], found["seed"], found["steps"]) == (6, 2, 4) and bits(run, 2, 40)["n"] == 2 and bits(run, 2, 40)["steps"] == 10


def test_bits_of_labelled_pictures_know_the_labels():
    run, seen = hot(labels=True, m=5), []
    ask = run.denoiser.forward
    run.denoiser.forward = lambda xt, t, y: (seen.append(y), ask(xt, t, y=y))[1]
    bits(run, 5, 3)
    assert set(torch.cat(seen).tolist()) == set(D.held_out_labels[:5].tolist())


class Alone(torch.nn.Module):
    """The best affine guess of each number by itself, from its mean and variance over the data."""
    def __init__(self, F, data):
        super().__init__()
        flat = data.flatten(1).double()
        self.F, self.mean, self.var, self.p = F, flat.mean(0), flat.var(0, correction=0), torch.nn.Parameter(torch.zeros(()))

    def forward(self, xt, t):
        a, s = self.F.schedule.alpha[t[0]], self.F.schedule.sigma[t[0]]
        guess = self.mean + a * self.var / (a**2 * self.var + s**2) * (xt.flatten(1) - a * self.mean)
        return Dirac(guess.view_as(xt))


def test_the_best_guesses_of_single_numbers_make_the_error_called_alone():
    run = hot(n=1000, m=700)
    run = replace(run, denoiser=Alone(run.F, D.train[:1000]))
    found = guesses(run, 1000, 3, seed=2)
    T = run.F.T
    assert [row["t"] for row in found] == sorted({T, *run.F.schedule.times(3)[1:-1], 1}, reverse=True)
    assert len(guesses(run, 20, 1)) == 2 and [row["t"] for row in guesses(run, 20, 99)] == list(range(T, 0, -1))
    for row in found:
        a, s = run.F.schedule.alpha[row["t"]], run.F.schedule.sigma[row["t"]]
        assert math.isclose(row["signal"], a / s, rel_tol=1e-12)
        x = D.train[:1000]
        each = (run.denoiser(a * x + s * torch.randn(x.shape, generator=rng(1, "cpu")), torch.tensor([row["t"]])).mean - x).square().flatten(1).mean(1)
        v = D.train[:1000].double().var(0, correction=0)
        assert math.isclose(row["alone"], (v * s**2 / (a**2 * v + s**2)).mean(), rel_tol=1e-12)
        for value in row["alone"], row["training"]: assert abs(value - each.mean()) < 5 * 2**0.5 * each.std() / 1000**0.5
        assert abs(row["held_out"] - each.mean()) < 5 * (1 / 1000 + 1 / 700)**0.5 * each.std()


class Label(torch.nn.Linear):
    """A guess made of the label and the time."""
    def forward(self, xt, t, y): return Dirac(0 * xt + (y / 9 + t / 100)[:, None, None, None])


def test_errors_are_means_over_all_rows_whatever_the_rows_at_once():
    odd, x, cond = replace(hot(labels=True), denoiser=Label(1, 1)), D.train[:7], {"y": D.train_labels[:7]}
    want = (D.train_labels[:7, None] / 9 + 0.04 - x.flatten(1)).square().mean().item()
    for rows in 1, 3, 7, 100: assert math.isclose(error(odd, x, cond, 4, rng(0, "cpu"), rows), want, rel_tol=1e-5)


def test_guesses_are_functions_of_the_seed_and_of_n_pictures():
    run = hot()
    assert guesses(run, 30, 2, seed=1) == guesses(run, 30, 2, seed=1) != guesses(run, 30, 2, seed=2)
    assert guesses(run) == guesses(run, 500, 5, seed=0)
    many = hot(n=510, m=510)
    assert guesses(many, times=1) == guesses(many, 500, 1)
    one, all_ = guesses(run, 1, 2), guesses(run, 500, 2)
    assert one[0]["alone"] == 0 < all_[0]["alone"] and one[0]["held_out"] != all_[0]["held_out"]


@pytest.mark.parametrize("family", ["mask", "edit"])
def test_bits_of_lines_stand_beside_counted_laws(family):
    run = words(family)
    found, x0, laws = bits(run, 20, seed=1), run.known.held_out[:20], Grams.tuned(run.known.train, 4)
    scale = 20 * 5 * math.log(2)
    assert math.isclose(found["single"], laws.unigram(x0).sum().item() / scale, rel_tol=1e-9)
    assert math.isclose(found["pairs"], laws.bigram(x0).sum().item() / scale, rel_tol=1e-9)
    assert found["n"] == 20 and found["seed"] == 1 and 0 < found["error"] < found["bits"]
    if family == "mask":        # untrained it guesses the frequencies, whatever it sees: the bound is that of single characters
        counts = torch.bincount(run.known.train.flatten(), minlength=4) + 1.0
        single = -(counts / counts.sum()).log()[x0].sum().item() / scale
        assert abs(found["bits"] - single) < 5 * found["error"]


def test_the_report_says_what_was_measured_and_how():
    run, text = hot(labels=True), words("mask")
    found = dict(distances=distances(run, 9, sampler="ddpm", steps=2, guidance=2.0, seed=5), bits=bits(run, 3, 2, seed=6))
    said = report(found)
    assert "9 samples by ddpm in 2 steps, guidance 2, seed 5" in said and "chain of 2 steps, 3 held-out pictures, seed 6" in said
    for name in "energy", "mmd", "nearest":
        assert all(f"{v:.4f}" in said for v in found["distances"][name].values())
    found = bits(text, 7, seed=8)
    assert f"{found['bits']:.3f} ± {found['error']:.3f} bits per character\n(bound, 7 held-out lines, seed 8)\n" in report(dict(bits=found))
    assert f"{found['single']:.3f} by single characters, {found['pairs']:.3f} by pairs" in report(dict(bits=found))
    rows = guesses(run, 9, 2)
    said = report(dict(guesses=rows)).splitlines()
    assert said[1].split() == ["t", "signal", "held", "out", "training", "alone"] and len(said) == 2 + len(rows)
    for line, row in zip(said[2:], rows): assert [float(v) for v in line.split()] == [float(f"{v:.3g}") for v in row.values()]
    assert report({}) == ""


def cold():
    run = hot()
    return replace(run, config=Config("digits", "cold"))


CASES = {"a cold run": (ValueError, lambda: bits(cold()), "a run with a likelihood", "a cold one"),
         "guesses of a cold run": (ValueError, lambda: guesses(cold()), "a hot run", "a cold one")}
test_it_refuses = refuses(CASES)


def test_the_runs_of_these_tests_are_hot(): assert isinstance(hot().denoiser, Denoiser) and hot().denoiser.parameterization is V

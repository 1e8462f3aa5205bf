"""The training loop by its exact effect on one number, the moving average, the batches."""
import inspect
import math

import pytest
import torch
from conftest import normal, rng

from udm_book.train import EMA, batches, fit


class One(torch.nn.Module):
    """A single number p that starts at 0, and a buffer."""
    def __init__(self, p=0.0):
        super().__init__()
        self.p = torch.nn.Parameter(torch.tensor(p, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(()))


@pytest.mark.parametrize("steps", [5, 100])
def test_steps_have_the_documented_sizes(steps):
    """Where the gradient is 1, Adam moves by the learning rate itself: p shows warm-up, cosine, weight decay (0.01).

    The bias corrections of Adam are exact for a constant gradient up to its epsilon, 1e-8 of a step.
    """
    model, lr, warm = One(), 0.1, max(1, steps // 10)
    _, losses = fit(model, lambda x: model.p + 0 * x[:, 0], torch.zeros(4, 1), steps, batch=2, lr=lr, progress=False)
    p, want = 0.0, []
    for n in range(steps):
        want.append(p)
        rate = lr * min(1, (n + 1) / warm) * (1 + math.cos(math.pi * n / steps)) / 2
        p = p * (1 - 0.01 * rate) - rate
    assert losses == pytest.approx(want, abs=1e-6)          # the rate itself is computed in float32
    assert model.p.item() == pytest.approx(p, abs=1e-6)


def test_large_gradients_are_clipped():
    "Gradients 1000 and then 1 move p alike if both are clipped to norm 1: Adam would remember the first for long."
    model = One()
    scales = iter([1000.0] + 99 * [1.0])
    fit(model, lambda x: next(scales) * model.p + 0 * x[:, 0], torch.zeros(2, 1), 100, batch=2, lr=0.1, progress=False)
    plain = One()
    fit(plain, lambda x: plain.p + 0 * x[:, 0], torch.zeros(2, 1), 100, batch=2, lr=0.1, progress=False)
    assert model.p.item() == pytest.approx(plain.p.item(), abs=1e-5)


def test_fit_solves_least_squares_and_gives_back_the_average():
    x = normal(256, 3, device="cpu", dtype=torch.float32)
    y, layer = x @ torch.tensor([[1.0], [-2.0], [0.5]]), torch.nn.Linear(3, 1)
    data = torch.cat([x, y], 1)
    def loss(b): return (layer(b[:, :3]) - b[:, 3:]).square().mean(1)
    ema, losses = fit(layer, loss, data, 400, lr=0.1, decay=0.9, progress=False, generator=rng(0, "cpu"))
    assert len(losses) == 400 and losses[-1] < 1e-3 * losses[0]
    assert ema is not layer and (ema.weight - torch.tensor([[1.0, -2.0, 0.5]])).abs().max() < 0.05
    assert not any(p.requires_grad for p in ema.parameters()) and not ema.training and layer.training


def test_same_generator_same_training():
    def run(seed):
        torch.manual_seed(0)
        layer = torch.nn.Linear(2, 1)
        return fit(layer, lambda b: layer(b).square().mean(1), normal(50, 2, dtype=torch.float32, device="cpu"), 20, batch=8,
                   generator=rng(seed, "cpu"), progress=False)[1]
    assert run(1) == run(1) != run(2)


def test_progress_shows_the_loss(capfd):
    model = One(2.0)
    fit(model, lambda x: model.p + 0 * x[:, 0], torch.zeros(2, 1), 3, batch=2)
    shown = capfd.readouterr().err
    assert "3/3" in shown and "loss=" in shown
    fit(model, lambda x: model.p + 0 * x[:, 0], torch.zeros(2, 1), 3, batch=2, progress=False)
    assert capfd.readouterr().err == ""


def test_a_loss_that_is_not_finite_stops_the_training():
    model = One(2.0)
    with pytest.raises(FloatingPointError, match="expected a finite loss; got nan at step 0"):
        fit(model, lambda x: model.p * math.nan + 0 * x[:, 0], torch.zeros(2, 1), 3, batch=2, progress=False)
    assert model.p.item() == 2.0
    scales = iter([1.0, 1.0, math.inf])
    with pytest.raises(FloatingPointError, match="got -?inf at step 2"):
        fit(model, lambda x: model.p * next(scales) + 0 * x[:, 0], torch.zeros(2, 1), 3, batch=2, progress=False)


def test_a_gradient_that_is_not_finite_stops_the_training_before_it_reaches_the_weights():
    model = One(0.0)
    with pytest.raises(FloatingPointError, match="expected a finite gradient; got one of size inf at step 0"):
        fit(model, lambda x: model.p.sqrt() + 0 * x[:, 0], torch.zeros(2, 1), 3, batch=2, progress=False)
    assert model.p.item() == 0.0


def test_defaults():
    defaults = {k: p.default for k, p in inspect.signature(fit).parameters.items()}
    assert [defaults[k] for k in ("batch", "lr", "decay", "progress")] == [128, 2e-3, 0.999, True]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_moving_average_is_its_formula(decay):
    module, mean = One(1.0), 1.0
    ema = EMA(module, decay)
    for n in range(1, 30):
        module.p.data.fill_(math.sin(n))
        module.count.fill_(n)
        ema.update(module)
        keep = min(decay, (1 + n) / (10 + n))
        mean = keep * mean + (1 - keep) * math.sin(n)
        assert ema.model.p.item() == pytest.approx(mean, abs=1e-14) and ema.model.count == n
    assert module.p.item() == math.sin(29)
    assert EMA(module).decay == 0.999


def test_a_pass_goes_through_all_rows_once_in_a_new_order():
    x = torch.arange(10)
    source = batches(x, 3, rng(0, "cpu"))
    first, second = ([next(source) for _ in range(3)] for _ in range(2))
    for part in first, second:
        rows = torch.cat(part).tolist()
        assert all(len(b) == 3 for b in part) and len(set(rows)) == 9
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    assert len(next(batches(x, 1))) == 1
    assert {len(b) for b, _ in zip(batches(torch.arange(11), 4), range(5))} == {4}                # a rest of 3 is left out
    whole = torch.cat([b for b, _ in zip(batches(x, 5, rng(0, "cpu")), range(2))])
    assert sorted(whole.tolist()) == x.tolist()

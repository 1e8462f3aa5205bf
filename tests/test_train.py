"""The training loop by its exact effect on one number, the moving average; the trainer against a plain loop."""
import inspect
import itertools
import json
import math

import pytest
import torch
from conftest import normal, refuses, rng, unhooked
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset
from trainers import DATA, ROWS, Net, lines, trainer, without_dropout

from udm_book.batches import seed_of
from udm_book.conditional import DropLabels
from udm_book.hot import Hot
from udm_book.objective import Loss
from udm_book.parameterization import Denoiser, V
from udm_book.resume import checkpoints, load_checkpoint
from udm_book.schedule import Schedule
from udm_book.train import EMA, Trainer, fit, rate


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
    plain, full = ({k: p.default for k, p in inspect.signature(f).parameters.items()} for f in (fit, Trainer))
    for defaults in plain, full: assert [defaults[k] for k in ("batch", "lr", "decay", "progress")] == [128, 2e-3, 0.999, True]
    assert [full[k] for k in ("save_every", "keep", "patience", "workers", "show_every", "log_every")] == [1000, 3, 10, 0, 0, 10]


def test_fit_shows_the_average_after_every_step():
    model, seen = One(2.0), []
    average, _ = fit(model, lambda x: model.p + 0 * x[:, 0], torch.zeros(2, 1), 3, batch=2, decay=0.5, progress=False,
                     look=lambda n, averaged: seen.append((n, averaged.p.item(), averaged)))
    assert [n for n, *_ in seen] == [1, 2, 3] and len({p for _, p, _ in seen}) == 3
    assert all(averaged is average for *_, averaged in seen) and seen[-1][1] == average.p.item()


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


def test_the_average_is_that_of_torch_and_its_counter_is_state():
    "torch.optim.swa_utils.AveragedModel with the same weights; a copy taken up halfway goes on alike."
    net, far = Net(), torch.device("cpu")
    ours = EMA(net, 0.9)
    def follow(mean, new, n): return mean + (1 - min(0.9, (2 + n) / (11 + n))) * (new - mean)
    theirs = torch.optim.swa_utils.AveragedModel(net, far, avg_fn=lambda mean, new, n: follow(mean, new, n - 1))
    theirs.update_parameters(net)                                               # its first call copies
    for n in range(40):
        if n == 13:
            again = EMA(Net(), 0.9)
            again.load_state_dict(ours.state_dict())
        with torch.no_grad():
            for p in net.parameters(): p.add_(torch.randn(p.shape, generator=rng(n, "cpu")))
        for average in (ours, again) if n >= 13 else (ours,): average.update(net)
        theirs.update_parameters(net)
    for a, b, c in zip(ours.model.parameters(), again.model.parameters(), theirs.module.parameters()):
        assert torch.equal(a, b) and ((a - c).abs() <= 40 * 8 * torch.finfo(a.dtype).eps * (1 + c.abs())).all()
    assert ours.updates == again.updates == 40 and "updates" in ours.state_dict()
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.model.training


def test_the_rate_goes_up_a_line_and_down_a_cosine():
    for steps, warmup in (100, 0.1), (30, 0.5), (7, 0.0), (10, 1.0):
        warm = max(1, int(steps * warmup))
        for n in range(steps):
            assert rate(n, steps, warmup) == pytest.approx(min(1, (n + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * n / steps)))
    assert [rate(n, 50) for n in range(50)] == [rate(n, 50, 0.1) for n in range(50)]


# --------------------------------------------------------------------------------------------------------------- the trainer


def plain(objective, steps, *, batch=8, lr=0.02, warmup=0.1, clip=1.0, decay=0.9, weight_decay=0.01, seed=0, data=DATA, skip=()):
    """The same training written out, with the reference AdamW: losses, weights, average."""
    model = objective.denoiser
    average = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, foreach=False, fused=False)
    orders = torch.cat([torch.randperm(len(data), generator=rng(seed_of(seed, "pass", k), "cpu")) for k in range(steps * batch // len(data) + 1)])
    losses = []
    for n in range(steps):
        x0 = data[orders[n * batch:(n + 1) * batch]]
        torch.manual_seed(seed_of(seed, "dropout", n, 0))
        loss = objective(x0, objective.draw(x0, rng(seed_of(seed, "draws", n), "cpu"))).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        if n not in skip:
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            for group in optimizer.param_groups: group["lr"] = lr * rate(n, steps, warmup)
            optimizer.step()
        keep = min(decay, (2 + n) / (11 + n))
        for m, p in zip(average, model.parameters()): m.copy_(keep * m + (1 - keep) * p.detach())
    return losses, list(model.parameters()), average


def objective(net=None): return Loss(Hot(Schedule.cosine(10)), Denoiser(net or Net(), Schedule.cosine(10), V))


def near(ours, theirs, C=2e-4):
    "Adam divides by the root of a running mean: where gradients are small, rounding is amplified; 24 steps of 0.02."
    for a, b in zip(ours, theirs, strict=True): assert (a - b).abs().max() < C, (a - b).abs().max()


@pytest.mark.parametrize("settings", [dict(), dict(clip=0.05, warmup=0.5, weight_decay=0.3, decay=0.5, seed=3, lr=0.01)], ids=["default", "other"])
def test_the_trainer_makes_the_steps_of_a_plain_loop(tmp_path, settings):
    run = trainer(tmp_path, log_every=1, **settings)
    run.run()
    torch.manual_seed(0)
    losses, weights, average = plain(objective(), 24, **settings)
    near(run.model.parameters(), weights)
    near(run.ema_model.parameters(), average)
    logged = lines(tmp_path)
    assert [line["loss"] for line in logged] == pytest.approx(losses, rel=1e-3)
    lr = settings.get("lr", 0.02)
    assert [line["lr"] for line in logged] == [lr * rate(n, 24, settings.get("warmup", 0.1)) for n in range(24)]
    assert [line["step"] for line in logged] == list(range(1, 25)) and {line["skipped"] for line in logged} == {0}
    assert all(not torch.equal(a, b) for a, b in zip(run.model.parameters(), run.ema_model.parameters()) if a.any())


@pytest.mark.parametrize("accumulate", [2, 4])
def test_parts_of_a_batch_make_the_step_of_the_whole(tmp_path, accumulate):
    "With a bound on the gradient that every step exceeds: clipping each part would give another step."
    one, some = (trainer(tmp_path / str(k), net=without_dropout(), accumulate=k, clip=0.1, log_every=1) for k in (1, accumulate))
    for run in one, some: run.run()
    near(some.model.parameters(), one.model.parameters())
    a, b = lines(tmp_path / "1"), lines(tmp_path / str(accumulate))
    assert [line["loss"] for line in b] == pytest.approx([line["loss"] for line in a], rel=1e-3)
    assert [line["norm"] for line in b] == pytest.approx([line["norm"] for line in a], rel=1e-2) and min(line["norm"] for line in a) > 0.1


def test_one_row_is_a_batch(tmp_path): assert trainer(tmp_path, steps=1, batch=1).run() is not None


def test_the_log_holds_means_of_the_steps_since_the_last_line(tmp_path):
    for every in 1, 5: trainer(tmp_path / str(every), log_every=every).run()
    each, mean = ([line["loss"] for line in lines(tmp_path / str(k))] for k in (1, 5))
    assert [line["step"] for line in lines(tmp_path / "5")] == [5, 10, 15, 20, 24]
    for k, loss in enumerate(mean): assert loss == pytest.approx(sum(each[5 * k:5 * k + 5]) / len(each[5 * k:5 * k + 5]), rel=1e-5)
    first = json.loads(open(tmp_path / "1" / "log.jsonl").readline())
    assert set(first) == {"step", "loss", "norm", "lr", "skipped", "images/s"} and 0 < first["images/s"] < 1e6


def test_the_speed_is_that_since_the_last_line(tmp_path, monkeypatch):
    """By a clock that goes on by two seconds whenever it is read: when a training begins, and for each line."""
    clock = itertools.count(0, 2)
    monkeypatch.setattr("udm_book.train.time.perf_counter", lambda: next(clock))
    trainer(tmp_path, steps=6, log_every=2).run()
    with pytest.warns(UserWarning, match="steps"): trainer(tmp_path, steps=10, log_every=2).run()
    speeds = [json.loads(line)["images/s"] for line in open(tmp_path / "log.jsonl")]
    assert speeds == 5 * [2 * 8 / 2.0]


def test_the_folder_says_what_was_trained(tmp_path):
    run = trainer(tmp_path / "a" / "b", config={"family": "hot"}, keep=2)
    assert not (tmp_path / "a").exists()                                        # making a trainer writes nothing
    run.run()
    about = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert set(about) == {"version", "schedule", "trainer", "config"} and about["config"] == {"family": "hot"}
    assert about["trainer"] == dict(steps=24, batch=8, lr=0.02, warmup=0.1, accumulate=1, clip=1.0, decay=0.9, weight_decay=0.01, precision="no", seed=0)
    saved = load_checkpoint(checkpoints(tmp_path / "a" / "b")[-1])
    assert saved.about == about and saved.step == 24 and len(checkpoints(tmp_path / "a" / "b")) == 2
    fresh = objective().denoiser
    fresh.load_state_dict(saved.ema)
    for a, b in zip(fresh.parameters(), run.ema_model.parameters()): assert torch.equal(a, b)
    for name, v in saved.model.items(): assert torch.equal(v, run.model.state_dict()[name])


def test_saving_does_not_touch_the_model(tmp_path):
    run = trainer(tmp_path)
    run.run()
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.save()
    for k, v in run.model.state_dict().items(): assert torch.equal(v, before[k])


def test_pictures_are_asked_for_on_schedule_from_the_average(tmp_path):
    seen = []
    def show(model, path):
        torch.manual_seed(5)                                                    # a picture may draw what it likes
        seen.append((path, model.training, torch.is_grad_enabled()))
    run = trainer(tmp_path / "a", show=show, show_every=10)
    assert run.run() is run.ema_model
    assert seen == [(tmp_path / "a" / "samples" / f"step-{n:08d}", False, False) for n in (10, 20)]
    trainer(tmp_path / "b").run()
    assert lines(tmp_path / "a") == lines(tmp_path / "b") and not (tmp_path / "b" / "samples").exists()


def test_the_bar_shows_loss_and_speed_and_goes_on_where_it_was(tmp_path, capfd):
    trainer(tmp_path, progress=True, steps=10).run()
    shown = capfd.readouterr().err
    assert "10/10" in shown and "loss=" in shown and "images/s=" in shown
    with pytest.warns(UserWarning): trainer(tmp_path, progress=True, steps=12).run()
    shown = capfd.readouterr().err
    assert "10/12" in shown and "12/12" in shown and " 1/12" not in shown
    with pytest.warns(UserWarning): trainer(tmp_path, steps=14).run()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("form", ["label", "named"])
def test_conditions_reach_the_network(tmp_path, form):
    "Labels for rows 0, 1, 2, …; the same training by hand must come out."
    labels = torch.arange(ROWS) % 3
    heard = []
    class Listening(Loss):
        def forward(self, x0, draws, **cond):
            heard.append((x0, cond))
            return super().forward(x0, draws, **cond)
    class Rows(torch.utils.data.Dataset):
        def __len__(self): return ROWS
        def __getitem__(self, i): return DATA[i], {"y": labels[i], "extra": DATA[i, 0]}
    data = TensorDataset(DATA, labels) if form == "label" else Rows()
    trainer(tmp_path, data, steps=3, objective=Listening(Hot(Schedule.cosine(10)), objective().denoiser), accumulate=2).run()
    assert len(heard) == 6
    for x0, cond in heard:
        rows = [(DATA == x).all(1).nonzero().item() for x in x0]
        assert len(x0) == 4 and torch.equal(cond["y"], labels[rows])
        if form == "named": assert torch.equal(cond["extra"], DATA[rows, 0])
        else: assert list(cond) == ["y"]


def test_only_the_shape_of_the_data_is_known_when_numbers_are_drawn(tmp_path):
    "And they are drawn for the whole batch at once, whatever its parts."
    seen = []
    class Watched(Loss):
        def draw(self, x0, generator=None):
            seen.append((x0.shape, generator.initial_seed()))
            return super().draw(x0, generator)
    trainer(tmp_path, steps=2, accumulate=4, objective=Watched(Hot(Schedule.cosine(10)), objective().denoiser)).run()
    assert seen == [((8, 4), seed_of(0, "draws", n)) for n in range(2)]


# --------------------------------------------------------------------------------------------------------------- not finite


class Spoilt(Loss):
    """A loss that is not finite in chosen steps, or for chosen data, or whose gradient is not."""
    def __init__(self, how, steps, *args):
        super().__init__(*args)
        self.how, self.steps, self.n = how, steps, -1

    def draw(self, x0, generator=None):
        self.n += 1
        return super().draw(x0, generator)

    def forward(self, x0, draws, **cond):
        loss = super().forward(x0, draws, **cond)
        if self.n not in self.steps: return loss
        p = next(self.denoiser.net.leave.parameters())
        if self.how == "gradient": return loss + (p - p.detach()).abs().sum().sqrt()       # 0, with an infinite slope
        return loss + {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[self.how]


def spoilt(how, steps): return Spoilt(how, steps, Hot(Schedule.cosine(10)), objective(without_dropout()).denoiser)


@pytest.mark.parametrize("how", ["nan", "inf", "-inf", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, how):
    "Neither weights nor moments know of it, nor Adam's count of steps; the data go on."
    bad = {0, 7, 8, 23}
    torch.manual_seed(0)
    run = trainer(tmp_path, objective=spoilt(how, bad), log_every=1)
    run.run()
    torch.manual_seed(0)
    losses, weights, average = plain(objective(without_dropout()), 24, skip=bad)
    near(run.model.parameters(), weights)
    near(run.ema_model.parameters(), average)
    logged = lines(tmp_path)
    assert [line["step"] - 1 for line in logged if line["loss"] is None] == sorted(bad)
    assert [line["step"] - 1 for line in logged if line["norm"] is None] == (sorted(bad) if how == "gradient" else [])
    assert [line["skipped"] for line in logged] == [len([b for b in bad if b <= n]) for n in range(24)]
    assert [line["loss"] for line in logged if line["loss"]] == pytest.approx([x for n, x in enumerate(losses) if n not in bad], rel=1e-3)
    steps = {v.item() for k, v in load_checkpoint(checkpoints(tmp_path)[-1]).rest.items() if "step of" in k}
    assert steps == {20}
    trainer(tmp_path / "b", objective=spoilt(how, bad), log_every=24).run()
    (line,), good = lines(tmp_path / "b"), [x for n, x in enumerate(losses) if n not in bad]
    assert line["loss"] == pytest.approx(sum(good) / len(good), rel=1e-3), "the mean of the good ones"


def test_too_many_in_a_row_end_the_training_and_name_the_rows(tmp_path):
    "Data row 11 is spoilt. Two bad steps in a row are borne by patience 3, the third is not."
    torch.manual_seed(0)
    patient = trainer(tmp_path / "a", objective=spoilt("nan", {3, 4, 6, 7, 9, 10}), patience=3)
    patient.run()
    assert patient.step == 24 and patient.learner.state.tally["skipped"] == 6
    torch.manual_seed(0)
    run = trainer(tmp_path / "b", objective=spoilt("inf", {2, 11, 12, 13}), patience=3)
    with pytest.raises(FloatingPointError, match=r"got 3 steps in a row without, .*\(step 13\); the last good checkpoint is .*step-00000010.safetensors"): run.run()
    assert run.step == 14
    data = DATA.clone()
    data[11, 2] = math.nan
    run = trainer(tmp_path / "c", data, patience=1)
    with pytest.raises(FloatingPointError) as caught: run.run()
    n, place = next((n, run.batches.rows(n).tolist().index(11)) for n in range(24) if 11 in run.batches.rows(n))
    t = run.learner.draws(n, DATA[:8])[0][place].item()
    end = "the last good checkpoint is none" if n < 5 else "the last good checkpoint is "
    assert f"rows [11] of the data at t = [{t}] (step {n}); {end}" in str(caught.value)
    hide = DropLabels(objective(without_dropout()), 2)                          # draws which labels are hidden before it draws times
    labelled = trainer(tmp_path / "d", TensorDataset(data, torch.arange(ROWS) % 2), objective=hide, patience=1)
    with pytest.raises(FloatingPointError, match=rf"rows \[11\] of the data at t = \[{labelled.learner.draws(n, DATA[:8])[1][0][place]}\]"):
        labelled.run()
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_an_infinite_gradient_is_blamed_on_the_batch(tmp_path):
    class Late(Loss):
        def draw(self, x0, generator=None): return (super().draw(x0, generator)[2],)
        def forward(self, x0, draws, **cond):
            p = next(self.denoiser.parameters())
            return 0 * x0.sum(1) + (p - p.detach()).abs().sum().sqrt()
    run = trainer(tmp_path, objective=Late(Hot(Schedule.cosine(10)), objective().denoiser), patience=2)
    with pytest.raises(FloatingPointError, match=rf"rows \[{', '.join(map(str, run.batches.rows(1).tolist()))}\] of the data at t = \?"): run.run()


def test_the_count_of_bad_steps_survives_an_interruption(tmp_path):
    class Cut(Exception): pass
    def cut(model, path): raise Cut
    with pytest.raises(Cut): trainer(tmp_path, DATA * math.nan, patience=8, show=cut, show_every=7).run()
    run = trainer(tmp_path, DATA * math.nan, patience=8)
    with pytest.raises(FloatingPointError, match="got 8 steps in a row"): run.run()
    assert run.step == 8


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    run = trainer(tmp_path, steps=5)
    run.run()
    with torch.no_grad(): next(run.model.parameters())[0] = math.nan
    run.learner.state.step = 6
    with pytest.raises(FloatingPointError, match="expected finite numbers at step 6; got others in model."): run.save()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000005.safetensors"]


# --------------------------------------------------------------------------------------------------------------- precision


class Huge(Loss):
    """A loss whose gradient is `size` times the weights' sign, computed as the autocast says."""
    def __init__(self, size, *args):
        super().__init__(*args)
        self.size, self.types = size, []

    def forward(self, x0, draws, **cond):
        y = self.denoiser.net.leave(x0.new_ones(len(x0), 8))
        self.types.append(y.dtype)
        return y.float().sum(1) * self.size


def huge(size): return Huge(size, Hot(Schedule.cosine(10)), objective().denoiser)


@pytest.mark.parametrize("precision, dtype", [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_is_that_of_the_layers_and_not_of_the_weights(tmp_path, precision, dtype):
    loss = huge(1e-3)
    run = trainer(tmp_path, objective=loss, precision=precision, steps=4)
    run.run()
    assert set(loss.types) == {dtype} and {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert run.learner.norm == pytest.approx(1e-3 * (4 * 8 + 4) ** 0.5, rel=1e-2)       # unscaled: one for each bias, 8 inputs of 1
    assert (precision == "fp16") == ("scale" in lines(tmp_path)[-1])


def test_the_fp16_scale_falls_to_a_floor_and_its_steps_are_counted_apart(tmp_path):
    "65504 is the largest float16: with gradients of 1000/8 a row, summed over 8, the scale 2^16 is too large, 2^6 and below fit."
    run = trainer(tmp_path, objective=huge(1000.0), precision="fp16", log_every=1)
    run.run()
    logged = lines(tmp_path)
    falls = next(k for k, line in enumerate(logged) if line["loss"] is not None)
    assert [line["scale"] for line in logged[:falls]] == [2.0 ** (15 - k) for k in range(falls)]
    assert logged[-1]["shrunk"] == falls > 3 and logged[-1]["skipped"] == 0 and logged[-1]["scale"] == 2.0 ** (16 - falls) >= 32
    hopeless = trainer(tmp_path / "b", objective=huge(1e9), precision="fp16", log_every=1, patience=3)
    with pytest.raises(FloatingPointError, match="got 3 steps in a row"): hopeless.run()
    tally = hopeless.learner.state.tally
    assert tally["scale"] == 1 and tally["shrunk"] == 16 and tally["skipped"] == 3
    nan = trainer(tmp_path / "c", DATA * math.nan, precision="fp16", patience=2)
    with pytest.raises(FloatingPointError, match="got 2 steps in a row"): nan.run()
    tally = nan.learner.state.tally
    assert tally["scale"] == 2**16 and tally["shrunk"] == tally["grown"] == 0           # the scale is not to blame


def test_the_fp16_scale_grows_after_2000_good_steps_and_is_saved(tmp_path):
    run = trainer(tmp_path, precision="fp16", steps=6, save_every=2, log_every=1)
    run.learner.state.tally["grown"] += 1996
    run.resume = lambda: None                        # nothing to take up
    run.run()
    assert [line["scale"] for line in lines(tmp_path)] == 3 * [2.0**16] + 3 * [2.0**17]
    again = trainer(tmp_path, precision="fp16", steps=6, log_every=1)
    again.resume()
    assert again.learner.state.tally["scale"] == 2**17 and again.learner.state.tally["grown"] == 2002
    other = trainer(tmp_path, steps=6)
    with pytest.warns(UserWarning, match="precision"): other.resume()
    assert other.learner.state.tally["scale"] == 1 and other.learner.state.tally["grown"] == 2002


# ------------------------------------------------------------------------------------------------------------------- speed


class Counted(TorchDispatchMode):
    """Counts the operations that reach PyTorch's kernels, and those among them that wait for a number."""
    def __init__(self):
        super().__init__()
        self.all, self.waits = 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.all += 1
        self.waits += op is torch.ops.aten._local_scalar_dense.default
        return op(*args, **(kwargs or {}))


def test_a_step_costs_what_a_bare_loop_costs(tmp_path):
    """Some fifty operations on single numbers more, whatever the network, and no more numbers that are waited for.

    The count of the average is one of these; it lies in the main memory wherever the network is.
    """
    data, objectives = DATA[:8], [objective(without_dropout()) for _ in range(2)]
    run, loss = trainer(tmp_path, data, objective=objectives[0]), objectives[1]
    optimizer, g, average = torch.optim.AdamW(loss.denoiser.parameters(), fused=True), rng(0, "cpu"), EMA(loss.denoiser)
    def bare():
        x0 = data[torch.randperm(8, generator=g)]
        value = loss(x0, loss.draw(x0, g)).mean()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(loss.denoiser.parameters(), 1.0)
        optimizer.step()
        average.update(loss.denoiser)
    def ours(): run.learner.advance(run.batches[run.step])
    counts = []
    with unhooked():
        for work in ours, bare:
            work()
            with Counted() as counted: work()
            counts.append(counted)
    assert counts[0].all <= counts[1].all + 60 and counts[0].waits == counts[1].waits
    assert run.learner.state.ema.updates.device.type == "cpu"


# --------------------------------------------------------------------------------------------------------------- bad input

V_ = ValueError


def learned_forward():
    F = Hot(Schedule.cosine(10))
    F.encoder = nn.Linear(2, 2)
    return Loss(F, objective().denoiser)


CASES = {
    "no step": (V_, lambda: trainer("x", steps=0), "steps >= 1", "0"),
    "no part": (V_, lambda: trainer("x", accumulate=0), "accumulate >= 1", "0"),
    "no patience": (V_, lambda: trainer("x", patience=0), "patience >= 1", "0"),
    "nothing kept": (V_, lambda: trainer("x", keep=0), "keep >= 1", "0"),
    "never saved": (V_, lambda: trainer("x", save_every=0), "save_every >= 1", "0"),
    "never logged": (V_, lambda: trainer("x", log_every=-1), "log_every >= 1", "-1"),
    "another precision": (V_, lambda: trainer("x", precision="fp8"), "among no, bf16, fp16", "fp8"),
    "parts that are not equal": (V_, lambda: trainer("x", accumulate=3), "1 x 3 parts share", "8"),
    "a batch of none": (V_, lambda: trainer("x", batch=0), "1 x 1 parts share", "0"),
    "an encoder to be trained outside the denoiser": (V_, lambda: trainer("x", objective=learned_forward()), "inside objective.denoiser", "F.encoder.weight outside"),
}
test_the_message_says_what_was_expected_and_what_came = refuses(CASES)

"""`make quality`: its figures on sets where they are known, its verdict, and that it goes on where it was interrupted."""
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
quality = pytest.importorskip("quality")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def judge():
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.rand(200, 1, 8, 8, generator=generator), torch.arange(200) % 4
    x[:, 0, 0] = 0.9 * torch.nn.functional.one_hot(labels, 8)
    return quality.Judge(x[:100], labels[:100], x[100:], labels[100:])


def test_figures_of_the_held_out_pictures_themselves(judge):
    certainty, frechet, kernel, near = judge(judge.held_out)
    assert near == 1 and abs(frechet) < 1e-6 and kernel < 0 and 0.25 < certainty < 1 and judge.accuracy > 0.9


def test_training_pictures_are_at_distance_zero(judge): assert judge(judge.train)[3] == 0


def test_frechet_of_a_shifted_and_of_a_stretched_set(judge):
    m, C = judge.law
    shift = torch.full((64,), 0.1).double()
    inside = torch.from_numpy(judge.pca.components_) @ shift
    assert judge.frechet(judge.held_out + shift) == pytest.approx(inside.square().sum().item(), rel=1e-6)
    middle = judge.held_out.mean(0)
    assert judge.frechet(middle + 3 * (judge.held_out - middle)) == pytest.approx(4 * C.trace().item(), rel=1e-6)


ROWS = [dict(who="mixture", seed=0, figures=[[0.93, 0.09, 2e-3, 0.95]]),
        *(dict(who="ours", minutes=2.0, seed=s, steps=10, seconds=119.0, images=9, drawing=1.0, figures=[[c, 0.08, 1e-3, 0.96]] * 3)
          for s, c in ((0, 0.89), (1, 0.93)))]
REPORT = dict(date="2020-01-01", processor="p", threads=2, torch="2", python="3", rows=ROWS)


def test_the_verdict_is_on_means_over_seeds():
    assert all(ok for _, ok in quality.bars(REPORT)) and len(quality.bars(REPORT)) == 5
    assert "0.910 ±0.020" in quality.text(REPORT) and "MISSED" not in quality.text(REPORT)


@pytest.mark.parametrize("which, value", [(0, 0.86), (1, 0.2), (2, 9e-3), (3, 0.8)])
def test_the_verdict_names_what_is_missed(which, value):
    bad = dict(ROWS[2], figures=[[*f[:which], value, *f[which + 1:]] for f in ROWS[2]["figures"]])
    missed = [what for what, ok in quality.bars(REPORT | {"rows": [ROWS[0], bad]}) if not ok]
    assert len(missed) == 1 and "2 minutes" in missed[0]
    assert "MISSED" in quality.text(REPORT | {"rows": [ROWS[0], bad]})


@pytest.mark.parametrize("which, worse", [(0, -0.01), (1, 0.01), (2, 1e-3), (3, -0.01)])
def test_more_minutes_must_not_make_a_figure_worse(which, worse):
    def after(each): return REPORT | {"rows": ROWS + [dict(row, minutes=5.0, figures=[[v + d * (k == which) for k, v in enumerate(f)] for f in row["figures"]])
                                                      for row, d in zip(ROWS[1:], each)]}
    def missed(each): return [what for what, ok in quality.bars(after(each)) if not ok and "after 2" in what]
    assert not missed([0.0, 0.0]) and not missed([-worse, -2 * worse]) and not missed([worse, -worse])
    assert len(missed([worse, 1.2 * worse])) == 1 and quality.FIGURES[which] in missed([worse, 1.2 * worse])[0]


def test_too_many_seconds_are_a_miss():
    assert [ok for _, ok in quality.bars(REPORT | {"rows": [ROWS[0], dict(ROWS[1], seconds=121.0, figures=ROWS[2]["figures"])]})].count(False) == 1


def test_an_interrupted_run_goes_on_after_its_last_row(monkeypatch, tmp_path, judge):
    made = []
    monkeypatch.setattr(quality, "Judge", lambda *args: judge)
    monkeypatch.setattr(quality, "plain_rows", lambda who, data, judge, seed: made.append((who, seed)) or [dict(who=who, seed=seed, figures=[[0.0] * 4])])
    monkeypatch.setattr(quality, "step_time", lambda *args: 0.1)

    def ours(data, judge, minutes, seed, steps):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(("ours", minutes, seed, steps))
        return dict(ROWS[1], minutes=minutes, seed=seed, steps=steps)

    monkeypatch.setattr(quality, "our_row", ours)
    path = tmp_path / "report.json"
    args = Namespace(only=["floor", "ours"], seeds=[0, 1], minutes=[2.0], steps={}, json=path, fresh=False, peer="")
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        made.append(None), quality.measure(args, {})
    made.append(None)
    quality.measure(args, json.loads(path.read_text()))
    assert [m for m in made if m] == [("floor", 0), ("floor", 1), ("ours", 2.0, 0, 1080), ("ours", 2.0, 1, 1080)]    # 0.9 * 120 s / 0.1 s
    assert len(json.loads(path.read_text())["rows"]) == 4
    torch.set_num_threads(threads)


def test_the_recipe_trains_and_draws():
    recipe = quality.RECIPE | dict(width=8, blocks=1, batch=4, steps=3)
    x, mean, std = quality.centred(torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert x.mean(0).abs().max() < 1e-6 and x.std() == pytest.approx(1, rel=1e-5)
    F, average, seconds = quality.train(x, recipe, 2, 0)
    drawn = quality.draw(F, average, recipe, mean, std, 0, count=5)
    assert drawn.shape == (5, 1, 8, 8) and 0 <= drawn.min() and drawn.max() <= 1 and seconds > 0
    assert torch.equal(drawn, quality.draw(F, average, recipe, mean, std, 0, count=5))
    assert not torch.equal(drawn, quality.draw(F, average, recipe, mean, std, 1, count=5))


def test_several_networks_are_averaged():
    recipe, x = quality.RECIPE | dict(width=8, blocks=1, batch=4), torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    (_, one, _), (_, other, _), (_, both, _) = (quality.train(x, recipe | dict(nets=n), 2 * n, seed) for n, seed in ((1, 7), (1, 1007), (2, 7)))
    t = torch.arange(1, 10)
    assert torch.equal(both(x, t).mean, (one(x, t).mean + other(x, t).mean) / 2) and not torch.equal(one(x, t).mean, other(x, t).mean)


def test_the_plan_is_what_fits_and_not_more_passes_than_are_good(monkeypatch):
    monkeypatch.setattr(quality, "step_time", lambda x, recipe: 0.01)
    for minutes, recipe in ((m, quality.recipe_for(m)) for m in (2, 5)):
        passes, nets = recipe["passes"], recipe["nets"]
        assert quality.plan(torch.empty(1078, 1), minutes) == int(passes * 1078 / 128) // 10 * 10 * nets
        assert quality.plan(torch.empty(10**6, 1), minutes) == int(0.9 * 60 * minutes / 0.01)


def test_an_interpreter_without_the_other_library_is_refused_at_once(monkeypatch, tmp_path, judge):
    monkeypatch.setattr(quality, "Judge", lambda *args: judge)
    args = Namespace(only=["peer"], seeds=[0], minutes=[2.0], steps={}, json=tmp_path / "report.json", fresh=False, peer="false")
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit, match="false has no denoising-diffusion-pytorch"):
        quality.measure(args, {})
    torch.set_num_threads(threads)

"""Runs: data are shared out by the seed, a folder is enough to go on and to draw from, and what must stay is checked."""
import atexit
import json
import shutil
import tempfile
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import close, refuses, rng

from udm_book.config import SAMPLERS, Config, model
from udm_book.data import digits, save_images
from udm_book.hot import ddim
from udm_book.parameterization import Denoiser, V
from udm_book.posterior import Dirac
from udm_book.resume import checkpoints, load_checkpoint
from udm_book.reverse import sample
from udm_book.runs import Data, Run, build, check_same, digest, load, read_data, stack, train

TINY = dict(width=8, mults=(1,), blocks=1, attention=(), T=10, steps=4, batch=8, save_every=2, show_every=0)
TEXT = dict(width=8, depth=1, steps=4, batch=8, save_every=2, show_every=0)
LINES = [f"{i:02}+{j}" for i in range(20) for j in range(3)]


@cache
def made():
    """A folder of pictures in two classes, a file of lines, and a run of each family. No fixture, so that mutants meet it."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    save_images(digits().train[:40], folder / "png", [f"{'ab'[i % 2]}/{i:03}" for i in range(40)])
    (folder / "lines.txt").write_text("\n".join(LINES), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, config in configs(folder).items(): train(config, folder / name)
    return folder


def configs(folder):
    png, lines = str(folder / "png"), str(folder / "lines.txt")
    return {"hot": Config(png, size=8, channels=1, labels=True, **TINY), "cold": Config("digits", "cold", held_out=1790, **TINY),
            "mask": Config(lines, "mask", **TEXT), "edit": Config(lines, "edit", **TEXT)}


# ------------------------------------------------------------------------------------------------------------------ data


def test_data_are_shared_out_by_the_seed():
    place = made()
    data = read_data(configs(place)["hot"])
    assert (len(data.train), len(data.held_out)) == (36, 4) and data.facts["classes"] == ["a", "b"] and data.facts["shape"] == [1, 8, 8]
    (train, y), (held, _) = stack(data.train, range(36)), stack(data.held_out, range(4))
    every = {tuple(row) for row in torch.cat([train, held]).flatten(1).tolist()}
    files = {tuple(row) for row in ((digits().train[:40] + 1) * 127.5).round().div(127.5).sub(1).flatten(1).tolist()}
    assert every == files and len(every) == 40 and y["y"].shape == (36,) and set(y["y"].tolist()) == {0, 1}
    again, other = (read_data(replace(configs(place)["hot"], seed=seed)) for seed in (0, 1))
    assert torch.equal(stack(again.train, [3, 1])[0], train[[3, 1]]) and again.facts == data.facts
    assert not torch.equal(stack(other.train, range(36))[0], train)
    assert len(read_data(replace(configs(place)["hot"], held_out=7)).held_out) == 7


@pytest.mark.parametrize("n, held", [(2, 1), (5, 1), (19, 1), (20, 2)])
def test_a_tenth_of_a_folder_is_held_out_at_least_one(n, held, tmp_path):
    save_images(digits().train[:n], tmp_path)
    assert len(read_data(Config(str(tmp_path), size=8, channels=1)).held_out) == held


def test_digits_and_lines_have_their_own_readers():
    place = made()
    data = read_data(Config("digits", labels=True))
    assert (len(data.train), len(data.held_out), data.facts["classes"]) == (1078, 719, [*"0123456789"])
    assert torch.equal(stack(data.held_out, [0, 5])[0], digits().held_out[[0, 5]])
    assert torch.equal(stack(data.held_out, [0, 5])[1]["y"], digits().held_out_labels[[0, 5]])
    assert torch.equal(read_data(Config("digits")).train, digits().train) and read_data(Config("digits")).facts["classes"] == []
    data = read_data(Config(str(place / "lines.txt"), "mask", seed=2))
    assert (len(data.train), len(data.held_out), data.facts["shape"]) == (54, 6, [4])
    assert set(data.facts["vocab"][1:]) <= set("0123456789+") and data.train.dtype == torch.int64


def test_a_digest_sees_bytes_names_and_sizes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("12")
    (tmp_path / "f").write_text("12")
    before = digest(str(tmp_path / "f")), digest(str(tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert digest(str(tmp_path / "b")) == before[1] and len(set(before)) == 2 and [*map(len, before)] == [16, 16]
    (tmp_path / "f").write_text("13")
    (tmp_path / "a" / "y").write_text("")
    (tmp_path / "b" / "x").write_text("123")
    assert len({*before, digest(str(tmp_path / "f")), digest(str(tmp_path / "a")), digest(str(tmp_path / "b"))}) == 5


# ----------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("name", ["hot", "cold", "mask", "edit"])
def test_a_folder_is_all_that_it_takes(name):
    place = made()
    config, run = configs(place)[name], load(place / name)
    assert run.config == config and run.step == 4 and not run.denoiser.training
    assert not any(p.requires_grad for p in run.denoiser.parameters())
    kept = load_checkpoint(checkpoints(place / name)[-1]).ema
    assert all(torch.equal(v, kept[k]) for k, v in run.denoiser.state_dict().items())
    early = load(place / name, checkpoints(place / name)[0])
    assert early.step == 2 and not all(torch.equal(v, kept[k]) for k, v in early.denoiser.state_dict().items())
    x = run.sample(5, seed=1)
    assert x.shape == (5, *run.facts["shape"]) and torch.equal(x, load(place / name).sample(5, seed=1)) and not x.requires_grad
    if name != "cold": assert not torch.equal(x, run.sample(5, seed=2)), "a cold run starts from data, and draws nothing"
    for sampler, how in SAMPLERS.items():
        if name in how.families: assert run.sample(3, sampler=sampler).shape == (3, *run.facts["shape"])
    again = train(config, place / name)
    assert again.step == 4 and torch.equal(again.sample(5, seed=1), x), "nothing is left to do"


def test_a_run_that_was_cut_off_is_one_that_was_not(tmp_path):
    place = made()
    config = configs(place)["hot"]
    shutil.copytree(place / "hot", tmp_path / "run")
    checkpoints(tmp_path / "run")[-1].unlink()
    assert load(tmp_path / "run").step == 2
    train(config, tmp_path / "run")
    ours, theirs = (load_checkpoint(checkpoints(folder)[-1]) for folder in (tmp_path / "run", place / "hot"))
    assert ours.step == theirs.step == 4 and ours.model.keys() == theirs.model.keys()
    for part in "model", "ema", "rest":
        for k, v in getattr(ours, part).items(): assert torch.equal(v, getattr(theirs, part)[k]), k
    assert torch.equal(load(tmp_path / "run").sample(2), load(place / "hot").sample(2))


def test_what_is_built_is_what_is_trained():
    place = made()
    data, F, denoiser, objective = build(configs(place)["mask"])
    again = model(configs(place)["mask"], data.facts, data.train)[1].state_dict()
    assert all(torch.equal(v, again[k]) for k, v in denoiser.state_dict().items()) and objective.denoiser is denoiser
    assert F.T == 4 and json.loads((place / "mask" / "config.json").read_text())["config"]["facts"] == data.facts


# --------------------------------------------------------------------------------------------------------------- samples


class Tell(torch.nn.Module):
    """A denoiser that guesses twice its label, or 0 for the null label 2."""
    def __init__(self):
        super().__init__()
        self.p, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def forward(self, xt, t, y=None):
        self.seen.append((len(xt), int(t[0])))
        return Dirac((torch.where(y == 2, 0, y) * 0.5)[:, None, None, None] + 0 * xt)


def telling(place): return replace(load(place / "hot"), denoiser=Tell())


def test_labels_and_guidance_reach_the_denoiser():
    place = made()
    run = telling(place)
    assert run.classes == ["a", "b"]
    assert run.sample(5).flatten(1)[:, 0].tolist() == [0, 0.5, 0, 0.5, 0], "all classes in turn"
    assert run.sample(2, label="b").unique().tolist() == [0.5] and run.sample(2, label="b", guidance=0.0).unique().tolist() == [0]
    assert run.sample(3, label=torch.tensor([1, 0, 1]), guidance=1.5).flatten(1)[:, 0].tolist() == [0.75, 0, 0.75]
    assert run.sample(1, label="b", guidance=9.0).max() == 1, "guesses are kept within [-1, 1]"


def test_rows_and_steps_are_those_asked_for():
    place = made()
    run = telling(place)
    run.sample(5, rows=2, steps=2)
    assert run.denoiser.seen == [(n, t) for n in (2, 2, 1) for t in (10, 5)]
    assert run.plan() == ("ddim", 10) and run.plan("heun", 3) == ("heun", 3), "T = 10 is less than 50"
    assert load(place / "mask").plan() == ("reveal", 4) and load(place / "mask").walk(None, 2, 1.0)[2] == [4, 2, 0]
    assert load(place / "cold").plan()[0] == "reuse" and run.plan(steps=1) == ("ddim", 1)
    long = {name: model(replace(configs(place)[name], T=60), load(place / name).facts)[0] for name in ("hot", "cold")}
    assert replace(run, F=long["hot"]).plan() == ("ddim", 50) and replace(load(place / "cold"), F=long["cold"]).plan()[1] == 60
    hot = load(place / "hot")
    assert torch.equal(hot.sample(101, sampler="ddpm", steps=2), hot.sample(101, sampler="ddpm", steps=2, seed=0, rows=100))


class Board(Tell):
    """Guesses a chessboard."""
    def forward(self, xt, t, y=None): return Dirac(0 * xt + 1 - 2 * ((torch.arange(8)[:, None] + torch.arange(8)) % 2))


@pytest.mark.parametrize("sign", [1, -1])
def test_pictures_end_within_the_range_of_pixels(sign):
    """To clip the guesses does not do: a step that keeps part of x_t can leave the range."""
    run = load(made() / "cold")
    run = replace(run, denoiser=Board(), known=run.data._replace(train=sign * run.data.train))
    denoiser, kernel, times = run.walk("reuse", 2, 1.0)
    free = sample(run.F, denoiser, run.F.prior(stack(run.data.train, [0])[0]), times, kernel)
    assert (-sign * free).max() > 1.1, "a digit is darker than the middle grey"
    assert torch.equal(run.sample(1, sampler="reuse", steps=2), free.clamp(-1, 1))


def test_samples_are_those_of_the_loop():
    place = made()
    run = load(place / "cold")
    x, _ = stack(run.data.train, range(7))
    start = run.F.prior(x)
    with torch.no_grad(): want = sample(run.F, run.denoiser, start, range(10, -1, -1), SAMPLERS["reuse"].kernel)
    close(run.sample(7), want.clamp(-1, 1), 100, dtype=torch.float32)
    close(run.sample(9)[7:], run.sample(2), 100, dtype=torch.float32)          # 7 training pictures, taken in turn
    hot = load(place / "hot")
    g = rng(3, "cpu")
    xT = hot.F.prior(torch.zeros(4, 1, 8, 8), generator=g)
    assert not torch.allclose(xT.mean(), torch.tensor(0.0), atol=1e-6)
    assert hot.walk("ddim", 5, 1.0)[1] == ddim() and hot.walk("ddim", 5, 1.0)[2] == hot.F.schedule.times(5)


def test_samples_are_written_as_what_they_are(tmp_path):
    place = made()
    hot, mask = load(place / "hot"), load(place / "mask")
    assert hot.write(hot.sample(4), tmp_path / "new" / "x").name == "x.png" and hot.write(hot.sample(1), tmp_path / "y.png").exists()
    path = mask.write(mask.sample(3), tmp_path / "newer" / "and newer" / "t")
    assert path.name == "t.txt" and path.read_text(encoding="utf-8").splitlines() == mask.texts(mask.sample(3))
    assert all(len(line) == 4 for line in mask.texts(mask.sample(3)))


def test_samples_are_shown_while_training(tmp_path):
    place = made()
    for name, kind in (("hot", "png"), ("edit", "txt")):
        train(replace(configs(place)[name], show_every=2), tmp_path / name)
        assert sorted(p.name for p in (tmp_path / name / "samples").iterdir()) == [f"step-{n:08d}.{kind}" for n in (2, 4)]
        run = load(tmp_path / name)
        again = run.write(run.sample(16), tmp_path / f"again.{kind}")
        assert again.read_bytes() == (tmp_path / name / "samples" / f"step-00000004.{kind}").read_bytes()


# ------------------------------------------------------------------------------------------------------ what has to stay


def test_what_may_change_and_what_may_not():
    place = made()
    config, facts = configs(place)["hot"], load(place / "hot").facts
    for there in "hot", "nowhere": check_same(config, facts, place / there)
    check_same(replace(config, workers=2, save_every=9, keep=1, show_every=3), facts, place / "hot")
    check_same(replace(config, steps=9, lr=0.5), facts, place / "hot")
    for more in dict(width=16), dict(seed=1), dict(schedule="linear"), dict(labels=False), dict(held_out=5), dict(drop=0.2):
        (name, value), = more.items()
        with pytest.raises(ValueError, match=f"expected {name} = .*, as in the run in .*; got {value!r}: take another folder"):
            check_same(replace(config, **more), facts, place / "hot")
    with pytest.raises(ValueError, match="expected digest = .*; got 'other'"): check_same(config, facts | dict(digest="other"), place / "hot")


def test_a_bent_run_says_so_once_and_other_data_are_refused(tmp_path):
    place = made()
    shutil.copytree(place / "mask", tmp_path / "run")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert train(replace(configs(place)["mask"], steps=5), tmp_path / "run").step == 5
    said = [str(w.message) for w in seen if "going on" in str(w.message) or "goes on" in str(w.message)]
    assert said == ["going on with steps = 5 (was 4): not what one run would have given"]
    run = load(tmp_path / "run")
    other = tmp_path / "lines.txt"
    other.write_text("\n".join(LINES), encoding="utf-8")
    moved = replace(configs(place)["mask"], steps=5, data=str(other))
    assert train(moved, tmp_path / "run").step == 5, "data that have only moved are the same"
    assert Run(moved, run.facts, 5, run.F, run.denoiser).data.facts == run.facts
    other.write_text("\n".join(LINES[::-1]), encoding="utf-8")
    with pytest.raises(ValueError, match="expected digest = "): train(moved, tmp_path / "run")
    with pytest.raises(ValueError, match=f"expected the data of the run, with the digest {run.facts['digest']}; got "):
        Run(moved, run.facts, 5, run.F, run.denoiser).data
    known = Data(*run.data)
    assert load(tmp_path / "run", known=known).data is known


def test_a_folder_without_a_run_is_said_so(tmp_path):
    place = made()
    with pytest.raises(FileNotFoundError, match=f"expected the folder of a run, with a config.json; got {tmp_path}$"): load(tmp_path)
    shutil.copy(place / "hot" / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=f"expected a checkpoint in {tmp_path}; got none yet"): load(tmp_path)


def fake(**facts):
    F, denoiser, _ = model(Config("digits", **TINY), dict(shape=[1, 8, 8]))
    return Run(Config("digits", **TINY), dict(shape=[1, 8, 8], classes=[]) | facts, 0, F, denoiser)


def stale():
    run = fake(digest="old")
    return Run(run.config, run.facts, 0, run.F, run.denoiser, Data(None, None, dict(digest="new"))).data


def three():
    folder = tempfile.mkdtemp()
    save_images(torch.zeros(3, 1, 8, 8), folder)
    return Config(folder, size=8, channels=1, held_out=3)


def another():
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps({"config": {"settings": Config("digits").settings, "facts": {}}}))
    return check_same(Config("digits", seed=1), {}, folder)


E, T = ValueError, TypeError
CASES = {
    "digits of another size": (E, lambda: read_data(Config("digits", size=16)), "digits at size 8 with 1 channel", "16 with 1"),
    "digits as text": (E, lambda: read_data(Config("digits", "edit")), "a file of lines for edit", "the word digits"),
    "no sample": (E, lambda: fake().sample(0), "at least one sample", "0"),
    "too many steps": (E, lambda: fake().sample(1, steps=11), "between 1 and T = 10 steps", "11"),
    "no step": (E, lambda: fake().sample(1, steps=0), "between 1 and T = 10 steps", "0"),
    "no such sampler": (E, lambda: fake().sample(1, sampler="reveal"), "sampler to be one of ddim, ", "'reveal'"),
    "a label without classes": (E, lambda: fake().sample(1, label="3"), "no label", "'3'"),
    "guidance without classes": (E, lambda: fake().sample(1, guidance=2.0), "guidance 1", "2.0"),
    "no such class": (E, lambda: fake(classes=["a", "b"]).sample(1, label="c"), "label to be one of a, b", "'c'"),
    "all images held out": (E, lambda: read_data(three()), "between 1 and 2 images", "3"),
    "another run": (E, another, "seed = 0, as in the run in", "1: take another folder"),
    "data that have changed": (E, stale, "digest old", "new in digits"),
}
test_it_refuses = refuses(CASES)


def test_all_images_cannot_be_held_out():
    place = made()
    with pytest.raises(ValueError, match="expected to hold out between 1 and 39 images; got 40"):
        read_data(replace(configs(place)["hot"], held_out=40))


def test_the_tests_know_a_denoiser():
    F, denoiser, _ = model(Config("digits", **TINY), dict(shape=[1, 8, 8]))
    assert isinstance(denoiser, Denoiser) and denoiser.parameterization is V

"""Settings: defaults by family, what contradicts itself is refused, files and Python say the same, tables map names to objects."""
import json
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import close, refuses, rng

from udm_book.cold import Cold
from udm_book.conditional import DropLabels
from udm_book.config import (DEGRADATIONS, FAMILIES, KINDS, LANGUAGES, SAMPLERS, SCHEDULES, Config, about, blur, checked, kind, model, pick,
                             pool, read_settings, restoring_loss)
from udm_book.degradations import Cover
from udm_book.edit import EditDifferent
from udm_book.forward import Forward
from udm_book.hot import Hot
from udm_book.mask import Mask
from udm_book.parameterization import Parameterization
from udm_book.posterior import Dirac
from udm_book.schedule import Schedule

SMALL = dict(width=8, mults=(1,), blocks=1, attention=())
IMAGES, WORDS = dict(shape=[1, 8, 8], classes=[*"abc"]), dict(shape=[5], vocab=[*"?ab"])


def config(family="hot", **more):
    small = SMALL if family in ("hot", "cold") else dict(width=8, depth=1)
    return Config("digits" if family in ("hot", "cold") else "lines.txt", family, **small | more)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# -------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_of_a_family_has_a_value_and_no_other_has(family):
    settings = Config("data", family).settings
    for f in fields(Config):
        by = f.metadata["by"]
        assert (f.name in settings) == (by is None or family in by), f.name
        assert f.metadata["help"].endswith(".") and f.metadata["may"] in ("stay", "bend", "free")
        if f.name in settings: assert checked(f, getattr(Config("data", family), f.name)) == getattr(Config("data", family), f.name)


def test_defaults_are_those_of_the_family_and_of_the_digits():
    assert (Config("folder").size, Config("folder").channels, Config("folder").width, Config("folder").T) == (32, 3, 64, 1000)
    assert (Config("digits").size, Config("digits").channels, Config("digits").width) == (8, 1, 64)
    assert (Config("x", "cold").T, Config("x", "cold").degradation, Config("x", "cold").schedule) == (20, "blur", None)
    text = Config("lines.txt", "edit")
    assert (text.width, text.depth, text.batch, text.size, text.T, text.labels) == (128, 3, 32, None, None, None)
    assert Config("hot", "mask").width == 128, "data that are called like a family"
    assert Config("digits", size=16).size == 16 and Config("digits", labels=False).labels is False


def test_settings_come_back_from_json_and_toml(tmp_path):
    for family in FAMILIES:
        one = config(family, steps=7, lr=1.0, seed=3)
        assert Config.of(one.settings | {"lr": 1}) == one, "1 is a number too"
        assert Config.of(json.loads(json.dumps(one.settings))) == one
        toml = "\n".join(f"{k} = {json.dumps(v)}" for k, v in one.settings.items())
        assert Config.of(read_settings(write(tmp_path / f"{family}.toml", toml))) == one
        write(tmp_path / family / "config.json", json.dumps({"version": "1", "config": {"settings": one.settings, "facts": {}}}))
        assert Config.of(read_settings(tmp_path / family / "config.json")) == one
    assert about(tmp_path / "hot")["version"] == "1" and about(tmp_path / "hot")["config"]["facts"] == {}
    with pytest.raises(FileNotFoundError, match=f"expected the folder of a run.*got {tmp_path}$"): about(tmp_path)
    with pytest.raises(FileNotFoundError): read_settings(tmp_path / "none.toml")


def test_kinds_are_what_the_annotations_say():
    kinds = {f.name: kind(f) for f in fields(Config)}
    assert set(kinds.values()) == set(KINDS)
    assert kinds | dict(data=str, size=int, labels=bool, drop=float, mults=tuple, steps=int, decay=float, family=str) == kinds
    for name, bad in dict(steps=True, labels=1, lr="1", mults=[1, 2.0], size=8.0, family=["hot"]).items():
        with pytest.raises(TypeError, match=f"expected {name} to be {KINDS[kinds[name]]}; got "):
            checked(next(f for f in fields(Config) if f.name == name), bad)


def test_a_key_that_is_none_names_the_nearest():
    for key, near in dict(step="steps", learning_rate="lr", Width="width", chanels="channels", save="save_every").items():
        with pytest.raises(ValueError, match="expected settings of a run; got ") as caught: Config.of({"data": "digits", key: 1})
        if key != "learning_rate": assert f"{key!r}: did you mean {near!r}?" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- tables


def test_tables_hold_objects_and_families_their_samplers():
    assert all(isinstance(make(50), Schedule) and make(50).T == 50 for make in SCHEDULES.values())
    assert all(isinstance(P, Parameterization) for P in LANGUAGES.values())
    assert {family for how in SAMPLERS.values() for family in how.families} == set(FAMILIES)
    for name, make in DEGRADATIONS.items():
        D = make((8, 8), 3)
        assert D.T == 3, name
        x = torch.rand(2, 1, 8, 8, generator=rng(device="cpu"))
        assert torch.equal(D(x, torch.tensor([0, 0])), x) and not torch.allclose(D(x, torch.tensor([3, 3])), x)
    assert [pool((8, 12), T).T for T in (1, 2, 9)] == [1, 2, 2] and pool((8, 8), 2).blocks == [(1, 1), (2, 2), (4, 4)]
    assert blur((8, 8), 5).table.widths[-1] == 4 and blur((8, 8), 5).T == 5


@pytest.mark.parametrize("family, kind_of", [("hot", Hot), ("cold", Cold), ("mask", Mask), ("edit", EditDifferent)])
def test_a_model_is_a_function_of_settings_and_facts(family, kind_of):
    facts = IMAGES if family in ("hot", "cold") else WORDS
    x0 = None if family in ("hot", "cold") else torch.randint(0, 3, (20, 5), generator=rng(device="cpu"))
    state = torch.get_rng_state()
    F, denoiser, objective = model(config(family), facts, x0)
    assert torch.equal(torch.get_rng_state(), state), "it leaves the generator alone"
    assert isinstance(F, kind_of) and isinstance(F, Forward) and objective.denoiser is denoiser and denoiser.training
    again, other = (model(config(family, seed=seed), facts, x0)[1].state_dict() for seed in (0, 1))
    assert all(torch.equal(v, again[k]) for k, v in denoiser.state_dict().items())
    assert not all(torch.equal(v, other[k]) for k, v in denoiser.state_dict().items())
    like = torch.zeros(3, *facts["shape"]) if x0 is None else x0[:3]
    loss = objective(like, objective.draw(like, rng(device="cpu")))
    assert loss.shape == (3,) and loss.isfinite().all()


def test_settings_reach_what_they_name():
    F, denoiser, _ = model(config(schedule="linear", T=30, parameterization="eps", labels=True), IMAGES)
    assert F.T == 30 and torch.equal(F.schedule.alpha, Schedule.linear(30).alpha)
    assert denoiser.is_eps and denoiser(torch.zeros(1, 1, 8, 8), torch.tensor([1]), y=torch.tensor([3])).mean.shape == (1, 1, 8, 8)
    with pytest.raises(ValueError): model(config(), IMAGES)[1](torch.zeros(1, 1, 8, 8), torch.tensor([1]), y=torch.tensor([3]))
    objective = model(config(labels=True, drop=0.25), IMAGES)[2]
    assert isinstance(objective, DropLabels) and (objective.null, objective.share) == (3, 0.25)
    F = model(config("cold", degradation="cover", T=7), IMAGES)[0]
    assert F.T == 7 and isinstance(F.D, Cover)
    F, denoiser, objective = model(config("mask"), WORDS, torch.tensor([[0, 1, 1, 1, 1]]))
    assert (F.vocab, F.T) == (3, 5)
    freq = denoiser(torch.full((1, 5), 3), torch.tensor([5])).logits.softmax(-1)[0, 0]
    assert torch.allclose(freq, torch.tensor([2.0, 5.0, 1.0]) / 8), "frequencies of the data, each counted once more"


def test_losses_are_means_over_numbers():
    F, x0 = Cold(blur((8, 8), 3)), torch.rand(4, 1, 8, 8, generator=rng(device="cpu"))
    t, eps = torch.tensor([1, 2, 3, 3]), torch.zeros(4, 1, 8, 8)
    got = restoring_loss(F, lambda xt, t: Dirac(xt), x0, t, eps)
    assert torch.allclose(got, (F(x0, t, eps) - x0).abs().flatten(1).mean(1)) and got.shape == (4,)
    words = torch.randint(0, 3, (6, 5), generator=rng(device="cpu"))
    for family in "mask", "edit":
        F, D, objective = model(config(family), WORDS, words)
        D.eval()
        draws = objective.draw(words, rng(device="cpu"))
        t, weight, eps = draws
        xt = F(words, t, eps)
        each = D(xt, t).token_nll(words)
        if family == "mask": each = torch.where(xt == 3, each, 0.0) * 5 / t[:, None]
        close(objective(words, draws), weight * each.sum(1) / 5, 30, dtype=torch.float32)


def said(name, text): return write(Path(tempfile.mkdtemp()) / name, text)


V, T = ValueError, TypeError
CASES = {
    "no such family": (V, lambda: Config("digits", "warm"), "family to be one of hot, cold, mask, edit", "'warm'"),
    "no such schedule": (V, lambda: Config("digits", schedule="cosin"), "schedule to be one of cosine, ", "'cosin'"),
    "no data": (T, lambda: Config(None), "data to be a text", "None"),
    "steps in words": (T, lambda: Config("digits", steps="many"), "steps to be a whole number", "'many'"),
    "another family's setting": (V, lambda: Config("digits", "hot", depth=3), "depth only for mask or edit", "3 for hot"),
    "a key that is none": (V, lambda: Config.of({"data": "digits", "step": 3}), "settings of a run", "'step': did you mean 'steps'"),
    "no such name": (V, lambda: pick({"a": 1, "b": 2}, "the letter", "c"), "the letter to be one of a, b", "'c'"),
    "a size that does not halve": (V, lambda: model(replace(config(), mults=(1, 2)), dict(shape=[1, 9, 9])), "sides .* 2", r"\(9, 9\)"),
}
CASES |= {
    "a file that is no TOML": (V, lambda: read_settings(said("a.toml", "steps = many")), "TOML, or the config.json of a run", "Invalid value"),
    "a run that says nothing": (V, lambda: about(said("config.json", "{}").parent), "settings and facts of a run", "KeyError"),
}
test_it_refuses = refuses(CASES)


def test_files_that_say_nothing_are_refused(tmp_path):
    for text in ("steps = many", "[1, 2]]", "\xff"):
        with pytest.raises(ValueError, match=r"expected TOML, or the config\.json of a run; got "): read_settings(write(tmp_path / "a.toml", text))
    for text in ("{", "[]", '{"config": {"settings": {}}}', '{"config": null}'):
        write(tmp_path / "run" / "config.json", text)
        for read in (about, lambda run: read_settings(run / "config.json")):
            with pytest.raises(ValueError, match="expected settings and facts of a run in .*; got "): read(tmp_path / "run")

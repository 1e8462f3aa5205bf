"""The command line: what it does to a folder, interrupted, killed and taken up again; what it says, and with which exit code."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from udm_book import __version__
from udm_book.cli import Commands, default_of, main, settings_of, spelled
from udm_book.config import FAMILIES, SAMPLERS, SCHEDULES, Config, read_settings
from udm_book.data import digits, save_images
from udm_book.resume import checkpoints, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ["eval", "info", "sample", "schedule", "train"]
PICTURES = "--size 8 --channels 1 --labels --width 8 --mults 1 --blocks 1 --attention none --T 20 --batch 8 --show-every 0".split()
LINES = "--family mask --width 16 --depth 1 --batch 8 --show-every 0".split()
ALONE = [sys.executable, "-c", "from udm_book.cli import main; main()"]


def run(*words, code=0):
    """A command in this process: what it printed, what it said on stderr."""
    done = CliRunner().invoke(main, [str(w) for w in words])
    if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
    assert done.exit_code == code, (done.exit_code, done.stdout, done.stderr)
    return done.stdout, done.stderr


def refused(*words, code=2, **more):
    """The one line on stderr of a command that must fail, and print nothing."""
    out, err = run(*words, code=code, **more)
    assert not out and err.startswith("udm-book: ") and err.count("\n") == 1 and err.endswith("\n")
    return err.strip().removeprefix("udm-book: ")


def cut_off(number, at, folder, *words):
    """A command in a process of its own, which gets the signal when the log of `folder` has reached the step `at`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([*ALONE, *map(str, words)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, end = Path(folder, "log.jsonl"), time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if log.exists() and (lines := re.findall(r'"step": (\d+)', log.read_text())) and int(lines[-1]) >= at: break
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    data = digits()
    save_images(data.train[:300], folder / "png", [f"{y}/{i:04}" for i, y in enumerate(data.train_labels[:300].tolist())])
    (folder / "lines.txt").write_text("".join(f"{i:03}+{i % 7}\n" for i in range(300)), encoding="utf-8")
    return folder


def same_weights(one, other):
    a, b = (load_checkpoint(checkpoints(folder)[-1]) for folder in (one, other))
    assert a.step == b.step and a.rest.keys() == b.rest.keys() and a.ema
    for x, y in (a.model, b.model), (a.ema, b.ema), (a.rest, b.rest):
        assert all(torch.equal(v, y[k]) for k, v in x.items())


# ----------------------------------------------------------------------------------------------- from data to measurements


@pytest.fixture(scope="module")
def pictures(place):
    """A run on pictures: interrupted by Ctrl-C, killed, then finished by the same command."""
    words = ["train", place / "png", *PICTURES, "--steps", 150, "--save-every", 15, "-o", place / "a", "--no-progress"]
    code, out, err = cut_off(signal.SIGINT, 10, place / "a", *words)
    assert code == 130 and not out, err
    assert err == f"udm-book: interrupted and saved; go on with: udm-book train --config {place / 'a' / 'config.json'}\n"
    stopped = load_checkpoint(checkpoints(place / "a")[-1]).step
    assert 10 <= stopped < 150
    code, out, err = cut_off(signal.SIGKILL, stopped + 25, place / "a", "train", "--config", place / "a" / "config.json", "--no-progress")
    assert code == -signal.SIGKILL and not out and not err
    killed = load_checkpoint(checkpoints(place / "a")[-1]).step
    assert stopped < killed < 150 and killed % 15 == 0
    assert run(*words)[0] == f"{place / 'a'}: 150 steps of hot on 270 data\n"
    return place / "a"


def test_a_training_that_was_cut_off_gives_what_one_would_have_given(place, pictures):
    assert run("train", place / "png", *PICTURES, "--steps", 150, "-o", place / "b", "--save-every", 90)[0]
    same_weights(pictures, place / "b")


def test_pictures_are_sampled(pictures, tmp_path):
    from PIL import Image
    out, err = run("sample", pictures, "-n", 9, "--steps", 5, "-o", tmp_path / "x.png", "--no-progress")
    assert out == f"{tmp_path / 'x.png'}: 9 samples of step 150\n" and not err
    sheets = {}
    for name, more in dict(same=[], seed=["--seed", 1], label=["--label", "3"], scale=["--guidance", 3], ddpm=["--sampler", "ddpm"]).items():
        run("sample", pictures, "-n", 9, "--steps", 5, "-o", tmp_path / f"{name}.png", "--no-progress", *more)
        sheets[name] = Image.open(tmp_path / f"{name}.png").tobytes()
    assert Image.open(tmp_path / "x.png").tobytes() == sheets["same"] and len(set(sheets.values())) == 5
    assert Image.open(tmp_path / "x.png").size == (196, 196)
    run("sample", pictures, "-n", 3, "--steps", 2, "-o", tmp_path / "many")
    assert [Image.open(p).size for p in sorted((tmp_path / "many").iterdir())] == [(8, 8)] * 3
    assert run("sample", pictures, "-n", 1, "--steps", 2)[0] == f"{pictures / 'samples.png'}: 1 samples of step 150\n"
    old = checkpoints(pictures)[0]
    assert run("sample", pictures, "-n", 1, "--steps", 2, "--checkpoint", old)[0].endswith(f"step {load_checkpoint(old).step}\n")
    assert "step/s" in run("sample", pictures, "-n", 1, "--steps", 2)[1], "a progress bar, on stderr"


def test_pictures_are_measured(pictures):
    found = json.loads(run("eval", pictures, "--json", "--steps", 5, "--bits-n", 5, "--no-progress")[0])
    assert found["step"] == 150 and found["family"] == "hot" and found["distances"]["n"] == 30 and found["bits"]["n"] == 5
    said, _ = run("eval", pictures, "--steps", 5, "--bits-n", 5, "--no-progress")
    assert said.startswith("hot, step 150\n30 samples by ddim in 5 steps, guidance 1, seed 0")
    for part in "energy", "mmd", "nearest": assert all(f"{v:.4f}" in said for v in found["distances"][part].values())
    assert f"{found['bits']['bits']:.3f} ± {found['bits']['error']:.3f} bits per dimension" in said
    assert [row["t"] for row in found["guesses"]] == [20, 16, 12, 8, 4, 1] and f"{found['guesses'][0]['held_out']:.3g}" in said


def test_a_run_is_described(pictures):
    said, found = run("info", pictures)[0], json.loads(run("info", pictures, "--json")[0])
    assert found["version"] == __version__ and len(found["schedule_hash"]) == 16 and found["step"] == 150 and found["skipped"] == 0
    log = [json.loads(line) for line in (pictures / "log.jsonl").read_text().splitlines()]
    assert found["losses"] == {str(line["step"]): line["loss"] for line in log[-5:]}
    assert found["parameters"] == sum(v.numel() for k, v in load_checkpoint(checkpoints(pictures)[-1]).rest.items() if "exp_avg of" in k)
    assert found["settings"] == json.loads((pictures / "config.json").read_text())["config"]["settings"]
    for word in (__version__, found["schedule_hash"], str(found["parameters"]), "270, and 30 held out", checkpoints(pictures)[-1].name,
                 f"{log[-1]['loss']:.4f}"): assert word in said
    for name, value in found["settings"].items():
        value = spelled(tuple(value) if isinstance(value, list) else value)
        assert re.search(rf"^--{name.replace('_', '-')} +{re.escape(value)}$", said, re.M), name


def test_lines_are_trained_on_cut_off_sampled_and_measured(place, tmp_path):
    words = ["train", place / "lines.txt", *LINES, "--steps", 80, "--save-every", 10]
    code, *_ = cut_off(signal.SIGKILL, 20, tmp_path / "a", *words, "-o", tmp_path / "a")
    assert code == -signal.SIGKILL and 10 <= load_checkpoint(checkpoints(tmp_path / "a")[-1]).step < 80
    for name in "ab": assert run(*words, "-o", tmp_path / name)[0] == f"{tmp_path / name}: 80 steps of mask on 270 data\n"
    same_weights(tmp_path / "a", tmp_path / "b")
    said, _ = run("sample", tmp_path / "a", "-n", 4)
    assert re.fullmatch(r"(.{5}\n){4}", said) and run("sample", tmp_path / "b", "-n", 4)[0] == said
    run("sample", tmp_path / "a", "-n", 4, "-o", tmp_path / "new.txt")
    assert (tmp_path / "new.txt").read_text(encoding="utf-8") == said
    assert run("sample", tmp_path / "a", "-n", 4, "--sampler", "surest", "--steps", 2)[0] != said
    found = json.loads(run("eval", tmp_path / "a", "--json")[0])
    assert set(found) == {"step", "family", "bits"} and found["bits"]["n"] == 30
    assert f"{found['bits']['bits']:.3f} ± " in run("eval", tmp_path / "a")[0]


# ------------------------------------------------------------------------------------------------------- files and flags


def flags_of(config):
    words = []
    for name, value in config.settings.items():
        f, flag = next(f for f in fields(Config) if f.name == name), name.replace("_", "-")
        if name == "data": continue
        if isinstance(value, bool): words += [f"--{flag}" if value else f"--no-{flag}"]
        else: words += [f"--{flag}", spelled(tuple(value) if isinstance(value, list) else value)]
        assert f.metadata["may"]
    return words


def parsed(words):
    """The settings that a command line means, without running it."""
    command = main.commands["train"]
    with command.make_context("train", list(words)) as context:
        more = {k: v for k, v in context.params.items() if k not in ("data", "file", "out", "progress")}
        return Config.of(settings_of(context.params["data"], context.params["file"], more))


@pytest.mark.parametrize("config", [
    Config("digits", labels=True, mults=(1, 2), attention=(), lr=0.5, T=7), Config("digits", "cold", degradation="pool", dropout=0.25),
    Config("/x/lines.txt", "mask", min_count=3, held_out=4), Config("/x/lines.txt", "edit", precision="bf16", workers=2)], ids=lambda c: c.family)
def test_files_and_flags_mean_the_same(config, tmp_path):
    toml = "".join(f"{k} = {json.dumps(v)}\n" for k, v in config.settings.items())
    (tmp_path / "a.toml").write_text(toml, encoding="utf-8")
    assert parsed([config.data, *flags_of(config)]) == config
    assert parsed(["--config", str(tmp_path / "a.toml")]) == config == Config.of(read_settings(tmp_path / "a.toml"))
    assert parsed(["--config", str(tmp_path / "a.toml"), "--steps", "3"]).steps == 3, "flags win"
    assert parsed(["/other", "--config", str(tmp_path / "a.toml"), *(["--size", "8"] if config.size else [])]).data == "/other"


def test_data_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parsed(["png"]).data == str(tmp_path / "png") and parsed(["./digits"]).data == str(tmp_path / "digits") and parsed(["digits"]).data == "digits"


def test_a_run_has_a_folder_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = "--width 8 --mults 1 --blocks 1 --attention none --T 5 --batch 4 --steps 1 --show-every 0".split()
    assert run("train", "digits", *tiny)[0] == "runs/digits-hot: 1 steps of hot on 1078 data\n"
    assert run("train", "--config", "runs/digits-hot/config.json")[0] == "runs/digits-hot: 1 steps of hot on 1078 data\n"
    _, err = run("train", "--config", "runs/digits-hot/config.json", "--steps", 2, "--no-progress")
    assert err == "udm-book: going on with steps = 2 (was 1): not what one run would have given\n"


# ------------------------------------------------------------------------------------------------------- help and errors


def test_help_is_complete():
    assert sorted(main.commands) == COMMANDS and "verify" not in main.commands
    said = run("--help")[0]
    for name in COMMANDS: assert re.search(rf"^  {name} +\w", said, re.M)
    for name in COMMANDS:
        said, command = run(name, "--help")[0], main.commands[name]
        with command.make_context(name, [], resilient_parsing=True) as context: options = command.get_params(context)
        assert run(name, "-h")[0] == said and command.help
        for option in options:
            if isinstance(option, click.Argument): continue
            assert option.help, option.name
            assert all(re.search(rf"(^|\s){re.escape(flag)}\b", said) for flag in option.opts), option.name
    said = " ".join(run("train", "--help")[0].split())
    for f in fields(Config)[1:]:
        assert f"--{f.name.replace('_', '-')} " in said and f"{f.metadata['help']} [{default_of(f)}]" in said
    assert " ".join(("hot", "cold")) not in default_of(fields(Config)[0]) and default_of(next(f for f in fields(Config) if f.name == "size")) == "hot, cold: 32; digits: 8"
    assert default_of(next(f for f in fields(Config) if f.name == "mults")) == "hot, cold: 1,2,4"
    first = {family: next(k for k, how in SAMPLERS.items() if family in how.families) for family in FAMILIES}
    assert "; ".join(f"{k}: {v}" for k, v in first.items()) in " ".join(run("sample", "--help")[0].split())
    assert run("--version")[0] == f"udm-book, version {__version__}\n"


def test_help_needs_no_torch():
    code = "import sys; from udm_book.cli import main; main(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert out.stdout.endswith("False\n")


def test_errors_are_one_line_and_2(place, pictures, tmp_path):
    (tmp_path / "odd.txt").write_text("ab\nabc\n")
    (tmp_path / "bad.toml").write_text("steps = many")
    (tmp_path / "near.toml").write_text('data = "digits"\nstep = 3')
    (tmp_path / "empty").mkdir()
    train = "train", "-o", tmp_path / "new"
    cases = {
        ("sampl", "x"): "No such command 'sampl'.", ("train",): "expected DATA, or a --config that names them; got neither",
        (*train, "digits", "--steps", "x"): "Invalid value for '--steps': 'x' is not a valid integer.",
        (*train, "digits", "--steps", 0): "expected steps >= 1; got 0",
        (*train, "digits", "--family", "warm"): "Invalid value for '--family': 'warm' is not one of 'hot', 'cold', 'mask', 'edit'.",
        (*train, "digits", "--mults", "1,x"): "Invalid value for '--mults': expected whole numbers like 1,2,4, or none; got '1,x'",
        (*train, "digits", "--depth", 3): "expected depth only for mask or edit; got 3 for hot",
        (*train, "digits", "--size", 9): "expected the digits at size 8 with 1 channel; got 9 with 1",
        (*train, "digits", "--mults", "1,1,1,1,1"): "by 16",
        (*train, "digits", "--family", "mask"): "expected a file of lines for mask; got the word digits",
        (*train, tmp_path / "none"): "expected a folder of images; got ", (*train, tmp_path / "empty"): "expected images (",
        (*train, tmp_path / "none.txt", "--family", "edit"): "No such file or directory", (*train, tmp_path / "odd.txt", "--family", "mask"): "expected lines of 2",
        (*train, "--config", tmp_path / "bad.toml"): "expected TOML", (*train, "--config", tmp_path / "near.toml"): "did you mean 'steps'?",
        (*train, "--config", tmp_path / "none.toml"): "does not exist",
        ("train", place / "png", *PICTURES, "--steps", 150, "--width", 16, "-o", pictures, "--no-progress"): "expected width = 8, as in the run in",
        ("sample", tmp_path / "none"): "does not exist", ("sample", tmp_path / "empty"): "expected the folder of a run, with a config.json; got",
        ("info", tmp_path / "empty"): "expected the folder of a run", ("eval", tmp_path / "empty"): "expected the folder of a run",
        ("sample", pictures, "-n", 0): "expected at least one sample; got 0", ("sample", pictures, "--label", "z"): "expected label to be one of 0, 1,",
        ("sample", pictures, "--sampler", "reveal"): "expected sampler to be one of ddim,", ("sample", pictures, "--steps", 21): "between 1 and T = 20",
        ("sample", pictures, "--steps", 2, "-o", tmp_path / "x.jpg"): "expected a name for --out that ends in .png", ("sample", pictures, "--checkpoint", tmp_path / "bad.toml"): "expected a",
        ("schedule", "cosin"): "expected the schedule to be one of cosine,", ("schedule", "cosine", "--rows", 1): "expected",
    }
    for words, said in cases.items(): assert said in refused(*words), words
    assert not (tmp_path / "new" / "checkpoints").exists()
    with pytest.raises(ValueError): run("--debug", "schedule", "cosin")


def test_other_ends_have_other_codes(monkeypatch):
    def end(error):
        @click.command()
        def command(): raise error
        group = Commands(commands={"go": command})
        return group.main(["go"], standalone_mode=False)
    assert [end(e) for e in (FloatingPointError("expected"), KeyboardInterrupt(), ImportError("no"), OSError("no"), TypeError("no"))] == [1, 130, 2, 2, 2]
    with pytest.raises(ZeroDivisionError): end(ZeroDivisionError())             # a bug: with its traceback
    monkeypatch.setenv("UDM_DEBUG", "1")
    with pytest.raises(TypeError): end(TypeError("no"))


def test_schedules_are_tabled_and_drawn(tmp_path):
    for name, make in SCHEDULES.items():
        lines, s = run("schedule", name, "--T", 50, "--rows", 6)[0].splitlines(), make(50)
        assert lines[0].split() == ["t", "alpha", "sigma", "SNR", "log", "SNR"] and len(lines) == 7
        for line, t in zip(lines[1:], range(0, 51, 10)):
            got = [float(word) for word in line.split()]
            assert int(got[0]) == t and abs(got[1] - s.alpha[t]) < 1e-6 and abs(got[2] - s.sigma[t]) < 1e-6
            if t: assert abs(got[3] / s.snr[t] - 1) < 1e-4 or s.snr[t] < 1e-30
    run("schedule", "linear", "--plot", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_longer_training_learns(tmp_path):
    "A folder of all digits and a file of lines, by the command line alone: better than what the mean or the counts know."
    data = digits()
    save_images(torch.cat([data.train, data.held_out]), tmp_path / "png")
    small = "--size 8 --channels 1 --width 24 --mults 1,2 --blocks 1 --attention none --T 100 --batch 64 --lr 0.005 --show-every 0".split()
    run("train", tmp_path / "png", *small, "--steps", 600, "--decay", 0.99, "-o", tmp_path / "run", "--no-progress")
    found = json.loads(run("eval", tmp_path / "run", "--json", "--no-progress")[0])
    found, rows = found["distances"], found["guesses"]
    assert found["energy"]["samples"] < 0.2 and found["nearest"]["samples"] < 1.6 * found["nearest"]["real"]
    assert all(row["held_out"] < 0.9 * row["alone"] for row in rows if 20 <= row["t"] <= 60)
    (tmp_path / "lines.txt").write_text("".join(f"{a:02}+{b:02}={a + b:03}\n" for a in range(40) for b in range(40)), encoding="utf-8")
    run("train", tmp_path / "lines.txt", "--family", "mask", "--width", 64, "--depth", 2, "--steps", 1500, "-o", tmp_path / "text", "--no-progress")
    found = json.loads(run("eval", tmp_path / "text", "--json")[0])["bits"]
    assert found["bits"] + 5 * found["error"] < found["pairs"]

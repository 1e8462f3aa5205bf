"""Nothing is lost: trainings killed at random moments end with the bits of one that was not, two processes make the numbers of one."""
import json
import math
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import refuses
from torch import nn
from torch.utils.data import TensorDataset
from trainers import DATA, ROWS, Net, Shaken, ends_alike, forked, lines, reaped, trainer, without_dropout

from udm_book import resume
from udm_book.hot import Hot
from udm_book.resume import checkpoints, compare, interrupts, load_checkpoint, replace, save_checkpoint, schedule_hash, tidy
from udm_book.schedule import Schedule

posix = pytest.mark.skipif(os.name != "posix", reason="forks and signals")

# ------------------------------------------------------------------------------------------------------------------- files


@posix
def test_files_are_on_the_disk_before_they_take_their_name(tmp_path, monkeypatch):
    "First the whole content, then the name, then the folder: any other order can lose a file that seems to be there."
    path, seen, fsync, rename = tmp_path / "a", [], os.fsync, os.replace
    path.write_text("old")
    def note(handle):
        there = os.fstat(handle)
        seen.append(("folder",) if there.st_ino == tmp_path.stat().st_ino else ("file", there.st_size, path.read_text()))
        fsync(handle)
    def renamed(a, b):
        seen.append(("name", Path(a).parent == Path(b).parent == tmp_path, Path(b) == path))
        rename(a, b)
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", renamed)
    replace(path, lambda part: part.write_text("newer"))
    assert seen == [("file", 5, "old"), ("name", True, True), ("folder",)]
    assert path.read_text() == "newer" and list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    def fail(part):
        part.write_text("ne")
        raise OSError("disk full")
    with pytest.raises(OSError, match="disk full"): replace(path, fail)
    assert path.read_text() == "old"


def test_elsewhere_than_posix_nothing_is_asked_of_the_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(resume.os, "name", "nt")
    monkeypatch.setattr(os, "fsync", lambda handle: 1 / 0)
    resume.sync(tmp_path)


def test_checkpoints_hold_what_was_put_in_and_the_last_ones_are_kept(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    tensors = {"model.a.b": shared.mT, "model.c": shared, "ema.a.b": shared.mT + 1, "tally.x": torch.tensor(3), "updates": torch.tensor(7)}
    for step in 5, 10, 2_000_000_000, 100_000_000: path = save_checkpoint(tmp_path, step, tensors, {"config": {"é": 1}}, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-100000000.safetensors", "step-2000000000.safetensors"]
    assert path == checkpoints(tmp_path)[0] and len(list(tmp_path.rglob("*"))) == 3
    got = load_checkpoint(path)
    assert got.step == 100_000_000 and got.about == {"config": {"é": 1}} and list(got.ema) == ["a.b"]
    assert torch.equal(got.model["a.b"], shared.mT) and torch.equal(got.model["c"], shared) and torch.equal(got.ema["a.b"], shared.mT + 1)
    assert {k: v.item() for k, v in got.rest.items()} == {"tally.x": 3, "updates": 7} and got.rest["updates"].dtype == torch.long
    for step in range(3): save_checkpoint(tmp_path / "b", step, tensors, {})
    save_checkpoint(tmp_path / "b", 3, tensors, {})
    assert len(checkpoints(tmp_path / "b")) == 3 and checkpoints(tmp_path / "b")[0].name == "step-00000001.safetensors"
    assert checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_never_written(tmp_path, bad):
    save_checkpoint(tmp_path, 1, {"model.a": torch.ones(2)}, {})
    tensors = {"model.a": torch.ones(2), "ema.b": torch.tensor([0.0, bad]), "tally.n": torch.tensor(1)}
    with pytest.raises(FloatingPointError, match="expected finite numbers at step 2; got others in ema.b"):
        save_checkpoint(tmp_path, 2, tensors, {}, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001.safetensors"]


class Trap:
    """A pickle that writes a file when it is loaded."""
    def __init__(self, path): self.path = path

    def __reduce__(self): return open, (str(self.path), "w")


def test_pickles_in_the_folder_are_not_read(tmp_path):
    "Neither under their own endings nor as a file that only has the name of a checkpoint."
    sprung, folder = tmp_path / "sprung", tmp_path / "run"
    trainer(folder, steps=5).run()
    for name in "step-00000099.pt", "step-00000099.pkl", "step-00000099.safetensors.part", "model.bin":
        (folder / "checkpoints" / name).write_bytes(pickle.dumps(Trap(sprung)))
    again = trainer(folder, steps=5)
    again.run()
    assert again.step == 5
    (folder / "checkpoints" / "step-00000099.safetensors").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ValueError, match="expected a checkpoint of udm_book; got .*step-00000099.safetensors"): trainer(folder, steps=5).run()
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()                                                      # the trap works


def test_what_a_killed_run_left_is_cleared_away(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for part in "config.json.part", "checkpoints/step-00000009.safetensors.part": (tmp_path / part).write_text("half")
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"ste')
    tidy(tmp_path, 4, 3)
    assert log.read_text() == '{"step": 2}\n{"step": 4}\n' and sorted(p.name for p in tmp_path.rglob("*")) == ["checkpoints", "log.jsonl"]
    before = log.stat().st_ino
    tidy(tmp_path, 9, 3)
    assert log.stat().st_ino == before                                          # nothing to do, nothing written
    tidy(tmp_path / "checkpoints", 0, 1)
    for step in range(4): save_checkpoint(tmp_path, step, {}, {}, keep=9)
    tidy(tmp_path, 9, 3)                                                        # killed between a save and the clearing
    assert [p.name for p in checkpoints(tmp_path)] == [f"step-0000000{k}.safetensors" for k in (1, 2, 3)]


def test_the_hash_tells_forward_processes_apart():
    class Other(Hot): pass
    def objective(F): return nn.ModuleDict({"wrapped": nn.ModuleDict({"F": F})})
    a = schedule_hash(objective(Hot(Schedule.cosine(10))))
    assert len(a) == 16 and a == schedule_hash(objective(Hot(Schedule.cosine(10))))
    others = [Hot(Schedule.cosine(11)), Hot(Schedule.linear(10)), Other(Hot(Schedule.cosine(10)).schedule)]
    assert len({a, *(schedule_hash(objective(F)) for F in others)}) == 4
    assert schedule_hash(nn.Linear(2, 2)) == ""


# ------------------------------------------------------------------------------------------------------------- interrupted


def stop_at(step, how):
    """A `show` that does something to the training at one step."""
    def show(model, path):
        if int(path.name[5:]) == step: how()
    return show


class Stopped(Exception): pass


def crash(): raise Stopped


@pytest.mark.parametrize("step", [1, 5, 23])
def test_a_run_that_crashed_goes_on_from_its_last_checkpoint(tmp_path, step):
    whole = trainer(tmp_path / "whole")
    model = whole.run()
    assert model is whole.ema_model and whole.step == 24
    with pytest.raises(Stopped): trainer(tmp_path / "cut", show=stop_at(step, crash), show_every=1).run()
    done = checkpoints(tmp_path / "cut")
    assert (int(done[-1].stem[5:]) if done else 0) == (step - 1) // 5 * 5
    again = trainer(tmp_path / "cut")
    assert again.step == 0
    again.run()
    ends_alike(tmp_path / "whole", tmp_path / "cut")
    for a, b in zip(whole.model.parameters(), again.model.parameters()): assert torch.equal(a, b)
    for a, b in zip(whole.ema_model.parameters(), again.ema_model.parameters()): assert torch.equal(a, b)
    assert again.learner.state.ema.updates == whole.learner.state.ema.updates == 24
    once_more = trainer(tmp_path / "cut")
    once_more.run()
    assert once_more.step == 24
    ends_alike(tmp_path / "whole", tmp_path / "cut")


@posix
@pytest.mark.parametrize("step", [3, 24])
def test_ctrl_c_ends_the_step_saves_and_raises(tmp_path, step):
    trainer(tmp_path / "whole").run()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", show=stop_at(step, lambda: signal.raise_signal(signal.SIGINT)), show_every=1).run()
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoints(tmp_path / "cut")[-1].name == f"step-{step:08d}.safetensors"
    trainer(tmp_path / "cut").run()
    ends_alike(tmp_path / "whole", tmp_path / "cut")


@posix
def test_the_second_ctrl_c_interrupts_at_once():
    with interrupts() as seen:
        signal.raise_signal(signal.SIGINT)
        assert len(seen) == 1
        with pytest.raises(KeyboardInterrupt): signal.raise_signal(signal.SIGINT)
    found = []
    def elsewhere():
        with interrupts() as seen: found.append(seen)
    thread = threading.Thread(target=elsewhere)                                 # no handler can be set there, and none is needed
    thread.start()
    thread.join()
    assert found == [[]]


def test_the_random_numbers_of_the_caller_are_left_alone(tmp_path):
    run = trainer(tmp_path, data=Shaken("label"))
    state = torch.random.get_rng_state()
    run.run()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_going_on_with_other_settings(tmp_path):
    trainer(tmp_path, steps=10).run()
    with pytest.warns(UserWarning, match=r"going on with steps = 12 \(was 10\), lr = 0.5 \(was 0.02\): not"):
        trainer(tmp_path, steps=12, lr=0.5).run()
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["trainer"]["lr"] == 0.5 and about == {k: v for k, v in load_checkpoint(checkpoints(tmp_path)[-1]).about.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer(tmp_path, steps=12, lr=0.5, config={"a": (1,)}).run()           # what config says is not this library's business
    assert json.loads((tmp_path / "config.json").read_text())["config"] == {"a": [1]}
    with pytest.raises(ValueError, match="expected the forward process of the checkpoint, .*; got .*: restore it"):
        trainer(tmp_path, steps=12, lr=0.5, schedule=Schedule.cosine(11)).run()
    with pytest.raises(ValueError, match="expected the checkpoint's network; got another: (?s:.*)size mismatch"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, steps=12, lr=0.5, config={"a": [1]}, net=Net(9)).run()


def test_another_version_is_warned_of():
    was = {"version": "0.0.1", "schedule": "a", "trainer": {"steps": 1}, "config": None}
    with pytest.warns(UserWarning, match=r"going on with version = '0.2' \(was '0.0.1'\), lr = 1 \(was None\)"):
        compare(was, {**was, "version": "0.2", "trainer": {"steps": 1, "lr": 1}})


# ------------------------------------------------------------------------------------------------------------------ killed

STEPS = 45


def slowly(folder):
    """A training whose every fsync takes 6 ms, so that half of its time is spent in saving."""
    fsync = os.fsync
    def slow(handle):
        time.sleep(0.006)
        fsync(handle)
    os.fsync = slow
    trainer(folder, steps=STEPS, save_every=3, keep=2, log_every=1).run()


def kill_at_random(folder, whole, chance):
    """Start, kill after a random while, start again until the end is reached. Kills, and those that hit a save."""
    kills, torn, patience = 0, 0, 0.3
    while True:
        before = checkpoints(folder)
        pid, end = forked(lambda: slowly(folder)), time.monotonic() + chance.uniform(0.0, patience)
        while (done := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < end: time.sleep(0.002)
        if done[0]: break
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status):
            done = pid, status
            break
        kills, torn = kills + 1, torn + any(folder.glob("**/*.part"))
        for path in checkpoints(folder): load_checkpoint(path)                  # what has the name is whole
        assert len(checkpoints(folder)) <= 3
        if checkpoints(folder) == before: patience *= 1.5                       # a busy machine: give it longer lives
    assert os.waitstatus_to_exitcode(done[1]) == 0
    ends_alike(whole, folder)
    assert [line["step"] for line in lines(folder)] == list(range(1, STEPS + 1))
    assert not list(folder.glob("**/*.part")) and len(checkpoints(folder)) == 2
    return kills, torn


@posix
@pytest.mark.parametrize("seed", range(2))
def test_a_killed_training_loses_nothing(tmp_path, seed):
    trainer(tmp_path / "whole", steps=STEPS, save_every=3, keep=2, log_every=1).run()
    kills, _ = kill_at_random(tmp_path / "cut", tmp_path / "whole", random.Random(seed))
    assert kills


@posix
@pytest.mark.slow
def test_thirty_killed_trainings_lose_nothing(tmp_path, capsys):
    trainer(tmp_path / "whole", steps=STEPS, save_every=3, keep=2, log_every=1).run()
    counts = [kill_at_random(tmp_path / f"cut{k}", tmp_path / "whole", random.Random(100 + k)) for k in range(30)]
    kills, torn = map(sum, zip(*counts))
    with capsys.disabled(): print(f"\n30 trainings, {kills} kills, {torn} of them in the middle of writing a file: nothing lost")
    assert min(k for k, _ in counts) >= 1 and torn >= 5


# ----------------------------------------------------------------------------------------------------------- two processes


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def same_curve(a, b):
    one, two = ([(line["loss"], line["norm"]) for line in lines(folder)] for folder in (a, b))
    assert len(one) == len(two) == 50
    for (x, u), (y, v) in zip(one, two): assert abs(x / y - 1) < 1e-5 and abs(u / v - 1) < 1e-4


@posix
@pytest.mark.parametrize("settings", [dict(), dict(accumulate=2, data="named")], ids=["plain", "accumulated"])
def test_two_processes_make_the_numbers_of_one(tmp_path, settings):
    "Without dropout, whose random numbers are each process's own."
    settings = dict(steps=50, log_every=1, lr=0.005) | settings
    if "data" in settings: settings["data"] = TensorDataset(DATA, torch.arange(ROWS) % 3)
    def work(name):
        run = trainer(tmp_path / name, net=without_dropout(), **settings)
        run.run()
        assert run.learner.of == {"one": 1, "two": 2}[name]
        run.learner.accelerator.end_training()
    env = dict(ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), LOCAL_WORLD_SIZE="2", WORLD_SIZE="2")
    pids = [forked(lambda: work("one"))]
    pids += [forked(lambda: work("two"), **env, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    assert reaped(pids) == [0, 0, 0]
    same_curve(tmp_path / "one", tmp_path / "two")


SCRIPT = """
import sys
sys.path[:0] = [sys.argv[2], sys.argv[3]]
import torch
torch.set_num_threads(1)
from trainers import trainer, without_dropout
run = trainer(sys.argv[1], net=without_dropout(), steps=50, log_every=1, lr=.005)
run.run()
print("processes:", run.learner.of)
run.learner.accelerator.end_training()
"""


@posix
@pytest.mark.slow
def test_accelerate_launch_two_processes(tmp_path):
    tests = Path(__file__).parent
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    for name, how in ("one", []), ("two", launch):
        out = subprocess.run([sys.executable, *how, str(tmp_path / "script.py"), str(tmp_path / name), str(tests), str(tests.parent)],
                             env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr[-3000:]
        assert "processes: 2" in out.stdout or name == "one"
    same_curve(tmp_path / "one", tmp_path / "two")


# --------------------------------------------------------------------------------------------------------------- bad input

V_, T_ = ValueError, TypeError
ABOUT = {"version": "1", "schedule": "a", "trainer": {}, "config": None}


def not_a_checkpoint():
    from tempfile import NamedTemporaryFile
    with NamedTemporaryFile(suffix=".safetensors") as file: load_checkpoint(file.name)


def other_network():
    net = nn.Linear(2, 2)
    resume.State(net, net, torch.optim.AdamW(net.parameters()), {}).restore(resume.Checkpoint(1, {"weight": torch.zeros(3, 2)}, {}, {}, {}))


CASES = {
    "a checkpoint that is none": (V_, not_a_checkpoint, "a checkpoint of udm_book", "delete it"),
    "another network": (V_, other_network, "the checkpoint's network", "another: "),
    "another forward process": (V_, lambda: compare(ABOUT, {**ABOUT, "schedule": "b"}), "forward process of the checkpoint, a;", "b: restore"),
}
test_the_message_says_what_was_expected_and_what_came = refuses(CASES)

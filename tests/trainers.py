"""A training small enough to be run, killed and run again many times in a test."""
import json
import os
import signal
import time
import traceback
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from udm_book.hot import Hot
from udm_book.objective import Loss
from udm_book.parameterization import Denoiser, V
from udm_book.resume import checkpoints
from udm_book.schedule import Schedule
from udm_book.train import Trainer

ROWS, SIZE = 37, 4
DATA = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(9)).clamp(-1, 1)


class Shaken(Dataset):
    """Rows that are changed at random, as augmentation does, in the form that is asked for."""
    def __init__(self, form): self.form = form

    def __len__(self): return ROWS

    def __getitem__(self, i):
        x = DATA[i] + torch.rand(1)
        return {"plain": x, "label": (x, i % 3), "named": (x, {"extra": torch.tensor(float(i)), "y": i % 3})}[self.form]


class Net(nn.Module):
    """A small network with dropout, which hears of labels and of a number for each row."""
    def __init__(self, width=8):
        super().__init__()
        self.label = nn.Embedding(3, width)
        self.enter, self.drop, self.leave = nn.Linear(SIZE + 1, width), nn.Dropout(0.2), nn.Linear(width, SIZE)

    def forward(self, x, t, y=None, extra=None):
        h = self.enter(torch.cat([x, t[:, None] / 10.0], 1)) + (0 * self.label.weight[0] if y is None else self.label(y))
        if extra is not None: h = h + extra[:, None]
        return self.leave(self.drop(nn.functional.silu(h)))


def without_dropout():
    """The same network every time, without random numbers of its own."""
    torch.manual_seed(0)
    net = Net()
    net.drop.p = 0.0
    return net


def trainer(folder, data=DATA, steps=24, *, schedule=None, net=None, objective=None, **settings):
    """A trainer that starts from the same weights every time."""
    torch.manual_seed(0)
    schedule = schedule or Schedule.cosine(10)
    objective = objective or Loss(Hot(schedule), Denoiser(net or Net(), schedule, V))
    settings = dict(batch=8, lr=0.02, decay=0.9, save_every=5, log_every=2, progress=False) | settings
    return Trainer(objective, data, folder, steps=steps, **settings)


def lines(folder):
    """The log without its only numbers that depend on the clock."""
    return [{k: v for k, v in json.loads(line).items() if k != "images/s"} for line in open(Path(folder, "log.jsonl"))]


def ends_alike(a, b):
    """The last checkpoints are the same bytes (weights, average, moments, counters) and the logs the same lines."""
    last = [checkpoints(folder)[-1] for folder in (a, b)]
    assert last[0].name == last[1].name and last[0].read_bytes() == last[1].read_bytes()
    assert lines(a) == lines(b)


def forked(work, **env):
    """Do `work()` in a fork of this process: no second import of torch. The child's number; it exits 1 on an error."""
    pid = os.fork()
    if pid: return pid
    try:
        os.environ.update(env)
        from accelerate.state import AcceleratorState, GradientState
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally: os._exit(1)


def reaped(pids, seconds=30):
    """How forks ended: their exit codes. Those that still run when the time is over are killed."""
    codes, end = {}, time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            if time.monotonic() > end: os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done: codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(.01)
    return [codes[pid] for pid in pids]

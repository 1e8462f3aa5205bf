"""How figures are made: clocks, counters of torch's operators, test networks and the figures of one candidate.

Needs torch alone, so that the interpreter of another environment can run it beside other libraries:

    python measure.py NAME [NAME ...] [--device cuda] [--quick]     prints one line of JSON

A *ratio* is the median, over rounds, of (time of the candidate / time of the yardstick), where every round times the
yardstick and all candidates one after the other: a slow moment of the machine slows both. An *absolute* time is that of
the fastest round. On a processor the clock is the processor time of this process, which other programs do not lengthen;
all work is done in one thread. On a GPU it is CUDA's events around the work, so launches and waiting count.
"""
import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # others' progress bars; read when torch imports tqdm
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # what torch's profiler says of itself

import torch
from torch import Tensor, nn
from torch.nn import functional as fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import candidates

T = 1000  # length of every schedule
IMAGES = (16, 3, 32, 32)  # the batch of the timed ratios
LARGE = (10, 1, 1000, 1000)  # 1e7 numbers
TEXT, VOCABULARY, WIDTH = 256, 32_000, 256  # tokens of a sentence, of the language; numbers that the head reads

# ---------------------------------------------------------------------------------------------------------------- clocks


def seconds(f: Callable, device: str) -> float:
    """The time of one call of `f`."""
    if device == "cpu":
        start = time.process_time()
        f()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    f()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def race(runners: dict[str, Callable], device: str, rounds: int) -> dict[str, list[float]]:
    """Times of all runners, in rounds; the first round warms up and is not counted, and every other round runs backwards."""
    times = {name: [] for name in runners}
    for i in range(rounds + 1):
        for name in list(runners)[:: 1 if i % 2 else -1]:
            taken = seconds(runners[name], device)
            if i:
                times[name].append(taken)
    return times


def ratio(times: list[float], yardstick: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times, yardstick))


# -------------------------------------------------------------------------------------------------------------- counters

# Operators whose answer is a Python number, or a tensor whose shape depends on the data: a program waits for a GPU there.
WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "unique", "repeat_interleave")


class Calls(TorchDispatchMode):
    """Counts the operators that run, those that would wait for a GPU, and new tensors of at least `large` elements."""

    def __init__(self, large: int = sys.maxsize):
        super().__init__()
        self.names, self.large, self.alive, self.waits = [], large, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, given = func.overloadpacket.__name__, [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        made = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor)]
        self.names.append(name)
        self.waits += name in WAITS or (any(x.is_cuda for x in given) and any(x.device.type == "cpu" for x in made))
        known = {x.untyped_storage().data_ptr() for x in given}
        for x in made:
            if x.numel() >= self.large and x.untyped_storage().data_ptr() not in known:
                self.alive.setdefault(x.untyped_storage().data_ptr(), x)  # kept, so that no address comes twice
        return out


def per_step(make: Callable[[int], Callable], x: Tensor) -> dict[str, float]:
    """Calls and waits of one step: a run of 20 steps less a run of 10, divided by 10, so that what a run does once is out."""
    counts = []
    for steps in (10, 20):
        run = make(steps)
        run(x)  # caches are filled
        with Calls() as calls:
            run(x)
        counts.append((len(calls.names), calls.waits))
    (calls_10, waits_10), (calls_20, waits_20) = counts
    return dict(calls=(calls_20 - calls_10) / 10, waits=(waits_20 - waits_10) / 10)


def counts(candidate: "candidates.Candidate", device: str = "cpu") -> dict[str, float]:
    """The exact figures: no clock is read, and the network is the identity, which calls no operator."""
    x, out = torch.randn(4, 3, 8, 8, device=device), {}
    with torch.no_grad():
        for kind in ("ddpm", "ddim"):
            found = per_step(lambda steps: candidate.sampler(Identity(), kind, steps, x), x)
            out[f"{kind} calls"], out[f"{kind} waits"] = found["calls"], found["waits"]
        for kind in candidate.solvers:
            out[f"{kind} calls"] = per_step(lambda steps: candidate.sampler(Identity(), kind, steps, x), x)["calls"]
        loss = candidate.loss(Identity(), x)
        loss(x)
        with Calls() as calls:
            loss(x)
        out["loss calls"], out["loss waits"] = len(calls.names), calls.waits
        eps, t = torch.randn_like(x), torch.arange(1, 5, device=device)
        forward = candidate.forward(x)
        forward(x, eps, t)
        with Calls(large=x.numel()) as calls:
            forward(x, eps, t)
        out["forward extra"] = len(calls.alive)
        if candidate.has_out:
            with Calls(large=x.numel()) as calls:
                forward(x, eps, t, out=torch.empty_like(x))
            out["forward out extra"] = len(calls.alive) - 1  # `out` itself was made inside
    return out


def peak(f: Callable, device: str) -> int:
    """Bytes that one call of `f` holds at most beyond what was held before: every allocation counts, inside operators too."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        f()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


def free_memory(device: str) -> float:
    """Bytes that can be had."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0


# -------------------------------------------------------------------------------------------------------------- networks


class Identity(nn.Module):
    """Returns its input: what remains is the cost of everything else."""

    def forward(self, x, t):
        return x


class OneConv(nn.Module):
    """One 3×3 convolution: the smallest network that does anything."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x)


class UNet(nn.Module):
    """A small U-Net: half a million parameters, 4 GFLOP for the batch. Real ones are larger, which makes the ratios smaller."""

    def __init__(self, width: int = 32):
        super().__init__()
        w = width

        def pair(i, o):
            return nn.ModuleList([nn.Sequential(nn.GroupNorm(min(8, a), a), nn.SiLU(), nn.Conv2d(a, o, 3, padding=1)) for a in (i, o)])

        self.time = nn.Sequential(nn.Linear(1, 2 * w), nn.SiLU(), nn.Linear(2 * w, 7 * w))
        self.enter, self.leave = nn.Conv2d(3, w, 3, padding=1), nn.Conv2d(w, 3, 3, padding=1)
        self.down = nn.ModuleList([pair(w, w), pair(w, 2 * w), pair(2 * w, 4 * w)])
        self.up = nn.ModuleList([pair(6 * w, 2 * w), pair(3 * w, w)])
        self.widths = [w, 2 * w, 4 * w]

    def forward(self, x, t):
        times = self.time(t.reshape(-1, 1).to(x.dtype).log1p()).expand(len(x), -1).split(self.widths, 1)
        h, kept = self.enter(x), []
        for i, ((first, second), time) in enumerate(zip(self.down, times)):
            h = second(first(fn.avg_pool2d(h, 2) if i else h) + time[:, :, None, None])
            kept.append(h)
        for (first, second), skip in zip(self.up, kept[-2::-1]):
            h = second(first(torch.cat([fn.interpolate(h, scale_factor=2.0), skip], 1)))
        return self.leave(h)


# --------------------------------------------------------------------------------------------------------------- figures


def sampling(entrants: dict, device: str, rounds: int, steps: int = 100) -> dict[str, dict[str, float]]:
    """Sampling with one convolution against that many calls of the convolution, and µs per step with the identity."""
    out = {name: {} for name in entrants}
    net, x, one = OneConv().to(device), torch.randn(IMAGES, device=device), torch.randn(1, *IMAGES[1:], device=device)
    t = torch.full(IMAGES[:1], 500, device=device)

    def bare():
        for _ in range(steps):
            net(x, t)

    with torch.no_grad():
        for kind in ("ddpm", "ddim"):
            runs = {name: c.sampler(net, kind, steps, x) for name, c in entrants.items()}
            times = race({"": bare} | {name: lambda run=run: run(x) for name, run in runs.items()}, device, rounds)
            for name in entrants:
                out[name][f"{kind} ratio"] = ratio(times[name], times[""])
                out[name][f"{kind} µs, one convolution"] = min(times[name]) / steps * 1e6
            runs = {name: c.sampler(Identity(), kind, steps, one) for name, c in entrants.items()}
            times = race({name: lambda run=run: run(one) for name, run in runs.items()}, device, rounds)
            for name in entrants:
                out[name][f"{kind} µs"] = min(times[name]) / steps * 1e6
    return out


def training(entrants: dict, device: str, rounds: int, make: Callable, key: str, repeats: int) -> dict[str, dict[str, float]]:
    """A training step that draws times and noise, against one whose noisy images and targets lie ready; both with AdamW."""
    x0, xt, y = (torch.randn(IMAGES, device=device) for _ in range(3))
    t = torch.randint(1, T, IMAGES[:1], device=device)

    net = make().to(device)  # one for all, so that all work in the same memory
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6)

    def step(loss):
        def run():
            for _ in range(repeats):
                optimizer.zero_grad(set_to_none=True)
                loss().mean().backward()
                optimizer.step()

        return run

    runners = {"": step(lambda: fn.mse_loss(net(xt, t), y))}
    for name, c in entrants.items():
        runners[name] = step(lambda loss=c.loss(net, x0): loss(x0))
    times = race(runners, device, rounds)
    return {name: {f"train {key} ratio": ratio(times[name], times[""]), f"train {key} µs": min(times[name]) / repeats * 1e6}
            for name in entrants}


def bounds(entrants: dict, device: str, rounds: int, steps: int = 100) -> dict[str, dict[str, float]]:
    """The bound of one 8-bit image of 16x16 against a call of the U-Net for each of its steps, one at a time.

    Times are folded into batches, so what is saved is what a network wastes on a batch of one. At 32x32 a single image
    keeps a core busy already, and nothing is saved. 100 steps make short rounds; with 1000 the last step, which alone
    needs a decoder, weighs less.
    """
    net, t = UNet().to(device), torch.full((1,), 500, device=device)
    x0 = torch.randint(0, 256, (1, 3, 16, 16), device=device) / 127.5 - 1

    def bare():
        for _ in range(steps):
            net(x0, t)

    with torch.no_grad():
        runs = {name: c.bound(net, steps, x0) for name, c in entrants.items() if c.has_bound}
        times = race({"": bare} | {name: lambda run=run: run(x0) for name, run in runs.items()}, device, rounds) if runs else {}
    return {name: {"bound ratio": ratio(times[name], times[""]), "bound µs": min(times[name]) / steps * 1e6} for name in runs}


def destruction(entrants: dict, device: str, rounds: int) -> dict[str, dict[str, float]]:
    """The forward process on 1e7 numbers against `torch.add` of two such tensors into a third."""
    x0, eps, target = (torch.randn(LARGE, device=device) for _ in range(3))
    t = torch.randint(1, T, LARGE[:1], device=device)
    runners, forwards = {"": lambda: torch.add(x0, eps, out=target)}, {name: c.forward(x0) for name, c in entrants.items()}
    for name, forward in forwards.items():
        runners[name, "forward"] = lambda forward=forward: forward(x0, eps, t)
        if entrants[name].has_out:
            runners[name, "forward out"] = lambda forward=forward: forward(x0, eps, t, out=target)
    times, out = race(runners, device, rounds), {name: {} for name in entrants}
    for who in runners:
        if who:
            out[who[0]][f"{who[1]} ratio"] = ratio(times[who], times[""])
            out[who[0]][f"{who[1]} µs"] = min(times[who]) * 1e6
    return out


def text(entrants: dict, device: str, rounds: int, rows: int, key: str, give_logits: bool = False) -> dict[str, dict[str, float]]:
    """A step of masked text that fills one hidden position in each row, half of 256 being hidden, against the head, softmax
    and multinomial on all positions; and what the step holds in memory at most, as a share of all logits.

    With `give_logits` the head is the identity on logits that lie ready, on both sides.
    """
    entrants = {name: c for name, c in entrants.items() if c.has_text}
    head = nn.Identity() if give_logits else nn.Linear(WIDTH, VOCABULARY).to(device)
    features = torch.randn(rows, TEXT, VOCABULARY if give_logits else WIDTH, device=device)
    xt = torch.randint(VOCABULARY, (rows, TEXT), device=device)
    xt[torch.arange(rows, device=device)[:, None], torch.rand(rows, TEXT, device=device).argsort(1)[:, : TEXT // 2]] = VOCABULARY

    def everything():
        return torch.multinomial(head(features).softmax(-1).flatten(0, 1), 1).view(rows, TEXT)

    out = {name: {} for name in entrants}
    with torch.no_grad():
        runs = {name: lambda run=c.reveal(head, features, VOCABULARY): run(xt) for name, c in entrants.items()}
        times = race({"": everything} | runs, device, rounds) if runs else {}
        for name, run in runs.items():
            filled = ((run() != xt).sum(1) == 1) & (run() < VOCABULARY).sum(1).eq(TEXT // 2 + 1)
            if not filled.all():
                raise AssertionError(f"{name} does not fill one position a row")
            out[name][f"{key} ratio"] = ratio(times[name], times[""])
            out[name][f"{key} µs"] = min(times[name]) * 1e6
            out[name][f"{key} memory"] = peak(run, device) / (rows * TEXT * VOCABULARY * 4)
    return out


def unets(entrants: dict, device: str, rounds: int, side: int = 1536) -> dict[str, dict[str, float]]:
    """Forward and backward through a candidate's own U-Net, 16 images, against a large float32 matmul.

    The share is (multiply-adds of convolutions, linear layers and attention a second) / (those of the matmul a second).
    """
    nets = {name: c.unet().to(device) for name, c in entrants.items() if c.has_unet}
    x, t, (a, b) = torch.randn(IMAGES, device=device), torch.randint(1, T, IMAGES[:1], device=device), torch.randn(2, side, side, device=device)

    def work(net):
        net.zero_grad(set_to_none=True)
        net(x, t).square().mean().backward()

    flops = {}
    for name, net in nets.items():
        with FlopCounterMode(display=False) as counter:
            work(net)
        flops[name] = counter.get_total_flops()
    runners = {"": lambda: torch.mm(a, b)} | {name: lambda net=net: work(net) for name, net in nets.items()}
    times = race(runners, device, rounds) if nets else {}
    return {name: {"unet share": flops[name] / (2 * side**3) / ratio(times[name], times[""]),
                   "unet ratio": ratio(times[name], times[""]) / len(x),
                   "unet images/s": len(x) / min(times[name]),
                   "unet parameters": sum(p.numel() for p in net.parameters()) / 1e6}
            for name, net in nets.items()}


def figures(entrants: dict, device: str, quick: bool = False) -> dict[str, dict[str, float]]:
    """All figures of all entrants."""
    rounds, out = (3 if quick else 15), {name: counts(c, device) for name, c in entrants.items()}
    few = max(1, rounds // 3)
    for part in (
        sampling(entrants, device, rounds),
        training(entrants, device, rounds, OneConv, "one convolution", 10),
        training(entrants, device, 3 * rounds, UNet, "U-Net", 1),
        destruction(entrants, device, rounds),
        bounds(entrants, device, rounds),
        unets(entrants, device, few),
        text(entrants, device, few, 4, "text"),
        text(entrants, device, few, 4, "text, logits given", give_logits=True),
        text(entrants, device, 1, 64, "text, 64 rows") if not quick and free_memory(device) > 12e9 else {},
    ):
        for name, found in part.items():
            out[name].update(found)
    return out


# ---------------------------------------------------------------------------------------------------------- a GPU's figures


def step_functions(device: str, rounds: int, steps: int = 50, backend: str = "inductor") -> dict[str, float]:
    """µs of one DDPM step as a pure function of tensors: as written, compiled, as a CUDA graph, and both; and the network alone.

    Compiled and eager steps must agree, or this raises.
    """
    from udm_book.hot import Hot, ddpm
    from udm_book.parameterization import EPS, Denoiser
    from udm_book.schedule import Schedule

    schedule = Schedule.linear(T).to(device)
    out = {}
    for key, net in {"identity": Identity(), "one convolution": OneConv(), "U-Net": UNet()}.items():
        F, denoiser = Hot(schedule), Denoiser(net, schedule, EPS).to(device)
        x, fresh = torch.randn(IMAGES, device=device), torch.randn(IMAGES, device=device)
        t, s = torch.full(IMAGES[:1], 500, device=device), torch.full(IMAGES[:1], 499, device=device)

        def step(x, t, s, fresh):
            return ddpm(F, denoiser(x, t).mean, x, t, s, fresh)

        with torch.no_grad():
            torch._dynamo.reset()
            compiled, bare = torch.compile(step, fullgraph=True, backend=backend), torch.compile(net.to(device), backend=backend)
            difference = (compiled(x, t, s, fresh) - step(x, t, s, fresh)).abs().max().item()
            if not difference < 1e-2:  # TF32 and reordered sums; a wrong coefficient is far larger
                raise AssertionError(f"compiled and eager step differ by {difference} with the network {key}")
            ways = {"network": lambda: net(x, t), "network, compiled": lambda: bare(x, t),
                    "step": lambda: step(x, t, s, fresh), "step, compiled": lambda: compiled(x, t, s, fresh)}
            if device == "cuda":
                ways |= {f"{name}, graph": graph(f) for name, f in list(ways.items())}
            runners = {name: lambda f=f: [f() for _ in range(steps)] for name, f in ways.items()}
            for name, times in race(runners, device, rounds).items():
                out[f"{key}: {name} µs"] = min(times) / steps * 1e6
    return out


def graph(f: Callable) -> Callable:
    """`f`, a function without arguments that works on fixed tensors, captured once as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # caches and workspaces are made outside of the capture
        for _ in range(3):
            f()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        kept = f()

    def replay():
        captured.replay()
        return kept

    return replay


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+", help="candidates, e.g. udm_book plain diffusers; those that are absent are left out")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="few rounds, to see whether everything runs")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "no CUDA device is available\n")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    entrants, absent = candidates.find(args.names)
    result = dict(torch=torch.__version__, versions={name: c.version for name, c in entrants.items()}, absent=absent,
                  figures=figures(entrants, args.device, args.quick))
    if args.device == "cuda":
        result["gpu"] = torch.cuda.get_device_name()
        if "udm_book" in entrants:
            result["steps"] = step_functions("cuda", 3 if args.quick else 15)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

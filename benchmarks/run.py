"""`make bench`: one table of what this library costs, beside the same work written by hand and beside other libraries.

    run.py                                      this library and the hand-written loops
    run.py --peers PYTHON [--peers PYTHON]      and the libraries that these interpreters can import
    run.py --json benchmarks/cpu.json           store the figures too
    run.py --from benchmarks/cpu.json --readme  print stored figures as the README shows them
    run.py --device cuda                        the same on a GPU, with torch.compile and CUDA graphs

Peers live in environments of their own, each with torch and any of: diffusers, azula, smalldiffusion,
denoising-diffusion-pytorch, improved_diffusion. What none of them has is listed as not measured. Every ratio is taken
inside one process against a yardstick timed beside it (measure.py says how), so figures from different environments can
be compared where their torch is the same.
"""
import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OURS, PEERS = ["udm_book", "plain"], ["smalldiffusion", "denoising_diffusion_pytorch", "azula", "diffusers", "improved_diffusion"]
SHORT = {"denoising_diffusion_pytorch": "denoising-diffusion-pytorch", "improved_diffusion": "improved-diffusion", "plain": "by hand"}
ROWS = [  # title, keys, target, digits
    ("operators per step, DDPM", "ddpm calls", 10, 0),
    ("operators per step, DDIM", "ddim calls", 8, 0),
    ("operators per step, DPM-Solver++(2M)", "2m calls", 8, 0),
    ("operators per step, Heun, two network calls", "heun calls", 12, 0),
    ("operators per training loss", "loss calls", 12, 0),
    ("waits for a GPU per step, DDPM", "ddpm waits", 0, 0),
    ("waits for a GPU per step, DDIM", "ddim waits", 0, 0),
    ("sampling / calls of a 1-convolution network, DDPM", "ddpm ratio", 2.5, 2),
    ("sampling / calls of a 1-convolution network, DDIM", "ddim ratio", 1.5, 2),
    ("µs per step beyond the network, DDPM", "ddpm µs", None, 0),
    ("µs per step beyond the network, DDIM", "ddim µs", None, 0),
    ("training step / bare step, U-Net", "train U-Net ratio", 1.02, 3),
    ("training step / bare step, 1 convolution", "train one convolution ratio", None, 2),
    ("U-Net, forward and backward at 32×32: share of a matmul's peak", "unet share", 0.6, 2),
    ("the same: time of one image / of one 1536×1536 matmul", "unet ratio", None, 2),
    ("the same: images/s", "unet images/s", None, 1),
    ("the same: millions of parameters", "unet parameters", None, 1),
    ("forward process into `out` / `torch.add(out=)`", "forward out ratio", 1.6, 2),
    ("forward process / `torch.add(out=)`", "forward ratio", None, 2),
    ("tensors that the forward process allocates", "forward extra", 1, 0),
    ("bound of one 16×16 image / a call of a U-Net for each step", "bound ratio", 0.7, 2),
    ("masked text, 4 rows: one token a row / head, softmax, multinomial everywhere", "text ratio", 0.01, 4),
    ("the same with the logits given", "text, logits given ratio", 0.01, 4),
    ("memory of that step / all logits", "text memory", 0.05, 3),
    ("masked text, 64 rows: the same ratio of times", "text, 64 rows ratio", 0.01, 4),
    ("memory of that step / all logits, 64 rows", "text, 64 rows memory", 0.05, 3),
    ("import / `import torch`", "import ratio", 1.1, 2),
    ("the same without passes of Python's garbage collector", "import ratio, no collector", None, 2),
]
AT_LEAST = {"unet share"}  # keys whose target is a lower bound
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def say(text: str):
    print(text, file=sys.stderr, flush=True)


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure(python: str, names: list[str], device: str, quick: bool) -> dict:
    """The figures of `names`, in a fresh process of `python`."""
    command = [python, str(HERE / "measure.py"), *names, "--device", device, *["--quick"] * quick]
    done = subprocess.run(command, env=environment(python), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"measuring {', '.join(names)} with {python} failed; the reason is above")
    return json.loads(done.stdout.splitlines()[-1])


def environment(python: str) -> dict:
    """The environment of a measured process: one thread; no search path of ours for another interpreter."""
    return {k: v for k, v in ENVIRONMENT.items() if python == sys.executable or k != "PYTHONPATH"}


def import_ratio(python: str, imports: str, rounds: int, collector: bool = True) -> float:
    """Processor time of importing torch and then a library / of importing torch, in the same fresh process; the median of several.

    Enough new objects call the garbage collector, which then goes through all that torch has made: not the library's own time.
    """
    code = (f"import gc; from time import process_time as now; a = now(); import torch; b = now(); {'' if collector else 'gc.disable(); '}"
            f"{imports}; c = now(); print((c - a) / (b - a))")

    def once() -> float:
        done = subprocess.run([python, "-c", code], env=environment(python), cwd=HERE.parent, check=True, stdout=subprocess.PIPE, text=True)
        return float(done.stdout.splitlines()[-1])

    once()  # compiles to byte code, fills the disk's cache
    return statistics.median(once() for _ in range(rounds))


def collect(peers: list[str], device: str, quick: bool) -> dict:
    """All figures, from this interpreter and the peers'."""
    from candidates import ALL

    result = dict(date=datetime.date.today().isoformat(), processor=processor(), python=platform.python_version(),
                  device=device, threads=1, versions={}, figures={}, absent={})
    wanted = list(PEERS)
    for python in [sys.executable, *peers]:
        names = OURS if python == sys.executable else [name for name in wanted if name not in result["figures"]]
        say(f"measuring {', '.join(names)} with {python}")
        part = measure(python, names, device, quick)
        if OURS[0] in part["absent"]:
            raise SystemExit(f"{OURS[0]} cannot be imported: {part['absent'][OURS[0]]}")
        if part["torch"] != result.setdefault("torch", part["torch"]):
            say(f"  note: torch {part['torch']} there, {result['torch']} here")
        for name in part["figures"]:
            if ALL[name].imports:
                say(f"  importing {name} beside torch, in fresh processes")
                try:
                    for key, collector in (("import ratio", True), ("import ratio, no collector", False)):
                        part["figures"][name][key] = import_ratio(python, ALL[name].imports, 3 if quick else 7, collector)
                except subprocess.CalledProcessError:
                    say("  that failed; the table shows no figure for it")
        result["figures"] |= part["figures"]
        result["versions"] |= part["versions"]
        result |= {key: part[key] for key in ("gpu", "steps") if key in part}
    result["absent"] = [name for name in wanted if name not in result["figures"]]
    return result


def rounded(value):
    """Four significant digits: more would say nothing."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(result: dict) -> tuple[list[list[str]], list[str]]:
    """The table, heading first, and the rows whose target is missed."""
    names, missed = [n for n in OURS + PEERS if n in result["figures"]], []
    lines = [["", "target", *(SHORT.get(n, n) for n in names)]]
    for title, key, target, digits in ROWS:
        values = [result["figures"][n].get(key) for n in names]
        if values.count(None) == len(values):  # not measured on this machine
            continue
        if target is not None and values[0] is not None:
            value = round(values[0], digits)
            if value < target if key in AT_LEAST else value > target:
                missed.append(title)
        goal = "" if target is None else "0" if target == 0 else f"{'≥' if key in AT_LEAST else '≤'} {target}"
        lines.append([title, goal, *("-" if v is None else f"{v:.{digits}f}" for v in values)])
    return lines, missed


def heading(result: dict) -> str:
    """When, where and with what."""
    where = f"{result['gpu']}, {result['processor']}" if "gpu" in result else f"{result['processor']}, one thread"
    return f"{result['date']}, {where}, torch {result['torch'].split('+')[0]}, Python {result['python']}"


def markdown(result: dict) -> str:
    """The README's table."""
    lines, _ = table(result)
    lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
    lines[2:] = [[a, b, f"**{c}**", *rest] for a, b, c, *rest in lines[2:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{heading(result)}."


def plain_text(result: dict) -> str:
    """The terminal's table."""
    lines, missed = table(result)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = [heading(result), ""]
    out += ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))) for line in lines]
    versions = ", ".join(f"{n} {v}" for n, v in result["versions"].items() if v != "-")
    out += ["", f"Versions: {versions}."]
    if result["absent"]:
        out.append(f"Not measured (no interpreter given that can import them): {', '.join(result['absent'])}.")
    out.append(f"Targets missed: {'; '.join(missed)}." if missed else "All targets are met.")
    if "steps" in result:
        out += ["", "One DDPM step as a pure function, batch 16x3x32x32, µs:"]
        out += [f"  {name.removesuffix(' µs'):42} {value:9.1f}" for name, value in result["steps"].items()]
    return "\n".join(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="append", default=[], metavar="PYTHON", help="interpreter of an environment with other libraries")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", metavar="FILE", help="store the figures")
    parser.add_argument("--from", dest="stored", metavar="FILE", help="print stored figures, measure nothing")
    parser.add_argument("--readme", action="store_true", help="print a markdown table")
    parser.add_argument("--quick", action="store_true", help="few rounds: whether everything runs, not what it costs")
    args = parser.parse_args()
    if args.stored:
        result = json.loads(Path(args.stored).read_text(encoding="utf-8"))
    else:
        result = rounded(collect(args.peers, args.device, args.quick))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(markdown(result) if args.readme else plain_text(result))


if __name__ == "__main__":
    main()

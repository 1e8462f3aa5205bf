"""`make quality`: how good the digits are after 2 and 5 minutes of training, beside a mixture of normal laws and beside another library.

    quality.py                              everything: about 45 minutes on two quiet cores
    quality.py --peer PYTHON                the other library (denoising-diffusion-pytorch) in another interpreter
    quality.py --minutes 2 --seeds 0        less
    quality.py --only floor mixture ours    some rows
    quality.py --steps 2=1500 5=3750        our rows by numbers of steps instead of minutes, as on the machine of the report
    quality.py --search [NAME ...]          the search for the recipe, on digits set apart; about 25 minutes on a core
    quality.py --show                       print the stored report, measure nothing

Each finished row goes into the report (nbs/assets/quality.json) at once; a run that was interrupted goes on after it, and rows that were
made by other settings are made again. `--fresh` makes all of them again.

Protocol. scikit-learn's 1,797 digits (8x8), split by `udm_book.data.digits()`: 1,078 to train on, 719 held out. The recipe was chosen on
250 digits set apart from the 1,078. (Not quite blind: earlier recipes had been measured on the held-out digits, for two minutes one with dropout,
for five a wider network with dropout and three networks of fewer passes.) Pixels are on the scale 0..1. Every row is the mean over
seeds of training (or fitting) and over draws of 719 pictures, each against the same 719 held-out digits, after clipping to 0..1:

  certainty  mean of the largest probability that a support vector machine gives, `SVC(gamma=0.001, probability=True)` on pixels 0..16,
             fitted to the training digits
  Fréchet    distance of the normal laws in the first 20 principal components of the training digits
  MMD²       `udm_book.data.mmd`: without bias, kernel exp(-|x - y|² / 2h²), h the median distance between held-out digits
  nearest    median distance to the nearest training digit / that of held-out digits

Minutes are those of training alone: batches, losses, gradients, the optimizer, the moving average; not drawing. Our number of steps is
fixed before, by a short timing, since the learning rate has to know where it ends, and is limited by a number of passes over the digits;
the other library runs until its time is over.
"""
import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from run import processor, say
from udm_book.data import digits, mmd, nearest_distance
from udm_book.hot import Hot, ddim, ddpm
from udm_book.network import UNet
from udm_book.objective import Loss
from udm_book.parameterization import EDM, Denoiser
from udm_book.posterior import Dirac
from udm_book.resume import replace
from udm_book.reverse import sample
from udm_book.schedule import Schedule, uniform
from udm_book.score import DPMSolver2M, karras
from udm_book.train import fit

HERE = Path(__file__).resolve().parent
REPORT = HERE.parent / "nbs" / "assets" / "quality.json"
FIGURES = ["certainty", "Fréchet", "MMD²", "nearest"]
NAMES = {"floor": "training digits", "jitter": "training digits, jittered", "mixture": "mixture of 40 normal laws",
         "unclipped": "the same, not clipped", "peer": "denoising-diffusion-pytorch", "ours": "udm_book"}
COUNT, DRAWS, THREADS = 719, 3, 2
HAS_PEER = "import importlib.util as u, sys; sys.exit(u.find_spec('denoising_diffusion_pytorch') is None)"

RECIPE = dict(width=32, mults=[1, 2], blocks=2, attention=[-1], dropout=0.0, T=1000, mean=-0.2, std=1.0, low=0.03, high=25.0,
              batch=128, lr=5e-3, average=0.1, passes=160, nets=1, steps=30, kernel="ddpm", rho=4.0)
LONGER = dict(nets=3)  # from 4 minutes on: three such networks, whose guesses are averaged


# --------------------------------------------------------------------------------------------------------------- the four figures


class Judge:
    """The four figures of a set of pictures, from digits to train on and digits to compare with, both in [0, 1]."""

    def __init__(self, train: torch.Tensor, labels: torch.Tensor, held_out: torch.Tensor, held_labels: torch.Tensor):
        from sklearn.decomposition import PCA
        from sklearn.svm import SVC

        self.train, self.held_out = train.flatten(1).double(), held_out.flatten(1).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions want its calibration written out
            self.svc = SVC(gamma=0.001, probability=True, random_state=0).fit(16 * self.train.numpy(), labels)
        self.accuracy = self.svc.score(16 * self.held_out.numpy(), held_labels)
        self.pca = PCA(20).fit(self.train.numpy())
        self.law = self.moments(self.held_out)
        self.near = nearest_distance(self.held_out, self.train).median().item()

    def moments(self, x):
        z = torch.from_numpy(self.pca.transform(x.numpy()))
        return z.mean(0), z.T.cov()

    def frechet(self, x) -> float:
        """`|m - m'|² + tr(C + C' - 2 (C C')^½)`; the last trace from the eigenvalues of C C'."""
        (m, C), (n, D) = self.moments(x), self.law
        cross = torch.linalg.eigvals(C @ D).real.clamp(min=0).sqrt().sum()
        return ((m - n).square().sum() + C.trace() + D.trace() - 2 * cross).item()

    def __call__(self, x: torch.Tensor) -> list[float]:
        x = x.flatten(1).double()
        certainty = self.svc.predict_proba(16 * x.numpy()).max(1).mean()
        near = nearest_distance(x, self.train).median().item() / self.near
        return [float(f"{v:.4g}") for v in (certainty, self.frechet(x), mmd(x, self.held_out), near)]


def pictures(x: torch.Tensor) -> torch.Tensor:
    """[-1, 1] to [0, 1]."""
    return (x + 1) / 2


# -------------------------------------------------------------------------------------------------------------------- our recipe


def recipe_for(minutes: float) -> dict:
    """More minutes go into more networks: more passes, or a wider network, would learn so few digits by heart."""
    return RECIPE if minutes < 4 else RECIPE | LONGER


def model(recipe: dict) -> tuple[Hot, Denoiser]:
    """The family and the untrained denoiser, for data of standard deviation 1."""
    if recipe.get("schedule") == "cosine":  # for the search
        schedule = Schedule.cosine(recipe["T"])
    else:
        schedule = Schedule.lognormal(recipe["T"], recipe["mean"], recipe["std"], recipe["low"], recipe["high"])
    net = UNet(1, recipe["width"], recipe["mults"], blocks=recipe["blocks"], attention=recipe["attention"], dropout=recipe["dropout"])
    return Hot(schedule), Denoiser(net.to(memory_format=torch.channels_last), schedule, EDM(1.0))


class Mean(torch.nn.Module):
    """The mean of the guesses of some denoisers."""

    def __init__(self, denoisers: Sequence[torch.nn.Module]):
        super().__init__()
        self.denoisers = torch.nn.ModuleList(denoisers)

    def forward(self, xt, t):
        return Dirac(torch.stack([denoiser(xt, t).mean for denoiser in self.denoisers]).mean(0))


def train(x: torch.Tensor, recipe: dict, steps: int, seed: int, look=None) -> tuple[Hot, torch.nn.Module, float]:
    """The family, the denoiser and the seconds of training. `steps` are shared by `recipe["nets"]` networks. `look` as `fit` takes it."""
    n = recipe["nets"]
    families, averages, seconds = zip(*(train_one(x, recipe, steps // n, seed + 1000 * k, look) for k in range(n)))
    return families[0], Mean(averages), sum(seconds)


def train_one(x: torch.Tensor, recipe: dict, steps: int, seed: int, look) -> tuple[Hot, torch.nn.Module, float]:
    """The family, one averaged denoiser and the seconds of its training."""
    torch.manual_seed(seed)
    F, denoiser = model(recipe)
    objective, generator = Loss(F, denoiser), torch.Generator().manual_seed(seed)
    decay = 1 - 1 / (recipe["average"] * steps + 1)  # of a moving average over that share of the steps

    def loss(x0):
        return objective(x0, objective.draw(x0, generator))

    began = time.perf_counter()
    average, _ = fit(denoiser, loss, x, steps, batch=recipe["batch"], lr=recipe["lr"], decay=decay, generator=generator, progress=False, look=look)
    return F, average, time.perf_counter() - began


def centred(train: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The images less their mean image and divided by one standard deviation; the two."""
    mean = train.mean(0, keepdim=True)
    std = (train - mean).std().item()
    return (train - mean) / std, mean, std


@torch.no_grad()
def draw(F: Hot, denoiser, recipe: dict, mean: torch.Tensor, std: float, seed: int, count: int = COUNT) -> torch.Tensor:
    """New digits in [0, 1], by stochastic DPM-Solver++(2M)."""
    generator, solver = torch.Generator().manual_seed(seed), DPMSolver2M(denoiser, F)
    spacing = uniform if recipe.get("schedule") == "cosine" else karras(recipe["rho"])
    xT, times = F.prior(torch.empty(count, *mean.shape[1:]), generator=generator), F.schedule.times(recipe["steps"], spacing)
    kernel = ddpm if recipe["kernel"] == "ddpm" else ddim()
    parts = xT.tensor_split(math.ceil(count / 120))  # small parts stay in the processor's cache
    x = torch.cat([sample(F, solver, part, times, kernel, generator=generator) for part in parts])
    return pictures(std * x + mean).clamp(0, 1)


def step_time(x: torch.Tensor, recipe: dict) -> float:
    """Seconds of a training step, the median of some after some more."""
    marks = []
    train_one(x, recipe, 100, 0, lambda n, average: marks.append(time.perf_counter()))
    return float(np.median(np.diff(marks[20:])))


def plan(x: torch.Tensor, minutes: float) -> int:
    """The number of steps: a little less than fits, since timings wander, and not more than the passes over the data that are good for each network."""
    recipe = recipe_for(minutes)
    each, most = step_time(x, recipe), int(recipe["nets"] * recipe["passes"] * len(x) / recipe["batch"])
    fits = int(0.9 * 60 * minutes / each)
    say(f"{minutes:g} minutes: a step takes {1000 * each:.1f} ms, {fits} fit, {most} are the most")
    whole = 10 * recipe["nets"]
    return max(whole, min(fits, most) // whole * whole)


# ------------------------------------------------------------------------------------------------------------------------ the rows


def plain_rows(who: str, data, judge: Judge, seed: int) -> list[dict]:
    """What needs no network: training digits, and a mixture fitted to them."""
    x = pictures(data.train).flatten(1)
    generator, began = torch.Generator().manual_seed(seed), time.perf_counter()
    if who == "mixture":
        from sklearn.mixture import GaussianMixture

        mixture = GaussianMixture(40, random_state=seed).fit(x.double().numpy())
        seconds = time.perf_counter() - began
        drawn = [torch.from_numpy(mixture.sample(COUNT)[0]) for _ in range(DRAWS)]
        return [dict(who=name, seed=seed, seconds=round(seconds, 1), figures=[judge(d.clamp(*ends)) for d in drawn])
                for name, ends in (("mixture", (0, 1)), ("unclipped", (-math.inf, math.inf)))]
    chosen = [x[torch.randperm(len(x), generator=generator)[:COUNT]] for _ in range(DRAWS)]
    if who == "jitter":
        chosen = [(c + 0.02 * torch.randn(c.shape, generator=generator)).clamp(0, 1) for c in chosen]
    return [dict(who=who, seed=seed, figures=[judge(c) for c in chosen])]


def our_row(data, judge: Judge, minutes: float, seed: int, steps: int) -> dict:
    (x, mean, std), recipe = centred(data.train), recipe_for(minutes)
    F, average, seconds = train(x, recipe, steps, seed)
    began = time.perf_counter()
    drawn = [draw(F, average, recipe, mean, std, 1000 * seed + k) for k in range(DRAWS)]
    took = (time.perf_counter() - began) / DRAWS
    return dict(who="ours", minutes=minutes, seed=seed, steps=steps, seconds=round(seconds, 1), images=round(steps * recipe["batch"] / seconds),
                drawing=round(took, 2), figures=[judge(d) for d in drawn])


def peer_rows(python: str, data, judge: Judge, minutes: list[float], seed: int) -> tuple[list[dict], dict]:
    """The other library, trained once, looked at after each of the times."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/train.npy", pictures(data.train).numpy())
        command = [python, str(HERE / "rival.py"), f"{folder}/train.npy", folder, "--seed", str(seed), "--count", str(COUNT),
                   "--draws", str(DRAWS), "--threads", str(THREADS), "--seconds", *(str(60 * m) for m in minutes)]
        environment = {k: v for k, v in os.environ.items() if python == sys.executable or k != "PYTHONPATH"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{python} could not train denoising-diffusion-pytorch; the reason is above. The rows made so far are kept")
        found = json.loads(done.stdout.splitlines()[-1])
        rows = []
        for k, (m, stage) in enumerate(zip(minutes, found["stages"])):
            drawn = [torch.from_numpy(np.load(f"{folder}/{k}-{i}.npy")).clamp(0, 1) for i in range(DRAWS)]
            rows.append(dict(who="peer", minutes=m, seed=seed, steps=stage["steps"], seconds=round(stage["seconds"], 1),
                             images=round(stage["images"]), drawing=round(stage["drawing"], 2), figures=[judge(d) for d in drawn]))
    return rows, {key: found[key] for key in ("parameters", "settings", "versions")}


# ---------------------------------------------------------------------------------------------------------------------- the report


def mean_row(rows: list[dict]) -> dict:
    """The mean of rows that differ in the seed, and the standard error of that mean over seeds."""
    each = np.array([np.mean(r["figures"], 0) for r in rows])
    out = dict(mean=each.mean(0).tolist(), error=(each.std(0, ddof=1) / len(each) ** 0.5).tolist() if len(each) > 1 else [math.nan] * 4)
    return out | {key: float(np.mean([r[key] for r in rows])) for key in ("steps", "seconds", "images", "drawing") if key in rows[0]}


def summary(report: dict) -> dict[tuple, dict]:
    """`(who, minutes)` to means; minutes is None where nothing is trained."""
    groups = {}
    for row in report["rows"]:
        groups.setdefault((row["who"], row.get("minutes")), []).append(row)
    order = list(NAMES)
    return {key: mean_row(groups[key]) for key in sorted(groups, key=lambda k: (order.index(k[0]), k[1] or 0))}


def bars(report: dict) -> list[tuple[str, bool]]:
    """Each condition in words, and whether it holds."""
    means, out = summary(report), []
    if ("mixture", None) not in means:
        return out
    bar = means["mixture", None]["mean"]
    for (who, minutes), row in means.items():
        if who != "ours":
            continue
        certainty, frechet, kernel, near = row["mean"]
        out += [(f"{minutes:g} minutes: certainty {certainty:.3f} >= 0.90", certainty >= 0.9),
                (f"{minutes:g} minutes: Fréchet {frechet:.4f} < {bar[1]:.4f}, the mixture's", frechet < bar[1]),
                (f"{minutes:g} minutes: MMD² {1e4 * kernel:.1f}e-4 < {1e4 * bar[2]:.1f}e-4, the mixture's", kernel < bar[2]),
                (f"{minutes:g} minutes: nearest {near:.3f} >= 0.9", near >= 0.9),
                (f"{minutes:g} minutes: {row['seconds']:.0f} seconds of training", row["seconds"] <= 60 * minutes)]
    return out + later(report)


def later(report: dict) -> list[tuple[str, bool]]:
    """Is any of our figures worse after more minutes, by more than two standard errors of the difference, paired by seeds?"""
    found = {(r["minutes"], r["seed"]): np.mean(r["figures"], 0) for r in report["rows"] if r["who"] == "ours"}
    minutes, out = sorted({m for m, _ in found}), []
    if len(minutes) < 2:
        return out
    first, last = minutes[0], minutes[-1]
    seeds = [seed for m, seed in found if m == last and (first, seed) in found]
    if len(seeds) < 2:
        return out
    for name, good, *d in zip(FIGURES, (1, -1, -1, 1), *(found[last, seed] - found[first, seed] for seed in seeds)):
        mean, error = np.mean(d), np.std(d, ddof=1) / len(d) ** 0.5
        out.append((f"{last:g} minutes after {first:g}: {name} {mean:+.2g} ± {error:.1g}", bool(good * mean >= -2 * error)))
    return out


def text(report: dict) -> str:
    """The terminal's table and the verdict."""
    lines = [["", "training", "certainty", "Fréchet", "MMD² x 1e4", "nearest", "steps", "images/s"]]
    for (who, minutes), row in summary(report).items():
        numbers = [f"{v * f:.{n}f}{f' ±{e * f:.{n}f}' if e == e else ''}" for v, e, f, n in zip(row["mean"], row["error"], (1, 1, 1e4, 1), (3, 4, 1, 3))]
        lines.append([NAMES[who], f"{minutes:g} min" if minutes else "-", *numbers, *(f"{row[k]:.0f}" if k in row else "-" for k in ("steps", "images"))])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = [f"{report['date']}, {report['processor']}, {report['threads']} threads, torch {report['torch'].split('+')[0]}, Python {report['python']}", ""]
    out += ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))) for line in lines]
    out += ["", *(f"{'met   ' if ok else 'MISSED'}  {what}" for what, ok in bars(report))]
    return "\n".join(out)


def store(report: dict, path: Path):
    replace(path, lambda part: part.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"))


def measure(args, report: dict):
    """Makes the rows that the report lacks."""
    from rival import SETTINGS

    data, only = digits(), args.only
    settings = dict(recipe=RECIPE, longer=LONGER, rival=json.loads(json.dumps(SETTINGS)), count=COUNT, draws=DRAWS, threads=THREADS, steps=args.steps,
                    torch=torch.__version__, processor=processor())
    if args.fresh or report.get("settings") != settings:
        report.update(rows=[], planned={}, settings=settings)
    report.update(date=datetime.date.today().isoformat(), processor=processor(), python=platform.python_version(), torch=torch.__version__, threads=THREADS)
    torch.set_num_threads(THREADS)
    judge = Judge(pictures(data.train), data.train_labels, pictures(data.held_out), data.held_out_labels)
    report["judge"] = dict(accuracy=round(judge.accuracy, 4), nearest=round(judge.near, 4), certainty=round(
        float(judge.svc.predict_proba(16 * judge.held_out.numpy()).max(1).mean()), 4), train=len(data.train), held_out=len(data.held_out))

    if "peer" in only and subprocess.run([args.peer, "-c", HAS_PEER]).returncode:
        raise SystemExit(f"{args.peer} has no denoising-diffusion-pytorch. `--peer PYTHON` names an interpreter that has it, the extra `quality` of "
                         "this project brings it, `--only floor jitter mixture ours` leaves it out")

    def lacks(who, seed, minutes=None):
        return who in only and not any((r["who"], r["seed"], r.get("minutes")) == (who, seed, minutes) for r in report["rows"])

    def add(rows):
        report["rows"] += rows
        store(report, args.json)
        for row in rows:
            f = np.mean(row["figures"], 0)
            say(f"  {NAMES[row['who']]}, seed {row['seed']}{', %g min' % row['minutes'] if 'minutes' in row else ''}: certainty {f[0]:.3f}, Fréchet {f[1]:.4f}, "
                f"MMD² {1e4 * f[2]:.1f}e-4, nearest {f[3]:.3f}" + (f"; {row['steps']} steps in {row['seconds']:.0f} s" if "steps" in row else ""))

    for seed in args.seeds:
        for who in ("floor", "jitter", "mixture"):
            if lacks(who, seed):
                add(plain_rows(who, data, judge, seed))
    report["parameters"] = sum(p.numel() for p in model(RECIPE)[1].parameters())
    for seed in args.seeds:
        for m in args.minutes:
            if lacks("ours", seed, m):
                steps = args.steps.get(f"{m:g}") or report["planned"].get(f"{m:g}")
                if not steps:
                    steps = report["planned"][f"{m:g}"] = plan(centred(data.train)[0], m)
                add([our_row(data, judge, m, seed, steps)])
        late = [m for m in args.minutes if lacks("peer", seed, m)]
        if late:
            rows, about = peer_rows(args.peer, data, judge, late, seed)
            report["peer"] = about
            add(rows)
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, nargs="+", default=[2.0, 5.0])
    parser.add_argument("--only", nargs="+", default=["floor", "jitter", "mixture", "peer", "ours"], choices=["floor", "jitter", "mixture", "peer", "ours"])
    parser.add_argument("--steps", nargs="+", default=[], metavar="MINUTES=STEPS", help="steps of ours instead of the timing")
    parser.add_argument("--peer", default=sys.executable, metavar="PYTHON", help="an interpreter that has denoising-diffusion-pytorch")
    parser.add_argument("--json", type=Path, default=REPORT, metavar="FILE", help="the report")
    parser.add_argument("--fresh", action="store_true", help="make all rows again")
    parser.add_argument("--search", nargs="*", metavar="NAME", help="search for the recipe instead, or make these entries of the search")
    parser.add_argument("--show", action="store_true", help="print the stored report, measure nothing")
    args = parser.parse_args()
    args.steps = {m: int(n) for m, n in (s.split("=") for s in args.steps)}
    report = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
    if args.search is not None:
        from quality_search import search

        return search(args.search, report, args.json)
    if not args.show:
        measure(args, report)
    print(text(report))
    sys.exit(not all(ok for _, ok in bars(report)))


if __name__ == "__main__":
    main()

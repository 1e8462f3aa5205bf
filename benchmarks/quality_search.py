"""The search for the recipe of quality.py: which choice bought what, on digits that are neither trained on nor held out.

    quality.py --search                 all entries that the report lacks; about 25 minutes on a core
    quality.py --search NAME ...        these, again

Two processes with OMP_NUM_THREADS=1 and entries of their own are faster than one with two threads.

250 of the 1,078 training digits are set apart for choosing, 828 are trained on. Numbers of steps are fixed, so that the speed of a machine
has no part in it. One seed each: differences of less than about 0.01 in certainty, 0.006 in Fréchet, 2e-4 in MMD² and 0.02 in
nearest are chance.
"""
import json
import time

import numpy as np
import torch

from quality import COUNT, LONGER, RECIPE, Judge, centred, draw, model, pictures, say, store, train
from udm_book.data import digits

APART = 250
ENTRIES = {}  # name: title, changes of the recipe, steps, samplers tried on the trained network


def entry(name, title, steps=1030, samplers=None, **changes):
    ENTRIES[name] = dict(title=title, steps=steps, samplers=samplers or {}, changes=changes)


# On these digits 1,030 steps are as many passes as the recipe makes on all training digits.
SAMPLERS = {"10 steps": dict(steps=10), "60 steps": dict(steps=60), "no fresh noise": dict(kernel="ddim"), "steps even in (σ/α)^(1/7)": dict(rho=7.0)}
entry("recipe", "the recipe of two minutes", samplers=SAMPLERS)
entry("longer", "the recipe of five minutes: three networks", 3090, **LONGER)
entry("long", "the recipe of two minutes, trained on", 3100)
entry("dropout", "the same with dropout 0.2", 3100, dropout=0.2)
entry("dropout 0.1", "dropout 0.1", dropout=0.1)
entry("slow", "learning rate 0.001", lr=1e-3)
entry("cosine", "cosine schedule, even times", schedule="cosine")
entry("spread", "times spread wider: mean -0.4, standard deviation 1.2", mean=-0.4, std=1.2)
entry("small batches", "batches of 64, twice the steps", 2060, batch=64)
entry("wide", "width 48", width=48)
entry("wide, dropout", "width 48, dropout 0.2", 1260, width=48, dropout=0.2)
entry("narrow", "width 24", width=24)
entry("no attention", "no attention", attention=[])


def choose_on():
    """Images to train on and their judge, both without the held-out digits."""
    data = digits()
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(1))
    apart, rest = order[:APART], order[APART:]
    x, labels = data.train, data.train_labels
    return x[rest], Judge(pictures(x[rest]), labels[rest], pictures(x[apart]), labels[apart])


def search(names: list[str], report: dict, path):
    """Makes the entries and stores each in the report as soon as it is there."""
    found, (images, judge) = report.setdefault("search", {}), choose_on()
    if not names or "references" not in found:
        references(found, images, judge)
        store(report, path)
    for name in names or [n for n in ENTRIES if n not in found.get("entries", {})]:
        one = ENTRIES[name]
        recipe, steps = RECIPE | one["changes"], one["steps"]
        x, mean, std = centred(images)
        looks = {}

        def look(n, average):
            if recipe["nets"] == 1 and n in {steps // 8, steps // 4, steps // 2, 3 * steps // 4}:
                looks[str(n)] = judge(draw(model(recipe)[0], average, recipe, mean, std, 0))
                say(f"{name}, {n} of {steps} steps: " + " ".join(f"{v:.4g}" for v in looks[str(n)]))

        began = time.process_time()
        F, average, _ = train(x, recipe, steps, 0, look)
        looks[str(steps)] = judge(draw(F, average, recipe, mean, std, 0))
        say(f"{name}, {steps} steps: " + " ".join(f"{v:.4g}" for v in looks[str(steps)]))
        tried = {title: judge(draw(F, average, recipe | changes, mean, std, 0)) for title, changes in one["samplers"].items()}
        for title, figures in tried.items():
            say(f"{name}, {title}: " + " ".join(f"{v:.4g}" for v in figures))
        parameters = sum(p.numel() for p in average.parameters())
        row = dict(title=one["title"], changes=one["changes"], steps=steps, parameters=parameters, looks=looks, samplers=tried,
                   processor_seconds=round(time.process_time() - began))
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else report      # another entry may have come in
        report.setdefault("search", found).setdefault("entries", {})[name] = row
        store(report, path)


def references(found: dict, images: torch.Tensor, judge: Judge):
    """What the figures are compared with on this split."""
    from sklearn.mixture import GaussianMixture

    x = pictures(images).flatten(1).double()
    chosen = [x[torch.randperm(len(x), generator=torch.Generator().manual_seed(k))[:COUNT]] for k in range(3)]
    drawn = [torch.from_numpy(GaussianMixture(40, random_state=k).fit(x.numpy()).sample(COUNT)[0]) for k in range(3)]
    sets = {"floor": chosen, "mixture": [d.clamp(0, 1) for d in drawn], "unclipped": drawn}
    found["references"] = {name: np.mean([judge(s) for s in several], 0).round(6).tolist() for name, several in sets.items()}
    found["split"] = dict(train=len(images), apart=APART, seed=1)

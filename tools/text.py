#!/usr/bin/env python3
"""Train a mask and an edit model on a file of lines, print what they reach, and store a report for the chapter on text.

The report holds figures and generated texts, no line of the file.
"""
import argparse
import json
import math
import time
from pathlib import Path

import torch

from udm_book.elbo import elbo
from udm_book.lines import load_lines
from udm_book.objective import Loss
from udm_book.text import Grams, Sharper, bits_per_character, longest_copy, root_times, token_model, ways, write
from udm_book.train import fit

REPORT = Path(__file__).resolve().parent.parent / "nbs" / "assets" / "text.json"
SHARES = {"mask": 0.6, "edit": 0.4}  # of the time


def train(way, lines, seconds, passes, batch, lr, generator, say, name, **network):
    """A trained model and its number of steps: as many as fit into the time and into `passes` over the lines."""
    x = lines.train
    model = token_model(x, len(lines.vocab), **network)
    objective = Loss(way.F, model, way.loss, times=root_times)

    def loss(x0):
        return objective(x0, objective.draw(x0, generator)) / x.shape[1]

    start = time.perf_counter()
    for _ in range(4):
        loss(x[:batch]).mean().backward()
    each = 1.1 * (time.perf_counter() - start) / 4  # the optimizer takes its part
    steps = max(1, min(int(seconds / each), math.ceil(passes * len(x) / batch)))
    say(f"{name}: {steps} steps of {batch} lines")
    return fit(model, loss, x, steps, batch=batch, lr=lr, generator=generator)[0], steps


def study(lines, name, minutes=30.0, *, width=128, depth=3, dropout=0.1, batch=32, lr=3e-3, passes=60.0, draws=2,
          texts=20, row=None, seed=0, say=print):
    """Train a mask and an edit model on `lines`; report their bits per character and texts that they write.

    Three fifths of the time go to the mask model; none sees the lines more than `passes` times. Texts that are a
    line, at any step, are dropped and counted. `row` is kept for whoever shows the texts.
    ValueError for a time that is not positive and for fewer than two lines to train on or held out.
    """
    x, held, vocab, l = lines.train, lines.held_out, len(lines.vocab), lines.train.shape[1]
    if not minutes > 0:
        raise ValueError(f"expected minutes above 0; got {minutes}")
    if len(held) < 2:
        raise ValueError(f"expected at least two lines held out; got {len(held)}")
    generator, grams = torch.Generator().manual_seed(seed), Grams.tuned(x, vocab)
    own, known, batch = {tuple(r) for r in torch.cat([x, held]).tolist()}, lines.decode(x), min(batch, len(x))

    def tell(what, nats):
        bits = bits_per_character(nats, l)
        found = dict(bits=round(bits.mean().item(), 4), error=round((bits.var() / len(bits)).sqrt().item(), 4))
        say(f"{what}: {found['bits']:.3f} ± {found['error']:.3f} bits per character on {len(held)} held-out lines")
        return found

    def copied(texts):
        return round(sum(longest_copy(texts, known)) / max(1, len(texts)), 2)

    report = dict(name=name, row=row, train=len(x), held_out=len(held), length=l, tokens=vocab, repeated=lines.repeated,
                  unknown=round((held == 0).double().mean().item(), 5), copied=copied(lines.decode(held[:200])),
                  unigram=tell("unigram", grams.unigram(held)), bigram=tell("bigram", grams.bigram(held)))
    for kind, way in ways(vocab, l).items():
        model, steps = train(way, lines, 60 * minutes * SHARES[kind], passes, batch, lr, generator, say, kind,
                             width=width, depth=depth, dropout=dropout)
        bounds = [elbo(way.F, model, held, kernel=way.kernel, chunk=64, generator=generator, progress=True).total
                  for _ in range(draws)]
        found = dict(tell(kind, sum(bounds) / draws), steps=steps, passes=round(steps * batch / len(x), 1), written={}, dropped=0)
        for temperature in (1.0, 0.7):
            states = write(way.F, Sharper(model, temperature), texts, l, way.kernel, generator)
            keep = [i for i in range(texts) if not own & {tuple(r) for r in states[:, i].tolist()}]
            new, frames = lines.decode(states[-1, keep]), [lines.decode(states[:, i]) for i in keep[:1]]
            found["written"][str(temperature)] = dict(texts=new, copied=copied(new), frames=frames)
            found["dropped"] += texts - len(keep)
        report[kind] = found
    return report


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a UTF-8 file of lines of one length")
    parser.add_argument("--minutes", type=float, default=30, help="training time of both models together")
    parser.add_argument("--row", type=int, help="characters in a line of the shown texts")
    parser.add_argument("--min-count", type=int, default=3, help="rarer characters are unknown tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=REPORT)
    return parser.parse_args()


def shown(text, row):
    """The text in indented lines of `row` characters."""
    row = row or len(text)
    return "\n".join("    " + text[i:i + row] for i in range(0, len(text), row))


def main():
    """Do what the command line asks."""
    args = arguments()
    start = time.time()
    torch.manual_seed(args.seed)
    lines = load_lines(args.file, min_count=args.min_count, seed=args.seed)

    def say(text):
        print(f"[{(time.time() - start) / 60:5.1f} min] {text}", flush=True)

    n, tokens = len(lines.train), len(lines.vocab)
    say(f"{n} lines to train on, {len(lines.held_out)} held out ({lines.repeated} of them are training lines too), {tokens} tokens")
    report = study(lines, args.file.stem, args.minutes, row=args.row, seed=args.seed, say=say)
    for kind in ("mask", "edit"):
        for temperature, found in report[kind]["written"].items():
            print(f"\n{kind}, temperature {temperature}:")
            print("\n\n".join(shown(text, args.row) for text in found["texts"][:3]))
        print(f"\n{kind}, step by step:")
        print("\n".join(f"{k:5} {frame}" for k, frame in enumerate(found["frames"][0] if found["frames"] else [])))
    args.report.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    say(f"report stored in {args.report}: `make book` shows it in the chapter on text")


if __name__ == "__main__":
    main()

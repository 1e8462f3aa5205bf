#!/usr/bin/env python3
"""Train a mask and an edit model on a file of lines, print what they reach, and store a report for the chapter on text.

The report holds figures and generated texts, no line of the file.
"""
import argparse
import json
import time
from pathlib import Path

import torch

from udm_book.data import load_lines
from udm_book.text import study

REPORT = Path(__file__).resolve().parent.parent / "nbs" / "assets" / "text.json"


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

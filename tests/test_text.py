"""Text: counted laws against loops, times by their chances, writing step by step, and the study as users run it."""
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import close, refuses, rng

from udm_book import finite
from udm_book.edit import EditDifferent, restore
from udm_book.lines import Lines
from udm_book.mask import AtRate, Exactly, Mask, Reveal, bound_loss, randomly
from udm_book.objective import Loss, nll
from udm_book.posterior import LazyCategorical
from udm_book.text import Grams, Sharper, bits_per_character, longest_copy, root_times, token_model, unfold, ways, write

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("text_tool", ROOT / "tools" / "text.py")
TOOL = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TOOL)
study = TOOL.study
G = rng(device="cpu")


def take(draws, rows): return draws[rows] if isinstance(draws, torch.Tensor) else tuple(take(d, rows) for d in draws)
def tokens(n, l, vocab, seed=0): return torch.randint(0, vocab, (n, l), generator=rng(seed, "cpu"))


def test_bits_per_character():
    "V^l equally likely sentences: log2 V bits."
    close(bits_per_character(torch.tensor([5 * math.log(8), 0.0], dtype=torch.float64), 5), [3, 0])


# ---------------------------------------------------------------------------------------------------------- counted laws


def counted(x, vocab, extra, cut):
    "Both laws by loops: chances p(v) and p(v | w), w = vocab for the start of a sentence."
    rows = x.tolist()
    n = Counter(v for row in rows for v in row)
    pairs = Counter((w, v) for row in rows for w, v in zip([vocab, *row], row))
    def p(v): return (n[v] + extra) / (sum(n.values()) + extra * vocab)
    def ends(v): return (sum(b == v for _, b in pairs) + extra) / (len(pairs) + extra * vocab)
    def after(w, v):
        seen = {b: c for (a, b), c in pairs.items() if a == w}
        if not seen: return ends(v)
        return (max(seen.get(v, 0) - cut, 0) + cut * len(seen) * ends(v)) / sum(seen.values())
    return p, after


@pytest.mark.parametrize("extra, cut", [(1.0, 0.75), (0.3, 0.4)])
def test_counted_laws_are_their_formulas(extra, cut):
    x, vocab = tokens(6, 4, 5), 7                                       # tokens 5 and 6 are never seen
    p, after = counted(x, vocab, extra, cut)
    grams, new = Grams(x, vocab, extra, cut), torch.cat([tokens(40, 3, vocab, 1), torch.full((1, 3), 6), x[:, :3]])
    close(grams.unigram(new), [-sum(math.log(p(v)) for v in row) for row in new.tolist()], 30)
    close(grams.bigram(new), [-sum(math.log(after(w, v)) for w, v in zip([vocab, *row], row)) for row in new.tolist()], 30)
    assert all(abs(sum(after(w, v) for v in range(vocab)) - 1) < 1e-12 for w in range(vocab + 1))
    assert Grams(x, vocab).extra == 1 and Grams(x, vocab).cut == 0.75
    assert grams.unigram(new).dtype == grams.bigram(new).dtype == torch.float64


def test_constants_suit_the_last_tenth_and_counts_hold_all():
    law = finite.repeating(5, 6)
    states, chances = torch.tensor(list(law)), torch.tensor([float(p) for p in law.values()])
    x = states[torch.multinomial(chances, 205, True, generator=rng(3, "cpu"))]
    grams = Grams.tuned(x, 5)
    def cost(form, extra, cut): return getattr(Grams(x[:185], 5, extra, cut), form)(x[185:]).sum().item()
    extras, cuts = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0), (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
    assert grams.extra == min(extras, key=lambda e: cost("unigram", e, 0.5))
    assert grams.cut == min(cuts, key=lambda c: cost("bigram", grams.extra, c))
    assert torch.equal(grams.bigram(x), Grams(x, 5, grams.extra, grams.cut).bigram(x))
    assert Grams.tuned(x[:2], 5).single.sum() == pytest.approx(1)
    tried = []
    class Noted(Grams):
        def __init__(self, x, vocab, extra, cut):
            super().__init__(x, vocab, extra, cut)
            tried.append((len(x), vocab, extra, cut))
    Noted.tuned(x, 5)
    assert tried == [*((185, 5, e, 0.5) for e in extras), *((185, 5, grams.extra, c) for c in cuts), (205, 5, grams.extra, grams.cut)]


# -------------------------------------------------------------------------------------------------------- model and times


def test_a_model_starts_with_the_frequencies():
    x = tokens(50, 4, 3)
    torch.manual_seed(0)
    model = token_model(x, 5, width=64, depth=1)
    seen = torch.bincount(x.flatten(), minlength=5) + 1.0
    for xt in tokens(2, 4, 6, 1), torch.full((2, 4), 5):
        close(model(xt, torch.tensor([1, 4])).mean, (seen / seen.sum()).expand(2, 4, 5), 10, dtype=torch.float32)
    assert [layer.look.heads for layer in model.body.layers[:-1]] == [2] and model.body.token.num_embeddings == 6
    assert [layer.look.heads for layer in token_model(x, 5, 8).body.layers[:-1]] == [1, 1]
    assert token_model(x, 5, 62, 1).body.layers[0].look.heads == 1 and token_model(x, 5).body.place.shape == (4, 64)
    def rates(**more): return {m.p for m in token_model(x, 5, 8, **more).modules() if isinstance(m, torch.nn.Dropout)}
    assert rates(dropout=0.3) == {0.3} and rates() == {0}


def test_times_have_chances_like_one_over_root_t_and_weights_undo_them():
    F = Mask(2, Exactly(4))
    p = torch.tensor([1, 2**-0.5, 3**-0.5, 0.5], dtype=torch.float64)
    p = p / p.sum()
    t, weight = root_times(F, 10_000, rng(device="cpu"))
    assert t.dtype == torch.int64 and t.min() == 1 and t.max() == 4 and weight.dtype == torch.float32
    assert (abs(t.bincount(minlength=5)[1:] - 1e4 * p) <= 1).all()              # a comb: evenly, but for one tooth
    close(weight, 1 / (4 * p[t - 1]), 2, dtype=torch.float32)
    draws = torch.stack([root_times(F, 3, G)[0] for _ in range(2000)])
    for row in draws.T:                                                         # each row by itself has the law p
        share = row.bincount(minlength=5)[1:] / 2000
        assert (abs(share - p) < 5 * (p * (1 - p) / 2000).sqrt()).all()
    turned = [sum(a > b for a, b in zip(d, d[1:] + d[:1])) for d in draws.tolist()]     # a comb on a circle: one way down, or all are equal
    assert set(turned) == {0, 1} or set(turned) == {1}
    if torch.cuda.is_available():
        there, weight = root_times(F, 5, rng(device="cuda"))
        assert there.is_cuda and weight.is_cuda
    G40 = Mask(2, Exactly(40))
    assert len({tuple(root_times(G40, 3, rng(7, "cpu"))[0].tolist()) for _ in range(5)}) == 1


def test_what_each_way_minimises():
    both, x = ways(5, 4), tokens(3, 4, 5)
    torch.manual_seed(0)
    model, t = token_model(x, 5, 16, 1), torch.tensor([1, 3, 4])
    torch.nn.init.normal_(model.head.weight)
    F, kernel, loss = both["mask"]
    assert isinstance(F, Mask) and isinstance(kernel, Reveal) and kernel.order is randomly and F.vocab == 5 and F.T == 4
    eps = F.sample_noise(x, generator=rng(1, "cpu"))
    assert torch.equal(loss(F, model, x, t, eps), bound_loss(F, model, x, t, kernel=Reveal(), generator=rng(1, "cpu")))
    assert torch.equal(loss(F, model, x, t, generator=rng(1, "cpu")), loss(F, model, x, t, eps))
    F, kernel, loss = both["edit"]
    assert isinstance(F, EditDifferent) and kernel is restore and F.vocab == 5 and F.T == 4
    eps = F.sample_noise(x, generator=rng(1, "cpu"))
    assert torch.equal(loss(F, model, x, t, eps), nll(F, model, x, t, generator=rng(1, "cpu")))


def test_ways_are_objectives():
    "Times by their chances, noise of the family, losses weighed: the same draws as by hand."
    x = tokens(6, 4, 5)
    torch.manual_seed(0)
    model = token_model(x, 5, 16, 1)
    torch.nn.init.normal_(model.head.weight)
    for F, _, loss in ways(5, 4).values():
        objective = Loss(F, model, loss, times=root_times)
        draws = objective.draw(x, rng(1, "cpu"))
        g = rng(1, "cpu")
        t, weight = root_times(F, 6, g)
        assert torch.equal(objective(x, draws), weight * loss(F, model, x, t, generator=g))
        half = [objective(x[i], tuple(take(d, i) for d in draws)) for i in (slice(3), slice(3, 6))]
        close(torch.cat(half), objective(x, draws), 20, dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------------- writing


def test_writing_keeps_every_state():
    x = tokens(20, 4, 5)
    torch.manual_seed(0)
    model = token_model(x, 5, 16, 1)
    for name, (F, kernel, _) in ways(5, 4).items():
        states = write(F, model, 2000, 4, kernel, rng(2, "cpu"))
        assert states.shape == (5, 2000, 4) and not states.requires_grad and states[-1].max() < 5
        moved = (states[1:] != states[:-1]).sum(2)
        assert (moved == 1).all()                                               # one token a step, for both
        if name == "mask": assert (states[0] == 5).all()
        else:                                                                   # from random tokens, all equally likely
            assert (abs(states[0].flatten().bincount(minlength=5) / 8000 - 0.2) < 5 * math.sqrt(0.16 / 8000)).all()
        assert torch.equal(states, write(F, model, 2000, 4, kernel, rng(2, "cpu")))
    rate = Mask(5, AtRate.even(3))
    assert write(rate, model, 2, 4, Reveal(), G).shape == (4, 2, 4)


def test_a_temperature_divides_logits():
    features = torch.randn(2, 3, 4, generator=rng(1, "cpu"))
    asked = []
    def denoiser(xt, t, label):
        asked.append((xt, t, label))
        return LazyCategorical(features, lambda h: 3 * h)
    xt, t = tokens(2, 3, 4), torch.tensor([1, 2])
    guess = Sharper(denoiser, 0.5)(xt, t, label=7)
    close(guess.logits, 6 * features, 10)
    close(guess.at(torch.ones(2, 3, dtype=torch.bool)).logits, 6 * features.view(6, 4), 10)
    assert asked == [(xt, t, 7)]


class Text(HTMLParser):
    "What a page says: the text of its spans by rows, its scripts, and its attributes."
    def __init__(self, page):
        super().__init__()
        self.rows, self.scripts, self.values, self.stack = [""], [], [], []
        self.feed(page)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.values += [(tag, *a) for a in attrs]
        if tag == "br": self.rows.append("")
        elif tag != "input": self.stack.append(tag)

    def handle_endtag(self, tag): assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "span": self.rows[-1] += data
        if self.stack and self.stack[-1] == "script": self.scripts.append(data)


def test_an_animation_holds_its_frames_and_shows_the_last():
    frames = ["_____", "_</_&", "</s>&"]
    page = Text(unfold(frames, row=3))
    assert page.rows == ["</s", ">&"] and len(page.scripts) == 1 and "</" not in page.scripts[0]
    line = page.scripts[0].split("frames = ")[1].split(", last")[0]
    played, hidden = line.rsplit(", hidden = ", 1)
    assert json.loads(played) == [list(f) for f in frames] and json.loads(hidden) == "_"
    assert ("input", "max", "2") in page.values and ("input", "value", "2") in page.values and "}, 250)" in page.scripts[0]
    assert Text(unfold(["ab"], row=1)).rows == ["a", "b"]
    assert Text(unfold(frames)).rows == ["</s>&"] and "}, 9)" in unfold(frames, pause=9) and 'hidden = "*"' in unfold(frames, hidden="*")
    for word in "NAME", "FRAMES", "HIDDEN", "PAUSE", "http": assert word not in unfold(frames)
    assert Text(unfold(["FRAMES"])).rows == ["FRAMES"] and '["F", "R", "A", "M", "E", "S"]' in unfold(["FRAMES"])


def test_animations_do_not_meet_on_one_page():
    def name(page): return page.split('id="')[1].split('"')[0]
    a, b = unfold(["a_", "ab"]), unfold(["a_", "ac"])
    assert name(a) != name(b) and f'getElementById("{name(a)}")' in a and name(a) == name(unfold(["a_", "ab"]))


def test_wide_characters_get_wide_cells():
    assert "width:1ch" in unfold(["ab"]) and "width:1ch" not in unfold(["a\u6625"]) and "width:1.3em" in unfold(["_", "\uff01"])
    assert "width:1.3em" not in unfold(["\u00e9"])


def test_longest_copy_against_all_pieces():
    source, texts = ["abcab", "cabba", ""], ["abcabba", "zz", "", "bba", "cabz", "abcab"]
    def pieces(s): return {s[i:j] for i in range(len(s)) for j in range(i + 1, len(s) + 1)}
    known = set().union(*map(pieces, source))
    assert longest_copy(texts, source) == [max([len(p) for p in pieces(t) & known], default=0) for t in texts]
    assert longest_copy([], source) == [] and longest_copy(["a"], []) == [0]


# ---------------------------------------------------------------------------------------------------------------- a study


def small(n=40, l=4, vocab=6, seed=0, repeated=3):
    x = 1 + tokens(n, l, vocab - 1, seed)
    return Lines(x[:n // 2], x[n // 2:], ("?", *"abcdefgh"[:vocab - 1]), repeated)


def quick(lines, **more): return study(lines, "small", 1.0, **dict(dict(width=16, depth=1, passes=0.5, draws=1, texts=4, say=lambda text: None), **more))


def test_a_study_reports_figures_and_texts():
    lines, said = small(l=8), []
    torch.manual_seed(0)
    report = quick(lines, row=2, batch=8, passes=1.0, say=said.append)
    assert json.loads(json.dumps(report)) == report
    facts = dict(name="small", row=2, train=20, held_out=20, length=8, tokens=6, repeated=3, unknown=0.0)
    assert {k: report[k] for k in facts} == facts
    own = lines.decode(lines.train)
    assert report["copied"] == round(sum(longest_copy(lines.decode(lines.held_out), own)) / 20, 2)
    grams = Grams.tuned(lines.train, 6)
    for name, nats in ("unigram", grams.unigram(lines.held_out)), ("bigram", grams.bigram(lines.held_out)):
        bits = nats / 8 / math.log(2)
        assert report[name] == dict(bits=round(bits.mean().item(), 4), error=round(bits.std().item() / math.sqrt(20), 4))
    for kind in "mask", "edit":
        found = report[kind]
        assert found["steps"] == 3 and found["passes"] == 1.2 and found["dropped"] == 0         # ceil(1.0 * 20 / 8) steps
        assert abs(found["bits"] - report["unigram"]["bits"]) < 1.5 and 0 < found["error"] < 1  # hardly trained
        for temperature in "1.0", "0.7":
            one = found["written"][temperature]
            assert len(one["texts"]) == 4 and all(len(text) == 8 and "_" not in text for text in one["texts"])
            (frames,) = one["frames"]
            assert len(frames) == 9 and frames[-1] == one["texts"][0] and (kind == "edit" or frames[0] == 8 * "_")
            assert one["copied"] == round(sum(longest_copy(one["texts"], own)) / 4, 2)
    assert [text.split(":")[0] for text in said] == ["unigram", "bigram", "mask", "mask", "edit", "edit"]
    assert said[2] == "mask: 3 steps of 8 lines" and f"mask: {report['mask']['bits']:.3f} ± " in said[3] and "20 held-out lines" in said[3]


def test_no_line_of_the_file_is_reported():
    "Where all sentences are lines, every text is dropped; where most are, what is left is none of them."
    every = torch.cartesian_prod(torch.arange(1, 3), torch.arange(1, 3))
    unknown = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    lines = Lines(unknown[:6], unknown[6:], ("?", "a", "b"), 0)
    report = quick(lines, texts=5)
    for kind in "mask", "edit":
        assert report[kind]["dropped"] == 10
        assert all(found == dict(texts=[], copied=0.0, frames=[]) for found in report[kind]["written"].values())
    lines = Lines(every[:2], every[2:], ("?", "a", "b"), 0)
    report, own = quick(lines, texts=60), set(lines.decode(every))
    for kind in "mask", "edit":
        texts = [text for found in report[kind]["written"].values() for text in found["texts"]]
        assert len(texts) + report[kind]["dropped"] == 120 and report[kind]["dropped"] > 0 and not own & set(texts)
        for found in report[kind]["written"].values(): assert not own & {frame for run in found["frames"] for frame in run}


def test_a_study_takes_the_time_that_it_is_given(monkeypatch):
    "A clock that says each of the timed steps takes a second."
    ticks = iter(range(0, 1000, 4))
    monkeypatch.setattr(TOOL.time, "perf_counter", lambda: float(next(ticks)))
    report = study(small(), "small", 0.25, width=16, depth=1, batch=4, passes=1e9, draws=1, texts=1, say=lambda text: None)
    assert (report["mask"]["steps"], report["edit"]["steps"]) == (8, 5)                    # 9 and 6 seconds, 1.1 for a step
    monkeypatch.undo()
    assert quick(small(), batch=500)["mask"]["steps"] == 1 and quick(small(), batch=500)["mask"]["passes"] == 1.0


def test_a_study_depends_on_the_seed():
    def run(seed):
        torch.manual_seed(0)
        return quick(small(), seed=seed)
    assert run(0) == run(0) != run(1)


@pytest.mark.slow
def test_the_command_trains_prints_and_stores_a_report(tmp_path):
    file, report = tmp_path / "verses.txt", tmp_path / "report.json"
    file.write_text("\n".join(f"{i:08b}" for i in range(200)))
    ran = subprocess.run([sys.executable, ROOT / "tools" / "text.py", file, "--minutes", "0.01", "--row", "4", "--report", report],
                         capture_output=True, text=True, check=True, cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    stored = json.loads(report.read_text())
    assert stored["name"] == "verses" and stored["row"] == 4 and stored["length"] == 8
    assert "bits per character" in ran.stdout and "step by step" in ran.stdout and str(report) in ran.stdout
    without = {k: v for k, v in os.environ.items() if k != "UDM_TEXT"}
    ran = subprocess.run(["make", "text"], capture_output=True, text=True, cwd=ROOT, env=without)
    assert ran.returncode == 2 and "UDM_TEXT" in ran.stdout + ran.stderr


X = tokens(6, 4, 5)
def test_a_pair_that_occurs_once_leaves_a_law():
    "Sentences of two tokens: their chances sum to 1, also where the first token was followed once, or never."
    x = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    chances = Grams(torch.tensor([[0, 1], [1, 1]]), 3).bigram(x).neg().exp()
    close(chances.sum(), 1.0)
    assert (chances > 0).all()


CASES = {
    "no extra count": (ValueError, lambda: Grams(X, 5, extra=0.0), "extra > 0 and 0 < cut < 1", "0.0 and 0.75"),
    "a cut of a whole count": (ValueError, lambda: Grams(X, 5, cut=1.0), "extra > 0 and 0 < cut < 1", "1.0 and 1.0"),
    "no cut": (ValueError, lambda: Grams(X, 5, cut=0.0), "extra > 0 and 0 < cut < 1", "1.0 and 0.0"),
    "one sentence to tune on": (ValueError, lambda: Grams.tuned(X[:1], 5), "at least two sentences", "1"),
    "a temperature of 0": (ValueError, lambda: Sharper(None, 0.0), "temperature above 0", "0.0"),
    "a temperature that is no number": (ValueError, lambda: Sharper(None, math.nan), "temperature above 0", "nan"),
    "frames of two lengths": (ValueError, lambda: unfold(["ab", "a"]), "frames of one length", r"\[1, 2\]"),
    "no frames": (ValueError, lambda: unfold([]), "frames of one length", r"\[\]"),
    "empty frames": (ValueError, lambda: unfold(["", ""]), "frames of one length, at least 1", r"\[0\]"),
    "rows of nothing": (ValueError, lambda: unfold(["ab"], row=0), "rows of at least 1 character", "0"),
}
test_the_message_says_what_was_expected_and_what_came = refuses(CASES)

TOOL_CASES = {
    "no time": (ValueError, lambda: study(small(), "small", 0.0), "minutes above 0", "0.0"),
    "a time that is no number": (ValueError, lambda: study(small(), "small", math.nan), "minutes above 0", "nan"),
    "one line held out": (ValueError, lambda: study(small()._replace(held_out=X[:1]), "small"), "at least two lines held out", "1"),
}
test_the_message_of_the_tool_says_so_too = refuses(TOOL_CASES)

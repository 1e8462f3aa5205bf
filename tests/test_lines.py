"""Lines of text as tokens, against what the file says."""
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import refuses

from udm_book.lines import Lines, load_lines, read_lines


def with_file(content, call, **more):
    """`call` on a file that holds `content`, bytes or text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lines.txt")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return call(path, **more)


def load(content, **more): return with_file(content, load_lines, **more)
def read(content, **more): return with_file(content, read_lines, **more)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_marks_and_empty_lines_do_not_matter(end):
    text = end.join(["春眠", "", "不覺", "曉處", ""])
    assert read(text) == read("\ufeff" + text) == read(text, length=2) == ["春眠", "不覺", "曉處"]


def test_other_separators_and_spaces_are_characters():
    assert read("a\u2028b\n c\x0b\n\x85\u3000.") == ["a\u2028b", " c\x0b", "\x85\u3000."]
    assert read("\n\n  \n") == ["  "]


def test_characters_are_counted_in_composed_form():
    assert read("e\u0301a\n\u00e9b") == ["\u00e9a", "\u00e9b"]
    assert read("\U0002000b\U0001f600\nab") == ["\U0002000b\U0001f600", "ab"]           # one code point each, beyond 16 bits


def test_lines_are_shared_out_by_the_seed_and_come_back():
    texts = [f"{i:03}" for i in range(50)]
    a, b, c = load("\n".join(texts)), load("\n".join(texts)), load("\n".join(texts), seed=1, held_out=20)
    assert len(a.train) == 45 and len(a.held_out) == 5 and (len(c.train), len(c.held_out)) == (30, 20)
    assert torch.equal(a.train, b.train) and a.vocab == b.vocab and a.train.dtype == torch.int64
    for d in a, c: assert sorted(d.decode(d.train) + d.decode(d.held_out)) == texts and d.repeated == 0
    assert set(c.decode(c.held_out)[:5]) != set(a.decode(a.held_out))
    assert a.decode(a.train) != sorted(a.decode(a.train))                                   # shuffled
    assert len(load("\n".join(texts[:19])).held_out) == 1 and len(load("\n".join(texts[:20])).held_out) == 2
    assert len(load("a\nb").held_out) == 1 and len(load("a\nb\nc", held_out=2).train) == 1


def test_the_vocabulary_is_counted_on_training_lines():
    "Every character of a held-out line that no training line has is unknown; the rest are numbered by falling frequency."
    texts = ["ab"] * 6 + ["ac"] * 3 + ["xy", "zw"]
    seen = set()
    for seed in range(20):
        d = load("\n".join(texts), seed=seed, held_out=3)
        train = d.decode(d.train)
        counts = {c: sum(line.count(c) for line in train) for c in set("".join(train))}
        assert d.vocab == (d.vocab[0], *sorted(counts, key=lambda c: (-counts[c], c)))
        new = {c for c in "".join(texts) if c not in counts}
        held = sorted(t for t in texts)
        for t in train: held.remove(t)
        want = ["".join("\u25a1" if c in new else c for c in t) for t in held]
        assert sorted(d.decode(d.held_out)) == sorted(want)
        assert d.repeated == sum(t in train for t in held)
        seen.add(bool(new))
    assert seen == {True, False}


def test_rare_characters_are_unknown():
    texts = "\n".join(["aab", "abc", "aad", "aaa"])
    for least, known in (1, {"a", "b", "c", "d"}), (2, {"a", "b"}), (3, {"a"}):
        d = load(texts + "\naaa", min_count=least, held_out=1, seed=next(
            s for s in range(50) if load(texts + "\naaa", held_out=1, seed=s).decode(load(texts + "\naaa", held_out=1, seed=s).held_out) == ["aaa"]))
        assert set(d.vocab[1:]) == known and d.vocab[0] == "\u25a1"
        assert sorted(d.decode(d.train)) == sorted("".join(c if c in known else "\u25a1" for c in t) for t in ["aab", "abc", "aad", "aaa"])


@pytest.mark.parametrize("taken, unknown", [("", "\u25a1"), ("\u25a1", "\ufffd"), ("\u25a1\ufffd", "\ue000"), ("\u25a1\ufffd\ue000", "\ue001")])
def test_the_unknown_token_is_no_character_of_the_file(taken, unknown):
    for seed in range(12):                                                  # in some only the held-out line has it
        d = load("\n".join([taken.ljust(3, "a"), "bbb", "ccc", "ddd"]), held_out=1, seed=seed)
        assert d.vocab[0] == unknown


def test_decode_shows_masks():
    d = Lines(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long), ("?", "a", "b"), 0)
    assert d.decode(torch.tensor([[1, 3], [0, 2]])) == ["a_", "?b"] and d.decode(torch.tensor([[3]]), hidden="*") == ["*"]
    assert d.decode(torch.zeros(0, 2, dtype=torch.long)) == []


def test_lines_are_split_by_seed_0_unless_told_otherwise():
    text = "\n".join(chr(97 + i) * 2 for i in range(20))
    usual, zero = load(text), load(text, seed=0)
    assert usual.decode(usual.train) == zero.decode(zero.train)


V = ValueError
NONE = Lines(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), ("?", "a"), 0)
CASES = {
    "an empty file": (V, lambda: load(b""), "at least one line of text", "none in .*lines.txt"),
    "only line ends": (V, lambda: load("\n\r\n\ufeff"[:3]), "at least one line of text", "none in"),
    "a ragged line": (V, lambda: load("abc\nabc\n\nab\nabcd"), "lines of 3 characters", "2 in line 4 of .*lines.txt"),
    "a line beyond the asked length": (V, lambda: load("abc\nabc", length=2), "lines of 2 characters", "3 in line 1"),
    "a byte that is no text": (V, lambda: load(b"\xef\xbb\xbfab\r\ncd\rx\xff"), "UTF-8", "byte 0xff at byte 11, line 3, of .*lines.txt"),
    "another encoding": (V, lambda: load("äb\nab".encode("latin-1")), "UTF-8", "byte 0xe4 at byte 0, line 1"),
    "one line": (V, lambda: load("abc"), "hold out between 1 and 0 lines", "1 of 1"),
    "no line to train on": (V, lambda: load("ab\ncd", held_out=2), "hold out between 1 and 1 lines", "2 of 2"),
    "no line held out": (V, lambda: load("ab\ncd", held_out=0), "hold out between 1 and 1 lines", "0 of 2"),
    "a count that no character has": (V, lambda: load("ab\nab\nab", held_out=1, min_count=3), "min_count between 1 and 2", "3"),
    "a count of 0": (V, lambda: load("ab\nab", min_count=0), "min_count between 1 and 1", "0"),
    "a token beyond the mask": (V, lambda: NONE.decode(torch.tensor([[0, 3]])), r"tokens in 0\.\.2", "0 to 3"),
    "a token below 0": (V, lambda: NONE.decode(torch.tensor([[-1, 1]])), r"tokens in 0\.\.2", "-1 to 1"),
}
test_the_message_says_what_was_expected_and_what_came = refuses(CASES)

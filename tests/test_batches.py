"""Batches: every row in its turn, and all that is random as a function of the seed and the step."""
import os
import signal

import pytest
import torch
from conftest import refuses, rng
from torch.utils.data import TensorDataset
from trainers import DATA, ROWS, Shaken

from udm_book.batches import Batches, batches, deaf, flat, seed_of, split, take


def test_a_pass_goes_through_all_rows_once_in_a_new_order():
    x = torch.arange(10)
    source = batches(x, 3, rng(0, "cpu"))
    first, second = ([next(source) for _ in range(3)] for _ in range(2))
    for part in first, second:
        rows = torch.cat(part).tolist()
        assert all(len(b) == 3 for b in part) and len(set(rows)) == 9
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    assert torch.equal(next(batches(x, 3, rng(0, "cpu"))), first[0])
    assert len(next(batches(x, 1))) == 1
    assert {len(b) for b, _ in zip(batches(torch.arange(11), 4), range(5))} == {4}                # a rest of 3 is left out
    whole = torch.cat([b for b, _ in zip(batches(x, 5, rng(0, "cpu")), range(2))])
    assert sorted(whole.tolist()) == x.tolist()


def test_seeds_are_functions_of_their_names_with_32_even_bits():
    keys = [(seed, name, n) for seed in range(5) for name in ("draws", "pass") for n in range(300)]
    seeds = [seed_of(*key) for key in keys]
    assert seeds == [seed_of(*key) for key in keys] and len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**32 for s in seeds)
    for bit in range(32):                                                       # 3,000 coins, within 5 standard errors
        assert abs(sum(s >> bit & 1 for s in seeds) - 1500) < 5 * 3000**0.5 / 2


@pytest.mark.parametrize("size", [1, 3, 8, ROWS, 2 * ROWS + 5])
def test_batches_take_all_rows_pass_after_pass_without_a_gap(size):
    source = Batches(torch.arange(ROWS), size, seed=3)
    n = 4 * ROWS // size + 2
    stream = torch.cat([source[i] for i in range(n)])
    assert len(stream) == n * size
    passes = stream[:len(stream) // ROWS * ROWS].view(-1, ROWS)
    assert (passes.sort(1).values == torch.arange(ROWS)).all() and len({tuple(p.tolist()) for p in passes}) == len(passes)
    for i in reversed(range(n)): assert torch.equal(Batches(torch.arange(ROWS), size, seed=3).rows(i), source[i])
    assert not torch.equal(Batches(torch.arange(ROWS), ROWS, seed=4).rows(0), Batches(torch.arange(ROWS), ROWS, seed=3).rows(0))


@pytest.mark.parametrize("of", [2, 3])
def test_processes_share_a_batch_in_order(of):
    whole = Batches(DATA, 12, seed=1)
    parts = [Batches(DATA, 12, 1, rank, of) for rank in range(of)]
    for n in range(10): assert torch.equal(torch.cat([p.rows(n) for p in parts]), whole.rows(n))


@pytest.mark.parametrize("form", ["plain", "label", "named"])
def test_datasets_are_functions_of_seed_and_step_even_where_they_are_random(form):
    source = Batches(Shaken(form), 8, seed=2)
    once = [split(b) for b in source.run(0, 6)]
    for (x, cond), (again, _), n in zip(once[3:], map(split, source.run(3, 6)), range(3, 6)):
        rows = source.rows(n)
        assert torch.equal(x, again) and ((x - DATA[rows] >= 0) & (x - DATA[rows] < 1)).all()
        assert list(cond) == {"plain": [], "label": ["y"], "named": ["extra", "y"]}[form]
        if cond: assert torch.equal(cond["y"], rows % 3)
    assert len(once) == 6 and not torch.equal(once[0][0], once[1][0])
    other, = map(split, Batches(Shaken(form), 8, 2, 1, 2).run(0, 1))
    assert torch.equal(Batches(Shaken(form), 8, 2, 1, 2).rows(0), source.rows(0)[4:]) and len(other[0]) == 4


@pytest.mark.skipif(os.name != "posix", reason="starts processes")
def test_workers_make_the_same_batches():
    source = Batches(Shaken("label"), 8, seed=2)
    for ours, theirs in zip(source.run(2, 5), source.run(2, 5, workers=2), strict=True):
        for a, b in zip(ours, theirs): assert torch.equal(a, b)


def test_labelled_tensors_are_indexed_by_the_batch():
    source = Batches(TensorDataset(DATA, torch.arange(ROWS)), 8)
    x0, cond = split(source[3])
    assert torch.equal(x0, DATA[cond["y"]]) and torch.equal(cond["y"], source.rows(3))
    assert torch.equal(Batches(DATA, 8)[3], DATA[source.rows(3)])
    assert source.seed == 0 and source.rank == 0 and source.of == 1


def test_items_and_batches_are_split():
    x, y = torch.zeros(2, 1), torch.tensor([1, 0])
    assert split(x) == (x, {}) and split([x, y]) == (x, {"y": y}) and split((x, {"seen": y})) == (x, {"seen": y})
    x0, cond = split((x, 3))
    assert x0 is x and cond["y"].dtype == torch.int64 and cond["y"].shape == () and cond["y"] == 3


def test_draws_are_taken_apart_by_rows():
    a, b, c = torch.arange(6), torch.arange(6, 12), torch.arange(24).view(6, 4)
    assert flat((a, (b, (c,)))) == [a, b, c] and flat(a) == [a]
    part = take((a, (b, (c,))), slice(2, 4))
    assert torch.equal(part[0], a[2:4]) and torch.equal(part[1][0], b[2:4]) and torch.equal(part[1][1][0], c[2:4])


def test_workers_do_not_hear_ctrl_c():
    before = signal.getsignal(signal.SIGINT)
    deaf(0)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    signal.signal(signal.SIGINT, before)


V_, T_ = ValueError, TypeError
CASES = {
    "an empty batch": (V_, lambda: next(batches(DATA, 0)), f"a batch size between 1 and {ROWS}", "0"),
    "a batch beyond the data": (V_, lambda: next(batches(DATA, ROWS + 1)), f"a batch size between 1 and {ROWS}", str(ROWS + 1)),
    "data without a row": (V_, lambda: Batches(DATA[:0], 2), "at least one row of data", "none"),
    "a batch of nothing": (V_, lambda: Batches(DATA, 0), "a batch that 1 processes share evenly", "0"),
    "a batch that cannot be shared": (V_, lambda: Batches(DATA, 9, of=2), "a batch that 2 processes share evenly", "9"),
    "three parts": (T_, lambda: split((DATA, DATA, DATA)), r"x0, \(x0, y\) or \(x0, {name: tensor}\)", "tuple of Tensor, Tensor, Tensor"),
    "a dictionary alone": (T_, lambda: split({"x": DATA}), r"x0, \(x0, y\) or", "dict of str"),
    "labels that are words": (T_, lambda: split([DATA, "abc"]), r"x0, \(x0, y\) or", "list of Tensor, str"),
}
test_the_message_says_what_was_expected_and_what_came = refuses(CASES)

"""Digits, checks of data, and the two distances, against slow loops and known values."""
import math

import pytest
import torch
from conftest import close, normal

from udm_book.data import check_data, digits, energy_distance, nearest_distance


def test_digits_are_images_in_the_known_range_split_without_overlap():
    d = digits()
    assert d.train.shape == (1078, 1, 8, 8) and d.held_out.shape == (719, 1, 8, 8)
    assert d.train.dtype == torch.float32 and d.train.min() == -1 and d.train.max() == 1
    from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    both, names = torch.cat([d.train, d.held_out]), torch.cat([d.train_labels, d.held_out_labels])
    rows = {(*x, y) for x, y in zip(((both.flatten(1) + 1) * 8).int().tolist(), names.tolist()) for x in [tuple(x)]}
    assert rows == {(*x, y) for x, y in zip(images.astype(int).tolist(), labels.tolist()) for x in [tuple(x)]}


def test_the_split_depends_on_the_seed_alone():
    a, b, c = digits(100), digits(100), digits(100, seed=1)
    assert torch.equal(digits().held_out, digits(719, seed=0).held_out)
    assert torch.equal(a.held_out, b.held_out) and torch.equal(a.train_labels, b.train_labels)
    assert not torch.equal(a.held_out, c.held_out) and len(a.held_out) == 100 and len(digits(1).held_out) == 1


def test_sound_data_pass_unchanged():
    x = torch.rand(3, 2)
    assert check_data(x) is x and check_data(5 * x, 0.0, 5.0).max() <= 5


def test_energy_distance_is_the_mean_over_pairs():
    a, b = normal(7, 2, device="cpu"), normal(5, 2, seed=1, device="cpu")
    between = sum(math.dist(x, y) for x in a.tolist() for y in b.tolist()) / 35
    def within(x): return sum(math.dist(p, q) for p in x.tolist() for q in x.tolist()) / len(x) / (len(x) - 1)
    assert energy_distance(a, b) == pytest.approx(2 * between - within(a) - within(b), abs=1e-6)
    assert energy_distance(a[:2], b[:2]) != 0
    assert energy_distance(a.float(), b.float()) == energy_distance(a.float().double(), b.float().double())
    assert energy_distance(a.view(7, 1, 2, 1), b.view(5, 1, 2, 1)) == pytest.approx(energy_distance(a, b), abs=1e-12)


def test_energy_distance_is_zero_on_average_for_equal_laws_and_only_then():
    "100 pairs of small sets: the mean over them within 5 standard errors of 0; shifted by 1, far above."
    def some(seed): return normal(10, 2, seed=seed, device="cpu")
    def values(shift): return torch.tensor([energy_distance(some(k), shift + some(k + 500)) for k in range(100)])
    same, moved = values(0.0), values(1.0)
    assert abs(same.mean()) < 5 * same.std() / 10 and moved.mean() > 5 * moved.std() / 10
    assert same.min() < 0


def test_nearest_distance():
    a, b = normal(6, 3, device="cpu"), normal(9, 3, seed=1, device="cpu")
    want = [min(math.dist(x, y) for y in b.tolist()) for x in a.tolist()]
    close(nearest_distance(a, b), want, 100)
    assert nearest_distance(a, torch.cat([b, a])).max() < 1e-6
    close(nearest_distance(a.view(6, 3, 1), b.view(9, 3, 1)), want, 100)

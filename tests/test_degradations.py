"""Degradations: the identity to the last bit, heat against its own flow, blocks, covers and fades against a pixel-by-pixel account."""
import itertools
import math

import pytest
import torch
from conftest import DEVICE, close, full, normal, refuses, rng, unhooked
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from udm_book.degradations import (
    Blend,
    Blur,
    Cover,
    Custom,
    Degradation,
    Pool,
    block_means,
    check_path,
    cosines,
    decay_rates,
    from_centre,
    matrix,
    rank,
)

inf = float("inf")


def dim(x, t): return x * (1 - t.view(-1, 1, 1, 1) / 4).to(x.dtype)


def picture(seed=7): return normal(6, 4, seed=seed, device="cpu")


# Pictures of 6 x 4 numbers: not square, so that rows and columns are not mistaken for each other.
OBJECTS = {
    "blur": lambda: Blur((6, 4), [0, 0.3, 0.8, 2, inf]),
    "geometric": lambda: Blur.geometric((6, 4), 5),
    "pool": lambda: Pool((6, 4)),
    "pool, uneven": lambda: Pool((6, 4), [1, (1, 2), (3, 2), (6, 4)]),
    "disc": lambda: Cover.disc((6, 4), 4),
    "frame": lambda: Cover.frame((6, 4), 4, 0.6),
    "pixels": lambda: Cover.pixels((6, 4), 7, rng(1, "cpu")),
    "fade": lambda: Blend.fade(3),
    "fade into a picture": lambda: Blend([0.0, 0.2, 0.9], picture()),
    "snow": lambda: Blend.snow((6, 4), 5, rng(2, "cpu")),
    "custom": lambda: Custom(dim, 4, True),
}
each = pytest.mark.parametrize("name", OBJECTS)


def build(name): return OBJECTS[name]().to(DEVICE)


# ------------------------------------------------------------------------------------------------ what all of them promise


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_at_0_it_is_the_picture_itself_and_rows_do_not_meet(name, dtype):
    D = build(name)
    x = normal(2 * D.T + 2, 3, 6, 4, seed=3).to(dtype)
    t = torch.arange(2 * D.T + 2, device=DEVICE) % (D.T + 1)
    kept = x.clone()
    y = D(x, t)
    assert torch.equal(x, kept) and (y.dtype, y.device, y.shape) == (x.dtype, x.device, x.shape)
    assert torch.equal(y[t == 0], x[t == 0])
    for i in range(len(t)): close(y[i:i + 1], D(x[i:i + 1], t[i:i + 1]), 8 * x.abs().max())
    assert all(not torch.equal(y[i], x[i]) for i in range(len(t)) if t[i])          # something happens in every step


def test_T_counts_the_steps():
    "One more table entry than steps; classes that are asked for a number of steps take that number."
    steps = {"blur": 4, "geometric": 5, "pool": 1, "pool, uneven": 3, "disc": 4, "frame": 4, "pixels": 7, "fade": 3,
             "fade into a picture": 2, "snow": 5, "custom": 4}
    assert {name: build(name).T for name in OBJECTS} == steps


@each
def test_it_works_with_and_without_channels(name):
    if name == "custom": return
    D, x = build(name), normal(2, 6, 4)
    t = full(x, 2)
    close(D(x, t), D(x[:, None, None], t)[:, 0, 0], 8 * x.abs().max())


@each
def test_casts_of_the_module_change_no_number_and_a_state_dict_brings_all_back(name):
    D, x = build(name), normal(2, 3, 6, 4)
    t = full(x, D.T - 1)
    y = D(x, t)
    assert torch.equal(D.float()(x, t), y) and torch.equal(D.half()(x, t), y)
    again = build(name)
    again.load_state_dict(D.state_dict())
    assert torch.equal(again(x, t), y)


@each
def test_linear_says_what_random_pictures_say(name):
    D, (x, y) = build(name), normal(2, 1, 6, 4, seed=5)
    def gap(t): return (D(2 * x[None] + y[None], t) - 2 * D(x[None], t) - D(y[None], t)).abs().max()
    gaps = [gap(torch.tensor([t], device=DEVICE)) for t in range(D.T + 1)]
    assert D.linear == (max(gaps) < 1e-13) and D.linear == (name not in ("fade into a picture", "snow"))


@each
def test_gradients_go_through_it(name):
    D = build(name)
    if not D.linear: return
    x = normal(1, 6, 4)[None]
    for t in range(D.T + 1):
        J = torch.autograd.functional.jacobian(lambda x: D(x, torch.tensor([t], device=DEVICE)).flatten(), x).flatten(1)
        close(J, matrix(D, (1, 6, 4), t, DEVICE), 8)


@each
def test_what_is_gone_stays_gone(name):
    "Each picture follows from an earlier one: no direction that D_s forgets is seen by D_t, t > s."
    D = build(name)
    if not D.linear: return
    for s, t in itertools.combinations(range(D.T + 1), 2):
        A, B = (matrix(D, (1, 6, 4), k, DEVICE) for k in (s, t))
        U, values, V = torch.linalg.svd(A)
        lost = V[(values < 1e-12)]
        assert (B @ lost.mT).abs().max() < 1e-11 if len(lost) else True


@pytest.mark.parametrize("name", ["blur", "pool", "disc", "snow", "custom"])
def test_it_is_compiled_whole(name):
    D, x = build(name), normal(2, 2, 6, 4)
    t = torch.arange(2, device=DEVICE)
    torch._dynamo.reset()
    with unhooked():
        got = torch.compile(D, fullgraph=True, backend="aot_eager")(x, t)
    close(got, D(x, t), 8 * x.abs().max())


# ------------------------------------------------------------------------------------------------------------------- blur


def flow(n, w):
    """Heat for the time w² by the flow's own matrix: neighbours exchange half of their difference."""
    L = torch.zeros(n, n, dtype=torch.float64, device=DEVICE)
    for i in range(n - 1):
        L[i, i + 1] = L[i + 1, i] = 1.0
        L[i, i] -= 1
        L[i + 1, i + 1] -= 1
    speed, shapes = torch.linalg.eigh(L)
    return shapes * (speed * w**2 / 2).exp() @ shapes.mT


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.05, 5), st.floats(0.05, 5), seeds)
def test_blur_is_the_flow_of_heat_and_squared_widths_add(h, w, first, second, seed):
    D = Blur((h, w), [0, first, math.hypot(first, second), inf]).to(DEVICE)
    x = normal(2, 2, h, w, seed=seed)
    size = 8 * (h + w) * x.abs().max()
    close(D(x, full(x, 1)), flow(h, first) @ x @ flow(w, first), size)
    twice = Blur((h, w), [0, second]).to(DEVICE)(D(x, full(x, 1)), full(x, 1))
    close(twice, D(x, full(x, 2)), size)
    close(D(x, full(x, 3)), x.mean((-1, -2), keepdim=True).expand_as(x), size)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 33])
def test_the_cosine_basis(n):
    C, rates = cosines(n), decay_rates(n)
    close(C @ C.mT, torch.eye(n), n)
    close(C[0], [n**-0.5] * n)
    assert (rates.diff() > 0).all() and rates[0] == 0
    close(rates, [2 - 2 * math.cos(math.pi * k / n) for k in range(n)], 4)
    close(C @ flow(n, 0.7).cpu() @ C.mT, torch.diag((-rates * 0.7**2 / 2).exp()), 4 * n)


def test_a_hot_pixel_spreads_to_the_width_that_was_asked_for():
    place = torch.arange(129.0, dtype=torch.float64, device=DEVICE) - 64
    for width in 0.4, 1.0, 4.0:
        p = Blur((1, 129), [0, width]).to(DEVICE)((place == 0).double().view(1, 1, -1), torch.tensor([1], device=DEVICE))[0, 0]
        close(p, p.clamp_min(0))
        close((p * place**2).sum(), width**2, (place**2).sum())


def test_geometric_widths():
    for T, args, first, last in (4, (), 0.3, 4.0), (3, (0.5, 2.0), 0.5, 2.0):
        widths = Blur.geometric((6, 4), T, *args).table.widths
        assert widths[0] == 0 and len(widths) == T + 1
        close(widths[[1, -1]], [first, last], last)
        close(widths[2:] / widths[1:-1], [(last / first) ** (1 / (T - 1))] * (T - 1), 4)


def test_wide_blurs_are_right_in_float32():
    "exp(-w²/2) alone would underflow: slow waves must keep their share."
    D, x = Blur((64, 1), [0, 20.0]).to(DEVICE), normal(2, 64, 1, dtype=torch.float32)
    close(D(x, full(x, 1)), flow(64, 20.0) @ x.double(), 64 * x.abs().max(), dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------------------- pool


@pytest.mark.parametrize("block", [(1, 1), (2, 2), (3, 2), (1, 4), (6, 4)])
def test_block_means(block):
    (h, w), x = block, normal(2, 6, 4)
    y = block_means(x, block)
    for i, j in itertools.product(range(6), range(4)):
        a, b = i // h * h, j // w * w
        close(y[:, i, j], x[:, a:a + h, b:b + w].mean((1, 2)), 4 * x.abs().max())


def test_pools_are_nested_projections():
    D = build("pool, uneven")
    A = [matrix(D, (6, 4), t, DEVICE) for t in range(4)]
    for s, t in itertools.product(range(4), repeat=2): close(A[s] @ A[t], A[max(s, t)], 4)
    assert [rank(D, (6, 4), t) for t in range(4)] == [24, 12, 4, 1]


def test_a_pool_is_the_small_picture():
    D, x = Pool(8).to(DEVICE), normal(2, 3, 8, 8)
    for t, k in enumerate((1, 2, 4, 8)):
        small = torch.nn.functional.avg_pool2d(x, k)
        close(D(x, full(x, t))[..., ::k, ::k], small, 4 * x.abs().max())
        close(D(x, full(x, t)), torch.nn.functional.interpolate(small, scale_factor=float(k)), 4 * x.abs().max())


def test_the_blocks_that_go_without_saying():
    def blocks(size): return [b for b, _ in Pool(size).blocks], Pool(size).T
    assert blocks(8) == ([1, 2, 4, 8], 3) and blocks((8, 12)) == ([1, 2, 4], 2) and blocks((6, 4)) == ([1, 2], 1)
    assert blocks(2) == ([1, 2], 1) and all(a == b for a, b in Pool((8, 12)).blocks)


# ------------------------------------------------------------------------------------------------------------------ cover


def test_a_cover_multiplies_by_its_table():
    keep = torch.tensor([1.0, 0.7, 0.7, 0.0], dtype=torch.float64)[:, None, None] * torch.ones(6, 4)
    keep[1, 2, 3], keep[2:, 2, 3], keep[3, 0, 0] = 0.9, 0.1, 0.6
    D, x = Cover(keep).to(DEVICE), normal(4, 3, 6, 4)
    y = D(x, torch.arange(4, device=DEVICE))
    assert D.T == 3 and torch.equal(y, x * keep.to(DEVICE)[:, None])


@pytest.mark.parametrize("size", [(6, 4), (5, 5), (1, 3), 8])
def test_discs_grow_from_the_middle_and_frames_from_the_corners(size):
    h, w = (size, size) if isinstance(size, int) else size
    r = from_centre(size)
    half = math.hypot(h - 1, w - 1) / 2
    want = [[math.hypot(i - (h - 1) / 2, j - (w - 1) / 2) / half for j in range(w)] for i in range(h)]
    close(r, want, 4)
    assert r.shape == (h, w)
    for make, order in (Cover.disc, r), (Cover.frame, 1 - r):
        for soft, D in (0.25, make(size, 5)), (0.7, make(size, 5, 0.7)):
            keep = D.table.keep
            assert D.T == 5 and (keep[0] == 1).all() and (keep[-1] == 0).all()
            for t in range(6):
                edge = -soft + t / 5 * (1 + soft)
                close(keep[t], ((order - edge) / soft).clamp(0, 1), 8 / soft)


@pytest.mark.parametrize("T", [1, 5, 7, 24, 30])
def test_pixels_go_one_by_one_in_even_shares(T):
    keep = Cover.pixels((6, 4), T, rng(3, "cpu")).table.keep
    gone = (1 - keep).sum((1, 2)).tolist()
    assert gone == [math.ceil(24 * t / T) for t in range(T + 1)] and ((keep == 0) | (keep == 1)).all()
    assert torch.equal(keep, Cover.pixels((6, 4), T, rng(3, "cpu")).table.keep)
    assert T == 1 or not torch.equal(keep, Cover.pixels((6, 4), T, rng(4, "cpu")).table.keep)


def test_every_pixel_is_as_likely_to_go_first():
    first = sum((1 - Cover.pixels((2, 3), 6, rng(seed, "cpu")).table.keep[1]).flatten() for seed in range(600))
    assert ((first - 100).abs() < 5 * (600 * 5 / 36) ** 0.5).all()


# ------------------------------------------------------------------------------------------------------------------ blend


def test_a_blend_takes_shares_of_two_pictures():
    shares = [0.0, 0.3, 0.3, 1.0]
    y, x = picture(), normal(4, 3, 6, 4)
    t = torch.arange(4, device=DEVICE)
    w = torch.tensor(shares, dtype=torch.float64, device=DEVICE).view(-1, 1, 1, 1)
    D = Blend(shares, y).to(DEVICE)
    close(D(x, t), (1 - w) * x + w * y.to(DEVICE), 4 * x.abs().max())
    assert D.T == 3 and torch.equal(D(x, full(x, 3)), y.to(DEVICE).expand_as(x))
    close(Blend(shares, -0.5).to(DEVICE)(x, t), (1 - w) * x - w / 2, 4 * x.abs().max())
    close(Blend(shares).to(DEVICE)(x, t), (1 - w) * x, 4 * x.abs().max())
    per_pixel = torch.stack([0 * y, y.sigmoid(), torch.ones_like(y)])
    w = per_pixel[1].to(DEVICE)
    close(Blend(per_pixel, y).to(DEVICE)(x, full(x, 1)), (1 - w) * x + w * y.to(DEVICE), 4 * x.abs().max())


def test_fades_are_even_and_snow_is_white():
    D = Blend.fade(4, picture())
    assert D.table.shares.tolist() == [0, 0.25, 0.5, 0.75, 1] and torch.equal(D.table.other, picture())
    assert Blend.fade(2).table.other == 0 and Blend.fade(2).linear is True and D.linear is False
    snow = Blend.snow((6, 4), 5, rng(3, "cpu")).to(DEVICE)
    x = normal(6, 2, 6, 4)
    fallen = Cover.pixels((6, 4), 5, rng(3, "cpu")).table.keep.to(DEVICE)[:, None].expand_as(x) == 0
    y = snow(x, torch.arange(6, device=DEVICE))
    assert torch.equal(y, torch.where(fallen, 1.0, x)) and snow.T == 5


# ----------------------------------------------------------------------------------------------------------------- custom


def test_a_custom_degradation_is_checked_once():
    calls = []
    def function(x, t):
        calls.append(t.tolist())
        return dim(x, t)
    x = normal(2, 1, 6, 4)
    D = Custom(function, 4)
    assert isinstance(D, Degradation) and D.T == 4 and not D.linear and calls == []
    for _ in range(2): assert torch.equal(D(x, full(x, 3)), dim(x, full(x, 3)))
    assert calls == [[0, 0], [3, 3], [3, 3]]
    D = Custom(function, 4, True, x[:1])
    assert D.linear and calls[3:] == [[0]]
    D(x, full(x, 1))
    assert calls[4:] == [[1, 1]]


def test_a_network_inside_a_custom_degradation_is_part_of_it():
    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))
        def forward(self, x, t): return torch.where(t.view(-1, 1) == 0, x, x * self.weight)
    assert [n for n, _ in Custom(Half(), 1).named_parameters()] == ["function.weight"]


# --------------------------------------------------------------------------------------------------------- matrix and rank


@each
def test_the_matrix_does_what_the_degradation_does(name):
    D, x = build(name), normal(3, 2, 6, 4)
    if not D.linear: return
    for t in range(D.T + 1):
        A = matrix(D, (2, 6, 4), t, DEVICE)
        assert A.dtype == torch.float64 and A.shape == (48, 48)
        close(x.flatten(1) @ A.mT, D(x, full(x, t)).flatten(1), 48 * x.abs().max())


def test_columns_of_the_matrix_are_degraded_units():
    def shift(x, t): return torch.where(t.view(-1, 1) == 0, x, x.roll(1, 1) * torch.arange(3, dtype=x.dtype, device=x.device))
    A = matrix(Custom(shift, 2, True), (3,), 2, DEVICE)
    assert A.tolist() == [[0, 0, 0], [1, 0, 0], [0, 2, 0]]


def test_ranks():
    assert [rank(Pool(8), (1, 8, 8), t) for t in range(4)] == [64, 16, 4, 1]
    assert [rank(Pool(4), (3, 4, 4), t) for t in range(3)] == [48, 12, 3]
    assert [rank(Cover.pixels(4, 4, rng(0, "cpu")), (1, 4, 4), t) for t in range(5)] == [16, 12, 8, 4, 0]
    assert rank(Blur(6, [0, inf]), (3, 6, 6), 1) == 3


def test_a_rank_is_relative_to_the_largest_singular_value():
    "Beside 10^8 one cannot see 10^-9."
    scales = torch.tensor([1e8, 1.0, 1e-9], dtype=torch.float64)
    def scaled(x, t): return torch.where(t.view(-1, 1) == 0, x, x * scales)
    assert rank(Custom(scaled, 1, True), (3,), 1) == 2
    assert rank(Custom(scaled, 1, True), (3,), 0) == 3


def test_a_degradation_is_not_linear_unless_it_says_so():
    class Square(Degradation):
        T = 1
        def forward(self, x0, t): return torch.where(t.view(-1, 1) == 0, x0, x0**2)
    with pytest.raises(ValueError, match="a linear degradation; got Square"): matrix(Square(), (3,), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1.0, 2.0, 2.5, 3.0, 4.0])
def test_the_rank_of_a_blur_is_what_rounding_leaves(width, dtype):
    shares = torch.exp(-(decay_rates(8)[:, None] + decay_rates(8)) * width**2 / 2)
    assert rank(Blur(8, [0, width]), (1, 8, 8), 1, dtype) == (shares > 64 * torch.finfo(dtype).eps).sum()


# -------------------------------------------------------------------------------------------------------------- bad input

V, x8, nan = ValueError, torch.zeros(2, 1, 8, 8), float("nan")
t1 = torch.ones(2, dtype=torch.int64)
PATH = "that go from 0.0 towards inf and never turn back"
CASES = {
    "widths that do not start at 0": (V, lambda: Blur(8, [0.1, 1.0]), PATH, r"\[0.1.*, 1.0\]"),
    "widths that fall": (V, lambda: Blur(8, [0.0, 2.0, 1.0]), PATH, r"\[0.0, 2.0, 1.0\]"),
    "a width NaN": (V, lambda: Blur(8, [0.0, nan]), PATH, "nan"),
    "one width": (V, lambda: Blur(8, [0.0]), "widths, two rows at least", r"\[0.0\]"),
    "a number for widths": (V, lambda: Blur(8, 0.0), "widths, two rows at least", r"\[0.0\]"),
    "a negative width": (V, lambda: Blur(8, [0.0, -1.0]), PATH, "-1.0"),
    "a picture of another size": (V, lambda: Blur((8, 4), [0, 1])(x8, t1), r"last axes are \(8, 4\)", r"\(2, 1, 8, 8\)"),
    "a picture without a batch": (V, lambda: Blur(8, [0, 1])(torch.zeros(8, 8), torch.ones(8, dtype=torch.int64)), r"\(8, 8\)", r"\(8, 8\)"),
    "times that are no integers": (TypeError, lambda: Pool(8)(x8, t1.float()), "integer times t", "torch.float32"),
    "too few times": (V, lambda: Cover.disc(8, 2)(x8, t1[:1]), r"t of shape \(2,\)", r"\(1,\)"),
    "too few times for a number": (V, lambda: Blend.fade(2)(x8, t1[:1]), r"t of shape \(2,\)", r"\(1,\)"),
    "too few times for a function": (V, lambda: Custom(dim, 2)(x8, t1[:1]), r"t of shape \(2,\)", r"\(1,\)"),
    "too few times for a blur": (V, lambda: Blur(8, [0, 1])(x8, t1[:1]), r"t of shape \(2,\)", r"\(1,\)"),
    "blocks that do not start at 1": (V, lambda: Pool(8, [2, 4]), "the first of size 1", r"\[\(2, 2\), \(4, 4\)\]"),
    "blocks that do not nest": (V, lambda: Pool(6, [1, 2, 3]), "a divisor of the next", r"\(3, 3\)"),
    "blocks that do not fit": (V, lambda: Pool(8, [1, 3]), r"the last of \(8, 8\)", r"\(3, 3\)"),
    "blocks that do not fit one side": (V, lambda: Pool((8, 6), [1, (2, 4)]), r"the last of \(8, 6\)", r"\(2, 4\)"),
    "a block of 0": (V, lambda: Pool(8, [1, 0]), "a divisor", r"\(0, 0\)"),
    "a negative block": (V, lambda: Pool(8, [1, -2]), "a divisor", r"\(-2, -2\)"),
    "one block": (V, lambda: Pool(8, [1]), "at least two blocks", r"\[\(1, 1\)\]"),
    "an odd size without blocks": (V, lambda: Pool(7), "at least two blocks", r"\[\(1, 1\)\]"),
    "a cover that is there at once": (V, lambda: Cover(torch.zeros(3, 8, 8)), "from 1.0 towards 0.0", "0.0"),
    "a cover that opens": (V, lambda: Cover(torch.tensor([1.0, 0.2, 0.3]).view(3, 1, 1)), "from 1.0 towards 0.0", "0.3"),
    "a cover beyond 0": (V, lambda: Cover(torch.tensor([1.0, -0.2]).view(2, 1, 1)), "from 1.0 towards 0.0", "-0.2"),
    "a cover of another size": (V, lambda: Cover.disc(6, 2)(x8, t1), r"last axes are \(6, 6\)", r"\(2, 1, 8, 8\)"),
    "a share above 1": (V, lambda: Blend([0.0, 1.1]), "from 0.0 towards 1.0", "1.1"),
    "a share at the start": (V, lambda: Blend([0.5, 1.0]), "from 0.0 towards 1.0", "0.5"),
    "one pixel's share that falls": (V, lambda: Blend(torch.tensor([[0.0, 0], [0.5, 0.5], [1, 0.4]])), "from 0.0 towards 1.0", "0.4"),
    "a picture NaN to fade into": (V, lambda: Blend.fade(2, nan), "finite numbers", "NaN"),
    "an infinite picture to fade into": (V, lambda: Blend.fade(2, inf), "finite numbers", "infinity"),
    "a picture to fade into of another size": (V, lambda: Blend.fade(2, torch.ones(6, 8))(x8, t1), r"last axes are \(6, 8\)", r"\(2, 1, 8, 8\)"),
    "shares of another size": (V, lambda: Blend(torch.zeros(2, 6, 6))(x8, t1), r"last axes are \(6, 6\)", r"\(2, 1, 8, 8\)"),
    "a function without steps": (V, lambda: Custom(dim, 0), "T >= 1", "0"),
    "a function that ruins at once": (V, lambda: Custom(lambda x, t: x / 2, 2, example=x8 + 1), r"to be x0, shaped \(2, 1, 8, 8\)", "other numbers"),
    "a function that ruins the first batch": (V, lambda: Custom(lambda x, t: x / 2, 2)(x8 + 1, t1), r"to be x0", "other numbers"),
    "a function that drops a row": (V, lambda: Custom(lambda x, t: x[1:], 2)(x8, t1), r"shaped \(2, 1, 8, 8\)", r"shaped \(1, 1, 8, 8\)"),
    "the matrix of a fade": (V, lambda: matrix(Blend.fade(2, 1.0), (8,), 1), "a linear degradation", "Blend, which is not"),
}

test_the_message_says_what_was_expected_and_what_came = refuses(CASES)


def test_paths_may_stand_still_and_reach_their_end():
    check_path("widths", torch.tensor([0.0, 0.0, 1.0, 1.0, inf]), 0.0, inf)
    check_path("shares", torch.tensor([1.0, 1.0, 0.5, 0.0, 0.0]), 1.0, 0.0)

"""Hypothesis strategies: schedules, times, shapes, dtypes, seeds."""
import torch
from conftest import unhooked
from hypothesis import strategies as st

from udm_book.schedule import Schedule

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from([torch.float32, torch.float64])
shapes = st.sampled_from([(1,), (4,), (3, 2), (1, 2), (2, 1, 2, 2), (5, 2, 4, 4)])      # (b,), (b, d), (b, c, h, w)


@st.composite
def alpha_bars(draw, max_T=30):
    """Strictly decreasing from 1, the last one possibly 0 (no signal left)."""
    ratios = draw(st.lists(st.floats(0.05, 0.999), min_size=1, max_size=max_T))
    a = [1.0]
    for r in ratios:
        a.append(a[-1] * r)
    if draw(st.booleans()):
        a[-1] = 0.0
    return a


def schedules(max_T=30):
    return alpha_bars(max_T).map(build)


def build(alpha_bar):
    """A schedule; type checks draw random numbers, which hypothesis does not want inside a strategy."""
    with unhooked():
        return Schedule(alpha_bar)


@st.composite
def spans(draw, max_T=30, positive=False):
    """A schedule and times s < t in it; `positive` keeps s >= 1 and signal at t."""
    schedule = draw(schedules(max_T).filter(lambda c: not positive or c.T >= 3))
    low, top = (1, schedule.T - 1) if positive else (0, schedule.T)
    t = draw(st.integers(low + 1, top))
    return schedule, t, draw(st.integers(low, t - 1))


@st.composite
def runs(draw, T):
    """Strictly decreasing times from T to 0 through any subset between."""
    between = draw(st.sets(st.integers(1, T - 1))) if T > 1 else set()
    return [T, *sorted(between, reverse=True), 0]

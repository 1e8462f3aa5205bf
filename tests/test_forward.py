"""Shape and time checks, and the noise that all families with normal noise share."""
import pytest
import torch
from conftest import DEVICE, rng, same_mean
from hypothesis import given
from strategies import dtypes, seeds, shapes

from udm_book.forward import Forward, check_rows, check_t, normal_like, uniform_like
from udm_book.hot import Hot
from udm_book.schedule import Schedule


@given(shapes, dtypes, seeds)
def test_normal_like_takes_shape_dtype_and_stream(shape, dtype, seed):
    x = torch.zeros(shape, dtype=dtype, device=DEVICE)
    a, b = normal_like(x, rng(seed)), torch.randn(shape, generator=rng(seed), dtype=dtype, device=DEVICE)
    assert a.dtype == dtype and torch.equal(a, b)


@given(shapes, dtypes, seeds)
def test_uniform_like_is_float64_whatever_it_is_shaped_like(shape, dtype, seed):
    x = torch.zeros(shape, dtype=dtype, device=DEVICE)
    a, b = uniform_like(x, rng(seed)), torch.rand(shape, generator=rng(seed), dtype=torch.float64, device=DEVICE)
    assert torch.equal(a, b) and torch.equal(a, uniform_like(x.long(), rng(seed)))
    torch.manual_seed(seed)
    a = uniform_like(x)
    torch.manual_seed(seed)
    assert torch.equal(a, uniform_like(x)) and a.dtype == torch.float64 and a.device == x.device


def test_normal_like_is_standard_normal():
    x = normal_like(torch.zeros(100_000, 1, dtype=torch.float64, device=DEVICE), rng(0))
    same_mean(torch.cat([x, x**2, x**4], 1), torch.tensor([0.0, 1.0, 3.0], device=DEVICE))


def test_the_end_of_data_is_their_state_at_T():
    F, x0 = Hot(Schedule.linear(9)), torch.ones(3, 2)
    assert torch.equal(F.sample_end(x0, generator=rng(4, "cpu")), F.sample(x0, torch.tensor([9, 9, 9]), generator=rng(4, "cpu")))


def test_sample_is_the_map_at_drawn_noise():
    F, x0 = Hot(Schedule.linear(9)), torch.ones(3, 2)
    t, g = torch.tensor([1, 5, 9]), rng(4, "cpu")
    xt = F.sample(x0, t, generator=rng(4, "cpu"))
    assert torch.equal(xt, F(x0, t, F.sample_noise(x0, generator=g)))


@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 1, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sound_rows_and_times_pass(shape, dtype):
    x = torch.zeros(shape)
    check_rows(torch.ones(len(x), dtype=dtype), x0=x, eps=x + 1, xt=x)
    check_t(torch.tensor([1, 7], dtype=dtype), 7)
    check_t(torch.tensor([], dtype=dtype), 7)


class Elsewhere(torch.Tensor):
    """Times that say of themselves that they lie on a GPU."""
    is_cuda = True


def test_on_a_gpu_times_are_checked_without_waiting():
    for good in ([1, 7], []): check_t(torch.tensor(good, dtype=torch.long).as_subclass(Elsewhere), 7)
    for bad in ([0, 3], [8]):
        with pytest.raises(RuntimeError, match="expected times in 1..7"): check_t(torch.tensor(bad).as_subclass(Elsewhere), 7)


def test_a_family_must_say_all_four_things():
    with pytest.raises(TypeError, match="forward.*infer_noise.*prior.*sample_noise"): Forward()


def test_a_family_starts_at_its_data_and_is_not_solved_unless_it_says_so():
    assert Forward.starts_at_data and not Forward.invertible


def test_a_family_is_not_affine_unless_it_says_so():
    class Plain(Hot):
        affine = Forward.affine
    assert Plain(Schedule.linear(3)).affine() is None

"""The convolutional network: it keeps shapes, starts at zero, sees the time, and learns through every weight."""
import pytest
import torch
from conftest import close, normal

from udm_book.network import Block, ConvNet, TimeEmbedding

T = torch.tensor([0, 1, 17, 999])


@pytest.mark.parametrize("width", [4, 48])
def test_embedding_is_sines_and_cosines_of_known_frequencies(width):
    n, out = width // 2, TimeEmbedding(width)(T)
    angle = torch.tensor([[t * 1e4 ** (-k / (n - 1)) for k in range(n)] for t in T.tolist()], dtype=torch.float64)
    close(out, torch.cat([angle.sin(), angle.cos()], 1), 1 + torch.cat([angle, angle], 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_embedding_tells_times_apart_in_every_dtype(dtype):
    "The angles are computed in at least float32: rounding t = 999 itself to bfloat16 would make it 1000."
    out = TimeEmbedding(16).to(dtype)(T)
    assert out.dtype == dtype
    close(out, TimeEmbedding(16)(T), C=1, dtype=torch.float32 if dtype == torch.float64 else dtype)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (1, 3, 4, 6)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_shapes_and_a_zero_start(shape, blocks):
    net = ConvNet(shape[1], width=8, blocks=blocks)
    out = net(normal(*shape, dtype=torch.float32, device="cpu"), torch.arange(shape[0]))
    assert torch.equal(out, torch.zeros(shape))


def test_a_block_starts_as_the_identity():
    x = normal(2, 8, 4, 4, dtype=torch.float32, device="cpu")
    assert torch.equal(Block(8, 6)(x, torch.randn(2, 6)), x)


def shaken(dtype=torch.float64):
    """A small network away from its zero start."""
    torch.manual_seed(0)
    net = ConvNet(1, width=8, blocks=1).to(dtype)
    for p in net.parameters(): torch.nn.init.normal_(p, std=0.3)
    return net


def test_the_answer_depends_on_time_and_every_weight_learns():
    net, x = shaken(), normal(4, 1, 4, 4, device="cpu")
    a, b = net(x, torch.zeros(4, dtype=torch.long)), net(x, torch.full((4,), 5))
    assert ((a - b).flatten(1).abs().amax(1) > 1e-3).all()
    (b**2).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


def test_rows_do_not_see_each_other():
    net, x = shaken(), normal(3, 1, 4, 4, device="cpu")
    t = torch.tensor([1, 2, 3])
    rows = torch.cat([net(x[i:i + 1], t[i:i + 1]) for i in range(3)])
    close(net(x, t), rows, 1e3 * rows.abs().max())                                  # some thousand terms in each sum


def test_two_resolutions():
    "Half of the blocks see the image at half size."
    net, seen = ConvNet(1, width=8, blocks=2), []
    for module in net.modules():
        if isinstance(module, Block): module.register_forward_hook(lambda m, a, out: seen.append(tuple(out.shape[1:])))
    net(torch.zeros(1, 1, 8, 4), torch.zeros(1, dtype=torch.long))
    assert seen == [(8, 8, 4)] * 2 + [(16, 4, 2)] * 2 + [(8, 8, 4)] * 2


def test_width_and_depth_are_arguments():
    count = lambda **k: sum(p.numel() for p in ConvNet(**k).parameters())           # noqa: E731
    assert count(width=8) < count(width=16) and count(width=8, blocks=1) < count(width=8, blocks=2)

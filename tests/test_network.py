"""The convolutional network: it keeps shapes, starts at zero, sees the time, and learns through every weight."""
import pytest
import torch
from conftest import close, normal
from torch.nn import functional as fn

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


def test_a_block_and_the_network_are_their_formulas():
    "Written out with torch.nn.functional; the sum of the two resolutions before the last blocks."
    net, x, t = shaken(), normal(3, 1, 4, 4, device="cpu"), torch.tensor([1, 2, 3])
    def norm(layer, x): return fn.group_norm(x, 8, layer.weight, layer.bias)
    def conv(layer, x): return fn.conv2d(x, layer.weight, layer.bias, padding=1)
    def block(b, x):
        scale, shift = fn.linear(time, b.time.weight, b.time.bias)[:, :, None, None].chunk(2, 1)
        inside = norm(b.norm, conv(b.before[2], fn.silu(norm(b.before[0], x)))) * (1 + scale) + shift
        return x + conv(b.after[1], fn.silu(inside))
    time = net.embed[0](t)
    for i in 1, 3: time = fn.silu(fn.linear(time, net.embed[i].weight, net.embed[i].bias))
    h = block(net.first[0], conv(net.enter, x))
    low = block(net.middle[0], fn.conv2d(h, net.down.weight, net.down.bias, stride=2))
    h = block(net.last[0], h + fn.conv_transpose2d(low, net.up.weight, net.up.bias, stride=2))
    want = conv(net.leave[2], fn.silu(norm(net.leave[0], h)))
    close(net(x, t), want, 1e3 * want.abs().max())


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
    assert net.down.kernel_size == net.up.kernel_size == (2, 2)                     # no pixel is passed over


def test_width_and_depth_are_arguments():
    count = lambda **k: sum(p.numel() for p in ConvNet(**k).parameters())           # noqa: E731
    assert count(width=8) < count(width=16) and count(width=8, blocks=1) < count(width=8, blocks=2)
    assert count() == count(channels=1, width=48, blocks=2)


def test_only_weights_are_stored():
    net = ConvNet(width=8, blocks=1)
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}

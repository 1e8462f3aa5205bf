"""The networks: they keep shapes, start at zero, see the time, learn through every weight, and are their formulas."""
import math

import pytest
import torch
from conftest import close, normal, refuses
from torch.nn import functional as fn

from udm_book.network import Block, ConvNet, Layer, TimeEmbedding, TokenDenoiser, Transformer
from udm_book.posterior import LazyCategorical

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


# ---------------------------------------------------------------------------------------------------------------- tokens


def stirred(module):
    """The module in float64, away from its zero start."""
    torch.manual_seed(0)
    module = module.double()
    for p in module.parameters(): torch.nn.init.normal_(p, std=0.3)
    return module


def test_a_layer_starts_as_the_identity():
    x = normal(2, 5, 8, dtype=torch.float32, device="cpu")
    assert torch.equal(Layer(8, 2)(x), x)


def test_a_layer_is_its_formula():
    "Attention written out with loops over rows, heads and positions; the scale is 1/√(width of a head)."
    layer, x = stirred(Layer(8, 2)), normal(2, 3, 8, device="cpu")
    def norm(n, x): return fn.layer_norm(x, (8,), n.weight, n.bias)
    def linear(n, x): return fn.linear(x, n.weight, n.bias)
    q, k, v = linear(layer.ask, norm(layer.norm, x)).chunk(3, -1)
    heard = torch.zeros_like(x)
    for b in range(2):
        for head in slice(0, 4), slice(4, 8):
            for i in range(3):
                weights = torch.stack([(q[b, i, head] * k[b, j, head]).sum() / 2 for j in range(3)]).softmax(0)
                heard[b, i, head] = sum(w * v[b, j, head] for j, w in enumerate(weights))
    y = x + linear(layer.answer, heard)
    want = y + linear(layer.think[3], fn.gelu(linear(layer.think[1], norm(layer.think[0], y))))
    close(layer(x), want, 1e3 * want.abs().max())


def test_a_transformer_is_its_formula_and_reads_token_place_and_time():
    net, x, t = stirred(Transformer(5, 3, width=8, depth=2, heads=2)), torch.tensor([[0, 1, 4], [1, 1, 2]]), torch.tensor([3, 9])
    first, second, third, fourth = net.time
    time = fn.linear(fn.silu(fn.linear(first(t), second.weight, second.bias)), fourth.weight, fourth.bias)
    h = net.token.weight[x] + net.place + time[:, None]
    for layer in net.layers[:2]: h = layer(h)
    want = fn.layer_norm(h, (8,), net.layers[2].weight, net.layers[2].bias)
    close(net(x, t), want, 1e3 * want.abs().max())
    assert isinstance(third, torch.nn.SiLU) and len(net.layers) == 3
    for other in net(x, t + 1), net(x.flip(1), t).flip(1), net(torch.tensor([[0, 1, 3], [1, 1, 3]]), t)[:, :2]:
        assert ((other - want[:, :other.shape[1]]).flatten(1).abs().amax(1) > 1e-3).all()


def test_every_weight_of_a_token_denoiser_learns_and_rows_do_not_see_each_other():
    net, x, t = stirred(TokenDenoiser(Transformer(5, 3, width=8, depth=1, heads=2), 8, 4)), torch.tensor([[0, 1, 4], [1, 3, 2]]), torch.tensor([3, 9])
    guess = net(x, t)
    assert isinstance(guess, LazyCategorical) and guess.logits.shape == (2, 3, 4) and guess.features.shape == (2, 3, 8)
    close(guess.logits, fn.linear(guess.features, net.head.weight, net.head.bias), 1e3)
    rows = torch.cat([net(x[i:i + 1], t[i:i + 1]).logits for i in range(2)])
    close(guess.logits, rows, 1e3 * rows.abs().max())
    guess.logits.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


def test_a_token_denoiser_starts_with_equal_chances_and_sees_no_head():
    net = TokenDenoiser(Transformer(5, 3, width=8, depth=1, heads=2), 8, 4)
    x, t = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, dtype=torch.long)
    assert torch.equal(net(x, t).logits, torch.zeros(1, 3, 4))
    asked = []
    net.head.register_forward_hook(lambda m, a, out: asked.append(out.shape))
    net(x, t).at(torch.tensor([[True, False, False]]))
    assert asked == [(1, 4)]                                                # one position, not three


def test_dropout_acts_while_training_alone_and_in_every_place():
    torch.manual_seed(0)
    x, t = torch.tensor([[0, 1, 4]]), torch.tensor([3])
    for part in "drop", "layers.0.drop":
        net = stirred(Transformer(5, 3, width=8, depth=1, heads=2, dropout=0.5))
        assert torch.equal(net.eval()(x, t), net(x, t))
        net.get_submodule(part).train()
        assert not torch.equal(net(x, t), net(x, t)), part
    assert not any(m.p for m in Transformer(5, 3, width=8).modules() if isinstance(m, torch.nn.Dropout))


def test_embeddings_start_with_length_one():
    net = Transformer(1000, 500, width=64)
    for w in net.token.weight, net.place: assert abs(w.square().sum(1).mean().item() - 1) < 5 * math.sqrt(2 / 64 / len(w))


def test_one_head_is_enough_and_what_goes_without_saying():
    assert Layer(8, 1)(torch.zeros(2, 3, 8)).shape == (2, 3, 8)
    plain = Transformer(5, 3)
    assert plain.place.shape == (3, 64) and len(plain.layers) == 3 and plain.layers[0].heads == 4 and plain.drop.p == 0


CASES = {
    "a width that heads do not share": (ValueError, lambda: Layer(12, 8), "share the width 12", "8"),
    "no heads": (ValueError, lambda: Layer(12, 0), "share the width 12", "0"),
    "sentences of another length": (ValueError, lambda: Transformer(5, 3, 8, 1, 2)(torch.zeros(2, 4, dtype=torch.long), torch.ones(2)),
                                    r"sentences \(b, 3\)", r"\(2, 4\)"),
    "one sentence without a batch": (ValueError, lambda: Transformer(5, 3, 8, 1, 2)(torch.zeros(3, dtype=torch.long), torch.ones(3)),
                                     r"sentences \(b, 3\)", r"\(3,\)"),
}
test_the_message_says_what_was_expected_and_what_came = refuses(CASES)

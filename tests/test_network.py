"""The networks: they keep shapes, start at zero, see what they are told, learn through every weight, and are their formulas."""
import inspect
import math

import pytest
import torch
from conftest import close, normal, refuses
from torch.nn import functional as fn

from udm_book.network import MLP, Attention, Block, Cue, Layer, Look, Stage, TimeEmbedding, TokenDenoiser, Transformer, UNet
from udm_book.parameterization import Denoiser, V
from udm_book.posterior import LazyCategorical
from udm_book.schedule import Schedule

T = torch.tensor([0, 1, 17, 999])


def count(module): return sum(p.numel() for p in module.parameters())


def shaken(module):
    """The module in float64, away from its zero start."""
    torch.manual_seed(0)
    module = module.double()
    for p in module.parameters(): torch.nn.init.normal_(p, std=0.3)
    return module


def differs(a, b, least=1e-3):
    """Every row of `a` differs from that of `b`."""
    assert a.shape == b.shape and ((a - b).flatten(1).abs().amax(1) > least).all()


def linear(layer, x): return fn.linear(x, layer.weight, layer.bias)
def conv(layer, x): return fn.conv2d(x, layer.weight, layer.bias, padding=1)
def group_norm(layer, x): return fn.group_norm(x, 8, layer.weight, layer.bias)
def layer_norm(layer, x): return fn.layer_norm(x, x.shape[-1:], layer.weight, layer.bias)


# ------------------------------------------------------------------------------------------------------ time and labels


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


def time_of(cue, t):
    embed, first, bend, second = cue.time
    assert isinstance(bend, torch.nn.SiLU)
    return linear(second, fn.silu(linear(first, embed(t))))


def test_a_cue_is_the_time_and_a_row_for_each_label():
    cue, y = shaken(Cue(8, 12, classes=3)), torch.tensor([0, 2, 1, 3])
    want = time_of(cue, T) + cue.label.weight[y]
    close(cue(T, y), want, 1e3)
    close(cue(T), time_of(cue, T) + cue.label.weight[3], 1e3)                       # no labels: the null label
    plain = shaken(Cue(8, 12))
    close(plain(T), time_of(plain, T), 1e3)
    assert plain(T).shape == (4, 12) and cue.label.weight.shape == (4, 12)


def test_labels_start_alike():
    cue = Cue(8, 12, classes=3)
    assert torch.equal(cue(T, torch.tensor([0, 1, 2, 3])), cue(T))


# -------------------------------------------------------------------------------------------------------------- images


def block_of(b, x, cue):
    scale, shift = linear(b.cue, cue)[:, :, None, None].chunk(2, 1)
    inside = group_norm(b.norm, conv(b.before[2], fn.silu(group_norm(b.before[0], x)))) * (1 + scale) + shift
    return x + conv(b.after[2], fn.silu(inside))


def heard_by(look, x, context=None):
    "Attention with loops over rows, heads and places; the scale is 1/√(width of a head)."
    x = layer_norm(look.norm, x)
    others = x if context is None else context
    q, (k, v) = linear(look.ask, x), linear(look.hear, others).chunk(2, -1)
    d = x.shape[-1] // look.heads
    heard = torch.zeros_like(x)
    for b in range(len(x)):
        for head in (slice(i * d, (i + 1) * d) for i in range(look.heads)):
            for i in range(x.shape[1]):
                weights = torch.stack([(q[b, i, head] * k[b, j, head]).sum() / d**0.5 for j in range(others.shape[1])]).softmax(0)
                heard[b, i, head] = sum(w * v[b, j, head] for j, w in enumerate(weights))
    return linear(look.answer, heard)


def test_a_block_is_its_formula_and_starts_as_the_identity():
    x, cue = normal(2, 8, 4, 6, device="cpu"), normal(2, 5, seed=1, device="cpu")
    assert torch.equal(Block(8, 5).double()(x, cue), x)
    block = shaken(Block(8, 5))
    want = block_of(block, x, cue)
    close(block(x, cue), want, 1e3 * want.abs().max())
    assert block.before[0].num_groups == block.norm.num_groups == 8


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_is_its_formula(heads):
    x, context = normal(2, 3, 8, device="cpu"), normal(2, 4, 5, seed=1, device="cpu")
    for look, given in (Attention(8, heads), None), (Attention(8, heads, context=5), context):
        assert not look.double()(x, given).any()
        want = heard_by(shaken(look), x, given)
        close(look(x, given), want, 1e3 * want.abs().max())
    assert Attention(8).heads == 4


def test_a_look_is_attention_among_the_pixels_and_then_to_a_context():
    x, context, look = normal(2, 8, 2, 3, device="cpu"), normal(2, 4, 5, seed=1, device="cpu"), shaken(Look(8, 2, 5))
    rows = x.flatten(2).mT
    rows = rows + heard_by(look.inside, rows)
    close(look(x), rows.mT.reshape(x.shape), 1e3 * rows.abs().max())
    want = (rows + heard_by(look.outside, rows, context)).mT.reshape(x.shape)
    close(look(x, context), want, 1e3 * want.abs().max())
    assert Look(8, 2).outside is None


def test_a_stage_is_blocks_with_or_without_looks():
    x, cue, context = normal(2, 8, 2, 3, device="cpu"), normal(2, 5, seed=1, device="cpu"), normal(2, 4, 6, seed=2, device="cpu")
    stage, plain = shaken(Stage(8, 5, 2, True, 2, 6)), shaken(Stage(8, 5, 2))
    want = x
    for block, look in zip(stage.blocks, stage.looks): want = look(block_of(block, want, cue), context)
    close(stage(x, cue, context), want, 1e4 * want.abs().max())
    want = block_of(plain.blocks[1], block_of(plain.blocks[0], x, cue), cue)
    close(plain(x, cue), want, 1e4 * want.abs().max())
    assert len(stage.blocks) == len(stage.looks) == 2 and len(plain.looks) == 0
    assert Stage(8, 5, 1, True).looks[0].inside.heads == 4


def test_a_unet_is_its_formula():
    "Three levels: down, bottom, up, with what went down added."
    net = shaken(UNet(2, 8, (1, 2, 3), blocks=1, attention=(1,), heads=2, classes=3, context=4, out=5))
    x, t, y, context = normal(2, 2, 8, 4, device="cpu"), torch.tensor([3, 70]), torch.tensor([2, 0]), normal(2, 3, 4, seed=1, device="cpu")
    cue = fn.silu(net.cue(t, y))
    h = conv(net.enter, x)
    first = block_of(net.down[0].blocks[0], h, cue)
    second = net.down[1](fn.conv2d(first, net.shrink[0].weight, net.shrink[0].bias, stride=2), cue, context)
    h = block_of(net.middle.blocks[0], fn.conv2d(second, net.shrink[1].weight, net.shrink[1].bias, stride=2), cue)
    h = net.up[0](second + fn.conv_transpose2d(h, net.grow[0].weight, net.grow[0].bias, stride=2), cue, context)
    h = block_of(net.up[1].blocks[0], first + fn.conv_transpose2d(h, net.grow[1].weight, net.grow[1].bias, stride=2), cue)
    want = conv(net.leave[2], fn.silu(group_norm(net.leave[0], h)))
    assert want.shape == (2, 5, 8, 4)
    close(net(x, t, y, context), want, 1e4 * want.abs().max())
    assert [len(s.looks) for s in (*net.down, net.middle, *net.up)] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("mults, shape", [((1,), (2, 1, 3, 5)), ((1, 2), (1, 3, 4, 6)), ((2, 1, 1), (2, 1, 4, 12))])
@pytest.mark.parametrize("blocks", [1, 2])
def test_shapes_and_a_zero_start(mults, shape, blocks):
    net = UNet(shape[1], 8, mults, blocks=blocks)
    x, t = normal(*shape, dtype=torch.float32, device="cpu"), torch.arange(shape[0])
    assert torch.equal(net(x, t), torch.zeros(shape))
    assert net.side == 2 ** (len(mults) - 1)


def test_widths_halve_the_image_and_follow_the_multipliers():
    net, seen = UNet(), []
    for part in (*net.down, net.middle, *net.up): part.register_forward_hook(lambda m, a, out: seen.append(tuple(out.shape[1:])))
    with torch.no_grad(): net(torch.zeros(1, 3, 16, 24), torch.zeros(1, dtype=torch.long))
    down = [(64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3)]
    assert seen == down + down[-2::-1]
    assert {len(s.blocks) for s in (*net.down, net.middle, *net.up)} == {2}
    assert [len(s.looks) for s in (*net.down, net.middle, *net.up)] == [0, 0, 0, 2, 0, 0, 0]
    assert net.middle.looks[0].inside.heads == 4 and net.cue.label is None and net.middle.looks[0].outside is None
    assert all(s.kernel_size == s.stride == (2, 2) for s in (*net.shrink, *net.grow))      # no pixel is passed over
    assert net.cue.time[0].half == 32 and net.cue.time[3].out_features == 256
    assert not any(m.p for m in net.modules() if isinstance(m, torch.nn.Dropout))


def test_the_number_of_parameters_does_not_depend_on_T():
    net = UNet(1, 8, (1, 2), blocks=1)
    for steps in 10, 1000:
        denoiser = Denoiser(net, Schedule.cosine(steps), V)
        assert count(denoiser) == count(net)
    assert set(net.state_dict()) == {name for name, _ in net.named_parameters()}            # only weights are stored
    assert count(UNet(1, 24, (1, 2), blocks=1, attention=())) == 102_913


def small(**options): return shaken(UNet(1, 8, (1, 2), blocks=1, heads=2, classes=3, context=4, **options))


INPUT = normal(4, 1, 4, 6, device="cpu"), torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 2, 0]), normal(4, 2, 4, seed=1, device="cpu")


def test_the_answer_depends_on_everything_and_every_weight_learns():
    net, (x, t, y, context) = small(), INPUT
    out = net(x, t, y, context)
    for other in net(x + 1, t, y, context), net(x, t + 1, y, context), net(x, t, y + 1, context), net(x, t, y, context.flip(1) * 2):
        differs(out, other)
    differs(out, net(x, t, y))                                                      # no context is not the same
    assert torch.equal(net(x, t, context=context), net(x, t, torch.full_like(y, 3), context))
    out.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for name, p in net.named_parameters() if name != "cue.label.weight")
    assert (net.cue.label.weight.grad.abs().amax(1) > 0).tolist() == [True, True, True, False]


def test_what_went_down_is_used_on_the_way_up():
    net, (x, t, y, context) = small(), INPUT
    below = []
    hook = net.shrink[0].register_forward_hook(lambda m, a, out: below.append(out))
    want = net(x, t, y, context)
    hook.remove()
    net.shrink[0].register_forward_hook(lambda m, a, out: below[0])                 # the way below stays as it was
    assert torch.equal(net(x, t, y, context), want)
    net.down[0].register_forward_hook(lambda m, a, out: torch.zeros_like(out))      # nothing is carried over
    differs(net(x, t, y, context), want)


def test_rows_do_not_see_each_other():
    net = small()
    rows = torch.cat([net(*(z[i:i + 1] for z in INPUT)) for i in range(4)])
    close(net(*INPUT), rows, 1e4 * rows.abs().max())                                # some thousand terms in each sum


def test_a_context_is_a_set_and_may_have_any_length():
    net, (x, t, y, context) = small(), INPUT
    a, b = net(x, t, y, context), net(x, t, y, context.flip(1))
    close(a, b, 1e4 * a.abs().max())
    differs(net(x, t, y, context[:, :1]), a)


def test_dropout_of_a_unet_acts_while_training_alone():
    net, (x, t, y, context) = small(dropout=0.5), INPUT
    assert torch.equal(net.eval()(x, t), net(x, t))
    net.train()
    differs(net(x, t), net(x, t))


def test_every_weight_learns_from_the_third_step_on():
    torch.manual_seed(0)
    net, (x, t, y, context) = UNet(1, 8, (1, 2), blocks=1, classes=3, context=4), INPUT
    optimizer, reached = torch.optim.SGD(net.parameters(), lr=0.1), []
    for _ in range(3):
        optimizer.zero_grad()
        (net(x.float(), t, y, context.float()) - 1).square().sum().backward()
        reached.append(sum(p.grad is not None and bool(p.grad.any()) for p in net.parameters()))
        optimizer.step()
    assert reached[0] == 2 and reached[2] == len(list(net.parameters()))


def test_a_level_may_be_named_from_either_end():
    for a, b in (-1, 1), (-2, 0):
        assert count(UNet(1, 8, (1, 2), blocks=1, attention=(a,))) == count(UNet(1, 8, (1, 2), blocks=1, attention=(b,)))
    both = UNet(1, 8, (1, 2), blocks=1, attention=(0, -2, 1))
    assert [len(s.looks) for s in (*both.down, both.middle, *both.up)] == [1, 1, 1]


# -------------------------------------------------------------------------------------------------------------- tokens


def test_a_layer_is_its_formula_and_starts_as_the_identity():
    x = normal(2, 3, 8, device="cpu")
    assert torch.equal(Layer(8, 2).double()(x), x)
    layer = shaken(Layer(8, 2))
    y = x + heard_by(layer.look, x)
    want = y + linear(layer.think[3], fn.gelu(linear(layer.think[1], layer_norm(layer.think[0], y))))
    close(layer(x), want, 1e3 * want.abs().max())
    assert layer.think[1].out_features == 32


def test_a_layer_hears_both_sides():
    layer, x = shaken(Layer(8, 2)), normal(2, 4, 8, device="cpu")
    for i, j in (0, 3), (3, 0):
        other = x.clone()
        other[:, j] *= -1
        differs(layer(other)[:, i], layer(x)[:, i])


def test_a_transformer_is_its_formula_and_reads_token_place_time_and_label():
    net, x, t = shaken(Transformer(5, 3, width=8, depth=2, heads=2, classes=2)), torch.tensor([[0, 1, 4], [1, 1, 2]]), torch.tensor([3, 9])
    y = torch.tensor([1, 0])
    h = net.token.weight[x] + net.place + (time_of(net.cue, t) + net.cue.label.weight[y])[:, None]
    for layer in net.layers[:2]: h = layer(h)
    want = layer_norm(net.layers[2], h)
    close(net(x, t, y), want, 1e4 * want.abs().max())
    assert len(net.layers) == 3
    for other in net(x, t + 1, y), net(x.flip(1), t, y).flip(1), net(x, t, y.flip(0)), net(x, t):
        differs(other, want)
    differs(net(torch.tensor([[0, 1, 3], [1, 1, 3]]), t, y)[:, :2], want[:, :2])


def test_every_weight_of_a_token_denoiser_learns_and_rows_do_not_see_each_other():
    net, x, t = shaken(TokenDenoiser(Transformer(5, 3, width=8, depth=1, heads=2), 8, 4)), torch.tensor([[0, 1, 4], [1, 3, 2]]), torch.tensor([3, 9])
    guess = net(x, t)
    assert isinstance(guess, LazyCategorical) and guess.logits.shape == (2, 3, 4) and guess.features.shape == (2, 3, 8)
    close(guess.logits, linear(net.head, guess.features), 1e3)
    rows = torch.cat([net(x[i:i + 1], t[i:i + 1]).logits for i in range(2)])
    close(guess.logits, rows, 1e3 * rows.abs().max())
    guess.logits.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


def test_a_token_denoiser_passes_labels_on():
    net, x, t = shaken(TokenDenoiser(Transformer(5, 3, 8, 1, 2, classes=2), 8, 4)), torch.tensor([[0, 1, 4]]), torch.tensor([3])
    differs(net(x, t, y=torch.tensor([1])).logits, net(x, t).logits)


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
        net = shaken(Transformer(5, 3, width=8, depth=1, heads=2, dropout=0.5))
        assert torch.equal(net.eval()(x, t), net(x, t))
        net.get_submodule(part).train()
        assert not torch.equal(net(x, t), net(x, t)), part
    assert not any(m.p for m in (*Transformer(5, 3, width=8).modules(), *Layer(8, 2).modules()) if isinstance(m, torch.nn.Dropout))


def test_embeddings_start_with_length_one():
    net = Transformer(1000, 500, width=64)
    for w in net.token.weight, net.place: assert abs(w.square().sum(1).mean().item() - 1) < 5 * math.sqrt(2 / 64 / len(w))


def test_one_head_is_enough_and_what_goes_without_saying():
    assert Layer(8, 1)(torch.zeros(2, 3, 8)).shape == (2, 3, 8)
    plain = Transformer(5, 3)
    assert plain.place.shape == (3, 64) and len(plain.layers) == 3 and plain.layers[0].look.heads == 4 and plain.drop.p == 0


# -------------------------------------------------------------------------------------------------------------- points


def test_an_mlp_is_its_formula_starts_at_zero_and_learns():
    x, t, y = normal(3, 2, device="cpu"), torch.tensor([1, 5, 9]), torch.tensor([1, 0, 3])
    assert torch.equal(MLP(2, 8, classes=3).double()(x, t, y), torch.zeros_like(x))
    net = shaken(MLP(2, 8, depth=2, classes=3, out=4))
    cue, h = time_of(net.cue, t) + net.cue.label.weight[y], linear(net.enter, x)
    for norm, _, layer in net.layers: h = h + linear(layer, fn.silu(layer_norm(norm, h + cue)))
    want = linear(net.leave[2], fn.silu(layer_norm(net.leave[0], h)))
    close(net(x, t, y), want, 1e3 * want.abs().max())
    assert want.shape == (3, 4) and len(net.layers) == 2
    net(x, t, torch.tensor([0, 1, 2])).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in net.parameters())
    defaults = {k: p.default for k, p in inspect.signature(MLP).parameters.items()}
    assert (defaults["width"], defaults["depth"], defaults["classes"], defaults["out"]) == (128, 3, None, None)
    assert len(MLP(2).layers) == 3 and MLP(2).enter.out_features == 128


ONE = torch.ones(2, dtype=torch.long)
NET = UNet(1, 8, (1, 2, 1), blocks=1, attention=(), classes=None)
READS = UNet(1, 8, (1, 2), blocks=1, context=5)
CASES = {
    "a width that heads do not share": (ValueError, lambda: Layer(12, 8), "share the width 12", "8"),
    "no heads": (ValueError, lambda: Attention(12, 0), "share the width 12", "0"),
    "sentences of another length": (ValueError, lambda: Transformer(5, 3, 8, 1, 2)(torch.zeros(2, 4, dtype=torch.long), ONE),
                                    r"sentences \(b, 3\)", r"\(2, 4\)"),
    "one sentence without a batch": (ValueError, lambda: Transformer(5, 3, 8, 1, 2)(torch.zeros(3, dtype=torch.long), ONE),
                                     r"sentences \(b, 3\)", r"\(3,\)"),
    "points of another size": (ValueError, lambda: MLP(3, 8)(torch.zeros(2, 2), ONE), r"points \(b, 3\)", r"\(2, 2\)"),
    "a point without a batch": (ValueError, lambda: MLP(3, 8)(torch.zeros(3), ONE), r"points \(b, 3\)", r"\(3,\)"),
    "labels nobody asked for": (ValueError, lambda: Cue(8, 8)(ONE, ONE), "no labels", "2 of them"),
    "labels for another batch": (ValueError, lambda: Cue(8, 8, 3)(ONE, ONE[:1]), r"shape of t, \(2,\)", r"\(1,\)"),
    "sides that do not fit": (ValueError, lambda: NET(torch.zeros(2, 1, 10, 8), ONE),
                              "divisible by 4: height 8 or 12, width 8;", r"\(10, 8\)"),
    "sides that are too small": (ValueError, lambda: NET(torch.zeros(2, 1, 12, 3), ONE), "divisible by 4: height 12, width 4;", r"\(12, 3\)"),
    "other channels": (ValueError, lambda: NET(torch.zeros(2, 3, 8, 8), ONE), r"images \(b, 1, h, w\)", r"\(2, 3, 8, 8\)"),
    "images without channels": (ValueError, lambda: NET(torch.zeros(2, 8, 8), ONE), r"images \(b, 1, h, w\)", r"\(2, 8, 8\)"),
    "a context nobody reads": (ValueError, lambda: NET(torch.zeros(2, 1, 8, 8), ONE, None, torch.zeros(2, 3, 5)), "no context", r"\(2, 3, 5\)"),
    "a context of another width": (ValueError, lambda: READS(torch.zeros(2, 1, 8, 8), ONE, None, torch.zeros(2, 3, 4)),
                                   r"a context \(b, m, 5\)", r"\(2, 3, 4\)"),
    "a context without rows": (ValueError, lambda: READS(torch.zeros(2, 1, 8, 8), ONE, None, torch.zeros(2, 5)), r"a context \(b, m, 5\)", r"\(2, 5\)"),
    "a level that does not exist": (ValueError, lambda: UNet(1, 8, (1, 2), attention=(2,)), r"levels in -2\.\.1", r"\(2,\)"),
    "a level before the first": (ValueError, lambda: UNet(1, 8, (1, 2), attention=(0, -3)), r"levels in -2\.\.1", r"\(0, -3\)"),
    "a context and nobody to read it": (ValueError, lambda: UNet(1, 8, attention=(), context=5), "attention at some level", r"\(\)"),
    "features that do not fall into groups": (ValueError, lambda: UNet(1, 12, (1, 2)), "multiples of 8", r"\[12, 24\]"),
    "a level without features": (ValueError, lambda: UNet(1, 8, (1, 0)), "multiples of 8", r"\[8, 0\]"),
    "no level": (ValueError, lambda: UNet(1, 8, ()), "multiples of 8", r"\[\]"),
}
test_the_message_says_what_was_expected_and_what_came = refuses(CASES)

"""Pictures, folders of them, digits and the distances, against slow loops, resizing by hand and known values."""
import inspect
import itertools
import math
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import close, normal, refuses
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch.utils.data import default_collate

from udm_book.data import (
    SUFFIXES,
    ImageFolder,
    check_data,
    digits,
    energy_distance,
    from_bytes,
    mmd,
    nearest_distance,
    read_image,
    save_grid,
    save_images,
    to_bytes,
)


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
    close(nearest_distance(a[:1], b[:1]), [math.dist(a[0], b[0])], 100)


# ------------------------------------------------------------------------------------------------------------------- MMD


def loop_mmd(a, b, h):
    def k(x, y): return math.exp(-math.dist(x, y) ** 2 / (2 * h * h))
    def within(x): return sum(k(p, q) for i, p in enumerate(x) for j, q in enumerate(x) if i != j) / len(x) / (len(x) - 1)
    return within(a) + within(b) - 2 * sum(k(x, y) for x in a for y in b) / len(a) / len(b)


@pytest.mark.parametrize("h", [0.3, 1.0, 5.0])
def test_mmd_is_the_mean_over_pairs(h):
    a, b = normal(7, 2, device="cpu"), normal(5, 2, seed=1, device="cpu")
    assert mmd(a, b, h) == pytest.approx(loop_mmd(a.tolist(), b.tolist(), h), abs=1e-12)
    assert mmd(a[:2], b[:2], h) == pytest.approx(loop_mmd(a[:2].tolist(), b[:2].tolist(), h), abs=1e-12)
    assert mmd(a.view(7, 1, 2, 1), b.view(5, 1, 2, 1), h) == pytest.approx(mmd(a, b, h), abs=1e-12)


def test_the_bandwidth_is_the_median_distance_of_the_reference():
    a, b = normal(6, 2, device="cpu"), 3 * normal(7, 2, seed=1, device="cpu")
    h = sorted(math.dist(x, y) for x, y in itertools.combinations(b.tolist(), 2))[10]       # of 21
    assert mmd(a, b) == pytest.approx(loop_mmd(a.tolist(), b.tolist(), h), abs=1e-12)
    assert mmd(2 * a, 2 * b) == pytest.approx(mmd(a, b), abs=1e-12) and mmd(a, b) != pytest.approx(mmd(b, a), abs=1e-3)


def test_mmd_has_the_value_of_the_closed_form():
    "N(0, I) against N(δ, I/4) in three dimensions, bandwidth 1.5: 150 pairs of sets of 6, within 5 standard errors."
    h, d = 1.5, 3
    def kernel(shift, v): return (h * h / (h * h + v)) ** (d / 2) * math.exp(-d * shift**2 / (2 * (h * h + v)))
    for shift, scale in (0.0, 1.0), (0.0, 0.5), (0.7, 0.5):
        truth = kernel(0, 2) + kernel(0, 2 * scale**2) - 2 * kernel(shift, 1 + scale**2)
        values = torch.tensor([mmd(normal(6, d, seed=k, device="cpu"), shift + scale * normal(6, d, seed=k + 900, device="cpu"), h)
                               for k in range(150)])
        assert abs(values.mean() - truth) < 5 * values.std() / 150**0.5
        if not truth: assert values.min() < 0


# ----------------------------------------------------------------------------------------------------- bytes and pictures


def picture(*shape, seed=0):
    """Random bytes."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def image_of(pixels):
    """A Pillow image of `(h, w)` or `(h, w, 3)` bytes."""
    return Image.fromarray(pixels.numpy())


def pixels_of(path):
    """The bytes of a file, `(h, w)` or `(h, w, c)`."""
    with Image.open(path) as im: return torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8).view(im.height, im.width, -1).squeeze(2)


def in_folder(call):
    """`call` on a folder of its own. (No fixture: mutants run these tests as plain calls.)"""
    with tempfile.TemporaryDirectory() as place: return call(Path(place))


def stored(image, name="a.png", size=4, channels=3, **options):
    """What `read_image` makes of a Pillow image written to a file."""
    def call(place):
        image.save(place / name, **options)
        return read_image(place / name, size, channels)
    return in_folder(call)


def test_all_bytes_survive():
    x = torch.arange(256, dtype=torch.uint8)
    assert from_bytes(x).dtype == torch.float32 and from_bytes(x).tolist() == [pytest.approx(k / 127.5 - 1, abs=1e-6) for k in range(256)]
    assert torch.equal(to_bytes(from_bytes(x)), x) and torch.equal(to_bytes(from_bytes(x).double()), x)
    assert to_bytes(torch.tensor([0.0, 0.0078])).tolist() == [128, 128] and check_data(from_bytes(x)).min() == -1
    near = from_bytes(x)[1:-1]
    for off in -0.45, 0.45: assert torch.equal(to_bytes(near + off / 127.5), x[1:-1])


@pytest.mark.parametrize("c", [1, 3])
def test_pictures_are_written_as_they_are(c):
    x = picture(5, c, 6, 9)
    def call(place):
        paths = save_images(from_bytes(x), place / "new" / "folder")
        assert [p.relative_to(place).as_posix() for p in paths] == [f"new/folder/{i:06}.png" for i in range(5)]
        for p, want in zip(paths, x): assert torch.equal(pixels_of(p), want.permute(1, 2, 0).squeeze(2))
        named = save_images(from_bytes(x[:2]), place, ["1/a", 7])
        assert [p.relative_to(place).as_posix() for p in named] == ["1/a.png", "7.png"]
        assert len([p for p in place.rglob("*") if p.is_file()]) == 7
        assert in_range(ImageFolder(place / "new", 6, c)[0])
    in_folder(call)


def in_range(x): return check_data(x) is x


def test_a_grid_shows_all_pictures_in_reading_order():
    x = picture(5, 3, 4, 7)
    def call(place):
        path = save_grid(from_bytes(x), str(place / "a" / "grid.PNG"), columns=2, scale=3)
        assert path == place / "a" / "grid.PNG"
        sheet = pixels_of(path)
        assert sheet.shape == (3 * 14 - 2, 2 * 23 - 2, 3)
        large = x.permute(0, 2, 3, 1).repeat_interleave(3, 1).repeat_interleave(3, 2)
        for i in range(5):
            top, left = 14 * (i // 2), 23 * (i % 2)
            assert torch.equal(sheet[top:top + 12, left:left + 21], large[i])
        assert (sheet[12:14] == 128).all() and (sheet[:, 21:23] == 128).all() and (sheet[28:, 23:] == 128).all()
    in_folder(call)


@pytest.mark.parametrize("n, h, columns, scale, size", [
    (9, 8, None, None, (3 * 66 - 2, 3 * 66 - 2)), (10, 32, None, None, (4 * 66 - 2, 3 * 66 - 2)), (2, 100, None, None, (202, 100)),
    (1, 24, None, None, (48, 48)), (1, 13, None, None, (52, 52)), (3, 8, 9, 1, (28, 8)), (4, 8, 1, 2, (16, 70)), (4, 64, 2, None, (130, 130))])
def test_the_usual_grid_is_a_square_of_visible_pictures(n, h, columns, scale, size):
    def call(place): return Image.open(save_grid(torch.zeros(n, 1, h, h), place / "g.png", columns, scale)).size
    assert in_folder(call) == size


def test_the_longer_side_of_a_picture_sets_its_scale():
    def call(place): return Image.open(save_grid(torch.zeros(1, 3, 2, 1), place / "g.png")).size
    assert in_folder(call) == (32, 64)


def test_a_failure_leaves_the_old_file():
    def call(place):
        path = save_grid(torch.zeros(1, 1, 8, 8), place / "g.png")
        before, real = path.read_bytes(), Image.Image.save
        def breaks(self, to, *args, **more):
            Path(to).write_bytes(b"half")
            raise OSError("disk full")
        Image.Image.save = breaks
        try:
            with pytest.raises(OSError, match="disk full"): save_grid(torch.ones(1, 1, 8, 8), path)
        finally: Image.Image.save = real
        assert path.read_bytes() == before and [p.name for p in place.iterdir()] == ["g.png"]
    in_folder(call)


# ------------------------------------------------------------------------------------------------------ reading pictures


@pytest.mark.parametrize("h, w", [(4, 4), (4, 5), (4, 6), (4, 9), (5, 4), (7, 4), (8, 4)])
def test_a_picture_of_the_size_wanted_is_cut_and_not_touched(h, w):
    x = picture(h, w, 3)
    top, left = (h - 4) // 2, (w - 4) // 2
    assert torch.equal(stored(image_of(x)), x[top:top + 4, left:left + 4].permute(2, 0, 1))
    assert torch.equal(stored(image_of(x[..., 0]), channels=1), x[top:top + 4, left:left + 4, 0][None])


def cubic(d):
    """The kernel of bicubic interpolation, a = -1/2."""
    d = abs(d)
    return 1.5 * d**3 - 2.5 * d**2 + 1 if d < 1 else -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0


def by_hand(x, size, side, start):
    """One axis of an antialiased bicubic resize of `x (n, …)`: the kernel is as wide as a new pixel; rounded as Pillow does."""
    scale = side / size
    wide = max(scale, 1.0)
    rows = []
    for k in range(size):
        centre = start + (k + 0.5) * scale
        weights = torch.tensor([cubic((j + 0.5 - centre) / wide) for j in range(len(x))], dtype=torch.float64)
        rows.append(torch.tensordot(weights / weights.sum(), x.double(), 1))
    return torch.stack(rows).round().clamp(0, 255)


@pytest.mark.parametrize("h, w, size", [(24, 24, 4), (20, 33, 5), (41, 16, 3), (7, 12, 5), (6, 9, 11)])
def test_resizing_averages_over_what_a_new_pixel_covers(h, w, size):
    "Also beyond the square's edge, where the picture has more. Two roundings: within one shade."
    x, side = picture(h, w), min(h, w)
    rows = by_hand(x.T, size, side, (w - side) // 2).T
    want = by_hand(rows, size, side, (h - side) // 2)
    assert (stored(image_of(x), size=size, channels=1)[0] - want).abs().max() <= 1


def test_fine_stripes_vanish():
    "Every eighth pixel of stripes nine pixels wide is stripes again; averaged, less than a tenth of them is left."
    stripes = ((torch.arange(256) % 9 < 4) * 255).to(torch.uint8).expand(256, 256).contiguous()
    assert stored(image_of(stripes), size=32, channels=1).double().std() < stripes[::8, ::8].double().std() / 10


KINDS = {
    "black and white": (Image.new("1", (6, 4), 1), {}, (255, 255, 255)),
    "grey": (Image.new("L", (6, 4), 100), {}, (100, 100, 100)),
    "colour": (Image.new("RGB", (6, 4), (200, 100, 10)), {}, (200, 100, 10)),
    "16 bits": (Image.new("I;16", (6, 4), 25700), {}, (100, 100, 100)),
    "16 bits, black": (Image.new("I;16", (6, 4), 0), {}, (0, 0, 0)),
    "16 bits, white": (Image.new("I;16", (6, 4), 65535), {}, (255, 255, 255)),
    "16 bits, below half a shade": (Image.new("I;16", (6, 4), 128), {}, (0, 0, 0)),
    "16 bits, above half a shade": (Image.new("I;16", (6, 4), 25700 + 129), {}, (101, 101, 101)),
    "grey, a fifth opaque": (Image.new("LA", (6, 4), (100, 51)), {}, (224, 224, 224)),
    "colour, nothing opaque": (Image.new("RGBA", (6, 4), (0, 0, 0, 0)), {}, (255, 255, 255)),
    "colour, a fifth opaque": (Image.new("RGBA", (6, 4), (200, 0, 100, 51)), {}, (244, 204, 224)),
    "a transparent shade": (Image.new("RGB", (6, 4), (1, 2, 3)), dict(transparency=(1, 2, 3)), (255, 255, 255)),
    "another transparent shade": (Image.new("RGB", (6, 4), (1, 2, 3)), dict(transparency=(3, 2, 1)), (1, 2, 3)),
    "ink": (Image.new("CMYK", (6, 4), (255, 0, 0, 0)), dict(name="a.tif"), (0, 255, 255)),
    "int32 within 16 bits": (Image.new("I", (6, 4), 514), dict(name="a.tif"), (2, 2, 2)),
    "the other byte order": (Image.new("I;16B", (6, 4), 514), dict(name="a.tif"), (2, 2, 2)),
    "the first frame": (Image.new("L", (6, 4), 30), dict(name="a.gif", save_all=True, append_images=[Image.new("L", (6, 4), 220)]), (30, 30, 30)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture(kind):
    image, options, colour = KINDS[kind]
    x = stored(image, **options)
    assert x.dtype == torch.uint8 and x.shape == (3, 4, 4)
    assert x.view(3, -1).T.unique(dim=0).tolist() == [list(colour)]
    grey = stored(image, channels=1, **options)
    assert grey.shape == (1, 4, 4) and abs(grey.double() - sum(p * c for p, c in zip((0.299, 0.587, 0.114), colour))).max() <= 1


@pytest.mark.parametrize("palette, options, colour", [([0, 0, 0, 200, 100, 10], {}, [200, 100, 10]),
                                                      ([0, 0, 0, 200, 100, 10], dict(transparency=1), [255, 255, 255])])
def test_palettes(palette, options, colour):
    image = Image.new("P", (6, 4), 1)
    image.putpalette(palette)
    for name in "a.png", "a.gif": assert stored(image, name, **options)[:, 2, 2].tolist() == colour


def test_pictures_are_turned_upright():
    x = picture(4, 4, 3)
    turned = {1: x, 2: x.flip(1), 3: x.flip(0, 1), 4: x.flip(0), 5: x.transpose(0, 1), 6: x.rot90(-1), 7: x.flip(0, 1).transpose(0, 1), 8: x.rot90(1)}
    for way, want in turned.items():
        note = Image.Exif()
        note[0x0112] = way
        assert torch.equal(stored(image_of(x), exif=note), want.permute(2, 0, 1)), way


@pytest.mark.parametrize("h, w, decoded", [(300, 450, (113, 75)), (300, 1200, (300, 75)), (1200, 300, (75, 300)), (119, 480, (480, 119))])
def test_large_jpegs_are_decoded_small_but_not_too_small(h, w, decoded):
    "300 at 30: a quarter, as an eighth would leave 38. 119: in full, as a half would leave less than 60."
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    smooth = (128 + 60 * torch.sin(x / 40) + 60 * torch.cos(y / 30)).to(torch.uint8)
    asked, real = [], JpegImageFile.draft
    def draft(self, mode, size):
        answer = real(self, mode, size)
        asked.append(self.size)
        return answer
    JpegImageFile.draft = draft
    try: small = stored(image_of(smooth), "a.jpg", size=30, channels=1, quality=95)
    finally: JpegImageFile.draft = real
    assert asked == [decoded]
    assert (small.double() - stored(image_of(smooth), size=30, channels=1).double()).abs().max() < 6


def test_the_usual_picture_is_in_colour():
    def call(place):
        image_of(picture(4, 4, 3)).save(place / "a.png")
        assert read_image(place / "a.png", 1).shape == ImageFolder(place, 1)[0].shape == (3, 1, 1)
    in_folder(call)
    usual = inspect.signature(ImageFolder).parameters
    assert usual["cache"].default == 2**30 and usual["progress"].default is False


# -------------------------------------------------------------------------------------------------------------- a folder


def folder_of(files, call, **more):
    """`call` on an ImageFolder, from `{name: picture | bytes}`."""
    def inside(place):
        for name, content in files.items():
            path = place / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes): path.write_bytes(content)
            else: image_of(content).save(path, format=None if path.suffix.lower() in SUFFIXES else "PNG")
        (place / "data").mkdir(exist_ok=True)
        return call(place / "data", **more)
    return in_folder(inside)


def load(place, size=4, channels=1, **more):
    """An ImageFolder."""
    return ImageFolder(place, size, channels, **more)


@contextmanager
def warned():
    """The messages of the warnings that come."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield said


SHADES = {"b/x.png": 10, "a/y.PNG": 20, "a/deep/er/z.bmp": 30, "c.gif": 40, "a/10.png": 50, "a/9.png": 60}
SORTED = [50, 60, 30, 20, 10, 40]                                                   # a/10 a/9 a/deep a/y b/x c


def shade(v, h=4, w=4): return torch.full((h, w), v, dtype=torch.uint8)


@pytest.mark.parametrize("cache", [0, 2**30])
def test_a_folder_is_read_in_order(cache):
    files = {name: shade(v) for name, v in SHADES.items()}
    more = {"notes.txt": b"x", ".hidden.png": b"x", ".cache/a.png": b"x", "a/._y.PNG": b"x", "a/b.png.txt": b"x"}
    def call(place):
        data = load(place, cache=cache)
        assert len(data) == 6 and [to_bytes(x).unique().tolist() for x in data] == [[v] for v in SORTED]
        assert all(in_range(x) and x.shape == (1, 4, 4) and x.dtype == torch.float32 for x in data)
        assert data.classes == () and data.skipped == [] and data.files[0] == place / "a" / "10.png"
        assert torch.equal(data[-1], data[5]) and (data.pixels is None) == (cache == 0)
        for i in 6, -7: pytest.raises(IndexError, data.__getitem__, i)
        assert load(place, channels=3)[0].shape == (3, 4, 4) and load(str(place), 7)[0].shape == (1, 7, 7)
    folder_of(files | more, call)


def test_the_cache_is_used_where_all_pictures_fit():
    files = {f"{i}.png": shade(9) for i in range(5)}
    def call(place): return [load(place, 4, c, cache=cache).pixels is None for c, cache in ((1, 80), (1, 79), (3, 240), (3, 239))]
    assert folder_of(files, call) == [False, True, False, True]


@pytest.mark.parametrize("cache", [0, 2**30])
def test_labels_are_the_folders(cache):
    files = {name: shade(v) for name, v in SHADES.items() if "/" in name} | {".x/a.png": shade(1)}
    def call(place):
        data = load(place, labels=True, cache=cache)
        assert data.classes == ("a", "b") and [y for _, y in data] == [0, 0, 0, 0, 1]
        assert [to_bytes(x)[0, 0, 0].item() for x, _ in data] == SORTED[:5]
        x, y = default_collate([data[0], data[4]])
        assert x.shape == (2, 1, 4, 4) and y.tolist() == [0, 1]
    folder_of(files, call)


def broken():
    """Sound pictures and, between them, two that are none."""
    whole = folder_of({"a.png": picture(16, 16)}, lambda place: (place / "a.png").read_bytes())
    return {"a/0.png": shade(1), "a/1.png": whole[:-40], "b/2.png": shade(2), "b/3.jpg": b"<html>", "b/4.png": shade(3)}


def test_broken_files_are_left_out_and_named():
    def call(place):
        with warned() as said: data = load(place, skip_broken=True, labels=True)
        assert [to_bytes(x)[0, 0, 0].item() for x, _ in data] == [1, 2, 3] and [y for _, y in data] == [0, 1, 1]
        assert [path for path, _ in data.skipped] == [place / "a/1.png", place / "b/3.jpg"] and data.files[1] == place / "b/2.png"
        assert data.skipped[1][1] == "cannot identify image file" and data.skipped[0][1]
        (message,) = [str(w.message) for w in said]
        assert "2 of 5" in message and all(f"{path} ({why})" in message for path, why in data.skipped)
        with warned(): late = load(place, cache=0, skip_broken=True)                    # headers only
        assert [path for path, _ in late.skipped] == [place / "b/3.jpg"] and len(late) == 4 and late.pixels is None
    folder_of(broken(), call)


def test_all_broken_files_are_named_in_one_error():
    def call(place):
        with pytest.raises(ValueError, match=r"2 of 5: .*a/1.png \(.*\); .*b/3.jpg \(cannot identify image file\). Mend"): load(place)
        with pytest.raises(ValueError, match=r"1 of 5: .*b/3.jpg \(cannot identify image file\)"): load(place, cache=0)    # headers only
    folder_of(broken(), call)


def test_a_picture_that_breaks_later():
    "Not kept in memory: refused when its turn comes, or the next one that can be read takes its place."
    files = {f"{i}.png": shade(i) for i in range(4)}
    def call(place):
        kept, strict, lenient = load(place), load(place, cache=0), load(place, cache=0, skip_broken=True)
        for name in "1.png", "3.png": (place / name).write_bytes(b"")
        (place / "2.png").unlink()
        assert [to_bytes(x)[0, 0, 0].item() for x in kept] == [0, 1, 2, 3] and to_bytes(strict[0])[0, 0, 0] == 0
        for i in 1, 2, 3:
            with pytest.raises(ValueError, match=rf"expected a readable image; got .*/{i}.png \(.+\)"): strict[i]
        with warned() as said:
            for _ in range(2): assert [to_bytes(x)[0, 0, 0].item() for x in lenient] == [0, 0, 0, 0]
        assert [path.name for path, _ in lenient.skipped] == ["1.png", "2.png", "3.png"] and len(said) == 3
        assert "1.png can no longer be read" in str(said[0].message)
        (place / "0.png").unlink()
        with warned(), pytest.raises(ValueError, match="expected readable images; got none any more of 4"): lenient[2]
    folder_of(files, call)


def test_a_later_break_keeps_the_label_with_its_picture():
    def call(place):
        data = load(place, labels=True, cache=0, skip_broken=True)
        (place / "a/0.png").unlink()
        with warned(): x, y = data[0]
        assert to_bytes(x)[0, 0, 0] == 7 and y == 1
    folder_of({"a/0.png": shade(3), "b/0.png": shade(7)}, call)


def test_what_cannot_be_seen_from_its_message_is_named_by_its_kind():
    assert ImageFolder._read(SimpleNamespace(size="?", channels=3), Path(__file__))[1]
    real = Image.open
    def fails(*args, **more): raise EOFError
    Image.open = fails
    try: assert ImageFolder._read(SimpleNamespace(size=4, channels=3), Path("a.png")) == (None, "EOFError")
    finally: Image.open = real


def test_progress_is_shown_where_asked_for(capsys):
    folder_of({"a.png": shade(1)}, lambda place: load(place))
    assert capsys.readouterr().err == ""
    folder_of({"a.png": shade(1)}, lambda place: load(place, progress=True))
    assert "1/1" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/nowhere", __file__])
def test_a_folder_that_is_none(path):
    with pytest.raises(NotADirectoryError, match=f"expected a folder of images; got {path}, which is none"): load(path)


def test_the_nine_most_frequent_kinds_are_listed():
    files = {f"{i}.{'x' * (1 + i % 11)}": b"" for i in range(40)}
    with pytest.raises(ValueError, match=r"got (\d \.x+, ){8}\d \.x+$"): folder_of(files, load)


def test_loaders_of_torch_take_it():
    files = {f"{'ab'[i % 2]}/{i}.png": shade(i) for i in range(6)}
    def call(place):
        for workers in 0, 2:
            loader = torch.utils.data.DataLoader(load(place, labels=True), batch_size=4, num_workers=workers)
            assert [y.tolist() for _, y in loader] == [[0, 0, 0, 1], [1, 1]]
    folder_of(files, call)


# ------------------------------------------------------------------------------------------------------------- refusals

V = ValueError
x = torch.zeros(3, 1, 8, 8)
def saved(call): return in_folder(call)


def gone(place, **more):
    """The first picture of a folder, deleted meanwhile."""
    data = load(place, cache=0, **more)
    (place / "a.png").unlink()
    with warned(): return data[0]


CASES = {
    "a sample beyond the range": (V, lambda: to_bytes(x + 1.01), r"data in \[-1.0, 1.0\]", r"\[1.01, 1.01\]: rescale them, clamp samples"),
    "a grid beyond the range": (V, lambda: saved(lambda f: save_grid(x - 1.01, f / "a.png")), r"data in \[-1.0, 1.0\]", "-1.01"),
    "pictures that are not finite": (V, lambda: saved(lambda f: save_images(x / 0, f)), "finite data", "192 values"),
    "bytes for pictures": (TypeError, lambda: saved(lambda f: save_images(x.byte(), f)), "floating-point data", "torch.uint8"),
    "two pictures of one name": (V, lambda: saved(lambda f: save_images(x, f, ["a", "b", "a"])), "3 different names", "3, 2 of them"),
    "too few names": (V, lambda: saved(lambda f: save_images(x, f, ["a", "b"])), "3 different names", "2, 2 of them"),
    "four channels": (V, lambda: saved(lambda f: save_images(x.expand(3, 4, 8, 8), f)), "1 or 3 channels", "4"),
    "no PNG": (V, lambda: saved(lambda f: save_grid(x, f / "a.jpg")), "a name.png", "a.jpg, 2 and 8"),
    "no column": (V, lambda: saved(lambda f: save_grid(x, f / "a.png", 0)), "at least 1 column", "0 and 8"),
    "a scale below 1": (V, lambda: saved(lambda f: save_grid(x, f / "a.png", 1, 0)), "at least 1 column and scale", "1 and 0"),
    "pixels without a range": (V, lambda: stored(Image.new("F", (4, 4), 0.5), "a.tif"), "8 or 16 bits", "mode F"),
    "pixels of 32 bits": (V, lambda: stored(Image.new("I", (4, 4), 65536), "a.tif"), "8 or 16 bits", "mode I, 65536 to 65536"),
    "pixels below 0": (V, lambda: stored(Image.new("I", (4, 4), -1), "a.tif"), "8 or 16 bits", "mode I, -1 to -1"),
    "size 0": (V, lambda: load(Path("."), 0), "size of at least 1", "0 and 1"),
    "two channels": (V, lambda: load(Path("."), 8, 2), "1 or 3 channels", "8 and 2"),
    "an empty folder": (V, lambda: folder_of({}, load), r"images \(.avif .* .png .*\) in .*data", "no files"),
    "a folder without images": (V, lambda: folder_of({"a.txt": b"", "x/b.txt": b"", "README": b"", ".c.png": b""}, load), "images", "2 .txt, 1 README"),
    "images beside the classes": (V, lambda: folder_of({"a/1.png": b"", "2.png": b""}, load, labels=True), "images in a folder for each class", "2.png beside them"),
    "a class without images": (V, lambda: folder_of({"a/1.png": b"", "b/1.txt": b""}, load, labels=True), "images in a folder for each class", "b without any"),
    "a broken file": (V, lambda: folder_of({"a.png": shade(1), "b.png": b""}, load), "images that can be read", "1 of 2: .*b.png"),
    "nothing but broken files": (V, lambda: folder_of({"a.png": b"", "b.png": b""}, load, skip_broken=True), "images that can be read", "2 of 2: .*b.png"),
    "a picture gone from the folder": (V, lambda: folder_of({"a.png": shade(1)}, gone), "a readable image", "a.png .*No such file"),
    "no picture left in the folder": (V, lambda: folder_of({"a.png": shade(1)}, gone, skip_broken=True), "readable images", "none any more of 1"),
    "rows of one place as reference": (V, lambda: mmd(x, x), "a bandwidth above 0", "0"),
    "a bandwidth of 0": (V, lambda: mmd(x, x, 0.0), "a bandwidth above 0", "0"),
    "a bandwidth that is no number": (V, lambda: mmd(x, x, math.nan), "a bandwidth above 0", "nan"),
    "one row for MMD": (V, lambda: mmd(x, x[:1]), "at least two rows", "3 and 1"),
}
test_the_message_says_what_was_expected_and_what_came = refuses(CASES)

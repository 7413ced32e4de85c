"""Image files from outside: what is opened, what is refused before it is decoded, and how images become squares.

Bugs planted in a copy, each seen red: all of Pillow's formats; no look at the file's kind; the limit checked after
decoding; a quarter turn ignored in the header; an MPO taken for an animation; a transparent colour dropped; the longer
side cropped at its beginning; features cached under one key whatever data.fit is.
"""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from advgrpo.data.images import MAX_PIXELS, ImageError, open_image, read_header, to_square
from advgrpo.data.references import ReferenceSet, import_command
from advgrpo.errors import UserError
from advgrpo.rewards import build_reward


def gradient(width: int, height: int) -> np.ndarray:
    """uint8 [h, w, 3]: red grows to the right, green downwards, so every pixel knows where it was."""
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)
    return np.stack(np.broadcast_arrays(x[None], y[:, None], np.float64(40)), -1).round().astype(np.uint8)


def png(width: int, height: int, *, depth: int = 8, kind: int = 2) -> bytes:
    """A PNG that promises a size and holds no pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_png_jpeg_and_webp_are_opened_whatever_they_are_called(tmp_path, name):
    Image.fromarray(gradient(20, 20)).save(tmp_path / name, quality=95)
    os.rename(tmp_path / name, tmp_path / "image.png")
    found = np.array(open_image(tmp_path / "image.png"))
    assert np.abs(found.astype(int) - gradient(20, 20)).mean() < 4


@pytest.mark.parametrize("kind", ["EPS", "TIFF", "BMP", "GIF", "PPM", "ICO"])
def test_no_other_decoder_runs(tmp_path, kind, monkeypatch):
    """Pillow opens an EPS that is called .png by starting Ghostscript."""
    image = Image.fromarray(gradient(32, 32))
    image.save(tmp_path / "x.png", kind)
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was started"))
    with pytest.raises(ImageError, match="no PNG, JPEG or WEBP"):
        open_image(tmp_path / "x.png")


def test_pipes_devices_and_folders_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zeros.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "zeros.png", "folder.png"):
        with pytest.raises(ImageError, match=rf"{name} is not a regular file"):
            open_image(tmp_path / name)
    with pytest.raises(ImageError, match="cannot be read"):
        open_image(tmp_path / "a\0.png")


def test_links_are_followed_to_regular_files(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(gradient(20, 20)).save(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "elsewhere" / "a.png")  # as in the hub's cache
    assert open_image(tmp_path / "link.png").size == (20, 20)


@pytest.mark.parametrize(("width", "height"), [(8193, 8193), (2**26 + 1, 1), (30_000, 30_000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_they_are_decoded(tmp_path, width, height):
    (tmp_path / "bomb.png").write_bytes(png(width, height))
    for look in (open_image, read_header):
        with pytest.raises(ImageError, match=rf"more than {MAX_PIXELS:,} pixels; make it smaller"):
            look(tmp_path / "bomb.png")


def test_a_budget_of_the_caller_and_a_content_instead_of_a_file():
    content = io.BytesIO()
    Image.fromarray(gradient(32, 32)).save(content, "PNG")
    assert open_image(content, "image 3").size == (32, 32)
    with pytest.raises(ImageError, match="image 3 is 32x32: more than 1,000 pixels"):
        open_image(content, "image 3", max_pixels=1000)
    jpeg = io.BytesIO()
    Image.fromarray(gradient(32, 32)).save(jpeg, "JPEG")
    with pytest.raises(ImageError, match="unreadable"):
        open_image(jpeg, "image 3", formats=("PNG",))


def frames(*colours):
    return [Image.new("RGB", (16, 16), colour) for colour in colours]


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_animations_are_no_references(tmp_path, suffix):
    first, *others = frames("red", "blue")
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=others)
    with pytest.raises(ImageError, match="is animated"):
        open_image(tmp_path / f"a.{suffix}")


def test_the_previews_in_a_phones_jpeg_are_no_animation(tmp_path):
    first, *others = frames("red", "blue")
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=others)
    assert open_image(tmp_path / "a.jpg").getpixel((0, 0))[2] < 10


def modes():
    grey = Image.fromarray(gradient(16, 16)[..., 0])
    red = Image.new("RGB", (16, 16), "red")
    keyed = io.BytesIO()
    red.save(keyed, "PNG", transparency=(255, 0, 0))
    return {
        "RGBA": red.convert("RGBA"),
        "LA": grey.convert("LA"),
        "L": grey,
        "P": red.quantize(4),
        "1": grey.convert("1"),
        "I;16": Image.fromarray(gradient(16, 16)[..., 0].astype(np.uint16) * 257),
        "CMYK": red.convert("CMYK"),
        "transparent": keyed,
    }


@pytest.mark.parametrize("mode", modes())
def test_modes_other_than_rgb_are_no_references(tmp_path, mode):
    image = modes()[mode]
    file = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    file.write_bytes(image.getvalue()) if mode == "transparent" else image.save(file)
    expected = "has a transparent colour" if mode == "transparent" else f"has mode {mode}, not RGB"
    with pytest.raises(ImageError, match=expected) as error:
        open_image(file)
    assert error.value.importable


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "webp", "png"])
def test_the_header_is_upright_as_the_image_is(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{kind}"
    Image.fromarray(gradient(40, 20)).save(file, exif=exif)
    expected = (40, 20) if orientation < 5 else (20, 40)  # from 5 on it is turned by a quarter, mirrored or not
    assert read_header(file).size == open_image(file).size == expected


@pytest.mark.parametrize(
    ("fit", "size", "corners"),
    [
        ("crop", (20, 20), [(65, 0), (190, 0)]),  # the middle half of red's range
        ("letterbox", (40, 40), [(255, 255), (255, 255)]),
        ("stretch", (40, 20), [(0, 0), (255, 0)]),
    ],
)
def test_fits(fit, size, corners):
    wide = Image.fromarray(gradient(40, 20))
    square = to_square(wide, fit)
    assert square.size == size
    for x, expected in zip((0, square.width - 1), corners):
        assert np.abs(np.array(square.getpixel((x, 0))[:2]) - expected).max() <= 2
    upright = to_square(wide.transpose(Image.Transpose.TRANSPOSE), fit)
    assert np.array_equal(np.array(upright), np.array(square).transpose(1, 0, 2))
    if fit == "letterbox":
        assert np.array_equal(np.array(square)[10:30], np.array(wide))
        assert to_square(wide, fit, "#102030").getpixel((0, 0)) == (16, 32, 48)
    nearly = Image.fromarray(gradient(51, 50))
    assert to_square(nearly, fit) is nearly


@pytest.fixture
def wide(tmp_path):
    """A set of one wide and one square image."""
    folder = tmp_path / "my images"
    folder.mkdir()
    Image.fromarray(gradient(64, 32)).save(folder / "wide.png")
    Image.fromarray(gradient(32, 32)).save(folder / "square.png")
    (folder / "references.json").write_text('{"a": ["wide.png", "square.png"]}')
    return folder


def test_nothing_is_squashed_silently(wide):
    with pytest.raises(UserError, match=r"wide\.png is 64x32, not square, and would be squashed") as error:
        ReferenceSet.load(wide, ["a"])
    assert import_command(wide) in str(error.value)
    assert "'" in import_command(wide)  # the folder's name has a space
    assert "data.fit to crop or letterbox" in str(error.value)
    with pytest.raises(UserError, match="not square"):
        ReferenceSet.shared(wide, ["a"])


def test_what_a_model_sees_is_cropped_or_has_bars(wide):
    whole = torch.from_numpy(gradient(64, 32)).permute(2, 0, 1) / 255
    cropped = ReferenceSet.load(wide, ["a"], fit="crop")
    assert torch.equal(cropped.load_images([wide / "wide.png"])[0], whole[..., 16:48])
    boxed = ReferenceSet.load(wide, ["a"], fit="letterbox").load_images([wide / "wide.png"])[0]
    assert boxed.shape == (3, 64, 64)
    assert torch.equal(boxed[:, 16:48], whole)
    assert (boxed[:, :16] == 1).all()
    squares = [
        s.load_images(s.files("a"), size=(16, 16)) for s in (cropped, ReferenceSet.shared(wide, ["a"], fit="crop"))
    ]
    assert squares[0].shape == squares[1].shape == (2, 3, 16, 16)


def test_features_of_another_fit_are_not_taken_from_the_cache(wide):
    keys = {
        fit: ReferenceSet.load(wide, ["a"], fit=fit).content_key(wide / "wide.png") for fit in ("crop", "letterbox")
    }
    plain = ReferenceSet.load(wide, ["a"], fit="stretch").content_key(wide / "wide.png")
    assert len({*keys.values(), plain}) == 3


def test_a_similarity_is_to_the_fitted_image(wide):
    """A reward that compares with references gets what data.fit makes of them."""
    (wide / "square.png").unlink()
    similarity = build_reward("dino_similarity", path="tiny", image_size=48, device="cpu")
    middle = torch.from_numpy(gradient(64, 32)[:, 16:48]).permute(2, 0, 1)[None] / 255
    cropped = similarity.score(middle, ["a"], ReferenceSet.shared(wide, ["a"], fit="crop")).item()
    stretched = similarity.score(middle, ["b"], ReferenceSet.shared(wide, ["b"], fit="stretch")).item()
    assert cropped == pytest.approx(1, abs=1e-5)
    assert stretched < 1 - 1e-4

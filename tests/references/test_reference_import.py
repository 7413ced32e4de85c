"""`advgrpo.references import`: any folder of images becomes a set that training accepts; originals are only read.

Bugs planted in a copy, each seen red: 16 bits clipped; alpha dropped; a tRNS colour kept; the colour profile ignored;
EXIF ignored; the crop at the left; letterbox bars in black; finished images made again; a damaged or painted-over one
kept; hidden folders read; the index written although images are unusable; another recipe mixed in; a target around
the originals; captions of several lines; a blank caption accepted;
images in a single colour, before or after cropping, let pass. In `check`: one image for all prompts, single
colours and images that are not square unseen; thumbnails squashed.
"""

import hashlib
import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from advgrpo.data.images import to_rgb
from advgrpo.data.prompts import load_prompts
from advgrpo.data.references import ReferenceSet
from advgrpo.errors import UserError
from advgrpo.references import check as reference_check
from advgrpo.references import importing as reference_import
from advgrpo.references.__main__ import BAD_SET, main
from advgrpo.references.check import check_set, draw_contact_sheet


def gradient(width: int, height: int, blue: int = 40) -> np.ndarray:
    """uint8 [h, w, 3]: red grows to the right, green downwards, so every pixel knows where it was."""
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)
    return np.stack(np.broadcast_arrays(x[None], y[:, None], np.float64(blue)), -1).round().astype(np.uint8)


def save(path: Path, pixels, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def run(folder, out, *flags) -> int:
    return main(["import", str(folder), "--out", str(out), "--size", "32", "--min-size", "16", *flags])


def made(out: Path) -> list[np.ndarray]:
    return [np.array(Image.open(path)) for path in sorted((out / "images").iterdir())]


def snapshot(folder: Path) -> dict:
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def through_file(tmp_path, image, **options) -> Image.Image:
    path = save(tmp_path / "one" / options.pop("name", "a.png"), image, **options)
    with Image.open(path) as opened:
        opened.load()
        return opened


def rgb(image: Image.Image, background="white") -> tuple[np.ndarray, list[str]]:
    converted, notices = to_rgb(image, background)
    assert converted.mode == "RGB"
    return np.array(converted), notices


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found, notices = rgb(through_file(tmp_path, levels))
    assert np.array_equal(found[..., 0], np.rint(levels / 257))
    assert (found == found[..., :1]).all()
    assert notices == ["16 bits: reduced to 8"]


@pytest.mark.parametrize(("background", "behind"), [("white", 255), ("black", 0), ("#808080", 128)])
def test_transparency_shows_the_background_and_no_hidden_colours(tmp_path, background, behind):
    hidden = np.zeros((16, 16, 4), dtype=np.uint8)
    hidden[..., 0] = hidden[..., 2] = 255  # magenta that nobody sees
    hidden[:8, :, 3] = 128
    hidden[8:, 8:, 3] = 255
    found, notices = rgb(through_file(tmp_path, hidden), background)
    assert (found[8:, :8] == behind).all()
    assert (found[8:, 8:] == (255, 0, 255)).all()
    assert np.abs(found[0, 0].astype(float) - (0.502 * np.array([255, 0, 255]) + 0.498 * behind)).max() <= 1
    assert notices == [f"transparent: put on {background}"]


def test_an_alpha_channel_without_transparency_is_nothing_to_tell(tmp_path):
    opaque = Image.fromarray(gradient(16, 16)).convert("RGBA")
    found, notices = rgb(through_file(tmp_path, opaque))
    assert np.array_equal(found, gradient(16, 16))
    assert notices == []


def test_transparent_palettes_grey_and_key_colours(tmp_path):
    red = Image.new("RGB", (16, 16), "red")
    red.paste((0, 0, 255), (0, 0, 8, 16))
    keyed = through_file(tmp_path, red, name="k.png", transparency=(0, 0, 255))
    palette = red.quantize(4)
    clear = palette.getpixel((0, 0))
    palette = through_file(tmp_path, palette, name="p.png", transparency=clear)
    for image in (keyed, palette):
        found, _ = rgb(image)
        assert (found[:, :8] == 255).all()
        assert (found[:, 8:] == (255, 0, 0)).all()
    grey = Image.merge("LA", [Image.new("L", (16, 16), 90), Image.new("L", (16, 16), 0)])
    assert (rgb(through_file(tmp_path, grey))[0] == 255).all()


def test_cmyk_comes_out_in_its_colours(tmp_path):
    colours = Image.fromarray(gradient(32, 32))
    found, notices = rgb(through_file(tmp_path, colours.convert("CMYK"), name="a.jpg", quality=95))
    assert np.abs(found.astype(int) - np.array(colours)).mean() < 4
    assert notices == ["CMYK without a colour profile: its colours are approximate"]


def swapped_profile() -> bytes:
    """sRGB with its red and green primaries exchanged, under another name."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(content[128:132], "big")
    tags = {bytes(content[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    for name, other in ((b"rXYZ", b"gXYZ"), (b"gXYZ", b"rXYZ")):
        content[tags[name] : tags[name] + 4] = other
    return bytes(content).replace("sRGB".encode("utf-16-be"), "abcd".encode("utf-16-be")).replace(b"sRGB", b"abcd")


@pytest.mark.parametrize("alpha", [False, True])
def test_a_colour_profile_is_honoured(tmp_path, alpha):
    red = Image.new("RGBA" if alpha else "RGB", (16, 16), "red")
    found, notices = rgb(through_file(tmp_path, red, icc_profile=swapped_profile()))
    assert found[..., 1].min() > 200
    assert found[..., 0].max() < 60
    assert notices == ["colours converted to sRGB by its profile"]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert rgb(through_file(tmp_path, red, icc_profile=srgb))[1] == []
    found, notices = rgb(through_file(tmp_path, red, icc_profile=b"no profile"))
    assert (found == (255, 0, 0)).all()
    assert notices == ["colour profile unusable: taken for sRGB"]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Six images of three prompts, given by folders, in the kinds that people have."""
    folder = tmp_path / "photos"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    save(folder / "a_red_fox" / "wide.jpg", gradient(96, 48), quality=95)
    save(folder / "a_red_fox" / "turned.png", gradient(48, 96, 80), exif=exif)
    save(folder / "the_sea" / "alpha.png", Image.fromarray(gradient(40, 40)).convert("RGBA"))
    save(folder / "the_sea" / "sixteen.png", gradient(64, 64)[..., 0].astype(np.uint16) * 257)
    first, *others = (Image.fromarray(gradient(33, 33, blue)) for blue in (0, 255))
    save(folder / "rain" / "moving.webp", first, save_all=True, append_images=others, lossless=True)
    save(folder / "rain" / "print.jpg", Image.fromarray(gradient(64, 64)).convert("CMYK"))
    return folder


def test_what_people_have_becomes_a_set_that_training_accepts(photos, tmp_path, capsys):
    save(photos / "rain" / "old.bmp", gradient(20, 20))
    save(photos / ".thumbnails" / "x.png", gradient(20, 20))
    before, out = snapshot(photos), tmp_path / "out"
    assert run(photos, out) == 0
    assert snapshot(photos) == before
    assert check_set(out).ok
    prompts = [prompt.text for prompt in load_prompts(out / "prompts.txt")]
    assert sorted(prompts) == ["a red fox", "rain", "the sea"]
    references = ReferenceSet.load(out, prompts, min_size=32)
    assert {references.load_images(references.files(p)).shape for p in prompts} == {(2, 3, 32, 32)}
    assert Image.open(out / "sheet.png").height > 3 * 100
    shown = capsys.readouterr().out
    for line in (
        "left out: neither PNG, JPEG nor WebP: 1 (rain/old.bmp)",
        "cropped to the middle: 2 (a_red_fox/turned.png, a_red_fox/wide.jpg)",
        "animated: the first frame was taken: 1 (rain/moving.webp)",
        "captions from the names of folders",
        "made 6 images, kept 0",
        f"6 images of 3 prompts; train with --data.prompts {out}/prompts.txt --data.references {out}",
    ):
        assert line in shown


def source_of(out: Path, name: str) -> np.ndarray:
    """The square that was made of an original."""
    images = json.loads((out / "manifest.json").read_text())["images"]
    [found] = [file for file, entry in images.items() if Path(entry["source"]).name == name]
    return np.array(Image.open(out / found)).astype(int)


def test_the_middle_is_kept_and_images_are_upright(photos, tmp_path):
    assert run(photos, tmp_path / "out") == 0
    wide, turned = (source_of(tmp_path / "out", name) for name in ("wide.jpg", "turned.png"))
    assert 55 < wide[16, 0, 0] < 75
    assert 180 < wide[16, 31, 0] < 200  # the middle half of red's range
    assert wide[0, 16, 1] < 15
    assert wide[31, 16, 1] > 240
    # Orientation 6: what grew downwards grows to the left; of what grew to the right, the middle half is kept.
    assert turned[16, 0, 1] > turned[16, 31, 1] + 100
    assert turned[31, 16, 0] > turned[0, 16, 0] + 200
    assert (
        source_of(tmp_path / "out", "moving.webp")[..., 2].max() < 10
    )  # blue is 0 in the first frame, 255 in the next


def test_letterboxed_on_a_colour(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(photos, out, "--fit", "letterbox", "--background", "#102030") == 0
    wide = source_of(out, "wide.jpg")
    assert (wide[:7] == (16, 32, 48)).all()
    assert (wide[-7:] == (16, 32, 48)).all()
    assert wide[16, 0, 0] < 20
    assert wide[16, 31, 0] > 235
    assert "letterboxed on #102030: 2" in capsys.readouterr().out


def test_an_interrupted_import_continues_and_equals_one_that_was_not(photos, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(photos, whole) == 0
    real, calls = reference_import.convert, []

    def stops(file, recipe, name):
        calls.append(file)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(file, recipe, name)

    monkeypatch.setattr(reference_import, "convert", stops)
    assert run(photos, parts) == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    assert not (parts / "references.json").exists()
    finished = sorted((parts / "images").iterdir())
    assert 1 <= len(finished) < 6
    times = {path: path.stat().st_mtime_ns for path in finished[1:]}
    finished[0].write_bytes(finished[0].read_bytes()[:-200])  # as a power cut leaves it
    monkeypatch.setattr(reference_import, "convert", real)
    assert run(photos, parts) == 0
    assert f"kept {len(finished) - 1}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in times} == times
    for path in whole.rglob("*"):
        if path.is_file():
            assert (parts / path.relative_to(whole)).read_bytes() == path.read_bytes(), path


def test_a_finished_image_that_was_painted_over_is_made_again(photos, tmp_path, capsys):
    assert run(photos, tmp_path / "out") == 0
    file = sorted((tmp_path / "out" / "images").iterdir())[0]
    sound = file.read_bytes()
    stamp = PngImagePlugin.PngInfo()
    stamp.add_itxt("advgrpo", Image.open(file).text["advgrpo"])
    save(file, gradient(32, 32, 200), pnginfo=stamp)
    assert run(photos, tmp_path / "out") == 0
    assert "made 1 images, kept 5" in capsys.readouterr().out
    assert file.read_bytes() == sound


def test_new_images_are_added_and_an_old_recipe_is_not_mixed_in(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(photos, out) == 0
    save(photos / "snow" / "new.png", gradient(50, 50))
    assert run(photos, out) == 0
    assert "made 1 images, kept 6" in capsys.readouterr().out
    assert len(json.loads((out / "references.json").read_text())) == 4
    for flags in (["--fit", "letterbox"], ["--size", "48"], ["--background", "black"]):
        assert run(photos, out, *flags) == 2
        assert "use another folder" in capsys.readouterr().err


def test_unusable_images_are_named_and_nothing_is_finished_without_them(photos, tmp_path, capsys):
    out = tmp_path / "out"
    (photos / "rain" / "torn.jpg").write_bytes((photos / "a_red_fox" / "wide.jpg").read_bytes()[:-300])
    save(photos / "rain" / "small.png", gradient(15, 40))
    os.mkfifo(photos / "rain" / "pipe.png")
    assert run(photos, out) == 2
    message = capsys.readouterr().err
    assert "3 of 9 images cannot be used" in message
    for part in ("torn.jpg: is unreadable or truncated", "small.png: is 15x40", "pipe.png: is not a regular file"):
        assert f"rain/{part}" in message
    assert not (out / "references.json").exists()
    assert run(photos, out, "--skip-unusable") == 0
    shown = capsys.readouterr().out
    assert "made 0 images, kept 6" in shown
    assert "skipped: 3 (" in shown


def blank(size, colour, bar=None) -> Image.Image:
    image = Image.new("RGB", size, colour)
    if bar is not None:
        image.paste(bar, (0, 0, size[0] // 8, size[1]))
    return image


@pytest.mark.parametrize(
    ("image", "flags", "why"),
    [
        (blank((64, 64), "black"), [], "is in a single colour"),
        (blank((96, 48), "black"), ["--fit", "letterbox"], "is in a single colour"),  # white bars make it no image
        (blank((96, 48), "white", bar="red"), [], "is in a single colour where it is cropped"),
        (Image.new("RGBA", (64, 64), (255, 0, 0, 0)), [], "is in a single colour"),  # transparent, so all background
    ],
)
def test_what_shows_nothing_is_not_imported(photos, tmp_path, capsys, image, flags, why):
    """Training would refuse it."""
    out = tmp_path / "out"
    save(photos / "rain" / "nothing.png", image)
    assert run(photos, out, *flags) == 2
    assert f"1 of 7 images cannot be used: rain/nothing.png: {why}. Mend" in capsys.readouterr().err
    assert run(photos, out, "--skip-unusable", *flags) == 0
    assert f"skipped: 1 (rain/nothing.png: {why})" in capsys.readouterr().out
    ReferenceSet.load(out, [p.text for p in load_prompts(out / "prompts.txt")])


def test_one_that_an_older_version_let_pass_is_refused(photos, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    save(photos / "rain" / "nothing.png", blank((64, 64), "black"))
    with monkeypatch.context() as patch:
        patch.setattr(reference_import, "in_one_colour", lambda _: False)
        assert run(photos, out) == 0
    assert run(photos, out) == 2
    assert "rain/nothing.png: is in a single colour" in capsys.readouterr().err


def captioned(folder: Path, **texts) -> Path:
    for number, (name, text) in enumerate(texts.items()):
        save(folder / f"{name}.png", gradient(40, 40, number))
        if text is not None:
            (folder / f"{name}.txt").write_text(text)
    return folder


def test_captions_beside_the_images(tmp_path, capsys):
    folder = captioned(tmp_path / "in", a="  a red\n  fox \n", b="the sea", c="the sea")
    assert run(folder, tmp_path / "out") == 0
    index = json.loads((tmp_path / "out" / "references.json").read_text())
    assert {prompt: len(files) for prompt, files in index.items()} == {"a red fox": 1, "the sea": 2}
    assert "captions from .txt files" in capsys.readouterr().out


def test_captions_of_an_imagefolder(tmp_path):
    for part in ("train", "test"):
        for name in ("a", "b"):
            save(tmp_path / "in" / part / f"{name}.png", gradient(40, 40, ord(name) + len(part)))
        lines = [{"file_name": "a.png", "text": f"a {part}", "id": 3}, {"file_name": "b.png", "prompt": "b"}]
        (tmp_path / "in" / part / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    index = json.loads((tmp_path / "out" / "references.json").read_text())
    assert {prompt: len(files) for prompt, files in index.items()} == {"a test": 1, "b": 2, "a train": 1}


def test_a_set_with_wrong_images_is_converted_by_the_command_its_error_names(tmp_path, capsys):
    folder = captioned(tmp_path / "my set", a=None, b=None)
    Image.fromarray(gradient(300, 200)).convert("RGBA").save(folder / "a.png")
    (folder / "references.json").write_text('{"x": ["a.png", "b.png"], "y": ["b.png"]}')
    with pytest.raises(UserError, match=r"a\.png has mode RGBA.*convert the whole folder: python -m") as error:
        ReferenceSet.load(folder, ["x", "y"])
    command = shlex.split(str(error.value).split("convert the whole folder: python -m advgrpo.references ")[1])
    assert main([*command, "--min-size", "16"]) == 0
    assert "captions from references.json" in capsys.readouterr().out
    references = ReferenceSet.load(command[-1], ["x", "y"], min_size=512)
    assert [len(references.files(prompt)) for prompt in ("x", "y")] == [2, 1]


def test_a_style_has_no_prompts(tmp_path, capsys):
    folder = captioned(tmp_path / "in", a=None, b=None)
    assert run(folder, tmp_path / "out") == 2
    assert "no captions. Wanted are references.json" in capsys.readouterr().err
    assert run(folder, tmp_path / "out", "--captions", "none") == 0
    assert f"--data.style {tmp_path}/out/images" in capsys.readouterr().out
    assert len(ReferenceSet.shared(tmp_path / "out" / "images", ["x"]).files("x")) == 2
    assert not (tmp_path / "out" / "references.json").exists()
    assert (tmp_path / "out" / "sheet.png").exists()


def test_prompts_are_set_aside_for_evaluation(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(photos, out, "--held-out", "1") == 0
    training, aside = ([p.text for p in load_prompts(out / name)] for name in ("prompts.txt", "held_out.txt"))
    assert len(training) == 2
    assert len(aside) == 1
    assert set(json.loads((out / "references.json").read_text())) == {*training, *aside}
    assert f"--data.held-out-prompts {out}/held_out.txt" in capsys.readouterr().out
    save(photos / "zz" / "more.png", gradient(50, 50))
    assert run(photos, tmp_path / "again", "--held-out", "2") == 0
    assert set(aside) <= {p.text for p in load_prompts(tmp_path / "again" / "held_out.txt")}
    for number in ("4", "-1"):
        assert run(photos, out, "--held-out", number) == 2
        assert f"--held-out {number}: want 0, or fewer than the 4 prompts" in capsys.readouterr().err


def metadata(folder, *lines):
    captioned(folder, a=None, b=None)
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("prepare", "flags", "expected"),
    [
        (lambda f: captioned(f, a="x", b=None), [], "1 image (b.png) have no caption: want a .txt file"),
        (lambda f: captioned(f, a="x", b=" \n"), [], "1 image (b.png) have blank captions"),
        (lambda f: metadata(f, '{"file_name": "a.png", "text": "x"}'), [], "1 image (b.png) have no caption"),
        (lambda f: metadata(f, '{"file_name": "c.png", "text": "x"}'), [], "names 1 image (c.png)"),
        (lambda f: metadata(f, '{"file_name": "../a.png", "text": "x"}'), [], "must be a path inside"),
        (lambda f: metadata(f, '{"file_name": "a.png"}'), [], "line 1: a.png has no caption"),
        (lambda f: metadata(f, "", "[1]"), [], 'line 2: expected an object with a string "file_name"'),
        (lambda f: metadata(f, "{"), [], "line 1: not JSON"),
        (lambda f: captioned(f, a="x"), ["--captions", "folders"], "want a folder that names them"),
        (lambda f: captioned(f, a="x"), ["--captions", "metadata"], "no metadata.jsonl in"),
        (lambda f: captioned(f, a="x"), ["--captions", "index"], "references.json does not exist"),
        (lambda f: f.mkdir(), [], "holds no image"),
        (lambda f: (f.mkdir(), (f / "a.heic").touch()), [], "1 are of other kinds (.heic)"),
        (lambda f: None, [], "is not a folder"),
        (lambda f: captioned(f, a="x"), ["--background", "clear"], "--background 'clear': want a colour"),
        (lambda f: captioned(f, a="x"), ["--background", "#ffffff80"], "want a colour"),
        (lambda f: captioned(f, a="x"), ["--size", "5"], "want 16 to 4096"),
    ],
)
def test_bad_folders_and_flags_are_one_line(tmp_path, capsys, prepare, flags, expected):
    prepare(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out", *flags) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out" / "references.json").exists()


def test_originals_are_never_written_to(photos, tmp_path, capsys):
    for out in (photos, photos / "out", tmp_path):
        assert run(photos, out) == 2
        assert "must be outside of" in capsys.readouterr().err
    save(tmp_path / "mine" / "precious.png", gradient(20, 20))
    assert run(photos, tmp_path / "mine") == 2
    assert "holds precious.png, which was not imported" in capsys.readouterr().err


def test_check_tells_what_training_would_refuse_and_what_it_would_not(tmp_path, capsys):
    folder = tmp_path / "set"
    save(folder / "wide.png", gradient(64, 32))
    save(folder / "alpha.png", Image.fromarray(gradient(32, 32)).convert("RGBA"))
    save(folder / "black.png", np.zeros((32, 32, 3), np.uint8))
    first, *others = (Image.fromarray(gradient(33, 33, blue)) for blue in (0, 255))
    save(folder / "moving.webp", first, save_all=True, append_images=others)
    index = {"p": ["wide.png", "alpha.png", "black.png"], "q": ["moving.webp"]}
    (folder / "references.json").write_text(json.dumps(index))
    report = check_set(folder)
    assert report.not_square == ["wide.png: 64x32"]
    assert report.unconverted == ["alpha.png: has mode RGBA, not RGB", "moving.webp: is animated"]
    assert report.one_colour == ["black.png"]
    assert report.only_one == ["q"]
    assert "not square: their middle is used" in check_set(folder, fit="crop").warnings
    assert main(["check", str(folder)]) == BAD_SET
    assert f"references import {folder} --out {folder}-imported" in capsys.readouterr().out


def test_the_contact_sheet_shows_shapes(tmp_path, monkeypatch):
    """An image of 40 x 8 stands between white bars of two fifths each; squashed ones look like squares."""
    drawn = []
    monkeypatch.setattr(reference_check, "draw_grid", lambda rows, *_, **__: drawn.append(rows))
    save(tmp_path / "set" / "wide.png", np.zeros((8, 40, 3), dtype=np.uint8))
    save(tmp_path / "set" / "square.png", np.zeros((8, 8, 3), dtype=np.uint8))
    assert draw_contact_sheet(tmp_path / "set", tmp_path / "sheet.png", tile=80) == 2
    square, wide = drawn[0][0][1][0][1]
    assert (wide[:, :32] == 1).all()
    assert (wide[:, 32:48] == 0).all()
    assert (wide[:, 48:] == 1).all()
    assert (square == 0).all()


@pytest.mark.parametrize("copies", [False, True])
def test_check_sees_one_image_for_all_prompts(tmp_path, copies):
    names = [f"{i}.png" if copies else "0.png" for i in range(3)]
    for name in names:
        save(tmp_path / name, gradient(32, 32))
    (tmp_path / "references.json").write_text(json.dumps({str(i): [name] for i, name in enumerate(names)}))
    assert check_set(tmp_path).shared_by_all == ["0.png"]
    save(tmp_path / names[-1], gradient(32, 32, 99))
    assert check_set(tmp_path).shared_by_all == ([] if copies else ["0.png"])


def test_bytes_do_not_depend_on_the_order_of_threads(photos, tmp_path):
    assert run(photos, tmp_path / "a") == run(photos, tmp_path / "b") == 0
    contents = [sorted((p.name, p.read_bytes()) for p in (tmp_path / n).rglob("*") if p.is_file()) for n in "ab"]
    assert contents[0] == contents[1]


def test_which_prompts_are_set_aside_does_not_depend_on_the_order_of_the_images():
    prompts = [f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("star", "ring", "cat")]
    aside = reference_import._set_aside(prompts, 3)
    assert reference_import._set_aside(prompts[::-1], 3) == reference_import._set_aside(sorted(prompts), 3) == aside
    assert set(reference_import._set_aside([*prompts, "a grey dog"], 4)) >= set(aside), "more images move none back"

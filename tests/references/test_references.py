"""The reference images: found, checked and decoded before training starts."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from advgrpo.data.references import ReferenceSet
from advgrpo.errors import UserError

PROMPTS = ["a red star", "a blue circle"]


@pytest.fixture
def folder(tmp_path):
    """Two images for each of the two prompts, one of them in a subfolder, all of 24 x 24 pixels."""
    rng = np.random.default_rng(0)
    (tmp_path / "more").mkdir()
    index = {PROMPTS[0]: ["0.png", "more/1.png"], PROMPTS[1]: ["2.png", "3.png"]}
    for names in index.values():
        for name in names:
            Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "references.json").write_text(json.dumps(index))
    return tmp_path


def test_files_follow_the_index(folder):
    references = ReferenceSet.load(folder, PROMPTS)
    assert references.files(PROMPTS[0]) == [folder / "0.png", folder / "more/1.png"]
    with pytest.raises(UserError, match="'a red stir'; the nearest prompt there is 'a red star'"):
        references.files("a red stir")


def test_the_order_is_that_of_the_index_and_no_other(folder):
    """Cached features are kept in it."""
    (folder / "references.json").write_text(json.dumps({PROMPTS[0]: ["more/1.png", "0.png"]}))
    references = ReferenceSet.load(folder, PROMPTS[:1])
    assert references.files(PROMPTS[0]) == [folder / "more/1.png", folder / "0.png"]


def test_the_fingerprint_says_which_prompt_has_which_images(folder):
    before = ReferenceSet.load(folder, PROMPTS).fingerprint()
    index = json.loads((folder / "references.json").read_text())
    swapped = dict(zip(PROMPTS, reversed([index[prompt] for prompt in PROMPTS])))
    (folder / "references.json").write_text(json.dumps(swapped))
    assert ReferenceSet.load(folder, PROMPTS).fingerprint() != before


def test_images_are_the_pixels(folder):
    references = ReferenceSet.load(folder, PROMPTS)
    images = references.load_images(references.files(PROMPTS[0]))
    assert images.shape == (2, 3, 24, 24)
    assert images.dtype == torch.float32
    expected = np.array(Image.open(folder / "more/1.png"))
    assert torch.equal((images[1] * 255).round().to(torch.uint8).permute(1, 2, 0), torch.from_numpy(expected))


def test_images_of_several_sizes_need_a_size(folder):
    halves = Image.new("RGB", (40, 40), (255, 0, 51))
    halves.paste((0, 0, 51), (0, 0, 20, 40))
    halves.save(folder / "0.png")
    references = ReferenceSet.load(folder, PROMPTS)
    files = references.files(PROMPTS[0])
    with pytest.raises(ValueError, match=r"0\.png is 40x40 but .*1\.png is 24x24; pass size="):
        references.load_images(files)
    images = references.load_images(files, size=(24, 24))
    assert torch.allclose(images[0, :, :, 16:], torch.tensor([1, 0, 0.2]).view(3, 1, 1).expand(3, 24, 8), atol=1e-6)
    assert torch.equal(images[1], references.load_images(files[1:])[0])
    with pytest.raises(ValueError, match="files is empty"):
        references.load_images([])


def test_resizing_is_antialiased_and_stays_in_range(folder):
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::4] = 255
    Image.fromarray(stripes).save(folder / "0.png")
    references = ReferenceSet.load(folder, PROMPTS)
    small = references.load_images([folder / "0.png"], size=(16, 16))
    assert (small - 0.25).abs().max() < 0.1  # without antialiasing the stripes fall between the samples
    large = references.load_images([folder / "0.png"], size=(256, 256))
    assert large.min() >= 0
    assert large.max() <= 1


def test_exif_orientation_is_applied(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    Image.linear_gradient("L").resize((40, 20)).convert("RGB").save(folder / "0.png", exif=exif)
    images = ReferenceSet.load(folder, PROMPTS, fit="stretch").load_images([folder / "0.png"])
    assert images.shape[-2:] == (40, 20)


def test_content_key_is_the_files_digest(folder):
    references = ReferenceSet.load(folder, PROMPTS)
    key = references.content_key(folder / "0.png")
    assert key == hashlib.sha256((folder / "0.png").read_bytes()).hexdigest()
    assert key != references.content_key(folder / "2.png")


def test_prompt_without_references_names_the_nearest(folder):
    with pytest.raises(UserError, match=r"'a red stars' has no references .* nearest prompt there is 'a red star'"):
        ReferenceSet.load(folder, [*PROMPTS, "a red stars"])
    with pytest.raises(UserError, match=r"'x' has no references.*2 other prompts"):
        ReferenceSet.load(folder, ["x", "y", "z", *PROMPTS])
    (folder / "references.json").write_text(json.dumps({PROMPTS[0]: []}))
    with pytest.raises(UserError, match="has no references"):
        ReferenceSet.load(folder, PROMPTS[:1])


def test_unneeded_entries_are_left_alone(folder):
    (folder / "2.png").unlink()
    ReferenceSet.load(folder, PROMPTS[:1])


def rgba(path):
    Image.new("RGBA", (24, 24)).save(path)


def gray(path):
    Image.new("L", (24, 24)).save(path)


def tiny(path):
    Image.new("RGB", (15, 40)).save(path)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-400])


def text(path):
    path.write_text("not an image")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rgba, "mode RGBA, not RGB; convert the whole folder: python -m advgrpo.references import"),
        (gray, "mode L, not RGB"),
        (tiny, "15x40 pixels; the smaller side must be at least 16"),
        (truncated, "unreadable or truncated"),
        (text, r"unreadable or truncated \(no PNG, JPEG or WEBP\)"),
        (lambda path: path.unlink(), "does not exist"),
    ],
)
def test_bad_images_are_named(folder, spoil, message):
    spoil(folder / "3.png")
    with pytest.raises(UserError, match=message) as error:
        ReferenceSet.load(folder, PROMPTS)
    assert str(folder / "3.png") in str(error.value)


def test_all_bad_images_are_counted(folder):
    for name in ("0.png", "2.png", "3.png"):
        text(folder / name)
    with pytest.raises(UserError, match=r"0\.png .*\(3 of 4 images are unusable, also 2\.png, 3\.png\)"):
        ReferenceSet.load(folder, PROMPTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "holds a list"),
        ('{"a": "x.png"}', "value of 'a' must be a list"),
        ('{"a": ["../x.png"]}', "must be a path inside"),
        ('{"a": ["/x.png"]}', "must be a path inside"),
        ('{"a": ["x.png"], "a": ["y.png"]}', "'a' appears twice"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "thousands of digits"),
        ('{"\\ud800": ["x.png"]}', "half a character"),
    ],
)
def test_bad_index(folder, content, message):
    (folder / "references.json").write_text(content)
    with pytest.raises(UserError, match=message):
        ReferenceSet.load(folder, PROMPTS)


def test_missing_folder_or_index(folder):
    with pytest.raises(UserError, match=r"reference folder .* does not exist"):
        ReferenceSet.load(folder / "none", PROMPTS)
    with pytest.raises(UserError, match=r"other\.json does not exist"):
        ReferenceSet.load(folder, PROMPTS, index="other.json")

"""Prompts, and images with captions, of parquet files, webdataset shards, image folders and `datasets`.

Parquet files, tars and local data sets are real ones; only the hub itself is stood in for, by a `load_dataset` that
takes what the library's takes. Bugs planted in a copy, each seen red: a caption joined to the next sample's image; a
shard that is missing skipped; braces without leading zeros; a tar cut off between members taken for a whole one; a link
followed; sizes not looked at; the first of two text columns taken; repeated prompts kept; a blank one let through; a
image's path followed anywhere; the split not passed on; all images held at once.
"""

import inspect
import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from advgrpo.data import record_archives, record_tables
from advgrpo.data.prompts import load_prompts
from advgrpo.data.record_source import MAX_TEXT, Record, RecordSource, parse_source
from advgrpo.data.records import read_images, read_prompts
from advgrpo.data.references import ReferenceSet
from advgrpo.errors import UserError
from advgrpo.references import importing as reference_import
from advgrpo.references.__main__ import main

PROMPTS = ["a red fox", "the sea at night", "rain"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def png(seed: int, size=(40, 40)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def parquet(path: Path, columns: dict) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def tar(path: Path, members: list) -> str:
    """(name, content) or a TarInfo each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            name, content = member
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


def texts(address) -> list[str]:
    return [prompt.text for prompt in load_prompts(address)]


def source(address) -> RecordSource:
    found = parse_source(address)
    assert found is not None
    return found


def import_(address, out, *flags) -> int:
    return main(["import", str(address), "--out", str(out), "--size", "32", "--min-size", "16", *flags])


# Addresses.


def test_settings_follow_the_address():
    found = source("hf:owner/name:config=x:split=test:column=my caption")
    assert (found.kind, found.location) == ("hf", "owner/name")
    assert found.options == {"config": "x", "split": "test", "column": "my caption"}
    assert source("a/b.parquet:column=caption").location == "a/b.parquet"
    assert parse_source("prompts.txt") is None
    assert parse_source("tiny") is None


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf:", "want hf:OWNER/NAME"),
        ("hf:o/n:splitt=test", "no setting 'splitt'; such a source has split, column"),
        ("a.tar:image=png", "no setting 'image'"),
        ("hf:o/n:split=", "split is empty"),
        ("hf:o/n:stream=yes", "stream = 'yes': want true or false"),
    ],
)
def test_bad_addresses(address, message):
    with pytest.raises(UserError, match=message):
        parse_source(address)


# Parquet.


def test_prompts_of_parquet(tmp_path):
    columns = {"caption": ["a  red\nfox", "rain", "a red fox"], "n": [1, 2, 3]}
    assert texts(parquet(tmp_path / "p.parquet", columns)) == ["a red fox", "rain"]
    both = parquet(tmp_path / "q.parquet", {"prompt": ["x"], "text": ["y"], "other": ["z"]})
    with pytest.raises(UserError, match=r"text, prompt may all be the prompt; name it with :column=NAME"):
        texts(both)
    assert texts(f"{both}:column=other") == ["z"]
    with pytest.raises(UserError, match=r"no column 'nope'; it has prompt, text, other"):
        texts(f"{both}:column=nope")


def test_parquet_files_by_a_pattern_in_order(tmp_path):
    for number, prompt in enumerate(PROMPTS):
        parquet(tmp_path / "data" / f"train-{number}.parquet", {"text": [prompt]})
    assert texts(f"{tmp_path}/data/train-*.parquet") == PROMPTS
    with pytest.raises(UserError, match=r"no file is called .*test-\*\.parquet"):
        texts(f"{tmp_path}/data/test-*.parquet")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", None]}, r"p\.parquet, row 2: no prompt, or a blank one"),
        ({"text": ["a", " \n"]}, r"p\.parquet, row 2: no prompt, or a blank one"),
        ({"text": pyarrow.array([], pyarrow.string())}, "holds no prompt"),
        ({"n": [1, 2]}, r"none of its columns \(n\) is the prompt"),
        ({"text": ["x" * (MAX_TEXT + 1)]}, "row 1: a prompt of 1,048,577 characters"),
    ],
)
def test_bad_parquet_prompts(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        texts(parquet(tmp_path / "p.parquet", columns))


def test_a_column_of_numbers_is_no_prompt(tmp_path):
    with pytest.raises(UserError, match="row 1: the prompt is a int, not text"):
        texts(parquet(tmp_path / "p.parquet", {"n": [1, 2]}) + ":column=n")


def test_damaged_and_missing_parquet(tmp_path):
    file = Path(parquet(tmp_path / "p.parquet", {"text": PROMPTS}))
    whole = file.read_bytes()
    for content in (b"", b"PAR1", whole[:-20], b"x" * 300):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"p\.parquet cannot be read as parquet"):
            texts(file)
    with pytest.raises(UserError, match=r"nowhere\.parquet does not exist"):
        texts("nowhere.parquet")
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(UserError, match="is no regular file"):
        texts(tmp_path / "folder.parquet")


def test_a_column_that_unpacks_to_more_than_its_rows_can_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(record_tables, "MAX_TEXT", 1000)
    file = parquet(tmp_path / "p.parquet", {"text": ["ab" * 200_000]})
    with pytest.raises(UserError, match=r"column text has [\d,]+ bytes in 1 rows"):
        texts(file)


def test_images_of_parquet_as_hugging_face_writes_them(tmp_path):
    rows = [{"bytes": png(k), "path": None} for k in range(3)]
    file = parquet(tmp_path / "p.parquet", {"image": rows, "caption": PROMPTS, "raw": [png(9)] * 3})
    with pytest.raises(UserError, match="image, raw may all be the image; name it with :image=NAME"):
        list(read_images(source(file)))
    found = list(read_images(source(f"{file}:image=image")))
    assert [record.image for record in found] == [png(k) for k in range(3)]
    assert [record.text for record in found] == PROMPTS
    assert found[1].where == f"{file}, row 2"


def test_a_path_in_parquet_is_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(1))
    rows = [{"bytes": None, "path": str(tmp_path / "secret.png")}]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    file = parquet(tmp_path / "p.parquet", {"image": pyarrow.array(rows, kind), "text": ["a"]})
    with pytest.raises(UserError, match="row 1: the image is not in the file"):
        list(read_images(source(file)))


# webdataset.


def test_prompts_of_shards_in_order(tmp_path):
    for number in range(8, 11):
        members = [(f"{number}/a.txt", f"first of {number}"), (f"{number}/a.png", b""), (f"{number}/a.cls", "3")]
        members += [(f"{number}/b.json", json.dumps({"caption": f"second of {number}"})), (f"{number}/b.jpg", b"")]
        tar(tmp_path / f"shard-{number:04d}.tar", members)
    found = texts(f"{tmp_path}/shard-{{0008..0010}}.tar")
    assert found == [f"{which} of {number}" for number in (8, 9, 10) for which in ("first", "second")]
    with pytest.raises(UserError, match=r"shard-0011\.tar does not exist"):
        texts(f"{tmp_path}/shard-{{0008..0011}}.tar")
    with pytest.raises(UserError, match="wants a first and a larger last number"):
        texts(f"{tmp_path}/shard-{{0010..0008}}.tar")


def test_names_are_cut_at_the_first_dot_and_folders_count(tmp_path):
    members = [("x/a.txt", "one"), ("y/a.txt", "two"), ("y/a.seg.png", b"")]
    assert texts(tar(tmp_path / "s.tar", members)) == ["one", "two"]


def test_a_key_of_the_json_may_be_named(tmp_path):
    file = tar(tmp_path / "s.tar", [("a.json", json.dumps({"text": "x", "prompt": "y", "long": "z"})), ("a.txt", "t")])
    assert texts(file) == ["t"]
    assert texts(f"{file}:column=long") == ["z"]
    alone = tar(tmp_path / "t.tar", [("a.json", json.dumps({"text": "x", "prompt": "y"}))])
    with pytest.raises(UserError, match=r"member a\.json: text, prompt may all be the prompt"):
        texts(alone)


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"")], "member a: no prompt"),
        ([("a.txt", b"\xff\xfe")], r"member a\.txt is not UTF-8 text"),
        ([("a.txt", " ")], "member a: no prompt, or a blank one"),
        ([("a.json", "[1]")], r"member a\.json: expected an object"),
        ([("a.json", "{")], r"member a\.json: not JSON"),
        ([("a.json", '{"text": 3}')], r"member a\.json: the prompt is a int"),
        ([("a.txt", "x" * (MAX_TEXT + 1))], r"member a\.txt has 1,048,577 bytes; want at most"),
        ([("a.txt", "x"), ("a.txt", "y")], r"a\.txt is there twice"),
        ([link("a.txt", tarfile.SYMTYPE)], r"member a\.txt: a link or a device"),
        ([link("a.txt", tarfile.LNKTYPE)], r"member a\.txt: a link or a device"),
        ([link("a.txt", tarfile.CHRTYPE)], r"member a\.txt: a link or a device"),
        ([], "holds no prompt"),
    ],
)
def test_bad_shards(tmp_path, members, message):
    with pytest.raises(UserError, match=message):
        texts(tar(tmp_path / "s.tar", members))


def test_shards_that_are_cut_off(tmp_path):
    file = Path(tar(tmp_path / "s.tar", [(f"{k}.txt", prompt) for k, prompt in enumerate(PROMPTS)]))
    whole = file.read_bytes()
    for length in (0, 100, 700, 1024, 2048, 3072):  # 1024 bytes a member: also exactly between two
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"s\.tar (cannot be read as a tar|is cut off)"):
            texts(file)
    file.write_bytes(whole[:1024] + b"\xff" * 512 + whole[1536:])
    with pytest.raises(UserError, match=r"s\.tar (cannot be read as a tar|is cut off)"):
        texts(file)
    file.write_bytes(b"\x1f\x8b" + whole)
    with pytest.raises(UserError, match="cannot be read as a tar"):
        texts(file)


def test_names_in_an_archive_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    members = [("../../evil.txt", "a"), ("../../evil.png", png(1)), ("/tmp/abs.txt", "b"), ("/tmp/abs.png", png(2))]
    file = tar(tmp_path / "in" / "s.tar", members)
    before = set(tmp_path.rglob("*"))
    assert [record.text for record in read_images(source(file))] == ["a", "b"]
    assert set(tmp_path.rglob("*")) == before
    assert import_(file, tmp_path / "out") == 0
    assert not list(tmp_path.parent.glob("evil*"))
    assert all(path.is_relative_to(tmp_path / "out" / "images") for path in tmp_path.rglob("*.png")
               if path.name != "sheet.png")  # fmt: skip


def test_a_sample_wants_one_image(tmp_path):
    for members in ([("a.txt", "x")], [("a.txt", "x"), ("a.png", png(1)), ("a.jpg", png(1))]):
        with pytest.raises(UserError, match="member a: want one image"):
            list(read_images(source(tar(tmp_path / "s.tar", members))))


def test_images_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(record_archives, "MAX_IMAGE", 100)
    with pytest.raises(UserError, match=r"member a\.png has [\d,]+ bytes; want at most 100"):
        list(read_images(source(tar(tmp_path / "s.tar", [("a.txt", "x"), ("a.png", png(1))]))))


# A folder with metadata.jsonl.


def test_prompts_of_an_image_folder(tmp_path):
    lines = [{"file_name": "a.png", "text": "a red  fox"}, {"file_name": "b.png", "prompt": "rain", "n": 1}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    assert texts(tmp_path) == ["a red fox", "rain"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 1: no prompt"):
        texts(tmp_path)


# The datasets library.


def hub_rows(count: int = 3) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = {"image": [{"bytes": png(k), "path": None} for k in range(count)], "caption": PROMPTS[:count]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_data_sets_of_a_folder(tmp_path):
    hub_rows().to_parquet(tmp_path / "parquet" / "train-0.parquet")
    assert texts(f"hf:{tmp_path}/parquet") == PROMPTS
    assert texts(f"hf:{tmp_path}/parquet:stream=true") == PROMPTS
    with pytest.raises(UserError, match=r"cannot be loaded .*Unknown split"):
        texts(f"hf:{tmp_path}/parquet:split=test")
    hub_rows().save_to_disk(tmp_path / "saved")
    assert texts(f"hf:{tmp_path}/saved") == PROMPTS
    datasets.DatasetDict({"train": hub_rows(1), "test": hub_rows(2)}).save_to_disk(tmp_path / "parts")
    assert texts(f"hf:{tmp_path}/parts:split=test") == PROMPTS[:2]
    with pytest.raises(UserError, match="no split 'validation'; it has train, test"):
        texts(f"hf:{tmp_path}/parts:split=validation")


def test_a_stream_of_json_lines_tells_its_columns_by_its_first_row(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text("".join(json.dumps({"caption": p, "n": 1}) + "\n" for p in PROMPTS))
    assert texts(f"hf:{tmp_path}/d:stream=true") == PROMPTS


def test_images_of_data_sets(tmp_path):
    hub_rows().save_to_disk(tmp_path / "saved")
    assert [record.image for record in read_images(source(f"hf:{tmp_path}/saved"))] == [png(k) for k in range(3)]
    folder = tmp_path / "folder" / "train"
    folder.mkdir(parents=True)
    for k, prompt in enumerate(PROMPTS):
        (folder / f"{k}.png").write_bytes(png(k))
        with (folder / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": f"{k}.png", "caption": prompt}) + "\n")
    found = list(read_images(source(f"hf:{tmp_path}/folder")))  # the library's own imagefolder: paths, no bytes
    assert [(record.text, record.image) for record in found] == [(p, png(k)) for k, p in enumerate(PROMPTS)]


def test_only_files_of_the_data_set_are_opened(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(1))
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array([{"bytes": None, "path": str(secret)}], kind), "text": ["a"]})
    (tmp_path / "evil").mkdir()
    schema = datasets.Dataset(table).cast(features).data.schema.metadata  # says that the column is an image
    pyarrow.parquet.write_table(table.replace_schema_metadata(schema), tmp_path / "evil" / "t.parquet")
    with pytest.raises(UserError, match=r"secret\.png, which is no file of this data set"):
        list(read_images(source(f"hf:{tmp_path}/evil")))


def test_what_the_library_is_asked_for(monkeypatch):
    asked, real = {}, inspect.signature(datasets.load_dataset)

    def load(*arguments, **options):
        asked.update(real.bind(*arguments, **options).arguments)  # TypeError for what the library does not take
        return hub_rows()

    monkeypatch.setattr(datasets, "load_dataset", load)
    address = "hf:owner/name:config=large:split=test_unique:revision=v1:stream=true:column=caption"
    assert texts(address) == PROMPTS
    assert asked == {
        "path": "owner/name",
        "name": "large",
        "split": "test_unique",
        "revision": "v1",
        "streaming": True,
    }


@pytest.mark.parametrize("error", [ConnectionError("no route"), ValueError("Unknown split"), OSError("gated\nrepo")])
def test_the_librarys_errors_are_one_line(monkeypatch, error):
    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(UserError, match="hf:o/n cannot be loaded") as caught:
        texts("hf:o/n")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("address", "package"), [("hf:o/n", "datasets"), ("p.parquet", "pyarrow")])
def test_missing_packages_are_named(monkeypatch, address, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=rf"{package}, which is not installed: pip install datasets"):
        texts(address)


# Reference sets.


def sources(tmp_path) -> dict[str, str]:
    """Three images with prompts, of which two share one, in every format."""
    prompts = ["a red fox", "rain", "rain"]
    rows = [{"bytes": png(k, (48, 40)), "path": None} for k in range(3)]
    members = [
        each
        for k in range(3)
        for each in ((f"{k}.png", png(k, (48, 40))), (f"{k}.json", json.dumps({"text": prompts[k]})))
    ]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": rows, "caption": prompts}, features=features).save_to_disk(tmp_path / "saved")
    return {
        "parquet": parquet(tmp_path / "p.parquet", {"image": rows, "caption": prompts}),
        "webdataset": tar(tmp_path / "shard-0000.tar", members),
        "hf": f"hf:{tmp_path}/saved",
    }


def test_every_source_makes_the_set_that_its_images_in_a_folder_make(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for k, prompt in enumerate(["a red fox", "rain", "rain"]):
        (photos / f"{k}.png").write_bytes(png(k, (48, 40)))
        (photos / f"{k}.txt").write_text(prompt)
    assert import_(photos, tmp_path / "from-folder", "--held-out", "1") == 0
    for kind, address in sources(tmp_path).items():
        out = tmp_path / f"from-{kind}"
        assert import_(address, out, "--held-out", "1") == 0
        for path in (tmp_path / "from-folder").rglob("*"):
            if path.is_file() and path.name != "manifest.json":
                assert (out / path.relative_to(tmp_path / "from-folder")).read_bytes() == path.read_bytes(), path
        manifest = json.loads((out / "manifest.json").read_text())
        assert all("row " in entry["source"] or "member " in entry["source"] for entry in manifest["images"].values())
        assert ReferenceSet.load(out, ["a red fox", "rain"], min_size=32)
    assert "cropped to the middle: 3" in capsys.readouterr().out


def test_a_style_needs_no_text_column(tmp_path, capsys):
    file = parquet(tmp_path / "p.parquet", {"image": [png(k) for k in range(3)]})
    assert import_(file, tmp_path / "out", "--captions", "none") == 0
    assert len(list((tmp_path / "out" / "images").iterdir())) == 3
    assert "--data.style" in capsys.readouterr().out
    assert import_(file, tmp_path / "other", "--captions", "txt") == 2
    assert "brings its own" in capsys.readouterr().err


def test_an_unusable_image_is_named_by_its_row(tmp_path, capsys):
    file = parquet(tmp_path / "p.parquet", {"image": [png(1), b"no image"], "text": ["a", "b"]})
    assert import_(file, tmp_path / "out") == 2
    assert f"1 of 2 images cannot be used: {file}, row 2: is unreadable" in capsys.readouterr().err
    assert import_(file, tmp_path / "out", "--skip-unusable") == 0
    assert (tmp_path / "out" / "prompts.txt").read_text() == "a\n"


def test_texts_are_checked_before_an_image_is_converted(tmp_path, capsys):
    file = parquet(tmp_path / "p.parquet", {"image": [png(1), png(2)], "text": ["a", ""]})
    assert import_(file, tmp_path / "out") == 2
    assert "row 2: no prompt" in capsys.readouterr().err
    assert not (tmp_path / "out" / "images").exists()


def test_few_originals_are_in_memory_at_once(tmp_path, monkeypatch):
    """The reader must not run ahead of the conversion by more than the window."""
    read, waiting, most = [], set(), []

    def records(source, *, texts):
        for number in range(40):
            waiting.add(number)
            most.append(len(waiting))
            read.append(number)
            yield Record(f"row {number}", f"prompt {number}", png(number))

    real = reference_import._attempts

    def attempts(*arguments):
        for name, done in real(*arguments):
            waiting.discard(int(name.removeprefix("row ")))
            yield name, done

    monkeypatch.setattr(reference_import, "_IN_FLIGHT", 4)
    monkeypatch.setattr(reference_import, "read_images", records)
    monkeypatch.setattr(reference_import, "_attempts", attempts)
    monkeypatch.setattr(reference_import, "read_prompts", lambda source: (f"prompt {k}" for k in range(40)))
    assert import_("x.parquet", tmp_path / "out") == 0
    assert max(most) <= 5
    assert len(read) == 40


def test_references_in_training_must_be_imported_first(tmp_path):
    with pytest.raises(UserError, match=r"references import 'hf:o/n' --out references/|references import hf:o/n --out"):
        ReferenceSet.load("hf:o/n", ["a"])


def test_prompts_are_streams_of_text_only(tmp_path, monkeypatch):
    """A parquet file of gigabytes of images gives its prompts without one of them."""
    file = parquet(tmp_path / "p.parquet", {"image": [png(1)], "text": ["a"]})
    columns = []
    real = pyarrow.parquet.ParquetFile.iter_batches

    def iter_batches(self, *arguments, **options):
        columns.append(options["columns"])
        return real(self, *arguments, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", iter_batches)
    assert list(read_prompts(source(file))) == ["a"]
    assert columns == [["text"]]

"""Images decoded by other processes: the same pixels, the caller's own error for a bad one, an end with the caller."""

import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from PIL import Image

from advgrpo.data.decoding import DecodingWorkers, WorkerError, workers_for
from advgrpo.data.images import ImageError
from advgrpo.data.references import ReferenceSet


@pytest.fixture
def workers():
    made = DecodingWorkers(2)
    yield made
    made.close()
    assert all(process.poll() == 0 for process in made._processes)


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(4):
        pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    Image.fromarray(generator.integers(0, 256, (20, 60, 3), dtype=np.uint8)).save(tmp_path / "wide.png")
    return tmp_path


def test_workers_give_the_pixels_that_decoding_here_gives(folder, workers, monkeypatch):
    files = sorted(folder.glob("*.png"))
    here = ReferenceSet(folder, {}, fit="letterbox")
    expected = [here.load_images([file], size=(24, 24)) for file in files]
    ahead = ReferenceSet(folder, {}, fit="letterbox")
    ahead.workers = workers
    ahead.decode_ahead(files)
    monkeypatch.setattr("advgrpo.data.references.open_image", lambda *_: pytest.fail("decoded in this process"))
    for file, images in zip(files, expected):
        assert torch.equal(ahead.load_images([file], size=(24, 24)), images)
        assert torch.equal(ahead.load_images([file], size=(24, 24)), images)  # as often as it is asked for


def test_what_is_not_wanted_any_more_is_forgotten(folder, workers):
    references = ReferenceSet(folder, {})
    references.workers = workers
    references.decode_ahead([folder / "0.png", folder / "1.png"])
    kept = references._ahead[folder / "1.png"]
    references.decode_ahead([folder / "1.png", folder / "2.png"])
    assert list(references._ahead) == [folder / "1.png", folder / "2.png"]
    assert references._ahead[folder / "1.png"] is kept


def test_a_bad_image_is_named_as_if_it_were_decoded_here(folder, workers, caplog):
    (folder / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    references = ReferenceSet(folder, {})
    references.workers = workers
    references.decode_ahead([folder / "0.png", folder / "1.png"])
    with pytest.raises(ImageError, match=r"0\.png"):
        references.load_images([folder / "0.png"])
    assert "cannot be decoded; it is decoded here" in caplog.text
    assert references.load_images([folder / "1.png"]).shape == (1, 3, 40, 40)


def test_a_worker_that_was_killed_costs_one_image_and_is_replaced(folder, workers):
    one = DecodingWorkers(1)
    one.decode(folder / "0.png", "refuse").result()
    one._processes[0].kill()
    one._processes[0].wait()
    with pytest.raises(WorkerError, match="has ended"):
        one.decode(folder / "1.png", "refuse").result()
    assert one.decode(folder / "1.png", "refuse").result().shape == (40, 40, 3)
    one.close()
    assert [process.poll() for process in one._processes] == [-9, 0]


def test_workers_import_no_torch_and_end_with_their_caller(folder):
    script = textwrap.dedent(f"""
        import os, sys
        from pathlib import Path
        from advgrpo.data.decoding import DecodingWorkers
        assert "torch" not in sys.modules
        workers = DecodingWorkers(1)
        workers.decode(Path({str(folder / "0.png")!r}), "refuse").result()
        process = workers._processes[0]
        loaded = Path(f"/proc/{{process.pid}}/maps").read_text() if sys.platform == "linux" else ""
        assert "libtorch" not in loaded
        print(process.pid, flush=True)
        os.kill(os.getpid(), 9)
    """)
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == -9, done
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _runs(int(done.stdout)):
        time.sleep(0.05)
    assert not _runs(int(done.stdout))


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("setting", "device", "ranks", "cores", "count"),
    [("auto", "cpu", 1, 16, 0), ("auto", "meta", 1, 16, 0), ("auto", "cuda", 1, 16, 8), ("auto", "cuda", 8, 32, 3),
     ("auto", "cuda", 8, 8, 1), (0, "cuda", 1, 16, 0), (5, "cpu", 1, 2, 5)],
)  # fmt: skip
def test_how_many_workers(setting, device, ranks, cores, count, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert workers_for(setting, device) == count

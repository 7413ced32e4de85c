"""Collectives between real processes, and what the others say when one of them fails.

Bugs planted in a copy, each seen red: the store's keys without the attempt; no look at whether the neighbour hangs;
nothing done before the exit; no timer behind it; rank 0 that does not stop while it waits; rank 0 that waits for a dead
rank's goodbye; a killed rank taken for one that hangs; 25 seconds of silence;
a training without `record`; an error that the watch does not record.
"""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing import PContext

from advgrpo.config import Config
from advgrpo.errors import UserError
from advgrpo.runtime import watch
from advgrpo.runtime.command import INTERRUPTED
from advgrpo.runtime.distributed import Distributed
from tests import zygote

WORKER = Path(__file__).parents[1] / "distributed_worker.py"
ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 60
SCENARIOS = (
    *("raises", "user_error", "busy", "killed", "killed_in_a_collective", "stopped", "hangs", "hangs_for_nccl"),
    *("raises_beside_a_gather", "stuck", "saves_first", "cannot_save", "lingers", "ends_early", "stops_while_waiting"),
    *("stops_without_a_goodbye", "early"),
)


def clean_environment():
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return {key: value for key, value in env.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def run_torchrun(scenario, folder, *flags, launcher=("-m", "torch.distributed.run")):
    """Torchrun leaves the first error of its processes in `folder`/error.json."""
    command = [sys.executable, *launcher, "--standalone", "--nproc-per-node=2", *flags, WORKER, scenario, folder]
    environment = clean_environment() | {"TORCHELASTIC_ERROR_FILE": f"{folder}/error.json"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2 * LIMIT_SECONDS)


def recorded_error(folder):
    return json.loads((folder / "error.json").read_text())["message"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collectives")
    for code, text in forked(folder, ["collectives"])["collectives"]:
        assert code == 0, text
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_place(results):
    assert [r["place"] for r in results] == [[0, 2, "cpu", True], [1, 2, "cpu", False]]


@pytest.mark.parametrize("rank", [0, 1])
def test_gathers_are_in_rank_order(results, rank):
    result = results[rank]
    assert result["all_gather"] == [[0, 1, 2], [100, 101, 102], [103, 104, 105]]
    assert result["bfloat16"] == [0.5, 0.5, 1.5, 1.5]
    assert result["bool"] == [False, True]
    assert result["empty"] == [0, 2]
    assert result["some empty"] == [[7, 7]]
    assert result["from rank 1"] == ["ab", "", "c"]
    assert result["nothing from rank 1"] == ["", ""]
    assert result["json"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "ü"}]


@pytest.mark.parametrize("rank", [0, 1])
def test_sums(results, rank):
    assert results[rank]["all_reduce"] == [[[3.0, 3.0], [3.0, 3.0]], [1.0], [2.0, 2.0, 2.0]]


def test_ranks_that_disagree_on_a_shape_are_told(results):
    assert "rank 1 passed another dtype or shape than rank 0: torch.float32 [n, [2]]" in results[0]["mismatch"]
    assert "rank 0 passed another dtype or shape than rank 1: torch.float32 [n, [3]]" in results[1]["mismatch"]


def test_monitored_work_may_outlast_the_collective_timeout_while_it_moves_on(results):
    assert [r["after"] for r in results] == [[0, 1], [0, 1]]


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """How every rank of every failing job ended."""
    return forked(tmp_path_factory.mktemp("ends"), SCENARIOS)


def forked(folder, scenarios):
    """Jobs at once: scenario -> [(exit code, standard error) of rank 0, of rank 1]."""
    command = [sys.executable, WORKER, "--fork", folder, *scenarios]
    process = subprocess.Popen(command, env=clean_environment(), start_new_session=True)
    try:
        process.wait(LIMIT_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # a rank that outlived the limit
    files = {scenario: [folder / f"{scenario}.{rank}" for rank in range(2)] for scenario in scenarios}
    return {
        scenario: [
            (int(f.with_name(f.name + ".code").read_text()), f.with_name(f.name + ".stderr").read_text()) for f in group
        ]
        for scenario, group in files.items()
    }


@pytest.mark.parametrize("scenario", ["raises", "raises_beside_a_gather"])
def test_a_failing_rank_ends_the_others_with_its_error(scenario, ends):
    (code0, text0), (code1, text1) = ends[scenario]
    assert code0 == code1 == 1
    assert "OSError: the image store is on fire" in text1
    assert "RankFailure: rank 1 failed with this error" in text0
    assert 'raise OSError("the image store is on fire")' in text0, "the traceback of the other rank"


@pytest.mark.weekly
def test_a_failing_rank_ends_an_attempt_of_torchrun_and_the_next_one_works(tmp_path):
    done = run_torchrun("restarts", tmp_path, "--max-restarts=1")
    assert "[rank 0] ending because rank 1 failed: OSError: the image store is on fire" in done.stderr
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"{rank}.restarted").read_text() for rank in range(2)] == ["[0, 1]"] * 2


@pytest.mark.weekly
@pytest.mark.parametrize(
    ("fault", "code", "error"),
    [
        ("burning", 1, "OSError: the image store is on fire"),
        ("misconfigured", UserError.EXIT_CODE, "UserError: seed = -1: want 0 or more"),
    ],
)
def test_torchruns_error_file_has_the_first_error_of_a_training(fault, code, error, tmp_path):
    """Whichever of the two torchrun takes for the first; the exit codes and the one line for the user stay."""
    flags = ["--output-dir", f"{tmp_path}/run", "--rollout.micro-batch", "16"]
    environment = clean_environment() | {"TORCHELASTIC_ERROR_FILE": f"{tmp_path}/error.json"}
    done = zygote.run("tests.train_worker:run", [fault, *flags], processes=2, environment=environment)
    found = recorded_error(tmp_path)
    assert error in found["extraInfo"]["py_callstack"]
    assert found["errorCode"] in (code, -signal.SIGTERM)  # torchrun's, where it comes between the error and the exit
    assert re.search(rf"^error: .*{error.split(': ', 1)[1]}", done.stderr, re.MULTILINE)


def test_a_user_error_stays_one(ends):
    (code0, text0), (code1, text1) = ends["user_error"]
    assert code0 == code1 == UserError.EXIT_CODE
    assert "error: prompts=none.txt does not exist\n" in text1
    assert "error: prompts=none.txt does not exist (found on rank 1)\n" in text0
    assert "Traceback" not in text0 + text1


def test_a_rank_that_cannot_raise_is_ended(ends):
    code0, text0 = ends["busy"][0]
    assert code0 == 1
    assert "rank 1 failed with this error" in text0
    assert "OSError: the image store is on fire" in text0


def test_a_killed_rank_is_noticed_and_its_last_work_named(ends):
    (code0, text0), (code1, _) = ends["killed"]
    assert code1 == -signal.SIGKILL
    assert code0 == 1
    assert "rank 1 failed with this error:\n[rank0]: it has given no sign of life for 5 s" in text0


def test_a_rank_killed_in_a_collective_is_told_from_one_that_hangs(ends):
    (code0, text0), (code1, _) = ends["killed_in_a_collective"]
    assert (code0, code1) == (1, -signal.SIGKILL)
    assert "CollectiveError: all_gather failed on rank 0" in text0
    assert "no sign of life since from rank 1 (last work: an example): probably killed or stopped" in text0


def test_a_stopped_rank_is_noticed_like_a_killed_one(ends):
    (code0, text0), (code1, _) = ends["stopped"]
    assert (code0, code1) == (1, -signal.SIGKILL)
    assert "it has given no sign of life for 5 s" in text0


def test_a_hanging_rank_runs_into_the_timeout_and_everybody_learns_where_it_hangs(ends):
    (code0, text0), (code1, text1) = ends["hangs"]
    assert code0 == code1 == 1
    assert "CollectiveError: all_gather failed on rank 0" in text0
    assert "ending because rank 0 failed: advgrpo.runtime.watch.CollectiveError: all_gather failed on rank 0" in text1
    assert "not there: rank 1 (an example)" in text0
    assert re.search(r'rank 1 was here:\n(.*\n)*.*distributed_worker.py", line \d+, in hangs', text0)
    assert re.search(r'distributed_worker.py", line \d+ in hangs', text1), "where the hanging rank was"


def test_the_watches_notice_a_hanging_rank_where_the_collective_does_not(ends):
    (code0, text0), (code1, text1) = ends["hangs_for_nccl"]
    assert code0 == code1 == 1
    assert re.search(r"rank 1 failed: it has not come any further than 'an example' for \d s, while rank 0", text0)
    assert re.search(r'rank 1 was here:\n(.*\n)*.*distributed_worker.py", line \d+, in hangs_for_nccl', text0)
    assert re.search(r'distributed_worker.py", line \d+ in hangs_for_nccl', text1), "where the hanging rank was"


def test_what_is_to_be_saved_is_saved_before_the_end(ends):
    assert [code for code, _ in ends["saves_first"]] == [1, 1]
    text = ends["saves_first"][0][1]
    assert text.index("saved") < text.index("This rank did not end by itself")


def test_saving_that_hangs_does_not_keep_a_failed_job(ends):
    assert [code for code, _ in ends["cannot_save"]] == [1, 1]


def test_a_rank_that_gets_stuck_in_monitored_work_is_named_with_its_work(ends):
    (code0, text0), (code1, _) = ends["stuck"]
    assert code0 == code1 == 1
    assert "meeting 'score': rank 1 has not come any further than 'reward ocr'" in text0
    assert re.search(r'rank 1 was here:\n(.*\n)*.*distributed_worker.py", line \d+, in stuck', text0)


def test_a_failing_rank_stays_until_its_report_was_read(ends):
    """torchrun ends all ranks once the first has ended."""
    (_, text0), (_, text1) = ends["lingers"]
    read, left = (
        float(re.search(rf"{word} at ([\d.]+)", text)[1]) for word, text in (("read", text0), ("left", text1))
    )
    assert read < left


def test_any_rank_may_end_the_job_in_order(ends):
    assert [code for code, _ in ends["ends_early"]] == [0, 0]
    assert "stopped: SIGTERM" in ends["ends_early"][0][1]


def test_rank_0_stops_also_where_it_waits_for_others(ends):
    (code0, text0), (code1, _) = ends["stops_while_waiting"]
    assert (code0, code1) == (0, INTERRUPTED), "a machine that nobody asked to stop is to be started again"
    assert "stopped: SIGTERM" in text0


def test_rank_0_does_not_wait_for_a_dead_rank_when_it_stops(ends):
    (code0, text0), _ = ends["stops_without_a_goodbye"]
    assert code0 == 0
    assert float(re.search(r"closed after ([\d.]+) s", text0)[1]) < 4  # the silence of rank 1 is noticed after 5 s


def test_rank_0_outlives_the_others_use_of_its_store(ends):
    assert [(code, text.splitlines()[0]) for code, text in ends["early"]] == [(0, "done"), (0, "done")]


def test_with_the_defaults_all_end_within_a_minute():
    """Which scenario above takes how long follows from these; `freezes` shows that the sum of the first holds."""
    timeout = Config().collective_timeout
    assert inspect.signature(Distributed.start).parameters["timeout_seconds"].default == timeout
    assert inspect.signature(PContext.close).parameters["timeout"].default == watch.TORCHRUN_SECONDS
    assert max(watch.seconds_to_the_end(timeout).values()) <= 60
    # in time for a collective's own report, which says more
    assert watch.BEHIND_SECONDS > 3 * watch.POLL_SECONDS


@pytest.mark.weekly
@pytest.mark.slow
def test_a_job_whose_rank_is_stopped_ends_in_time(tmp_path):
    """The constants of distributed_worker.py, which are imported there and not here."""
    done = run_torchrun("freezes", tmp_path, launcher=(WORKER, "--torchrun"))
    took = time.time() - float((tmp_path / "frozen").read_text())
    assert done.returncode != 0
    assert "[rank 0] ending because rank 1 failed: it has given no sign of life for 5 s" in done.stderr
    assert "it has given no sign of life for 5 s" in recorded_error(tmp_path)["extraInfo"]["py_callstack"]
    assert took < 5 + 2 * 0.2 + 4 + 5 + 3  # silence, polls, saving, torchrun's patience; torchrun itself ends


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return Distributed.start("cpu")


def test_one_process_needs_no_setup(alone):
    assert (alone.rank, alone.world_size, alone.is_main, alone.device) == (0, 1, True, torch.device("cpu"))
    tensor = torch.randn(3, 2)
    gathered, before = alone.all_gather(tensor), tensor.clone()
    assert torch.equal(gathered, tensor)
    gathered.zero_()
    assert torch.equal(tensor, before), "what was gathered is a copy, as it is between processes"
    alone.all_reduce_sum([tensor])
    assert alone.gather_json([1]) == [[1]]
    assert list(alone.stoppable([1, 2], "piece")) == [1, 2]
    with pytest.raises(KeyError), alone.guard(), alone.monitored("work"):
        raise KeyError("unchanged")
    alone.close()


def test_bad_tensors(alone):
    with pytest.raises(ValueError, match="without dimensions"):
        alone.all_gather(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"tensors\[1\] is torch\.float64"):
        alone.all_reduce_sum([torch.ones(1), torch.ones(1).double()])


def test_bad_places(monkeypatch):
    with pytest.raises(UserError, match="device='tpu' must be auto, cpu or cuda"):
        Distributed.start("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no GPU"):
        Distributed.start("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="local rank 1 has no GPU, this machine has 1"):
        Distributed.start("cuda")
    monkeypatch.setenv("LOCAL_RANK", "")
    with pytest.raises(UserError, match="LOCAL_RANK='' must be a number"):
        Distributed.start("cpu")

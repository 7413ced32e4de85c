"""The thread that feeds the device decodes no reference: workers do, while it samples, and results are the same."""

import threading

import pytest
from rich.console import Console

from advgrpo.config import build, merge
from advgrpo.data import references
from advgrpo.runtime.distributed import Distributed
from advgrpo.training.run import Run
from tests.projects import ROOT

EXAMPLE = ROOT / "examples" / "custom_reward.py"  # the monitor wants to know what the references would get


@pytest.fixture
def decodings(monkeypatch):
    """Names of the threads of this process that decoded a reference, one for each."""
    seen, own = [], references.open_image

    def counted(*args, **options):
        seen.append(threading.current_thread().name)
        return own(*args, **options)

    monkeypatch.setattr(references, "open_image", counted)
    return seen


def iterations(config, decodings, count: int = 2) -> tuple[list[dict], list[str]]:
    """Metrics of each, and the decodings in this process after everything has been checked and built."""
    trainer = Run(config, Distributed.start("cpu"), resume=False, console=Console(quiet=True)).trainer
    decodings.clear()
    rows = [trainer.iterate() for _ in range(count)]
    kept = {name for name in rows[0] if "seconds" not in name and "per_second" not in name}
    return [{name: row[name] for name in sorted(kept)} for row in rows], list(decodings)


def test_the_main_thread_decodes_nothing_and_numbers_stay(unit_config, decodings, tmp_path):
    settings = merge(
        unit_config.model_dump(),
        {"rewards": {"custom": [{"name": "red", "import": f"{EXAMPLE}:redness", "weight": 1.0}]},
         "data": {"cache_dir": str(tmp_path / "one")},
         "evaluation": {"backbone": unit_config.adversary.backbone, "backbone_image_size": 32}},
    )  # fmt: skip
    here, seen = iterations(build(settings, "here"), decodings)
    assert len(seen) >= 8  # features, the observer's, the monitor's and the judge's, each for itself
    changes = {"data": {"cache_dir": str(tmp_path / "other"), "decode_workers": 2}, "output_dir": str(tmp_path / "out")}
    elsewhere, seen = iterations(build(merge(settings, changes), "elsewhere"), decodings)
    assert seen == []
    assert elsewhere == here

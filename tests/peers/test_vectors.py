"""What the peers' real functions gave, against this package: recorded by record.py, so that no checkout is needed.

Planted bugs that turned this file red: std_dev_t of Flow-Factory's Dance-SDE as s, its rounding to the stored dtype
left out, DanceGRPO's constants left out, UniRL's sigma_max of 0.99 left out, flow_cps for flow_sde, a case renamed.
"""

import importlib
import inspect
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from advgrpo_kernels.integrations import _cases, _self_check
from tests.kernels import stand_ins
from tests.peers import checkouts
from tests.peers.record import ECHOES, VECTORS

# Classes to call a method on: where a peer's scheduler stands in a schedule is not what is compared.
CLASSES = {
    "PerPromptStatTracker.update": stand_ins.EARLY_TRACKER,
    "FlowMatchEulerDiscreteSDEScheduler.step": stand_ins.FLOW_FACTORY,
    "FlowMatchSDEDiscreteScheduler.sample_previous_step": stand_ins.VERL_OMNI,
    "StepStrategy.denoise": stand_ins.UNIRL,
}


class Recording:
    """The outputs of one file, by module and target, case and output."""

    def __init__(self, file: Path):
        data = np.load(file)
        self.about, self.outputs, start = json.loads(str(data["about"])), {}, 0
        values = torch.from_numpy(data["values"])
        for module, target, case, name, form in json.loads(str(data["index"])):
            value = None
            if form is not None:
                dtype, *shape = form
                count = int(np.prod(shape, dtype=int))
                value = values[start : start + count].to(getattr(torch, dtype)).reshape(shape)
                start += count
            self.outputs.setdefault((module, target), {}).setdefault(case, {})[name] = value
        assert start == len(values)

    def function(self, module, target):
        """One with the parameters of the recorded function: they decide which cases there are."""
        (names,) = [names for m, t, names in self.about["parameters"] if (m, t) == (module, target)]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD

        def recorded():
            raise AssertionError("scored cases have recorded next latents")

        recorded.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        return recorded


FILES = sorted(path.stem for path in VECTORS.glob("*.npz"))


def test_every_peer_is_recorded_and_every_file_is_small():
    assert set(FILES) == set(checkouts.RECIPES)
    assert all((VECTORS / f"{name}.npz").stat().st_size < 200_000 for name in FILES)
    for name in FILES:
        about, entry = Recording(VECTORS / f"{name}.npz").about, checkouts.COMMITS[checkouts.RECIPES[name].folder]
        assert (about["repository"], about["commit"]) == (entry["repository"], entry["commit"])
        assert len(about["sha256"]) == 64


@pytest.mark.parametrize("name", FILES)
def test_this_package_gives_what_the_peer_gave(name):
    targets = importlib.import_module(f"advgrpo_kernels.integrations.{name}").TARGETS
    recording, compared = Recording(VECTORS / f"{name}.npz"), 0
    for (module, target_name), cases in recording.outputs.items():
        (target,) = [t for t in targets if t.name == target_name and t.is_defined_in(module)]
        # The trackers recorded take no `dists`; otherwise the first variant is that of the newest version.
        ours = target.variants[-1 if target_name.startswith("PerPrompt") else 0]
        cls = None
        if target_name in CLASSES:
            cls = getattr(stand_ins.module(CLASSES[target_name]), target_name.partition(".")[0])
        for case, outputs in answers(target, ours, cls, cases, recording.function(module, target_name)):
            assert outputs.keys() - set(ECHOES) == cases[case.name].keys(), f"{case.name}: run tests.peers.record again"
            for output, value in cases[case.name].items():
                text = _self_check.unequal(value, outputs[output], case.tolerances.get(output, _self_check.FLOAT32))
                assert text is None, f"{module}.{target_name}, {case.name}, {output}: {text}"
                compared += 1
    assert compared == sum(len(outputs) for cases in recording.outputs.values() for outputs in cases.values()) > 50


def answers(target, ours, cls, recorded, like):
    """(case, outputs of `ours`) for every recorded case; scored cases get the next latents that the peer drew."""
    cases = {case.name: case for case in target.cases(like, cls)}
    assert set(recorded) <= set(cases), "a case was renamed or taken out: run tests.peers.record again"
    with _self_check._isolated():
        for name in recorded:
            case = cases[name]
            run = case.run
            drawn = recorded.get(name.removesuffix(", scored") + ", drawn", {}).get("prev_sample")
            if name.endswith(", scored") and drawn is not None:
                run = run._replace(recorded=drawn)
            yield case, run(ours)


@pytest.mark.skipif(not os.environ.get("ADVGRPO_PEERS"), reason="ADVGRPO_PEERS is not set")
@pytest.mark.parametrize("name", FILES)
def test_the_recordings_are_of_the_checkouts_sources(name):
    about = Recording(VECTORS / f"{name}.npz").about
    assert about["sha256"] == checkouts.digest(name), (
        f"{name}: not at {about['commit']}, or record.py is to be run again"
    )


def test_cases_reach_first_and_last_step_both_modes_and_all_dtypes():
    names = [case for n in FILES for cases in Recording(VECTORS / f"{n}.npz").outputs.values() for case in cases]
    for part in ("step 0 of 8", f"step {_cases.COUNT - 1} of 8", "drawn", "scored", "bfloat16", "float16", "float32"):
        assert any(part in name for name in names)

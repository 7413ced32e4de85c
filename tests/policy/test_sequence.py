"""The tokens of a row on 2 and 4 processes: exchanges and their gradients, and our forward against that of one process,
with its blocks whole on each and with each block's weights in parts.

Bugs planted in a copy, each seen red (tests/mutants): the gradient of the first tokens on every process; every process
on the positions of the first tokens.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from advgrpo.policy.fused.sequence import shares
from advgrpo.runtime.mesh import Mesh
from tests import sequence_worker
from tests.sequence_worker import IN_PARTS, TEXT, WHOLE
from tests.training.test_run import environment
from tests.zygote import run as run_forked

MODELS = {
    "sd35-medium": ("sd35-medium", {}),
    "sd3-medium": ("sd3-medium", {}),
    "sd35-large": ("sd35-large", {}),
    f"sd35-large{IN_PARTS}": ("sd35-large", {}),
    "flux": ("flux", {}),
    "flux-checkpointing": ("flux", {"checkpointing": True}),
    "qwen": ("qwen", {}),
    "qwen-bfloat16": ("qwen", {"dtype": "bfloat16"}),
    f"sd35-medium{IN_PARTS}": ("sd35-medium", {}),
    f"flux-checkpointing{IN_PARTS}": ("flux", {"checkpointing": True}),
    f"flux{IN_PARTS}": ("flux", {}),
    f"qwen{IN_PARTS}": ("qwen", {}),
}
WEEKLY = {f"sd35-medium{IN_PARTS}", f"flux{IN_PARTS}", "sd35-large", f"sd35-large{IN_PARTS}"}
FOUR = {"sd35-medium", "qwen", f"qwen{IN_PARTS}"}  # by four processes in CI: both kinds of text, and a head to each
CASES = [pytest.param(2, key, marks=[pytest.mark.weekly] * (key in WEEKLY)) for key in MODELS]
CASES += [pytest.param(4, key, marks=[pytest.mark.weekly] * (key not in FOUR)) for key in MODELS]
every_case = pytest.mark.parametrize(("processes", "key"), CASES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sequence")


@pytest.fixture(scope="module")
def by_one(request) -> dict[str, dict[str, torch.Tensor]]:
    """What one process gives that has all tokens, of the models that this session asks for."""
    cases = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    asked, found = {case.params.get("key") for case in cases if case}, {}
    for key, (name, settings) in MODELS.items():
        if key not in asked:
            continue
        ours = sequence_worker.model(name, **sequence_worker.options(settings))
        given = sequence_worker.seen(ours, name) | sequence_worker.by_rows(ours, name)
        merged = not key.endswith(IN_PARTS)
        found[key] = {what: tensor for what, tensor in given.items() if merged or "merged" not in what}
    return found


@pytest.fixture(scope="module")
def left(folder, request) -> Callable[[str, int], list[dict[str, torch.Tensor]]]:
    """What each of so many processes has left of a model, or of the "exchanges". They are started once, for all models
    that this session asks of them."""

    @cache
    def start(processes: int) -> None:
        cases = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
        asked = {case.params.get("key") for case in cases if case and case.params.get("processes") == processes}
        models = {key: model for key, model in MODELS.items() if key in asked}
        (folder / "job.json").write_text(json.dumps({"group": True, "models": models, "runs": {}}))
        done = run_forked("tests.sequence_worker:main", [folder], processes=processes, environment=environment())
        assert done.returncode == 0, done.stderr

    def of(key: str, processes: int) -> list[dict[str, torch.Tensor]]:
        start(processes)
        return [load_file(folder / f"{key}.{processes}.{rank}.safetensors") for rank in range(processes)]

    return of


def test_shares_are_in_order_and_differ_by_one_at_most():
    assert (shares(7, 2), shares(7, 4), shares(24, 4)) == ([4, 3], [2, 2, 2, 1], [6, 6, 6, 6])
    with pytest.raises(ValueError, match="3 tokens cannot be shared out over 4 processes"):
        shares(3, 4)


def test_processes_of_a_sequence_group_are_neighbours_and_take_turns():
    places = [Mesh(rank, 6, 3) for rank in range(6)]
    found = [(each.data_rank, each.sequence_rank, each.data_size) for each in places]
    assert found == [(0, 0, 2), (0, 1, 2), (0, 2, 2), (1, 0, 2), (1, 1, 2), (1, 2, 2)]
    assert [each.rank for each in places if each.is_judge(4)] == [1, 4]
    assert places[0].one_of_each(torch.arange(6)).tolist() == [0, 3]
    with pytest.raises(ValueError, match="4 processes are no sequence groups of 3"):
        Mesh(0, 4, 3)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.weekly)])
def test_an_exchange_moves_bits_and_its_gradient_moves_them_back(processes, left):
    first, width = [sum(shares(24, processes)[:rank]) for rank in range(processes + 1)], 8 // processes
    second = [24 + sum(shares(TEXT, processes)[:rank]) for rank in range(processes + 1)]
    for rank, found in enumerate(left("exchanges", processes)):
        image, heads = WHOLE[first[rank] : first[rank + 1]], WHOLE[:, :, :, width * rank : width * (rank + 1)]
        tokens = torch.cat([image, WHOLE[second[rank] : second[rank + 1]]])
        expected = {
            "heads": heads,
            "bfloat16": heads.bfloat16(),
            "gradient of heads": tokens,
            "tokens": tokens,
            "gradient of tokens": heads,
            "gathered": WHOLE[:24],
            "gradient of gathered": image,
        }
        assert found.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@every_case
@pytest.mark.in_ci(1)
def test_a_velocity_has_the_bits_of_one_process_where_no_product_blocks_rows(key, by_one, processes, left):
    """What is exchanged, attention by heads and all that is computed token by token; a library's matrix product rounds
    by how many rows it has, which here it has one by one."""
    for found in left(key, processes):
        names = [name for name in by_one[key] if "by rows" in name]
        assert len(names) == (2 if key.endswith(IN_PARTS) else 3)
        assert [name for name in names if not torch.equal(found[name], by_one[key][name])] == []


@every_case
def test_velocities_and_gradients_are_those_of_one_process_up_to_rounding(key, by_one, processes, left):
    bound = 3e-6 if "bfloat16" not in key else 1e-2
    for found in left(key, processes):
        assert found.keys() == by_one[key].keys()
        for name, expected in by_one[key].items():
            difference = (found[name].float() - expected.float()).abs().max()
            assert difference <= bound * expected.float().abs().max(), name
        assert (found["adapted"] - found["base"]).abs().max() > 0.1


@every_case
def test_every_process_has_the_same_velocity_with_and_without_a_gradient(key, by_one, processes, left):
    """So that all compute the same loss, and likelihood ratios start at exactly 1."""
    every = left(key, processes)
    assert all(torch.equal(found["trained"], every[0]["adapted"]) for found in every)
    assert all(torch.equal(found["base, before the backward"], every[0]["base"]) for found in every)

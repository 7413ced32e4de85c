"""The table of scores gathers itself by image number, and every column keeps its name.

Bugs planted in a copy, each seen red: gathered in the order of the processes; a kind of column left out of the table;
two kinds taken for each other; columns left in the judge's precision.
"""

import pytest
import torch

from advgrpo.training.columns import Columns


class TwoProcesses:
    """`all_gather` as rank 0 of two sees it: the other holds `ids` and rows that are 10 times their numbers."""

    def __init__(self, ids: list[int], columns: int):
        self.ids, self.columns = ids, columns

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 1:
            return torch.cat([tensor, torch.tensor(self.ids)])
        theirs = torch.tensor([[float(100 * number + i) for number in range(self.columns)] for i in self.ids])
        return torch.cat([tensor, theirs.to(tensor.dtype)])


def filled(ids: list[int], **without) -> Columns:
    def column(number: int) -> torch.Tensor:
        return torch.tensor([float(100 * number + i) for i in ids])

    columns = Columns({"adversary": column(0), "rule": column(1)}, column(2), {"rule": column(3)}, column(4))
    for name, value in without.items():
        setattr(columns, name, value)
    return columns


def test_columns_are_gathered_by_image_number_each_kind_apart():
    own = [4, 0, 2]
    found = filled(own).gathered(torch.tensor(own), TwoProcesses([3, 5, 1], columns=5))
    everywhere = filled(list(range(6)))
    assert list(found.rewards) == ["adversary", "rule"]
    for name, column in everywhere.rewards.items():
        assert torch.equal(found.rewards[name], column)
    assert torch.equal(found.paired, everywhere.paired)
    assert torch.equal(found.of_references["rule"], everywhere.of_references["rule"])
    assert torch.equal(found.similarity, everywhere.similarity)


def test_what_is_absent_stays_absent():
    own = [1, 0]
    found = filled(own, paired=None, similarity=None, of_references={}).gathered(
        torch.tensor(own), TwoProcesses([], columns=2)
    )
    assert (found.paired, found.of_references, found.similarity) == (None, {}, None)
    assert torch.equal(found.rewards["rule"], torch.tensor([100.0, 101.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_are_float32(dtype):
    columns = Columns({"rule": torch.tensor([0.5, 1.0], dtype=dtype)})
    assert columns.gathered(torch.tensor([0, 1]), TwoProcesses([], columns=1)).rewards["rule"].dtype == torch.float32


def test_names_are_the_users_words():
    assert list(filled([0]).described()) == [
        "the reward adversary",
        "the reward adversary of the references",
        "the reward rule",
        "the reward rule of the references",
        "the DINO similarity to the references",
    ]
    assert [float(column) for column in filled([0]).described().values()] == [0, 200, 100, 300, 400]

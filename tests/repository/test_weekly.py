"""The mark `every_second` leaves CI half of the combinations, among which any two values of three arguments meet.

Bugs planted, each seen red: the parity of the first argument alone; the other half weekly as well.
"""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import pytest_collection_modifyitems

SIZES = {"shape": 3, "dtype": 2, "form": 3}


class Item(SimpleNamespace):
    """What the hook asks of a test."""

    def get_closest_marker(self, name):
        return self.mark if self.mark and self.mark.name == name else None

    def add_marker(self, name):
        self.keywords.add(name)


def items(mark):
    places = itertools.product(*(range(size) for size in SIZES.values()))
    made = (SimpleNamespace(indices=dict(zip(SIZES, each, strict=True))) for each in places)
    return [Item(path=Path("tests/x.py"), keywords=set(), mark=mark, callspec=each) for each in made]


def test_any_two_values_meet_in_half_of_the_combinations():
    found = items(pytest.mark.every_second(*SIZES).mark)
    pytest_collection_modifyitems(None, found)
    kept = [item.callspec.indices for item in found if "weekly" not in item.keywords]
    assert len(kept) == len(found) / 2
    for one, other in itertools.combinations(SIZES, 2):
        met = {(each[one], each[other]) for each in kept}
        assert met == set(itertools.product(range(SIZES[one]), range(SIZES[other])))


def test_without_the_mark_all_run():
    found = items(None)
    pytest_collection_modifyitems(None, found)
    assert not any(item.keywords for item in found)

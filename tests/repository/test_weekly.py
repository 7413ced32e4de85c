"""The mark `every_second` leaves CI half of the combinations, among which any two values of three arguments meet, and
`in_ci` the first ones.

Bugs planted, each seen red: the parity of the first argument alone; the other half weekly as well; pytest's numbers of
the variants taken for those of the values, which leaves out a whole value of the last argument.
"""

import itertools

from tests.conftest import pytest_collection_modifyitems

pytest_plugins = ["pytester"]

SIZES = {"shape": 3, "dtype": 2, "form": 3}
MARKED = """
import pytest

@pytest.mark.{mark}
@pytest.mark.parametrize("form", range(3))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 8), (2, 8), (3, 5)])
def test_it(shape, dtype, form):
    pass
"""


def kept_and_left(pytester, mark: str) -> tuple[list[dict], list[dict]]:
    """Arguments of the variants that CI runs, and of those that are weekly."""
    [*items], _ = pytester.inline_genitems(pytester.makepyfile(MARKED.format(mark=mark)))
    pytest_collection_modifyitems(None, items)
    parts = [[item.callspec.params for item in items if ("weekly" in item.keywords) == weekly] for weekly in (0, 1)]
    return parts[0], parts[1]


def test_any_two_values_meet_in_half_of_the_combinations(pytester):
    kept, left = kept_and_left(pytester, "every_second('shape', 'dtype', 'form')")
    assert len(kept) == len(left) == 9
    for one, other in itertools.combinations(SIZES, 2):
        assert len({(each[one], each[other]) for each in kept}) == SIZES[one] * SIZES[other]


def test_the_first_ones_are_kept(pytester):
    kept, left = kept_and_left(pytester, "in_ci(2)")
    assert (len(kept), len(left)) == (2, 16)
    assert kept[0] == {"shape": (1, 8), "dtype": "float32", "form": 0}


def test_without_a_mark_all_run(pytester):
    kept, left = kept_and_left(pytester, "usefixtures()")
    assert (len(kept), len(left)) == (18, 0)

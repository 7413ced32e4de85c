"""An engine that draws with the unit pipeline's weights, and its server's address."""

import pytest

from tests.engine.stand_ins import Engine, stand_in
from tests.judges import serving
from tests.unit_size import UNIT


@pytest.fixture(scope="module")
def standing(unit_pipeline):
    return Engine(unit_pipeline, UNIT.t5_tokens)


@pytest.fixture(scope="module")
def url(standing):
    with serving(stand_in.server(standing)) as address:
        yield address

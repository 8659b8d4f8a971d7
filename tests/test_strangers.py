"""Networks of other libraries, one test each, where the library is installed: `pytest -m strangers`."""

import importlib.util

import pytest

from tests.architectures import LIBRARIES, described
from tests.strangers import convert

NETWORKS = [(library, name) for library in LIBRARIES for name in described(library).ARCHITECTURES]


@pytest.mark.exhaustive
@pytest.mark.strangers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("library", "name"), NETWORKS, ids=map("-".join, NETWORKS))
def test_a_network_of_another_library_goes_the_whole_way(library, name):
    if library != "by_hand" and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: pip install '.[strangers]'")
    outcome = convert(library, name)
    assert outcome.result in ("right", "friction"), str(outcome)

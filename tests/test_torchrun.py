"""The processes of torchrun as the environment tells of them."""

import pytest

from sphereify import torchrun


@pytest.mark.parametrize(
    ("environment", "world", "local", "first"),
    [
        ({}, 1, 0, True),
        ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}, 4, 0, True),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, 4, 1, False),
        ({"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": "none"}, 1, 0, True),
    ],
)
def test_processes_are_counted_and_one_speaks_for_all(environment, world, local, first, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (torchrun.world_size(), torchrun.local_rank(), torchrun.is_first_process()) == (world, local, first)

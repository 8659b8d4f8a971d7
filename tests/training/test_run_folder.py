"""The folder of a run: what lies in it, and whether it is free."""

import pytest

from sphereify.errors import UsageError
from sphereify.training import (
    finetune,
)
from tests.training.small import dropout_net, images, usual


def test_a_folder_has_room_for_one_run(tmp_path):
    finetune(dropout_net(), images(), usual(epochs=2), output=tmp_path)
    with pytest.raises(UsageError, match="holds a run already; resume it, remove its checkpoints/, or name another"):
        finetune(dropout_net(), images(), usual(epochs=1), output=tmp_path)

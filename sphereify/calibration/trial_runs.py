"""Trial runs of the original before a calibration: what it returns, and whether its passes may take turns."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.calibration.layer_pairs import LayerPair
from sphereify.calibration.lockstep import Pass, active_pass
from sphereify.convert.arguments import ModelArguments
from sphereify.convert.model_inputs import tensors_in
from sphereify.errors import DataError, UsageError, first_line


def first_run(
    reference: nn.Module, pairs: dict[str, LayerPair], arguments: ModelArguments
) -> tuple[list[Tensor], Counter]:
    """The outputs of the original for a batch, and the number of calls of each layer.

    Raises:
        UsageError: the original does not take these arguments.
        DataError: its output is not finite.
    """
    calls: Counter[str] = Counter()
    handles = [
        pair.original.register_forward_hook(lambda *_, name=name: calls.update([name]))  # type: ignore[misc]
        for name, pair in pairs.items()
    ]
    try:
        output = arguments.run(reference)
    except Exception as error:  # a forward may raise anything
        advice = ". Leave labels out: [images for images, _ in loader]." if len(arguments.args) > 1 else ""
        raise UsageError(
            f"calibration: the model does not take the first batch, {arguments.described()} "
            f"({first_line(error)}){advice}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if isinstance(output, Tensor) and output.is_floating_point() and not _has_scores(output):
        raise DataError(
            "calibration: the original network's output is not finite on the first batch; its weights or the range of "
            "the inputs are wrong"
        )
    return list(tensors_in(output)), calls


def _has_scores(output: Tensor) -> bool:
    """True if an output is finite, but for classes that are masked out with −∞."""
    masked = output == -torch.inf
    return bool((output.isfinite() | masked).all() and not masked.all())


def can_take_turns(
    reference: nn.Module, pairs: dict[str, LayerPair], inputs: list[ModelArguments], first: list[Tensor]
) -> bool:
    """Try whether passes of several batches may take turns in one network.

    Where a module keeps a value from one layer to the next, they would mix it up. The first and the last batch are
    tried; `first` are the outputs for the first one, run alone.
    """
    ends = [inputs[0], inputs[-1]]
    alone = [first, list(tensors_in(ends[1].run(reference)))]
    together: dict[int, list[Tensor]] = {}

    def body(number: int) -> Callable[[], Any]:
        def run() -> None:
            together[number] = list(tensors_in(ends[number].run(reference)))

        return run

    def pause(*_: Any) -> None:
        current = active_pass()
        if current is not None:
            current.pause(True)

    handles = [pair.original.register_forward_hook(pause) for pair in pairs.values()]
    passes = [Pass(body(number), number) for number in range(2)]
    try:
        running = list(passes)
        while running:
            running = [one for one in running if one.advance() is not None]
        return all(_are_close(alone[number], together[number]) for number in range(2))
    except RuntimeError:  # sizes that do not fit together
        return False
    finally:
        for one in passes:
            one.close()
        for handle in handles:
            handle.remove()


def _are_close(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3)
        for a, b in zip(one, other, strict=True)
    )

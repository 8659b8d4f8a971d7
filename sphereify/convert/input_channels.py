"""The number of channels of the images that a model takes."""

import contextlib
from typing import Any

from torch import nn

from sphereify.convert.assumed_inputs import assumed_inputs
from sphereify.convert.copies import skeleton
from sphereify.convert.observe import observe_first
from sphereify.convert.sites import is_site, weight_of


def input_channels(model: nn.Module) -> int:
    """The number of channels that the images of a model have; 3 where nothing tells.

    The first convolution tells, unless a linear map comes before it, which may take patches or pixels: then it is the
    usual image with which the model runs that tells.
    """
    sites = [m for m in model.modules() if is_site(m) and getattr(weight_of(m), "ndim", 0) >= 2]
    convolutions = [m for m in sites if weight_of(m).ndim > 2]  # type: ignore[union-attr]
    if sites and isinstance(sites[0], nn.Linear):
        with contextlib.suppress(Exception):  # a model that cannot be copied
            images = [one for one in assumed_inputs(model) if getattr(one.first, "ndim", 0) == 4]
            seen = observe_first(skeleton(model), images)
            if not seen.error:
                return int(seen.arguments.first.shape[1])
    first: Any = next(iter(convolutions), None)
    return 3 if first is None else int(weight_of(first).shape[1]) * int(getattr(first, "groups", 1))

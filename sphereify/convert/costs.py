"""The cost of a network: the multiplications of each site, and the share of them that a conversion makes angular."""

from torch import nn

from sphereify.annotations import PLAN
from sphereify.convert.arguments import Inputs
from sphereify.convert.graph import read_graph
from sphereify.convert.multiplied import Costs
from sphereify.convert.plan import ConversionPlan


def multiplications(plan_or_model: ConversionPlan | nn.Module, example_inputs: Inputs = None) -> dict[str, int]:
    """The multiplications of each site in one forward pass, by name and in order.

    Args:
        plan_or_model: a plan, which holds those of the run that it was made from; or a model, plain or converted.
        example_inputs: as for `plan_conversion`, for a model; default: those of its plan, or the usual ones. With them
            a converted model is run as it is, and sums over the windows of its grouped convolutions count as well.

    Returns:
        An empty dictionary for a plan of a model that could not be run.

    Raises:
        UsageError: the model does not run with `example_inputs`.

    >>> multiplications(nn.Conv2d(3, 8, 3), nn.functional.pad(__import__("torch").ones(1, 3, 2, 2), (1, 1, 1, 1)))
    {'': 864}
    """
    return dict(costs(plan_or_model, example_inputs).sites)


def costs(plan_or_model: ConversionPlan | nn.Module, example_inputs: Inputs = None) -> Costs:
    """The multiplications of one forward pass, as `multiplications` gives them, with those that no site makes."""
    if isinstance(plan_or_model, ConversionPlan):
        return plan_or_model.costs
    plan = PLAN.of(plan_or_model)
    if plan is not None and plan.costs.total and example_inputs is None:
        return plan.costs
    return read_graph(plan_or_model, example_inputs).costs

"""The rewriting of a network: observe and trace it, plan, apply the plan."""

from typing import TYPE_CHECKING

from sphereify.lazy import lazy_names

if TYPE_CHECKING:
    from sphereify.convert.options import ConversionOptions
    from sphereify.convert.plan import ConversionPlan, Decision
    from sphereify.convert.planner import plan_conversion
    from sphereify.convert.rewrite import apply_plan

_HOMES = {
    "ConversionOptions": "sphereify.convert.options",
    "ConversionPlan": "sphereify.convert.plan",
    "Decision": "sphereify.convert.plan",
    "apply_plan": "sphereify.convert.rewrite",
    "plan_conversion": "sphereify.convert.planner",
}

__all__ = ["ConversionOptions", "ConversionPlan", "Decision", "apply_plan", "plan_conversion"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)

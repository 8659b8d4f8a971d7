"""The report: one HTML file in which a person sees what a conversion did, and which layers resist."""

from typing import TYPE_CHECKING

from sphereify.lazy import lazy_names

if TYPE_CHECKING:
    from sphereify.report.angles import measure_angles
    from sphereify.report.writing import write_report

_HOMES = {
    "measure_angles": "sphereify.report.angles",
    "write_report": "sphereify.report.writing",
}

__all__ = ["measure_angles", "write_report"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES)

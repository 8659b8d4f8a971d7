"""The command doctor."""

from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sphereify.doctor import Examination


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON and nothing else.")] = False,
) -> None:
    """Examine this machine: which fast paths are usable, whether each computes what the reference does, how fast."""
    from sphereify.doctor import examine
    from sphereify.errors import SphereifyError

    examination = examine()
    if json:
        _print_json(examination)
    else:
        _print(examination)
    if examination.wrong:
        names = ", ".join(f"{report.maker} {report.name} on {report.device}" for report in examination.wrong)
        raise SphereifyError(
            f"wrong results: {names}. Layers check kernels before they use them, and go on without those that are "
            f"wrong. In the environment SPHEREIFY_KERNELS=0 switches Triton's off, SPHEREIFY_COMPILED_PASSES=0 the "
            f"compiled ones."
        )


def _print_json(examination: "Examination") -> None:
    import json
    import math
    from dataclasses import asdict

    data = asdict(examination)
    for report in data["passes"]:  # JSON has no infinity
        report["deviation"] = report["deviation"] if math.isfinite(report["deviation"]) else None
    print(json.dumps(data, indent=2, ensure_ascii=False))


def _print(examination: "Examination") -> None:
    from rich.text import Text

    from sphereify.doctor import TIMED_DTYPES
    from sphereify.terminal import add_row, console, say, text_table
    from sphereify.wording import enumerated

    out = console()
    table = text_table("", "")
    for row in examination.environment.items():
        add_row(table, *row)
    out.print(table)
    dtypes = [str(dtype).removeprefix("torch.") for dtype in TIMED_DTYPES]
    for (maker, device), reports in groupby(examination.passes, key=lambda report: (report.maker, report.device)):
        columns = ["pass", "agrees", "deviation", "allowed", *dtypes]
        table = text_table(*columns, title=f"{maker} on {device}", whole={*columns} - {"agrees"})
        for report in reports:
            agrees = Text("yes", "green") if report.agrees else Text(f"no: {report.error or report.where}", "red")
            deviation = ("", "") if report.error else (f"{report.deviation:.1e}", f"{report.allowed:.1e}")
            times = (f"{report.microseconds[dtype]:,.0f}" if dtype in report.microseconds else "" for dtype in dtypes)
            add_row(table, report.name, agrees, *deviation, *times)
        out.print(table)
    say(out, "deviation: from the reference in float64, as a share of the largest value; allowed: by rounding", "dim")
    say(out, f"{enumerated(dtypes)}: microseconds of {examination.timed}; median of single calls", "dim")
    if not examination.wrong:
        say(out, "all passes agree with the reference", "bold")

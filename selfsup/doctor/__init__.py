"""`selfsup doctor DATA`: a look at images and at the machine, and what to train on the one with the other."""

import json
import sys
from pathlib import Path

from selfsup.doctor import advice, machine, report
from selfsup.doctor.survey import survey
from selfsup.errors import UserError


def run(
    spec: str | None, *, as_json: bool = False, sample: int = 500, seconds: float = 30.0, out: Path = Path("runs")
) -> None:
    """Print what is seen and proposed, for people or as one JSON object. Without `spec`: of the machine alone.

    Raises UserError if there are no images, and, after the report, if fewer than two can be read.
    """
    here = machine.look(out)
    if spec is None:
        print(
            json.dumps({"machine": report.of_machine(here)}, indent=1)
            if as_json
            else "\n".join(report.machine_lines(here))
        )
        return
    seen = survey(spec, sample=sample, seconds=seconds)
    proposal = advice.propose(seen, here, out)
    if as_json:
        print(json.dumps(report.as_json(here, seen, proposal), indent=1, allow_nan=False))
    else:
        print("\n".join(report.lines(here, seen, proposal)))
    if proposal is None:
        sys.stdout.flush()
        reason = f"; {seen.bad[0][0]}: {seen.bad[0][1]}" if seen.bad else ""
        raise UserError(
            f"data={spec}: {seen.readable} of {seen.decoded} images looked at can be read; two are needed{reason}"
        )

"""Doctor: is this machine, are these ranks and these data fit for a run? Small checks, each with what was found and what to do."""

from __future__ import annotations

from clipscale.doctor.examination import examine, print_findings, write_json
from clipscale.doctor.finding import Finding

__all__ = ["Finding", "examine", "print_findings", "write_json"]

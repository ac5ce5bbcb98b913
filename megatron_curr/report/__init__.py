"""One self-contained HTML page about a run: what was planned, what happened, how fast."""

from megatron_curr.report.build import build_report, write_report

__all__ = ["build_report", "write_report"]

"""What runs amounted to: a table for the terminal, `summary.json`, and one HTML page that needs nothing but itself.

The input is data, a list of `Record`s; no model is loaded and nothing is computed again.
"""

from statetrack.report.origin import provenance, run_origin
from statetrack.report.page import ReportTable, write_figure, write_report
from statetrack.report.record import Record, read_summary, write_summary
from statetrack.report.tables import table

__all__ = [
    "Record",
    "ReportTable",
    "provenance",
    "read_summary",
    "run_origin",
    "table",
    "write_figure",
    "write_report",
    "write_summary",
]

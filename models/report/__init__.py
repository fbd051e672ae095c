"""The evaluation report: what each compressed bundle saves, and what it costs (docs/report.md).

`build.py` measures and returns a dictionary, `html.py` renders it; both are what
`streamrec models report` calls.
"""

from models.report.build import DataInfo, Effort, build_report, open_bundles
from models.report.html import render_html
from models.report.writing import write_report

__all__ = ["DataInfo", "Effort", "build_report", "open_bundles", "render_html", "write_report"]

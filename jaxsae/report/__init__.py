"""The run's report: measured numbers in, `report.md`, one self-contained `report.html` and `figures/*.png` out.

In: `ReportInputs`, plain Python and NumPy values that the pipeline gathered. Out: files, or the plain-text table that
ends a run. Nothing is measured here but the bands drawn around curves, and every sentence follows from the inputs.
"""

from jaxsae.report.page import write
from jaxsae.report.score import describe_score
from jaxsae.report.tables import ReportInputs, summary_table

__all__ = ["ReportInputs", "describe_score", "summary_table", "write"]

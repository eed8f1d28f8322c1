"""A report on compressed models: size, ranks, errors, accuracy, speed, and one slice to look at.

`build` gathers and writes; `layers`, `speed` and the evaluation supply what is known; `content` says which
parts there are; `figures`, `overlay`, `tables` and `page` show them.
"""

from tucker_ops.nnunet.report.build import Inputs, Report, write_report

__all__ = ["Inputs", "Report", "write_report"]

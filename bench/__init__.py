"""Benchmarks of the op on nnU-Net's layers, against torch's own convolutions. See README.md beside this file.

`problems` names what is computed, `operands` makes the tensors and the float64 answer, `peers` lists who
computes it, `measure` checks and times them, `memory` measures their peak, `ceilings` that of the machine, `output`,
`plot` and `roofline` write it down. `suite` runs many problems in several configurations and keeps a `journal`.
"""

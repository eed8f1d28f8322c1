"""What is timed of the op, and what the project asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from bench.problems import CPU_FULL, BenchProblem

# Relative RMS against float64 on the same rounded operands.
GATES = {"float16": 6e-4, "bfloat16": 5e-3, "float32": 2e-5, "tf32": 1e-3}
TF32 = "tf32"
# The same of gradients, each of which is a product of rounded intermediates.
GRADIENT_GATES = {"float16": 2e-3, "bfloat16": 1e-2}


@dataclass(frozen=True)
class OpCase:
    """A layer in a kind of number: float16, bfloat16, float32 or tf32.

    targets: "floor" is the most that time ÷ time of a copy of input and output may be, the others are the least that
    the named ratio may be.
    """

    problem: BenchProblem
    kind: str
    targets: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.problem.name.removesuffix("_128")

    @property
    def copied_bytes(self) -> int:
        """Input read once and output written once."""
        problem = self.problem
        voxels = [1, 1]
        for axis in range(problem.spec.ndim):
            voxels[0] *= problem.size[axis]
            voxels[1] *= problem.output_shape[2 + axis]
        channels = (problem.spec.in_channels, problem.spec.out_channels)
        elements = sum(c * v for c, v in zip(channels, voxels, strict=True))
        return problem.batch * elements * problem.dtype.itemsize


TARGETS = {
    ("stage0_128", "float16"): {"floor": 1.6, "dense": 2.5, "three": 2.0},
    ("stage1_128", "float16"): {"dense": 2.0, "three": 1.8},
}
# Those with a target first: they are to be measured even where time is short.
LAYERS = (
    "stage0_128", "stage1_128", "stage2_128", "stage3_128", "stage4_128", "down1_128", "decoder0_128",
)  # fmt: skip
OTHER_KINDS = ("bfloat16", TF32, "float32")


# What is asked of Triton's kernels, forward and with the gradient.
TRITON_TARGETS = {
    ("stage0_128", "float16"): {"three": 1.5},
    ("stage1_128", "float16"): {"three": 1.5},
}


def gradient_cases(shrink: int = 1) -> tuple[OpCase, ...]:
    """The layers that something is asked of, with what is asked."""
    return tuple(
        replace(case, targets=TRITON_TARGETS[case.problem.name, case.kind])
        for case in op_cases(shrink)
        if (case.problem.name, case.kind) in TRITON_TARGETS
    )


def op_cases(shrink: int = 1) -> tuple[OpCase, ...]:
    """All layers in float16, the first two also in the other kinds; with extents divided by `shrink`, for tests."""
    known = {problem.name: problem for problem in CPU_FULL}
    pairs = [(name, "float16") for name in LAYERS]
    pairs += [(name, kind) for kind in OTHER_KINDS for name in LAYERS[:2]]
    cases = []
    for name, kind in pairs:
        dtype = "float32" if kind == TF32 else kind
        problem = replace(known[name], dtype_name=dtype)
        if shrink > 1:
            problem = replace(problem, size=tuple(max(2, n // shrink) for n in problem.size))
        cases.append(OpCase(problem, kind, TARGETS.get((name, kind), {})))
    return tuple(cases)

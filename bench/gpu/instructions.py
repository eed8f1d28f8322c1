"""`python -m bench.gpu.instructions`: what Triton's kernels cost a GPU, counted in their machine code; needs no GPU.

Each kernel of one layer's forward and gradient is compiled for a capability and disassembled with the tools that come
with Triton. Instructions a voxel are those that all warps issue, loops as often as they run, over the voxels written;
a multiprocessor of capability 8.0 and newer issues at most four a cycle. That says nothing of memory.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from tucker_ops.backends.triton import launch
from tucker_ops.backends.triton.config import Config

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}


class Recorder:
    """Takes the place of `launch.launch`: keeps each kernel that would have been started, once, and runs nothing."""

    def __init__(self):
        self.launches = {}

    def __call__(self, kernel, grid, arguments, constants, config):
        kinds = tuple(kind_of(argument) for argument in arguments)
        key = kernel.__name__, kinds, tuple(constants.items()), config
        self.launches.setdefault(key, (kernel, arguments, grid))


def kind_of(argument) -> tuple[str, object, bool]:
    """Type of an argument in Triton's words, its value if that is compiled in, and whether 16 divides it."""
    if argument is None or (isinstance(argument, int) and argument == 1):
        return "constexpr", argument, False
    if isinstance(argument, torch.Tensor):
        return _POINTERS[argument.dtype], None, True
    return ("fp32", None, False) if isinstance(argument, float) else ("i32", None, argument % 16 == 0)


class _Source(triton.compiler.ASTSource):
    """Parsed by one thread at a time: Python 3.11's parser fails in two at once. The rest of a compilation does not."""

    _lock = threading.Lock()

    def hash(self):
        with self._lock:
            return super().hash()

    def make_ir(self, *arguments, **options):
        with self._lock:
            return super().make_ir(*arguments, **options)


def compiled(kernel, kinds, constants, config: Config, capability: int):
    """A recorded launch, compiled for cards of this capability."""
    signature, values, attributes = {}, dict(constants), {}
    for i, (name, (kind, value, divisible)) in enumerate(zip(kernel.arg_names, kinds, strict=False)):
        signature[name] = kind
        if kind == "constexpr":
            values[name] = value
        elif divisible:
            attributes[i,] = [["tt.divisibility", 16]]
    signature.update(dict.fromkeys(dict(constants), "constexpr"))
    assert list(signature) == kernel.arg_names
    source = _Source(kernel, signature, constexprs=values, attrs=attributes)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(
        source, target=target, options={"num_warps": config.warps, "num_stages": config.stages}
    )


@dataclass(frozen=True)
class Code:
    """Machine code of a kernel: registers a thread, local memory read and written, and its instructions.

    ``loops``: of each loop the instructions, and whether it stores to global memory.
    """

    registers: int
    spills: int
    instructions: int
    loops: tuple[tuple[int, bool], ...]


def disassembled(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, listing = (
            subprocess.run(
                [_TOOLS / tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    loops = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*`\((\.L_[^)]+)\)", instruction)
        begin = labels.get(target[1], len(instructions)) if target else len(instructions)
        # A kernel ends in a branch to itself.
        if begin < end:
            body = instructions[begin : end + 1]
            loops.append((len(body), any(re.search(r"\bSTG\b", word) for word in body)))
    spills = sum(bool(re.search(r"\b(STL|LDL)\b", word)) for word in instructions)
    return Code(int(re.search(r"REG:(\d+)", usage)[1]), spills, len(instructions), tuple(loops))


def _executed(name: str, code: Code, constants: dict, arguments: dict) -> int:
    """Instructions of one warp; a loop that is not in the code any more was unrolled."""
    if name == "convolve_rows":
        wide = constants["TOGETHER"] > 1
        taps = math.prod(constants[f"KERNEL_{axis}"] for axis in "DHW") // constants["TOGETHER"]
        steps = taps * (
            1 if wide else triton.cdiv(arguments["RANK_IN"] * constants["UNIT_K"], constants["BLOCK_K"])
        )
        after = triton.cdiv(arguments["CHANNELS"] * constants["UNIT_C"], constants["BLOCK_C"])
    elif name == "reduce_rows":
        steps = after = triton.cdiv(arguments["CHANNELS"] * constants["UNIT_C"], constants["BLOCK_C"])
    else:
        steps = after = arguments["BLOCKS_EACH"]
    return code.instructions + sum(size * ((after if stores else steps) - 1) for size, stores in code.loops)


def table(channels: int, rank: int, extent: int, dtype: torch.dtype, capability: int) -> str:
    """Markdown: a line for each kernel of `tucker_conv`, 3×3×3, and of its gradient that the forward has not yet."""
    recorder, run = Recorder(), launch.launch
    x = torch.empty(1, channels, *[extent] * 3, dtype=dtype).contiguous(memory_format=torch.channels_last_3d)
    weights = [x.new_empty(size) for size in ((rank, channels), (rank, rank, 3, 3, 3), (channels, rank))]
    geometry = [[1] * 3] * 3
    launch.launch = recorder
    try:
        launch.forward(x, *weights, None, *geometry)
        forward = len(recorder.launches)
        launch.backward(x, x, *weights, *geometry, [True] * 5)
    finally:
        launch.launch = run
    lines = [
        f"{channels} channels, rank {rank}, {extent}³, {dtype}, capability {capability / 10}",
        "",
        "| | kernel | rows | registers | spills | shared, KB | instructions a voxel |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for i, (key, (kernel, arguments, grid)) in enumerate(recorder.launches.items()):
        name, kinds, constants, config = key
        result = compiled(kernel, kinds, constants, config, capability)
        code, constants = disassembled(result.asm["cubin"]), dict(constants)
        executed = _executed(name, code, constants, dict(zip(kernel.arg_names, arguments, strict=False)))
        issued = executed * config.warps * math.prod(grid) / extent**3
        lines.append(
            f"| {'forward' if i < forward else 'gradient'} | {name} | {constants['BLOCK_M']} | {code.registers} | "
            f"{code.spills} | {result.metadata.shared / 1024:.0f} | {issued:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.instructions", description=__doc__)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--extent", type=int, default=64)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument(
        "--capability", type=int, default=90, choices=(80, 86, 89, 90, 100, 120), help="80 for 8.0"
    )
    chosen = parser.parse_args()
    if min(chosen.channels, chosen.rank, chosen.extent) < 1:
        parser.error("channels, rank and extent must be at least 1")
    print(table(chosen.channels, chosen.rank, chosen.extent, getattr(torch, chosen.dtype), chosen.capability))


if __name__ == "__main__":
    main()

"""What nvcc made of the kernels: no spills, no stack, tensor cores, shared memory that cards have. Needs no GPU."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

import pytest
import torch

import tucker_ops
from tucker_ops.backends import cuda, native

# Of the largest card of each kind, for one block.
SHARED = {75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024}
KINDS = {
    "Fp16": (torch.float16, False),
    "Bf16": (torch.bfloat16, False),
    "Tf32": (torch.float32, True),
    "Fp32": (torch.float32, False),
}
T4 = cuda.Device(75, 40, 64 * 1024, 64 * 1024)


@pytest.fixture(scope="module")
def library() -> Path:
    loaded = native.load_cuda()
    if not loaded:
        pytest.skip(loaded.reason)
    return native.CUDA_LIBRARY


def tool(name: str) -> str:
    folder = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    found = shutil.which(name, path=f"{folder}:/usr/local/cuda/bin") or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not here: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return found


def read(library: Path, *options: str) -> str:
    environment = {"PATH": f"{Path(tool('nvdisasm')).parent}:/usr/bin:/bin"}
    command = [tool("cuobjdump"), *options, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def kernel_of(mangled: str) -> str:
    """Such as "Stream Fp16 1 1 3 1 1 12 32"."""
    name = re.search(r"(Stream|Gather)INS0_\d(\w{4})E((?:L[ib]\d+E)+)", mangled)
    if name is None:
        return mangled
    return " ".join([name[1], name[2], *re.findall(r"L[ib](\d+)E", name[3])])


@cache
def architectures(library: Path) -> list[int]:
    return sorted({int(n) for n in re.findall(r"sm_(\d+)", read(library, "--list-elf"))})


def test_where_there_is_nvcc_the_kernels_are_built():
    status = native.build_status()
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    if "TUCKER_CUDA=0" in status.get("cuda_reason", "") or status["native"] == "absent":
        pytest.skip(f"left out: {status.get('cuda_reason', status['reason'])}")
    assert status["cuda"] == "built", status["cuda_reason"]


def test_ops_are_registered_and_run_on_no_other_device(library):
    # In a process of its own: tests that ran before may have registered the emulated kernels for the CPU.
    code = """
import torch, tucker_ops
arguments = [torch.randn(1, 8, 4, 4), torch.randn(8, 8), torch.randn(8, 8, 3, 3), torch.randn(8, 8)]
try:
    torch.ops.tucker_ops._tucker_conv_cuda(*arguments, None, [1, 1], [1, 1], [1, 1], [90, 132, 1, 1], [])
except NotImplementedError:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr
    if not torch.cuda.is_available():
        assert "no NVIDIA GPU" in tucker_ops.backends()["cuda"].reason


def test_nothing_is_spilled_and_nothing_lies_on_a_stack(library):
    report = read(library, "--dump-resource-usage")
    found, arch, name = {}, None, None
    for line in report.splitlines():
        if match := re.match(r"\s*arch = sm_(\d+)", line):
            arch = int(match[1])
        if match := re.search(r"Function (\S+?):", line):
            name = match[1]
        if match := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            found[arch, kernel_of(name)] = tuple(map(int, match.groups()))
    assert {arch for arch, _ in found} == set(architectures(library))
    assert len(found) > 30 * len(architectures(library))
    bad = {kernel: use for kernel, use in found.items() if use[1] or use[2]}
    assert not bad, f"registers, stack, local memory: {bad}"


def forms(kind: str) -> list[cuda.Form]:
    dtype, tf32 = KINDS[kind]
    numbers = (cuda.form(dtype, n, 64, tf32) for n in itertools.count())
    return list(itertools.takewhile(lambda form: form is not None, numbers))


def test_every_kernel_multiplies_on_tensor_cores(library):
    for arch in architectures(library):
        code = read(library, "-sass", "-arch", f"sm_{arch}")
        parts = re.split(r"Function : ", code)[1:]
        counts = {kernel_of(part.split("\n", 1)[0]): len(re.findall(r"\bHG?MMA\.", part)) for part in parts}
        streams = {name: n for name, n in counts.items() if name.startswith("Stream")}
        for kind in {name.split()[1] for name in streams}:
            for form in forms(kind):
                geometry = (form.steps_in, form.steps_out, form.depth, form.stride_depth, form.stride)
                name = " ".join(["Stream", kind, *map(str, (*geometry, form.height, form.width))])
                # Those of one tap of the core alone; a kernel for a later architecture is left empty here.
                slots = form.depth if form.stride_depth == 1 else 2
                tiles = (
                    form.height
                    * form.width
                    // 64
                    * form.steps_in
                    * form.steps_out
                    * (2 if "16" in kind else 1)
                )
                least = slots * tiles if form.least_capability <= arch else 0
                assert (streams[name] >= least) if least else streams[name] == 0, (arch, name, streams[name])
        gathers = [n for name, n in counts.items() if name.startswith("Gather")]
        assert gathers and min(gathers) >= 16
        assert ("Bf16" in {name.split()[1] for name in streams}) == (arch >= 80)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_fit_into_shared_memory(library, kind):
    for form in forms(kind):
        assert form.shared_bytes <= SHARED[form.least_capability], form
    assert len(forms(kind)) >= 2


@pytest.mark.parametrize(
    ("device", "rank", "one_pass"),
    [(cuda.H200, 16, True), (cuda.H200, 32, True), (cuda.H200, 64, False), (T4, 16, True)],
)
def test_the_choice_of_kernels_says_why(library, device, rank, one_pass):
    module = tucker_ops.nn.TuckerConv3d(2 * rank, 2 * rank, 3, (rank, rank), padding=1).half()
    choice = cuda.choice_of(module.problem((1, 2 * rank, 64, 64, 64)), device)
    assert choice.one_pass == one_pass and choice.microseconds > 0
    assert ("tiles of" in choice.text) == one_pass
    assert one_pass or "ranks" in choice.text

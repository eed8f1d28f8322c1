"""Runs `emulated` on this processor with avx2, then with every instruction set in Bochs as a Sapphire Rapids."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

POOL = "https://deb.debian.org/debian/pool/main/"
# Debian 13's, the C library with the rest because an older system's is too old for this Bochs.
PACKAGES = {
    "b/bochs/bochs_3.0+dfsg-1_amd64.deb": "6433495e013686deb83866ce49a9aec27a3c801de532358a330cd683b27e3593",
    "g/glibc/libc6_2.41-12+deb13u4_amd64.deb": "967aa62605721081c3eb2a17650611a792aa802d76a6511d1840242623d204c9",
    "g/gcc-14/libgcc-s1_14.2.0-19_amd64.deb": "3c71917b490d1a17aed43196a2787a256ecf060526cdb20216a74bedc061b150",
    "g/gcc-14/libstdc++6_14.2.0-19_amd64.deb": "ab1fa05837aa7a92aae748fd07a18a35f7d18bb4a71c4724fe2bbf0e32089de0",
    "libt/libtool/libltdl7_2.5.4-4_amd64.deb": "ab38167fc5aba8d133309fa98ca0a8b4e8b3c31588214ea70803a2bf3c6aa5ba",
    "libs/libsamplerate/libsamplerate0_0.2.2-4+b2_amd64.deb": "2665417fa996c1e249dbaa65c32305ac666e5ae865fad0f109b629935ec0bd18",  # noqa: E501
    "r/readline/libreadline8t64_8.2-6_amd64.deb": "eeadf2b5e755c9f183883feea2d9b5b28560284275d5f54d3e55d0923b1d0967",
    "n/ncurses/libtinfo6_6.5+20250216-2_amd64.deb": "8b9f6a7983e9418564e48a627518de4c03917b56efe68d7f3e93bd8fffa1cc10",
}
# Of the windows of Bochs' debugger, which this never opens.
WINDOWS = ("libgtk-3.so.0", "libgdk-3.so.0", "libpango-1.0.so.0", "libgobject-2.0.so.0", "libglib-2.0.so.0")
LIBRARIES = "usr/lib/x86_64-linux-gnu"
# Bochs puts no more into memory than fits into one of its blocks.
BLOCK_KB = 8192
SETTINGS = """\
display_library: rfb, options="timeout=0"
cpu: model=sapphire_rapids, ips=50000000, reset_on_triple_fault=0
memory: guest=1024, host=1024, block_size={block}
romimage: file={build}/machine
vgaromimage: file={build}/empty
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
optramimage1: file={build}/emulated, address=0x8000000
optramimage2: file={build}/arguments, address=0x7fff000
port_e9_hack: enabled=1
clock: sync=none
panic: action=fatal
log: {build}/bochs.log
"""


def fetched(path: str, digest: str, folder: Path) -> Path:
    target = folder / path.rsplit("/", 1)[1]
    if not target.exists():
        try:
            with urllib.request.urlopen(POOL + path) as answer:
                target.write_bytes(answer.read())
        except OSError as error:
            sys.exit(
                f"{POOL}{path}: {error}; Debian drops old versions: name the new one, or install Bochs 3.0"
            )
    if hashlib.sha256(target.read_bytes()).hexdigest() != digest:
        target.unlink()
        sys.exit(f"{POOL}{path} has another checksum than expected")
    return target


def unpacked(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for path, digest in PACKAGES.items():
        package = fetched(path, digest, root)
        archive = subprocess.run(
            ["ar", "p", package, "data.tar.xz"], stdout=subprocess.PIPE, check=True
        ).stdout
        subprocess.run(["tar", "-xJ", "-C", root], input=archive, check=True)
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", root / "usr/bin/bochs-bin"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    names = re.findall(r" U ((?:g|gtk|gdk|pango)_\w+)", symbols)
    source = "".join(f"void {name}(void) {{ __builtin_trap(); }}\n" for name in names)
    for library in WINDOWS:
        command = ["cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library}", "-xc", "-", "-o"]
        command.append(str(root / LIBRARIES / library))
        subprocess.run(command, input=source, text=True, check=True)


def emulator(root: Path) -> tuple[list[str | Path], dict[str, str]]:
    """Command and environment of an installed Bochs that knows the processor, or else of a fetched one."""
    installed = shutil.which("bochs")
    if installed:
        models = subprocess.run([installed, "--help", "cpu"], capture_output=True, text=True)
        if "sapphire_rapids" in models.stdout + models.stderr:
            return [installed], {}
    if not (root / LIBRARIES / WINDOWS[-1]).exists():
        unpacked(root)
    loader = [root / "usr/lib64/ld-linux-x86-64.so.2", "--library-path", root / LIBRARIES]
    environment = {
        "LTDL_LIBRARY_PATH": f"{root / LIBRARIES}/bochs/plugins",
        "BXSHARE": f"{root}/usr/share/bochs",
    }
    return [*loader, root / "usr/bin/bochs-bin"], environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path, help="where CMake has built `emulated` and `machine`")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th problem [1]")
    parser.add_argument("isa", nargs="*", default=["avx2", "avx512", "avx512_bf16", "amx_bf16"])
    options = parser.parse_intermixed_args()
    build = options.build.resolve()
    if options.every < 1:
        parser.error(f"--every must be at least 1, got {options.every}")
    for name in ("emulated", "machine"):
        if not (build / name).exists():
            parser.error(f"{build} holds no {name}: build it first, or run `make emulate`")
    if (build / "emulated").stat().st_size > BLOCK_KB * 1024:
        sys.exit(f"{build}/emulated is larger than {BLOCK_KB} KB")
    native = subprocess.run(
        [build / "emulated", str(options.every), "avx2"], stdout=subprocess.PIPE, text=True
    )
    print(native.stdout, end="", flush=True)

    (build / "arguments").write_text(f"emulated {options.every} {' '.join(options.isa)} ")
    (build / "empty").write_bytes(bytes(2048))
    command, environment = emulator(build / "bochs")
    (build / "bochsrc").write_text(SETTINGS.format(build=build, block=BLOCK_KB))
    lines = []
    with subprocess.Popen(
        [*command, "-q", "-f", build / "bochsrc"],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        errors="replace",
    ) as bochs:
        for line in bochs.stdout:
            lines.append(line)
            # Bochs greets, and calls the end of the program a panic.
            if re.match(r"this processor|FAILED|\w+ (fp32|bf16) |terminate|unknown|exception|exit", line):
                print(line, end="", flush=True)
    different = [
        line for line in native.stdout.splitlines(True) if line.startswith("avx2") and line not in lines
    ]
    if "avx2" in options.isa and different:
        sys.exit("in the emulator these came out differently:\n" + "".join(different))
    if native.returncode or "exit 00\n" not in lines:
        sys.exit(f"failed; see {build}/bochs.log")


if __name__ == "__main__":
    main()

"""What README shows runs."""

from __future__ import annotations

import re
import subprocess
import sys


def test_python_example_runs(repo_root):
    (code,) = re.findall(r"```python\n(.*?)```", (repo_root / "README.md").read_text(), re.DOTALL)
    assert len(code.strip().splitlines()) <= 12
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "(1, 3, 64, 64, 64)" in result.stdout.replace("torch.Size([", "(").replace("])", ")")

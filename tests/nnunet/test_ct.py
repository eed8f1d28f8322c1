"""A network of the shape of TotalSegmentator's 3 mm model, dense against compressed, on a real CT."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tiny import TRAINER_FOLDER

from tucker_ops.convert import CompressionConfig
from tucker_ops.nnunet.compress import compress_folder
from tucker_ops.nnunet.evaluate import evaluate_folder

PREDICT = """
import json, sys
from tucker_ops.nnunet.predict import predict_folder
summary = predict_folder(sys.argv[1], sys.argv[2], sys.argv[3], mirroring=False)
print(json.dumps({"seconds": summary.seconds, "bytes": summary.peak_rss_bytes}))
"""


@pytest.mark.slow
def test_agreement_and_memory(tmp_path, shared_dir, repo_root, capsys):
    """Prints, per class, the Dice of the compressed output with the dense one, and both models' peak memory.

    Nothing in the ranks fits this model to its data, so agreement is low at a factor of 0.5; full rank, where
    the network is only rewritten, must agree.
    """
    source = shared_dir / "models" / "Dataset297_CTOrgans" / TRAINER_FOLDER
    images = tmp_path / "images"
    images.mkdir()
    (images / "ct_0000.nii.gz").symlink_to(shared_dir / "data" / "ct" / "example_ct_sm.nii.gz")
    half = compress_folder(source, tmp_path / "half", CompressionConfig(factor=0.5))
    compress_folder(source, tmp_path / "full", CompressionConfig(factor=1.0, only_if_cheaper=False))
    assert (half.dtype, half.configuration) == ("float16", "3d_fullres")
    assert half.tucker.parameters < 0.4 * half.dense.parameters

    used = {}
    for name, model in (("dense", source), ("half", tmp_path / "half"), ("full", tmp_path / "full")):
        # A process each, so that the peak of one does not hide the other's.
        done = subprocess.run(
            [sys.executable, "-c", PREDICT, str(model), str(images), str(tmp_path / f"out_{name}")],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(repo_root)},
        )
        assert done.returncode == 0, done.stderr
        used[name] = json.loads(done.stdout.splitlines()[-1])

    agreement = {
        name: evaluate_folder(tmp_path / f"out_{name}", tmp_path / "out_dense") for name in ("half", "full")
    }
    with capsys.disabled():
        print("\nDice with the dense output at factor 0.5, and at full rank:")
        table = agreement["half"].per_class.to_frame("0.5").assign(full=agreement["full"].per_class)
        print(table.round(3).to_string())
        print(f"mean {agreement['half'].mean:.3f} and {agreement['full'].mean:.4f}")
        for name, figures in used.items():
            print(f"{name}: {figures['bytes'] / 1e9:.2f} GB, {figures['seconds']:.0f} s")
    assert agreement["full"].mean > 0.99
    assert agreement["half"].per_class.notna().sum() >= 12
    assert used["half"]["bytes"] < 1.25 * used["dense"]["bytes"]

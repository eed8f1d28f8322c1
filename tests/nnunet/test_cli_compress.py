"""`tucker-ops compress`, `predict` and `explain` as typed in a shell."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tucker_ops.cli import main
from tucker_ops.errors import ModelFolderError
from tucker_ops.nnunet.manifest import read_manifest

SMALL = ["--min-rank", "4", "--align", "4"]


@pytest.fixture
def shell(monkeypatch, capsys):
    """Runs a command; returns its exit code, standard output and standard error."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tucker-ops", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def test_compress_explain_predict(tmp_path, tiny_model, images, shell):
    code, out, _ = shell("compress", tiny_model, "-o", tmp_path / "dst", "--factor", 0.5, *SMALL)
    assert code == 0
    for text in ("encoder.stages.0.0.convs.1.conv", "Dense, head", "parameters", "checkpoint on disk"):
        assert text in out
    assert read_manifest(tmp_path / "dst").config.factor == 0.5

    code, out, _ = shell("explain", tmp_path / "dst")
    assert code == 0
    assert "4, 4" in out and "reference" in out and "first layer" in out
    assert shell("explain", tiny_model)[1].count("dense") > 10

    code, out, _ = shell(
        "predict",
        "-m",
        tmp_path / "dst",
        "-i",
        images,
        "-o",
        tmp_path / "out",
        "--no-mirroring",
        "--case",
        "b",
    )
    assert code == 0
    assert "1 cases in" in out and (tmp_path / "out" / "b.nii.gz").exists()


def test_dry_run_writes_nothing(tmp_path, tiny_model, shell):
    code, out, _ = shell("compress", tiny_model, "-o", tmp_path / "dst", "--dry-run", *SMALL)
    assert code == 0 and "Dense" in out
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ([], {"factor": 0.5}),
        (["--energy", "0.8"], {"energy": 0.8}),
        (["--params", "0.5"], {"params": 0.5}),
        (["--macs", "0.6"], {"macs": 0.6}),
        (["--skip-transposed"], {"skip_transposed": True}),
        (["--factor", "1", "--keep-expensive"], {"factor": 1.0, "only_if_cheaper": False}),
    ],
)
def test_options_reach_the_config(tmp_path, tiny_model, shell, options, config):
    code, _, err = shell("compress", tiny_model, "-o", tmp_path / "dst", *SMALL, *options)
    assert code == 0, err
    used = read_manifest(tmp_path / "dst").config.to_dict()
    assert {key: used[key] for key in config} == config
    assert (used["min_rank"], used["align"]) == (4, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--factor", "1.5"], "ConfigError: factor"),
        (["--factor", "0"], "ConfigError: factor"),
        (["--factor", "0.5", "--macs", "0.5"], "ConfigError: one policy"),
        (["--fold", "7"], "ModelFolderError: fold 7"),
        (["--checkpoint", "best.pth"], "ModelFolderError: no fold has a best.pth"),
    ],
)
def test_one_readable_message(tmp_path, tiny_model, shell, options, message):
    code, out, err = shell("compress", tiny_model, "-o", tmp_path / "dst", *options)
    assert code == 2
    assert message in err and "Traceback" not in out + err
    assert not (tmp_path / "dst").exists()


def test_debug_shows_the_traceback(tmp_path, shell, monkeypatch):
    monkeypatch.setenv("TUCKER_OPS_DEBUG", "1")
    with pytest.raises(ModelFolderError):
        shell("compress", tmp_path / "nothing", "-o", tmp_path / "dst")


@pytest.mark.parametrize("command", ["compress", "predict", "explain"])
def test_help_shows_an_example(shell, command):
    code, out, _ = shell(command, "--help")
    assert code == 0 and f"Example: tucker-ops {command}" in out


@pytest.mark.parametrize("command", [("compress", "-o", "dst"), ("explain",)])
def test_patch_that_does_not_fit_the_network(tmp_path, tiny_model, shell, command):
    plans = json.loads((tiny_model / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["patch_size"] = [17, 17, 17]
    (tiny_model / "plans.json").write_text(json.dumps(plans))
    name, *rest = command
    code, out, err = shell(name, tiny_model, *(tmp_path / part if part == "dst" else part for part in rest))
    assert code == 2 and "correct patch_size in plans.json" in " ".join((out + err).split())
    assert not (tmp_path / "dst").exists()


def test_unknown_device_also_for_a_dense_model(tiny_model, shell):
    code, out, err = shell("explain", tiny_model, "--device", "foo")
    assert code == 2 and "use cpu or cuda" in " ".join((out + err).split())


def test_version(shell):
    import tucker_ops

    assert shell("--version")[1].strip() == f"tucker-ops {tucker_ops.__version__}"


HEAVY = """
import sys
import tucker_ops.cli
print([name for name in ("nnunetv2", "tensorly", "matplotlib") if name in sys.modules])
"""


def test_help_imports_nothing_heavy(repo_root):
    done = subprocess.run(
        [sys.executable, "-c", HEAVY], capture_output=True, text=True, cwd=repo_root, check=True
    )
    assert done.stdout.strip() == "[]"

"""Folders that appear whole or not at all."""

from __future__ import annotations

import os

import pytest

from tucker_ops.errors import OutputExistsError, OutputWriteError
from tucker_ops.nnunet.staging import staged_folder


def marked(path) -> bool:
    return (path / "mark").exists()


def tree(path):
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def test_appears_at_the_end(tmp_path):
    target = tmp_path / "deep" / "er" / "out"
    with staged_folder(target, replaceable=marked) as stage:
        stage.write("sub/file", b"content")
        assert not target.exists()
    assert tree(tmp_path) == ["deep", "deep/er", "deep/er/out", "deep/er/out/sub", "deep/er/out/sub/file"]
    assert os.stat(target).st_mode & 0o777 == os.stat(target / "sub").st_mode & 0o777


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_any_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        with staged_folder(tmp_path / "deep" / "out", replaceable=marked) as stage:
            stage.write("file", b"content")
            raise error
    assert tree(tmp_path) == []


def test_existing_output_needs_force_and_a_known_face(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExistsError, match="--force"):
        with staged_folder(target, replaceable=marked):
            pass
    with pytest.raises(OutputExistsError, match="no earlier output of this command"):
        with staged_folder(target, replaceable=marked, force=True):
            pass
    (target / "mark").write_text("")
    with staged_folder(target, replaceable=marked, force=True) as stage:
        stage.write("new", b"")
        assert (target / "thesis.tex").exists()
    assert tree(tmp_path) == ["out", "out/new"]


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputExistsError, match="no folder"):
        with staged_folder(tmp_path / "out", replaceable=lambda path: True, force=True):
            pass


def test_failed_rename_restores_the_old_output(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "mark").write_text("old")
    rename = os.rename

    def full(source, destination):
        if os.path.basename(source).startswith(".out.") and str(destination) == str(target):
            raise OSError(28, "No space left on device")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OutputWriteError, match="No space left on device"):
        with staged_folder(target, replaceable=marked, force=True) as stage:
            stage.write("mark", b"new")
    assert tree(tmp_path) == ["out", "out/mark"]
    assert (target / "mark").read_text() == "old"


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputWriteError, match=r"cannot be written .*choose another output"):
        with staged_folder(tmp_path / "file" / "out", replaceable=marked):
            pass
    assert tree(tmp_path) == ["file"]

"""Places where a file cannot be written are named before any work."""

import os

import pytest

from metaaug_cli.errors import InputError
from metaaug_cli.files import require_writable


def test_places_that_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.txt").write_text("old")
    for name in ("new.txt", "old.txt", "folder/below/new.txt"):
        require_writable(tmp_path / name)
        require_writable(type(tmp_path)(name))
    assert sorted(os.listdir(tmp_path)) == ["old.txt"]


def test_places_that_cannot(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="it is a folder"):
        require_writable(tmp_path)
    with pytest.raises(InputError, match="file is not a folder"):
        require_writable(tmp_path / "file" / "new.txt")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(InputError, match="cannot be written into"):
        require_writable(tmp_path / "new.txt")

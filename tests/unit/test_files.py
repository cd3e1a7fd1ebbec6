"""Places where a file cannot be written are named before any work."""

import os
import threading

import pytest

from metaaug_cli.errors import InputError
from metaaug_cli.files import require_writable, write_atomically


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


def test_what_is_behind_a_link_is_replaced(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_atomically(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link.txt", "real.txt"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_stays_a_pipe_and_gets_the_text(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_atomically(pipe, "text")
    reader.join(10)
    assert read == ["text"]
    assert pipe.is_fifo()
    write_atomically(type(pipe)(os.devnull), "nothing")
    assert not os.path.isfile(os.devnull)

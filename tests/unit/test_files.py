"""Places where a file cannot be written are named before any work."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

from metaaug_cli.errors import InputError, UsageError
from metaaug_cli.files import (
    DISK_FULL,
    exclusive,
    replaced_atomically,
    require_report_place,
    require_writable,
    write_atomically,
)


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
    require_writable(Path(os.devnull))  # it is written to, not replaced


def test_a_report_needs_a_folder_that_is_there(tmp_path):
    require_report_place("--json", tmp_path / "report.json")
    with pytest.raises(UsageError, match=r"--json .*: there is no folder"):
        require_report_place("--json", tmp_path / "no" / "report.json")


def test_a_full_disk_is_no_mistake_in_the_name(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "new.txt", "text")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_under_another_writer_is_told_from_a_place_that_cannot_be_written(tmp_path, error):
    def write(raised):
        with replaced_atomically(tmp_path / "set") as partial:
            partial.write_text("ha")
            raise raised

    (tmp_path / "set").write_text("old")
    with pytest.raises(OSError, match="set") as caught:
        write(error)
    assert caught.value.errno in DISK_FULL
    with pytest.raises(InputError, match=r"cannot write .*: Permission denied"):
        write(SafetensorError("I/O error: Permission denied (os error 13)"))
    assert os.listdir(tmp_path) == ["set"]
    assert (tmp_path / "set").read_text() == "old"


def test_what_another_writer_wrote_takes_the_place_with_the_usual_rights(tmp_path):
    (tmp_path / "usual").touch()
    with replaced_atomically(tmp_path / "new" / "set") as partial:
        partial.write_text("new")
        partial.chmod(0o600)
    assert (tmp_path / "new" / "set").read_text() == "new"
    assert (tmp_path / "new" / "set").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_file_is_held_by_one_at_a_time(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("kept")
    with exclusive(path) as first, exclusive(path) as second:
        assert (first, second) == (True, False)
    with exclusive(path) as again:
        assert again
    assert path.read_text() == "kept"


def test_a_killed_process_lets_go(tmp_path):
    path = tmp_path / "log.txt"
    code = (
        "import sys, time; from pathlib import Path; from metaaug_cli.files import exclusive\n"
        "with exclusive(Path(sys.argv[1])) as held: print(held, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        with exclusive(path) as held:
            assert not held
        other.kill()
        other.wait()
    with exclusive(path) as held:
        assert held


def test_where_there_are_no_locks_nobody_is_refused(tmp_path, monkeypatch):
    def unsupported(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("metaaug_cli.files.fcntl.flock", unsupported)
    with exclusive(tmp_path / "a") as first, exclusive(tmp_path / "a") as second:
        assert first
        assert second


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

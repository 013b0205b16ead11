"""`relay reload`: which process it asks, and what it says if there is none."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from relay import announcement
from relay.announcement import namespace
from relay.cli import reload

HERE, ELSEWHERE = namespace(), "pid:[1]"


def server(process: int, port: int, space: str = HERE) -> tuple[str, str, str, str]:
    return space, str(process), "http", str(port)


@pytest.mark.parametrize(
    ("port", "servers", "process"),
    [
        ("", [server(12, 8030)], 12),
        ("9000", [server(12, 8030)], 12),
        ("", [server(12, 8030), server(1, 9000)], 1),
        (" 9000 ", [server(12, 8030), server(13, 9000)], 13),
        ("8030", [server(12, 8030, ELSEWHERE), server(13, 9000)], 13),
    ],
)
def test_the_relay_of_this_host_is_found(port, servers, process):
    """Process 1 of a container first, then the one on the port, then the only one."""
    assert reload.running({"PORT": port}, servers) == process


@pytest.mark.parametrize(
    ("servers", "reason"),
    [
        ([], "no relay runs here; --pid names the process of one elsewhere"),
        ([server(12, 8030, ELSEWHERE)], "no relay runs here"),
        (
            [server(12, 8030), server(13, 9000)],
            "several relays run here, so choose one with --pid: 12 (port 8030), 13 (port 9000)",
        ),
    ],
)
def test_it_must_be_clear_which(servers, reason):
    """No signal goes to a process that may be another one."""
    with pytest.raises(ValueError, match=reason.replace("(", r"\(").replace(")", r"\)")):
        reload.running({}, servers)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--pid"], "unknown argument --pid; the only one is --pid N"),
        (["--pid", "1", "2"], "unknown argument --pid"),
        (["--pid", "0"], "--pid takes the ID of a process"),
        (["--pid=-1"], "--pid takes the ID of a process"),
        (["--pid", "x"], "--pid takes the ID of a process"),
        (["now"], "unknown argument now"),
        (["--pid", str(2**22 + 1)], "there is no process 4194305"),
    ],
)
def test_wrong_arguments_are_an_error(arguments, reason, capsys):
    """With the reason on one line."""
    assert reload.main(arguments, {}) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"not reloaded: {reason}")
    assert printed.err.count("\n") == 1


def test_no_relay_is_an_error(monkeypatch, capsys):
    """The reason says what to do."""
    monkeypatch.setattr(reload, "announced", list)
    assert reload.main([], {}) == 1
    assert capsys.readouterr().err == (
        "not reloaded: no relay runs here; --pid names the process of one elsewhere\n"
    )


ANNOUNCING = """
import signal, sys
from relay.announcement import announce
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
holder = announce(8030, tls=False) if sys.argv[1:] else None
print(flush=True)
print(signal.sigtimedwait([signal.SIGHUP], 60).si_signo)
"""


@contextmanager
def waiting(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for the signal, as a relay if it has an argument."""
    command = [sys.executable, "-c", ANNOUNCING, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("form", ["--pid {}", "-pid {}", "--pid={}"])
def test_the_process_gets_the_signal(form, capsys):
    """It is a hangup."""
    with waiting("relay") as process:
        assert process.stdout is not None
        assert reload.main(form.format(process.pid).split(), {}) == 0
        assert process.stdout.read().strip() == b"%d" % signal.SIGHUP
    assert f"process {process.pid} reloads" in capsys.readouterr().out


def test_a_process_that_is_no_relay_gets_no_signal(capsys):
    """It might end, as most programs do."""
    with waiting("relay"), waiting() as process:
        assert reload.main(["--pid", str(process.pid)], {}) == 1
        text = f"not reloaded: process {process.pid} is no running relay, so SIGHUP might end it\n"
        assert capsys.readouterr().err == text
        process.send_signal(signal.SIGHUP)
        assert process.wait(10) == 0  # only this one came


def test_where_nothing_is_announced_the_process_is_believed(monkeypatch, tmp_path, capsys):
    """Systems other than Linux have no table of names."""
    monkeypatch.setattr(announcement, "SOCKETS", str(tmp_path / "none"))
    with waiting() as process:
        assert process.stdout is not None
        assert reload.main(["--pid", str(process.pid)], {}) == 0
        assert process.stdout.read().strip() == b"%d" % signal.SIGHUP
    assert f"process {process.pid} reloads" in capsys.readouterr().out


def test_help_is_no_request(capsys):
    """It prints the usage."""
    assert reload.main(["--help"], {}) == 0
    assert capsys.readouterr().out == reload.USAGE

"""Log lines: their format, their destination, and that writing them never blocks."""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from relay.telemetry import log

TIME = r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d{6}"


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Each test leaves the process's logging as it was."""
    root, ours = logging.getLogger(), logging.getLogger("relay")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], root.level, ours.level = before
    logging.getLogger("relay.env.Shop").setLevel(logging.NOTSET)
    root.setLevel(before[1])
    ours.setLevel(before[2])


class Pipes:
    """Two pipes in place of the two outputs of the process."""

    def __init__(self) -> None:
        self.out_read, self.out = os.pipe()
        self.err_read, self.err = os.pipe()

    def read(self) -> tuple[str, str]:
        os.close(self.out)
        os.close(self.err)
        return os.read(self.out_read, 65536).decode(), os.read(self.err_read, 65536).decode()

    def close(self) -> None:
        for descriptor in (self.out_read, self.out, self.err_read, self.err):
            with suppress(OSError):
                os.close(descriptor)


@pytest.fixture(name="pipes")
def make_pipes() -> Iterator[Pipes]:
    """Outputs of one test."""
    with closing(Pipes()) as pipes:
        yield pipes


def test_a_text_line_is_that_of_ld_relay(pipes: Pipes) -> None:
    """Date, time with microseconds, level, the environment's mask, message; errors go to stderr."""
    with closing(log.LogHandler(stdout=pipes.out, stderr=pipes.err)) as output:
        log.set_up("debug", "text", output)
        logging.getLogger("relay.server").debug("one")
        logging.getLogger("relay.server").info("two %s", 2)
        log.environment_log("Shop", "...abcd").warning("three")
        logging.getLogger("relay.server").error("four")
    out, err = pipes.read()
    assert re.fullmatch(
        rf"{TIME} DEBUG: one\n{TIME} INFO: two 2\n{TIME} WARN: \[env: \.\.\.abcd\] three\n", out
    )
    assert re.fullmatch(rf"{TIME} ERROR: four\n", err)


def test_a_json_line_is_one_object_with_the_environment(pipes: Pipes) -> None:
    """Collectors get one object per line, even for a message of several lines."""
    with closing(log.LogHandler(stdout=pipes.out, stderr=pipes.err)) as output:
        log.set_up("info", "json", output)
        log.environment_log("Shop", "...abcd").info("two\nlines")
    (line,) = pipes.read()[0].splitlines()
    entry = json.loads(line)
    assert entry.pop("time").endswith("Z")
    assert entry == {
        "level": "info",
        "logger": "relay.env.Shop",
        "environment": "Shop",
        "message": "two\nlines",
    }


def test_text_from_outside_cannot_forge_a_line(pipes: Pipes) -> None:
    """A line break within a message is escaped."""
    with closing(log.LogHandler(stdout=pipes.out, stderr=pipes.err)) as output:
        log.set_up("info", "text", output)
        logging.getLogger("relay").info("a\nb\rc")
    assert pipes.read()[0].endswith("INFO: a\\nb\\rc\n")


@pytest.mark.parametrize("line_format", ["text", "json"])
def test_secrets_are_masked_everywhere(pipes: Pipes, line_format: str) -> None:
    """A secret that slips into a message or a traceback shows its last four characters."""
    with closing(log.LogHandler(["sdk-secret-abcd"], pipes.out, pipes.err)) as output:
        log.set_up("info", line_format, output)
        try:
            int("sdk-secret-abcd")
        except ValueError:
            logging.getLogger("relay").exception("sdk-secret-abcd")
    written = pipes.read()[1]
    assert "sdk-secret" not in written
    assert written.count("...abcd") >= 2


def test_keys_that_come_later_are_masked_too(pipes: Pipes) -> None:
    """Until they are dropped; those of the configuration stay masked for ever."""
    with closing(log.LogHandler(["sdk-first-aaaa"], pipes.out, pipes.err)) as output:
        log.set_up("info", "text", output)
        log.mask_keys(["sdk-second-bbbb"])
        log.mask_keys(["sdk-third-cccc", "short"])
        logging.getLogger("relay").info("sdk-first-aaaa sdk-second-bbbb sdk-third-cccc short")
        assert log.masked_keys() == {"sdk-second-bbbb", "sdk-third-cccc"}
        log.unmask_keys(["sdk-first-aaaa", "sdk-second-bbbb"])
        logging.getLogger("relay").info("sdk-first-aaaa sdk-second-bbbb sdk-third-cccc short")
    first, second = pipes.read()[0].splitlines()
    assert first.endswith("INFO: ...aaaa ...bbbb ...cccc short")
    assert second.endswith("INFO: ...aaaa sdk-second-bbbb ...cccc short")


def test_the_log_of_an_environment_follows_its_name_and_key(pipes: Pipes) -> None:
    """Whoever holds it writes with the current ones, at the level of the current name."""
    with closing(log.LogHandler(stdout=pipes.out, stderr=pipes.err)) as output:
        log.set_up("info", "text", output)
        environment_log = log.environment_log("Shop", "...aaaa")
        environment_log.info("one")
        environment_log.describe("Store", "...bbbb")
        log.set_environment_level("Store", "warn")
        environment_log.info("silenced")
        environment_log.warning("two")
        log.set_environment_level("Store", None)
        environment_log.info("three")
        log.forget_environment("Shop")
        log.forget_environment("Store")
    lines = [line.partition(": ")[2] for line in pipes.read()[0].splitlines()]
    assert lines == ["[env: ...aaaa] one", "[env: ...bbbb] two", "[env: ...bbbb] three"]


def test_loggers_of_forgotten_environments_are_freed() -> None:
    """Environments may come and go for ever."""
    before = len(logging.Logger.manager.loggerDict)
    for number in range(100):
        log.environment_log(f"short-lived-{number}", "...abcd")
        log.forget_environment(f"short-lived-{number}")
    assert len(logging.Logger.manager.loggerDict) == before


@pytest.mark.parametrize("line_format", ["text", "json"])
@pytest.mark.parametrize("secret", ['pass"word-abcd', "pässword-abcd", "pass\nword-abcd"])
def test_secrets_are_masked_also_where_they_are_escaped(
    pipes: Pipes, line_format: str, secret: str
) -> None:
    """Also with a quotation mark, a letter beyond ASCII or a line end in it."""
    with closing(log.LogHandler([secret], pipes.out, pipes.err)) as output:
        log.set_up("info", line_format, output)
        logging.getLogger("relay").info("it is %s, or %r", secret, secret)
    written = pipes.read()[0]
    assert "word-" not in written
    assert written.count("...abcd") == 2


def test_a_traceback_is_set_apart_from_lines(pipes: Pipes) -> None:
    """Its lines are indented, and the text of the exception cannot begin one."""
    with closing(log.LogHandler(stdout=pipes.out, stderr=pipes.err)) as output:
        log.set_up("info", "text", output)
        error = ValueError("a\n2026/01/01 00:00:00.000000 INFO: forged\r\x1b[2K\u2028")
        try:
            raise error
        except ValueError:
            logging.getLogger("relay").exception("failed")
    first, *rest = pipes.read()[1].splitlines()
    assert first.endswith("ERROR: failed")
    assert rest[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in rest)
    assert rest[-1].endswith("\\r\\x1b[2K\\u2028")


def test_levels(pipes: Pipes) -> None:
    """The environment's level overrides the relay's; `none` silences."""
    with closing(log.LogHandler(stdout=pipes.out, stderr=pipes.err)) as output:
        log.set_up("none", "text", output)
        log.set_environment_level("Shop", "info")
        logging.getLogger("relay.server").error("silenced")
        logging.getLogger("library").error("silenced")
        log.environment_log("Shop", "...abcd").info("shown")
    out, err = pipes.read()
    assert "shown" in out
    assert "silenced" not in out + err


def test_lines_that_are_not_written_are_counted(pipes: Pipes) -> None:
    """Those of a broken pipe, and records that cannot be formatted."""
    os.close(pipes.out_read)
    with closing(log.LogHandler(stdout=pipes.out, stderr=pipes.err)) as output:
        log.set_up("info", "text", output)
        logging.getLogger("relay").info("lost")
        logging.getLogger("relay").info("%d", "no number")
    assert log.lost_lines() == 2

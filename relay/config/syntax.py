"""Parser of ld-relay's configuration file (config 3.3): text to assignments. Pure.

The grammar is that of git's configuration files: sections, optionally with a quoted subsection, and
`name = value` lines. `load` interprets the names.
"""

from __future__ import annotations

import re

from msgspec import Struct

_HEADER = re.compile(
    r"""\[ [ \t]* (?P<section>[A-Za-z0-9.-]+) (?:[ \t]+ "(?P<sub>(?:[^"\\\n]|\\.)*)")? [ \t]* \]""",
    re.VERBOSE,
)
_NAME = re.compile("[A-Za-z][A-Za-z0-9-]*")
_ESCAPES = {"\\": "\\", '"': '"', "n": "\n", "t": "\t"}
_BLANKS = " \t\r"


class FileSyntaxError(Exception):
    """Syntax error in the text; `line` and `column` count from 1."""

    def __init__(self, line: int, column: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.column = column


class Assignment(Struct, frozen=True):
    """One `name = value` of the file, or a bare section header (with an empty name).

    Args:
        section: name as written; it is not case-sensitive.
        subsection: name with escapes resolved; None if there is none.
        name: name as written.
        value: unquoted value; None if there is no `=`.
        line: line number, from 1.
    """

    section: str
    subsection: str | None
    name: str
    value: str | None
    line: int


def parse(text: str) -> list[Assignment]:
    """Return the assignments of a file in order; a section header yields one without a name.

    Raises:
        FileSyntaxError: the text does not follow the grammar.
    """
    reader = _Reader(text.removeprefix("\ufeff"))
    assignments: list[Assignment] = []
    section: tuple[str, str | None] | None = None
    while reader.to_next_token():
        line = reader.line
        if reader.peek() == "[":
            section = reader.header()
            assignments.append(Assignment(*section, "", None, line))
        elif section is None:
            reader.fail("expected section header")
        else:
            name, value = reader.variable()
            assignments.append(Assignment(*section, name, value, line))
    return assignments


class _Reader:
    """Recursive-descent parser: the text, a position in it, and a method per production."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._counted, self._lines = 0, 1
        """A position up to which lines have been counted, and the line there."""

    @property
    def line(self) -> int:
        self._lines += self._text.count("\n", self._counted, self._position)
        self._counted = self._position
        return self._lines

    def fail(self, message: str) -> None:
        start = self._text.rfind("\n", 0, self._position) + 1
        raise FileSyntaxError(self.line, self._position - start + 1, message)

    def peek(self) -> str:
        return self._text[self._position : self._position + 1]

    def to_next_token(self) -> bool:
        """Skip blanks, line ends and comments; return whether anything is left."""
        while self.peek():
            if self.peek() in ";#":
                self._skip_line()
            elif self.peek() in _BLANKS + "\n":
                self._position += 1
            else:
                return True
        return False

    def _skip_line(self) -> None:
        end = self._text.find("\n", self._position)
        self._position = len(self._text) if end < 0 else end

    def _end_of_line(self) -> None:
        """Skip blanks and a comment; fail if anything else follows on the line."""
        while self.peek() and self.peek() in _BLANKS:
            self._position += 1
        if self.peek() and self.peek() in ";#":
            self._skip_line()
        if self.peek() not in ("", "\n"):
            self.fail("expected EOL, EOF, or comment")

    def header(self) -> tuple[str, str | None]:
        match = _HEADER.match(self._text, self._position)
        if match is None:
            self.fail("malformed section header")
            raise AssertionError
        sub = match["sub"]
        if sub is not None:
            if bad := next((c for c in re.findall(r"\\(.)", sub) if c not in '"\\'), None):
                self.fail(f"unknown escape sequence \\{bad}")
            sub = re.sub(r"\\(.)", r"\1", sub)
            if not sub:
                self.fail("empty subsection name")
        self._position = match.end()
        self._end_of_line()
        return match["section"], sub

    def variable(self) -> tuple[str, str | None]:
        match = _NAME.match(self._text, self._position)
        if match is None:
            self.fail("expected section header or variable name")
            raise AssertionError
        self._position = match.end()
        while self.peek() and self.peek() in _BLANKS:
            self._position += 1
        if self.peek() != "=":
            self._end_of_line()
            return match[0], None
        self._position += 1
        while self.peek() and self.peek() in _BLANKS:
            self._position += 1
        return match[0], self._value()

    def _value(self) -> str:
        """Read quoted and unquoted parts up to the end of the line."""
        parts: list[str] = []
        length = 0  # without trailing blanks outside quotation marks
        quoted = False
        while char := self.peek():
            if char == "\n" and not quoted:
                break
            if char in ";#" and not quoted:
                self._skip_line()
                break
            if char == "\n":
                break
            self._position += 1
            if char == '"':
                quoted = not quoted
                length = len(parts)
            elif char == "\\":
                parts += self._escape(quoted=quoted)
                length = len(parts)
            else:
                parts.append(char)
                if quoted or char not in _BLANKS:
                    length = len(parts)
        if quoted:
            self.fail("string not terminated")
        return "".join(parts[:length])

    def _escape(self, *, quoted: bool) -> list[str]:
        following = self._text[self._position : self._position + 2]
        if following.startswith("\n") or following == "\r\n":
            self._position += 1 if following[0] == "\n" else 2
            return []
        if not quoted and not following.startswith('"'):
            self.fail("unquoted '\\' must be followed by new line or double quote")
        if not following or following[0] not in _ESCAPES:
            self.fail("unknown escape sequence")
        self._position += 1
        return [_ESCAPES[following[0]]]

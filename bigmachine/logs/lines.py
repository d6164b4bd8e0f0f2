"""What one process writes to one stream, as lines: for a terminal that many write to at once, for files, for the page.

Rule 1. A line is shown when it has ended, and not before; one without an end is cut after `MAX_LINE` characters.
Rule 2. What a line overwrites of itself (``\\r``, ``\\b``, erasing: a progress bar) is not shown. Its latest state is, when
that has been changing for `STATE_EVERY` seconds, and when the line ends. Text after a ``\\r`` takes the whole line's place.
Rule 3. Lines above that are written again (the cursor goes up: several bars, or `rich`'s live displays) are as one with those
below, from there on: a block, each of whose lines is as in rule 2. It ends with an ordinary line below it.
Rule 4. Of control sequences only colours (SGR) are left: whoever writes has a line, not the terminal. Other control characters
are left out, but for tabs. Bytes that are no UTF-8 become U+FFFD.

Pure: bytes and times in, text out.
"""

from __future__ import annotations

import codecs
import re
from typing import NamedTuple

MAX_LINE = 1 << 20
"""Characters of a line without an end that are held back: so as to keep lines whole, not to keep a memory."""

STATE_EVERY = 5.0
"""Seconds between two states of a line that are shown: a bar is seen to move, and ten machines' bars do not bury the rest."""

MAX_ROWS = 100
"""Lines of a block at most; no terminal is much higher."""

MAX_ESCAPE = 4096
"""Characters of a control sequence that has not ended: a long title. What is longer is none, and shown."""

_CONTROLS = bytes({*range(0x20), 0x7F} - {0x09, 0x0A})
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
_COLOUR_BEGUN = re.compile(r"\x1b(?:\[[0-9;:]{,64})?")
_TOKEN = re.compile(
    r"(?P<text>[^\x00-\x08\x0a-\x1f\x7f-\x9f]+)"
    r"|\x1b\[(?P<csi>[0-?]*)[ -/]*(?P<final>[@-~])"
    r"|\x1b[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)"  # A title, or another text to the terminal; within a line.
    r"|(?P<open>\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b\n]*\x1b?|[ -/]*)\Z)"
    r"|\x1b[ -/]*[0-~]"
    r"|(?P<control>[\x00-\x1f\x7f-\x9f])"
)


def plain(text: str) -> str:
    """`text` without colours."""
    return _COLOUR.sub("", text) if "\x1b" in text else text


def _has_controls(data: bytes, text: str) -> bool:
    """Whether `text`, decoded from `data` and perhaps a beginning before it, has controls other than tabs and newlines."""
    if len(data.translate(None, _CONTROLS)) < len(data):
        return True
    # Those of C1 are \xc2 and a second byte. Looking at the text takes longer than at the bytes.
    return (b"\xc2" in data or data[:1] >= b"\x80") and _CONTROL.search(text) is not None


class Said(NamedTuple):
    """Lines that are to be shown: `text` is whole lines, each with its end; `coloured` if it may have colours in it."""

    text: str
    coloured: bool


NOTHING = Said("", False)


class _Row:
    """A line that has not ended. `again`: the next text takes the place of `text`. `rewritten`: rule 2 holds for it."""

    __slots__ = ("again", "rewritten", "shown", "style", "text")

    def __init__(self, rewritten: bool = False) -> None:
        self.text = ""
        self.style = ""  # Colours that belong to what will take the text's place.
        self.shown = ""
        self.again = rewritten
        self.rewritten = rewritten

    def new(self) -> bool:
        return not (self.text or self.again or self.rewritten)

    def write(self, text: str) -> None:
        if self.again:
            self.text, self.again, self.rewritten = "", False, True
        if self.style:
            text, self.style = self.style + text, ""
        self.text += text

    def colour(self, sequence: str) -> None:
        if self.again:
            self.style = (self.style + sequence)[-MAX_ESCAPE:]
        else:
            self.text += sequence

    def erase(self) -> None:
        self.text, self.rewritten = "", True

    def back(self) -> None:
        self.text, self.rewritten = plain(self.text)[:-1], True

    def news(self) -> str | None:
        """What there is to show of it that has not been shown; None where there is nothing."""
        text = self.text
        if self.rewritten:
            text = text.rstrip()
            if text == self.shown or not plain(text).strip():
                return None
        return text


class Lines:
    """See the module. Takes bytes in the order in which they were written."""

    def __init__(self, max_line: int = MAX_LINE, state_every: float = STATE_EVERY) -> None:
        self._max_line = max_line
        self._state_every = state_every
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: list[str] = []  # The beginning of a line, while `_rows` is a single new row.
        self._length = 0
        self._open = ""  # The beginning of a control sequence.
        self._rows = [_Row()]
        self._at = 0
        self.due: float | None = None
        """When `states` will have something to show; None where nothing is being rewritten."""

    def feed(self, data: bytes, now: float) -> Said:
        """The lines that `data` ends. `now` is any clock that does not go back."""
        text = self._decoder.decode(data)
        if self._open:
            text, self._open = self._open + text, ""
        elif self._ordinary() and not _has_controls(data, text):
            return self._append(text, False)
        if self._ordinary():
            text = text.replace("\r\n", "\n")
            start = text.rfind("\x1b")
            if start >= 0 and _COLOUR_BEGUN.fullmatch(text, start):
                text, self._open = text[:start], text[start:]
            if not _CONTROL.search(_COLOUR.sub("", text)):
                return self._append(text, True)
            text, self._open = text + self._open, ""
        return self._draw(text, now)

    def states(self, now: float) -> Said:
        """The state of what is being rewritten, where that has changed, and was not shown, for long enough."""
        if self.due is None or now < self.due:
            return NOTHING
        said = []
        for row in self._rows:
            news = row.news() if row.rewritten else None
            if news is not None:
                row.shown = news
                said.append(news)
        self.due = None
        return _said(said)

    def under_way(self) -> list[str]:
        """What a terminal would show now of lines that have not ended: bars, a prompt; without colours."""
        rows = ["".join(self._held)] if self._held else [row.text for row in self._rows]
        return [text for row in rows if (text := plain(row).rstrip())]

    def end(self) -> Said:
        """Nothing follows: all that has not been shown."""
        rest = self._decoder.decode(b"", final=True)
        said = [self._draw(rest, 0.0)] if rest else []
        self._open = ""
        said.append(self._end_held() if self._held else self._end_rows())
        self._decoder.reset()
        return Said("".join(each.text for each in said), True)

    # -- Ordinary lines ----------------------------------------------------------------------------------------------

    def _ordinary(self) -> bool:
        return len(self._rows) == 1 and self._rows[0].new()

    def _append(self, text: str, coloured: bool) -> Said:
        end = text.rfind("\n") + 1
        whole = ""
        if end:
            whole = "".join((*self._held, text[:end])) if self._held else text[:end]
            coloured = coloured or (bool(self._held) and "\x1b" in whole)
            self._held.clear()
            self._length = 0
            text = text[end:]
        if text:
            self._held.append(text)
            self._length += len(text)
            if self._length > self._max_line:
                return Said(whole + self._end_held().text, True)
        return Said(whole, coloured) if whole else NOTHING

    def _end_held(self) -> Said:
        text = "".join(self._held) + "\n"
        self._held.clear()
        self._length = 0
        return Said(text, True)

    # -- Lines that are rewritten ------------------------------------------------------------------------------------

    def _draw(self, text: str, now: float) -> Said:
        """As a terminal would, on rows of unlimited width."""
        if self._held:
            self._rows[0].text = "".join(self._held)
            self._held.clear()
            self._length = 0
        said: list[str] = []
        for token in _TOKEN.finditer(text):
            row = self._rows[self._at]
            if (part := token["text"]) is not None:
                row.write(part)
                if len(row.text) > self._max_line:
                    said.append(row.text)
                    row.text = ""
            elif token["final"] is not None:
                self._control(token["final"], token["csi"], token[0])
            elif (control := token["control"]) is not None:
                if control == "\n":
                    said += self._newline()
                elif control == "\r":
                    row.again = True
                elif control == "\b":
                    row.back()
            elif (begun := token["open"]) is not None:
                if len(begun) <= MAX_ESCAPE:
                    self._open = begun
                else:
                    row.write(begun[2:])
        if self.due is None and any(row.rewritten and row.news() is not None for row in self._rows):
            self.due = now + self._state_every
        elif not any(row.rewritten for row in self._rows):
            self.due = None
        return _said(said)

    def _control(self, final: str, parameters: str, sequence: str) -> None:
        row = self._rows[self._at]
        count = int(parameters) if parameters.isdecimal() and len(parameters) < 4 else 1
        if final == "m" and not parameters.strip("0123456789;:"):
            row.colour(sequence)
        elif final == "K" and (parameters == "2" or (row.again and parameters in ("", "0"))):
            row.erase()
        elif final == "J" and parameters in ("", "0"):
            for below in self._rows[self._at + 1 :]:
                below.erase()
            if row.again:
                row.erase()
        elif final == "G" and count <= 1:
            row.again = True
        elif final in "AF":
            self._go(-max(count, 1))
        elif final in "BE":
            self._go(max(count, 1))

    def _go(self, rows: int) -> None:
        """Up, to lines that have been shown; or down."""
        self._at += max(-MAX_ROWS, min(rows, MAX_ROWS))
        while self._at < 0 and len(self._rows) < MAX_ROWS:
            self._rows.insert(0, _Row(rewritten=True))
            self._at += 1
        self._at = max(0, min(self._at, len(self._rows) - 1))
        self._enter()

    def _enter(self) -> None:
        row = self._rows[self._at]
        row.again = row.rewritten = True

    def _newline(self) -> list[str]:
        row = self._rows[self._at]
        if self._at < len(self._rows) - 1:
            self._at += 1
            self._enter()
            return []
        if len(self._rows) == 1 or (row.text and not row.rewritten):
            return self._take_rows()
        self._rows.append(_Row())
        self._at += 1
        if len(self._rows) <= MAX_ROWS:
            return []
        self._at -= 1
        news = self._rows.pop(0).news()
        return [] if news is None else [news]

    def _take_rows(self) -> list[str]:
        rows, self._rows, self._at = self._rows, [_Row()], 0
        self.due = None
        return [news for row in rows if (news := row.news()) is not None]

    def _end_rows(self) -> Said:
        if not self._rows[-1].text:  # No line was begun there.
            self._rows[-1].rewritten = True
        return _said(self._take_rows())


def _said(lines: list[str]) -> Said:
    return Said("".join(f"{line}\n" for line in lines), True) if lines else NOTHING

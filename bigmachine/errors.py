"""Every error that bigmachine raises, in one tree.

Whose fault it is decides the branch:

- ``CallRefused``: the call never ran, and would not if it were sent again (a name that does not exist, arguments
  that do not fit, a caller who may not). HTTP status 4xx.
- ``RemoteError``: the method ran and raised. It is raised only where the exception's own type could not be rebuilt
  here; otherwise the exception itself is raised again, with the remote traceback as its cause. HTTP status 590.
- ``Unreachable``: the transport failed, so nobody can say more than ``sent``: whether the request had left this
  process. ``MachineStopped`` is the case in which it is known why: the machine is gone, and ``cause`` tells how it ended.
- ``CallTimeout``: the deadline that the caller set has passed; also a ``TimeoutError``.
- ``NotPicklable``: an argument or a reply could not be encoded; nothing was sent.
- ``BootError``: a machine did not get as far as ``RUNNING``.
- ``PackError``: a program could not be packed, or a packed file is not whole.

Errors carry fields, their text is made from them, and every one of them pickles: it may cross the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class BigmachineError(Exception):
    """The root of the tree. Positional arguments of each subclass are its fields, so that all of them pickle."""


class UsageError(BigmachineError):
    """bigmachine was used in a way that cannot work; the text says what to change."""


class NotPicklable(BigmachineError, TypeError):
    """``what`` (an argument, the reply, a service) cannot be encoded, because of ``reason``. Nothing was sent."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(what, reason)
        self.what = what
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot pickle {self.what}: {self.reason}"


class CallRefused(BigmachineError):
    """The far side refused to run ``method``: ``reason``. The call had no effect; sending it again would not help."""

    status = 400

    def __init__(self, method: str, reason: str) -> None:
        super().__init__(method, reason)
        self.method = method
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.method}: {self.reason}"


class BadArguments(CallRefused):
    """The arguments do not fit the method's signature, or could not be decoded there."""


class UnknownMethod(CallRefused):
    """No such service, or no such public method of it; ``reason`` says which exist."""

    status = 404


class Forbidden(CallRefused):
    """The caller's certificate has a role that may not call this method."""

    status = 403


class NotReady(CallRefused):
    """The machine has not been given its services yet, or is shutting down."""

    status = 503


class RemoteError(BigmachineError):
    """``method`` raised an exception whose type could not be rebuilt here.

    ``type_name`` is its qualified name, ``message`` its text, ``traceback`` the remote traceback as text.
    """

    def __init__(self, method: str, type_name: str, message: str, traceback: str = "") -> None:
        super().__init__(method, type_name, message, traceback)
        self.method = method
        self.type_name = type_name
        self.message = message
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.method} raised {self.type_name}: {self.message}"


class RemoteTraceback(BigmachineError):
    """The ``__cause__`` of an exception that was raised remotely: shows the remote traceback, and is never raised itself."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


class Unreachable(BigmachineError):
    """``address`` could not be reached, or the connection to it ended, because of ``reason``.

    ``sent`` says whether the request may have been received: False means that it certainly did not run, so that it may
    be sent again.
    """

    def __init__(self, address: str, reason: str, sent: bool = False) -> None:
        super().__init__(address, reason, sent)
        self.address = address
        self.reason = reason
        self.sent = sent

    def __str__(self) -> str:
        outcome = "the call may have run" if self.sent else "the call did not run"
        return f"{self.address} is unreachable: {self.reason} ({outcome})"


class MachineStopped(Unreachable):
    """The machine at ``address`` has stopped: ``reason``. Try again on another machine."""

    def __str__(self) -> str:
        whose = f"machine {self.address} "
        # A `BootError` has said already whose it is.
        return self.reason if self.reason.startswith(whose) else f"{whose}stopped: {self.reason}"


class CallTimeout(BigmachineError, TimeoutError):
    """``method`` on ``address`` did not answer within ``timeout`` seconds; it was cancelled there."""

    def __init__(self, method: str, address: str, timeout: float) -> None:
        super().__init__(method, address, timeout)
        self.method = method
        self.address = address
        self.timeout = timeout

    def __str__(self) -> str:
        return f"{self.method} on {self.address}: no answer within {self.timeout:g} s; cancelled there"


class WaitTimeout(BigmachineError, TimeoutError):
    """The machine at ``address`` was still ``state`` after ``timeout`` seconds of waiting for ``wanted``."""

    def __init__(self, address: str, state: str, wanted: str, timeout: float) -> None:
        super().__init__(address, state, wanted, timeout)
        self.address = address
        self.state = state
        self.wanted = wanted
        self.timeout = timeout

    def __str__(self) -> str:
        return f"machine {self.address} is {self.state}, not {self.wanted}, after {self.timeout:g} s"


class BootError(BigmachineError):
    """A machine failed at boot step ``step`` after ``elapsed`` seconds: ``reason``; ``output`` is its last output."""

    def __init__(self, machine: str, step: str, elapsed: float, reason: str, output: str = "") -> None:
        super().__init__(machine, step, elapsed, reason, output)
        self.machine = machine
        self.step = step
        self.elapsed = elapsed
        self.reason = reason
        self.output = output

    def __str__(self) -> str:
        text = f"machine {self.machine} failed at boot step {self.step!r} after {self.elapsed:.1f} s: {self.reason}"
        return f"{text}\nlast output:\n{self.output.rstrip()}" if self.output else text


class ProgramEnded(BigmachineError):
    """The program ended on a machine before it reached `driver.start()`; `reason` says how, `output` what it said last."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason, output)
        self.reason = reason
        self.output = output

    def __str__(self) -> str:
        text = f"the program ended before its services were set up: {self.reason}"
        return f"{text}; its last output:\n{self.output.rstrip()}" if self.output.strip() else text


class ProgramMismatch(BigmachineError):
    """Driver and machine do not run the same thing: ``what`` is ``ours`` here and ``theirs`` there."""

    def __init__(self, what: str, ours: str, theirs: str) -> None:
        super().__init__(what, ours, theirs)
        self.what = what
        self.ours = ours
        self.theirs = theirs

    def __str__(self) -> str:
        return f"{self.what} differs: {self.ours} on the driver, {self.theirs} on the machine"


class PackError(BigmachineError):
    """A program cannot be packed, or a packed file cannot be used: ``reason``, one line with the way out. ``details``, which
    may be empty, are for those who want more: lines of a resolver's own report."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason, details)
        self.reason = reason
        self.details = details

    def __str__(self) -> str:
        return f"{self.reason}\n{self.details.rstrip()}" if self.details else self.reason


class ResolveError(PackError):
    """No set of distributions meets the program's requirements on every platform."""


class CacheError(BigmachineError):
    """The cache of packed programs cannot be used; the text says where it is and what to change."""


class IllegalTransition(BigmachineError):
    """A state was left in a way that its table does not allow; ``history`` is how it got there."""

    def __init__(self, machine: str, history: list[str], to: str) -> None:
        super().__init__(machine, history, to)
        self.machine = machine
        self.history = history
        self.to = to

    def __str__(self) -> str:
        return f"machine {self.machine} cannot become {self.to}: it went {' → '.join(self.history)}"


explainers: list[Callable[[BaseException], str]] = []
"""What this process knows about its own errors, asked before one is sent to a caller: a note for the user, or ``""``."""


def explain(error: BaseException) -> None:
    """Add the notes of `explainers`."""
    for explainer in explainers:
        if note := explainer(error):
            add_note(error, note)


def add_note(error: BaseException, note: str) -> None:
    """Add a note once: an exception that passes through two machines keeps both, one that is raised twice keeps one."""
    notes: list[Any] = getattr(error, "__notes__", [])
    if note not in notes:
        error.add_note(note)

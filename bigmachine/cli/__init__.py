"""The command line: ``bigmachine pack``, ``info``, ``cache``, ``config``, ``doctor``, ``ps``, ``gc``, ``completion``; for a
driver that runs, ``status``, ``top``, ``logs``, ``profile``, ``bundle``.

Each command is a module with ``run(arguments) -> str``: it returns what standard output gets, and raises what goes wrong
(`exits.Ended` where there is something to print nevertheless).
`main` prints the one, and makes of the other a line on standard error and an exit code (`exits`). So there is one place where
anything is printed in the end, and commands are tested as functions. What is shown meanwhile is `terminal`'s; ``logs`` and
``top`` print what they are asked for as it comes.

``--json`` prints one JSON object and nothing else; its keys are documented in the module of the command. Keys may be added.

A command must start fast, as a program that is in the cache is packed in less time than rich takes to load. So `main`
imports only the parser, and then the command that was asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence

from ..errors import BigmachineError, PackError, ResolveError, UsageError
from .arguments import make_parser
from .exits import DONE, FAILED, GONE, INTERRUPTED, UNRESOLVED, WRONG, Ended, Gone, show


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names (without the program's own name; None: this process's arguments).

    Returns the exit code, never raises `SystemExit`. An exception that is nobody's fault but ours passes through.
    """
    quiet = False
    try:
        try:
            words = sys.argv[1:] if argv is None else argv
            arguments = make_parser(words).parse_args(words)
        except SystemExit as left:
            # --help, --version and wrong command lines: argparse has printed what there is to say.
            return _show("") or (WRONG if left.code else DONE)
        quiet = arguments.quiet
        with _signals():
            return _show(_command(arguments.command)(arguments))
    except Ended as ended:
        return _show(ended.output) or ended.code
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted")
    except _Signalled as signalled:
        return _fail(128 + signalled.number, f"ended by {signal.Signals(signalled.number).name}")
    except UsageError as error:
        return _fail(WRONG, str(error))
    except Gone as error:
        return _fail(GONE, str(error))
    except PackError as error:
        code = UNRESOLVED if isinstance(error, ResolveError) else FAILED
        return _fail(code, error.reason, "" if quiet else error.details)
    except BigmachineError as error:
        return _fail(FAILED, str(error))
    except OSError as error:
        return _fail(FAILED, _os_error(error))


class _Signalled(BaseException):
    """SIGTERM or SIGHUP: what is under way ends as it does by Ctrl-C, and leaves nothing running."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        raise _Signalled(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _command(name: str) -> Callable[[Namespace], str]:
    # Imported here, because each needs modules that take longer to load than the others take to run.
    run: Callable[[Namespace], str] = importlib.import_module(f".{name}", __package__).run
    return run


def _show(output: str) -> int:
    try:
        show(output + "\n" if output else "")
    except Ended as ended:
        return ended.code
    return DONE


def _fail(code: int, line: str, details: str = "") -> int:
    print(f"bigmachine: {line}", *details.strip("\n").splitlines(), sep="\n  ", file=sys.stderr, flush=True)
    return code


def _os_error(error: OSError) -> str:
    reason = error.strerror or str(error)
    reason = reason[0].lower() + reason[1:] if reason else type(error).__name__
    return reason if error.filename is None else f"{reason}: {os.fsdecode(error.filename)}"

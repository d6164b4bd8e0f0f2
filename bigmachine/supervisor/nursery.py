"""A process that has imported the supervisor, and forks one for each machine that the driver orders.

Twenty supervisors that are executed import the same modules twenty times, half of what starting a machine on this host
costs. The nursery is single-threaded, holds no key, and runs nothing of the user's. Linux only: elsewhere libraries may
not survive a fork.

Over its control socket come ``machine`` orders (``id``, ``argv``, ``environ``, ``cwd``, ``listener``: the number that the
listening descriptor must have; with three descriptors: standard input, standard error, the listener). It answers
``started`` (``id``, ``pid``), or ``failed`` (``id``, ``error``), and later ``ended`` (``pid``, ``status``: as from waitpid).
It ends with the control socket; its machines have a pipe to the driver of their own.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys
from typing import NoReturn

from .control import ControlSocket, Message
from .forking import Program, close_others
from .local import serve_local
from .processes import Processes
from .serve import pidfd


def main() -> None:
    """Fork machines until the driver hangs up."""
    control = ControlSocket.from_fd(int(sys.argv[1]))
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    poll.register(control.fileno(), select.POLLIN)
    poll.register(wake_read, select.POLLIN)
    driver = pidfd(int(sys.argv[2]))  # Somebody whom the driver forked may hold the other end of the socket, too.
    if driver is not None:
        poll.register(driver, select.POLLIN)
    while not control.eof:
        ready = {fd for fd, _ in poll.poll()}
        if driver in ready:
            return
        if wake_read in ready:
            os.read(wake_read, 4096)
            _bury(control)
        if control.fileno() in ready:
            for message, fds in control.receive_ready():
                _bear(message, fds, control)


def _bury(control: ControlSocket) -> None:
    """Tell how machines ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        control.send({"type": "ended", "pid": pid, "status": status})


def _bear(message: Message, fds: list[int], control: ControlSocket) -> None:
    """Fork one machine."""
    try:
        pid = os.fork()
    except OSError as error:
        control.send({"type": "failed", "id": message["id"], "error": f"cannot fork: {error.strerror}"})
    else:
        if not pid:
            _become(message, fds, control)
        control.send({"type": "started", "id": message["id"], "pid": pid})
    for fd in fds:
        os.close(fd)


def _become(message: Message, fds: list[int], control: ControlSocket) -> NoReturn:
    """In the child: what `subprocess` and `main` do for a machine that is executed."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        control.abandon()
        wanted = message["listener"]
        _rearrange(fds, wanted)
        os.environ.clear()
        os.environ.update(message["environ"])
        os.chdir(message["cwd"])
        processes = Processes(Program(message["argv"], dict(os.environ), os.getcwd()))
        processes.start()
        serve_local(message["id"], processes)
        code = 0
    except BaseException as error:  # Nobody is above: this process has nothing else to do.
        os.write(2, f"bigmachine: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def _rearrange(fds: list[int], wanted: int) -> None:
    """Standard input and error, and the listener as descriptor `wanted`; all others are closed, among them those of
    machines whose orders came together with this one's."""
    stdin, stderr, listener = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, max(wanted, *fds) + 1) for fd in fds)
    os.dup2(stdin, 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)
    os.dup2(stderr, 2)
    os.dup2(listener, wanted)
    close_others(wanted)

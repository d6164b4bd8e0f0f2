"""One TLS connection between threads and a `Connection`: leader and follower.

Theory of operation
-------------------
Rule 1. At most one thread reads a connection at a time: it holds the *role*. While nobody does, the descriptor is armed in
the reactor, and the worker that wakes takes the role. A thread that waits for something to arrive (`wait`) takes the
role itself where it is free, and reads until what it waits for is there, dispatching what is others' on the way: on an
idle connection a call is made, answered and returned on one thread. The other waiters follow: they sleep, and whoever
gives the role up hands it to one of them, or arms the descriptor again. Who has led lingers: only when no thread has
led for a tick is the descriptor armed, so that in a loop of calls no worker wakes for what the caller will read. Where
nobody leads, as nobody waits but callbacks, a worker reads.

Rule 2. `lock` guards the `Connection`, the outbox and the TLS object (which must not be read and written at once before
Python 3.13). It is held for one TLS record or one frame, never while waiting.

Rule 3. Writing never blocks a thread that holds the role: what the socket does not take stays in the outbox, and is
written when the reactor says that the socket takes more. A thread that sends a large body waits between its frames
(`send_body`), without the role.

Rule 4. A connection fails once. `fail` closes it, tells the owner (`on_closed`), and wakes every waiter.

Rule 5. Events are dispatched in order, by the holder of the role, without the lock.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import threading
import time
from _thread import LockType, allocate_lock
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol, cast

from .channel import Bytes, Message
from .connection import Connection, ConnectionFailed, Event
from .reactor import READ, WRITE, Reactor, Watch, Worker, report_bug

RECORD = 16 * 1024
"""Bytes of a TLS record: small frames are joined up to this before they are encrypted."""

DIRECT_BURST = 256 * 1024
"""Bytes of a large body that are read under one hold of the lock: what a writer may have to wait for (0.3 ms)."""

OUTBOX_HIGH = 1024 * 1024
"""Bytes in the outbox above which `send_body` waits, and above which callers of small calls do."""

ALL = 2**30
"""To OpenSSL: as many bytes as the buffer holds, or the record has."""

LINGER = 2
"""Milliseconds."""

MAX_DEFERRED = 32
"""Calls that wait for each other, to share a TLS record and a system call, where others are under way already."""

SEND_STALL = 60.0
"""Seconds without any progress after which a blocked sender gives the connection up: the machine's keepalive is quicker
where the machine is gone; this is for a peer that stopped reading."""


LAST_WORDS = 0.1
"""Seconds that the reader has, when writing has failed, to find out why: what explains it has mostly arrived before that."""


class Closed(Exception):
    """The connection has ended; the text says why."""


class Waiter:
    """What a thread waits for on a connection. `done` is set by whoever dispatches the awaited event."""

    __slots__ = ("done", "leading", "sleeper")

    def __init__(self) -> None:
        self.done = False
        self.leading = False
        self.sleeper: LockType | None = None  # A lock that the waiting thread sleeps on, once it has to.

    def wake(self) -> None:
        """What was awaited is here."""
        self.done = True
        sleeper = self.sleeper
        if sleeper is not None:
            _release(sleeper)


def _release(sleeper: LockType) -> None:
    try:
        sleeper.release()
    except RuntimeError:
        pass  # Woken twice.


class Bell:
    """A descriptor that becomes readable when somebody rings."""

    def __init__(self) -> None:
        if hasattr(os, "eventfd"):
            self.fd = self._ring = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        else:
            self.fd, self._ring = os.pipe()
            os.set_blocking(self.fd, False)
            os.set_blocking(self._ring, False)

    def ring(self) -> None:
        try:
            os.write(self._ring, b"\1\0\0\0\0\0\0\0")
        except BlockingIOError:
            pass  # It rings.

    def silence(self) -> None:
        try:
            os.read(self.fd, 4096)
        except BlockingIOError:
            pass

    def close(self) -> None:
        for fd in {self.fd, self._ring}:
            os.close(fd)


class Owner(Protocol):
    """Client or server: what the transport tells, always without the lock."""

    def on_event(self, event: Event) -> None:
        """Must not block."""

    def on_messages(self, messages: list[Message]) -> None:
        """Messages of the call channel. Must not block."""

    def on_readable(self) -> None:
        """A reactor worker has taken the role. Ends with `release`, unless the role was stolen meanwhile."""

    def on_closed(self, closed: Closed) -> None:
        """The connection has ended; called once."""


class Transport:
    """See the module. `owner` must be set before `start`."""

    def __init__(
        self, sock: ssl.SSLSocket, connection: Connection, reactor: Reactor, owner: Owner, *, leads: bool
    ) -> None:
        self.connection = connection
        self._leads = leads  # Waiting threads may read. At a server's end they would find calls that others must run.
        self.lock = allocate_lock()
        self.closed: Closed | None = None
        self._sock = sock
        self._fd = sock.fileno()
        self._reactor = reactor
        self._owner = owner
        self._reading = True  # Somebody holds the role; nobody else may before `start`.
        self._lingering = False  # The role is free and READ is not armed: the last leader is expected back.
        self._ticking = False  # The monitor asks once a tick whether to `settle`.
        self._leads_seen = self._leads_taken = 0
        self._blocked = False  # The socket took less than it was offered; WRITE is armed.
        self._followers: deque[Waiter] = deque()
        self._writers: list[Waiter] = []
        self._pollers = 0  # Threads without the role that poll the descriptor: it must not be closed under them.
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        self._bell = Bell() if leads else None
        if self._bell is not None:
            self._poll.register(self._bell.fd, select.POLLIN)
        # As `recv_into` and `send`, past a layer of checks: they are on the path of every call.
        self._read = cast("Callable[[int, memoryview], int]", sock.read)
        self._pending = sock.pending
        self._write = sock.write
        self._deferred = 0
        self._failing = False  # Writing has failed.
        self._ended = False
        with self.lock:  # A worker may be on its way that woke for another user of the same descriptor.
            self._watch: Watch = reactor.watch(self._fd, self._on_ready)

    def start(self) -> None:
        """Send what the connection begins with, and listen."""
        with self.lock:
            self.flush()
            self._reading = False
            if self._pending():  # Came with the handshake: no poller will tell of it.
                self._reading = True
                self._reactor.execute(self._owner.on_readable)
            self._arm()

    # -- Writing -----------------------------------------------------------------------------------------------------

    def send_now(self, data: bytes) -> None:
        """Send `data` behind what is in the outbox. With the lock held; never blocks, never raises."""
        connection = self.connection
        if connection.out or self._blocked:
            connection.out.append(data)
            connection.out_bytes += len(data)
            self.flush()
            return
        try:
            sent = self._write(data)
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError, BlockingIOError):
            connection.out.append(data)  # OpenSSL wants to be given the same bytes again.
            connection.out_bytes += len(data)
            self._blocked = True
            self._arm()
        except (OSError, ValueError) as error:
            self._fail_later(error)
        else:
            if sent < len(data):
                connection.out.append(memoryview(data)[sent:])
                connection.out_bytes += len(data) - sent
                self.flush()

    def send_soon(self, data: bytes) -> None:
        """Send `data` with what follows, before this thread or another waits for an answer, within a tick at the latest.
        With the lock held."""
        connection = self.connection
        connection.out.append(data)
        connection.out_bytes += len(data)
        self._deferred += 1
        if self._deferred >= MAX_DEFERRED or len(data) > RECORD // 8:
            self.flush()
        else:
            self._tick()

    def send_deferred(self) -> None:
        """Send what `send_soon` has kept."""
        if self._deferred:
            with self.lock:
                self.flush()

    def send_message(self, kind: int, number: int, parts: tuple[Bytes, ...], deadline: float | None = None) -> None:
        """Send a message of the channel, blocking until its window has room for all of it: pieces of messages must not mix.

        Must not be called by the holder of the role. Gives up at `deadline` (monotonic). Raises `Closed`.
        """
        while deadline is None or time.monotonic() < deadline:
            waiter = Waiter()
            with self.lock:
                if self.closed is not None:
                    raise self.closed
                data = self.connection.message(kind, number, parts)
                if data is not None:
                    self.send_now(data)
                    return
                self._writers.append(waiter)
                self.flush()
            self.wait(waiter, deadline)  # As long as it takes: the far side runs what it has, and is alive.

    def _tick(self) -> None:
        if not self._ticking:
            self._ticking = True
            self._reactor.linger(self)

    def flush(self) -> None:
        """Write what the outbox holds, as far as the socket takes it. With the lock held; never blocks, never raises."""
        out = self.connection.out
        self._deferred = 0
        if self._blocked or not out:
            return
        head: bytes | memoryview = b""
        try:
            while out:
                head = out.popleft()
                if len(out) and len(head) < RECORD and type(head) is bytes:
                    head = self._join(head)
                sent = self._write(head)
                self.connection.out_bytes -= sent
                if sent < len(head):
                    out.appendleft(memoryview(head)[sent:])
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError, BlockingIOError):
            out.appendleft(head)  # OpenSSL wants to be given the same bytes again.
            self._blocked = True
            if not self._pollers:
                self._arm()
        except (OSError, ValueError) as error:
            self._fail_later(error)

    def _join(self, head: bytes) -> bytes:
        """Small frames become one TLS record, one system call."""
        out = self.connection.out
        parts = [head]
        size = len(head)
        while out and size + len(out[0]) <= RECORD and type(out[0]) is bytes:
            part = out.popleft()
            parts.append(part)  # type: ignore[arg-type]
            size += len(part)
        return b"".join(parts) if len(parts) > 1 else head

    def send_body(
        self, stream: int, parts: Iterable[bytes | bytearray | memoryview], deadline: float | None = None
    ) -> bool:
        """Send `parts` on `stream`, in order, as DATA frames. Blocks for windows and for the socket.

        Must not be called by the holder of the role. False where the stream was reset meanwhile, or `deadline` (monotonic)
        has passed; raises `Closed`.
        """
        with self.lock:
            self._pollers += 1  # This thread sees to it that the socket is written to: no worker need wake for it.
        try:
            for part in parts:
                view = memoryview(part).cast("B") if not isinstance(part, bytes) else memoryview(part)
                if not self._send_view(stream, view, deadline):
                    return False
        finally:
            self._stop_polling(False)
        while self.connection.out_bytes and self.closed is None and self._wait_to_send(stream, 1, deadline):
            pass  # The caller may change its buffers when this returns.
        return True

    def _send_view(self, stream: int, view: memoryview, deadline: float | None) -> bool:
        offset, size = 0, len(view)
        while offset < size:
            with self.lock:
                window = self.connection.window(stream)
                if self.closed is None and window > 0 and self.connection.out_bytes < OUTBOX_HIGH:
                    n = min(window, size - offset, self.connection.frame_size)
                    self.connection.send_data(stream, n, view[offset : offset + n])
                    offset += n
                    self.flush()
                    if not self._blocked:
                        continue
            if self.closed is not None:
                raise self.closed
            if window < 0 or not (
                self._wait_to_send(stream, 1, deadline) if window else self._wait_for_window(stream, deadline)
            ):
                return False
        return True

    def _wait_for_window(self, stream: int, deadline: float | None) -> bool:
        """As `_wait_to_send`. Meanwhile this thread does not look at the socket: a worker has to."""
        self._stop_polling(False)
        try:
            return self._wait_to_send(stream, 0, deadline)
        finally:
            with self.lock:
                self._pollers += 1

    def wait_for_room(self, deadline: float | None = None) -> None:
        """Block while the outbox is over its limit: what keeps a caller in a loop from filling the memory."""
        while self.closed is None and self.connection.out_bytes > OUTBOX_HIGH and self._wait_to_send(0, 1, deadline):
            pass

    def _wait_to_send(self, stream: int, window: int, deadline: float | None = None) -> bool:
        """Until the socket, or the window where it is used up, lets more be sent. False when `deadline` (monotonic) has
        passed."""
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            return False
        if window > 0:
            until = now + SEND_STALL if deadline is None else min(deadline, now + SEND_STALL)
            with self.lock:
                if self.closed is not None:
                    return True
                self._pollers += 1
            poll = select.poll()
            poll.register(self._fd, select.POLLOUT)
            writable = False
            try:
                writable = bool(poll.poll((until - now) * 1000 + 1))
            finally:
                self._stop_polling(writable)
            if not writable and until != deadline:
                self.fail(Closed(f"the peer has not read for {SEND_STALL:g} s"))
            return True
        waiter = Waiter()
        with self.lock:
            if self.closed is not None or self.connection.window(stream) != 0:
                return True
            self._writers.append(waiter)
        self.wait(waiter, deadline)  # As long as it takes: a consumer may pause, and the connection is in use by others.
        return True

    def _stop_polling(self, writable: bool) -> None:
        with self.lock:
            self._pollers -= 1
            if self.closed is not None:
                self._close_if_unused()
            elif writable:
                self._blocked = False
                self.flush()
            elif self._blocked and not self._pollers:
                self._arm()

    # -- Waiting and reading -----------------------------------------------------------------------------------------

    def round_trip(self, waiter: Waiter) -> None:
        """`wait` without a deadline, for the most frequent case: this thread has led before, and nobody reads."""
        with self.lock:
            lead = (
                self._lingering and not self._reading and not self._deferred and not waiter.done and self.closed is None
            )
            if lead:
                self._reading = True
                self._leads_taken += 1
        if lead:
            try:
                if self._poll.poll()[0][0] != self._fd:
                    self._silence()
                self.read()
            except BaseException:  # Ctrl-C, while this thread waited: nobody else may wait for it for ever.
                self.release()
                raise
            if waiter.done:
                with self.lock:
                    if not self._followers and self._lingering and self.closed is None:
                        self._reading = False
                        return
                self.release()
                return
            waiter.leading = True  # More is needed: the role is kept, and `wait` goes on with it.
        self.wait(waiter)

    def wait(self, waiter: Waiter, deadline: float | None = None) -> bool:
        """Until `waiter.done` or the connection has ended. False when `deadline` (monotonic) passes before."""
        in_time = True
        try:
            while in_time and not waiter.done and self.closed is None:
                in_time = self._wait_once(waiter, deadline)
        finally:  # Also after Ctrl-C: a leader that has gone would never give up the role.
            if waiter.sleeper is not None or waiter.leading:
                self._stop_following(waiter)
        return in_time or waiter.done

    def _wait_once(self, waiter: Waiter, deadline: float | None) -> bool:
        """Lead, where the role is free, or follow, until there is a change. False on a timeout."""
        with self.lock:
            lead = waiter.leading
            if not lead and self._leads and not self._reading and self.closed is None:
                self._reading = lead = True
                self._leads_taken += 1
                if not self._lingering:
                    self._lingering = True
                    self._arm()
                    self._tick()
            elif not lead and waiter.sleeper is None and self.closed is None:
                waiter.sleeper = allocate_lock()
                waiter.sleeper.acquire()
                if self._leads:  # Else it waits for a window: `_writers` has it.
                    self._followers.append(waiter)
            sleeper = waiter.sleeper
            if not lead and self._deferred:
                self.flush()
        if lead:
            waiter.leading = False
            return self._lead(waiter, deadline)
        if waiter.done or sleeper is None:  # `wake` sets `done` first, and then looks for a sleeper.
            return True
        timeout = -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
        return sleeper.acquire(timeout=min(timeout, threading.TIMEOUT_MAX))

    def _stop_following(self, waiter: Waiter) -> None:
        with self.lock:
            waiter.sleeper = None
            leading, waiter.leading = waiter.leading, False
            if waiter in self._followers:
                self._followers.remove(waiter)
        if leading:
            self.release()  # It was made the leader at the moment in which it was done.

    def _lead(self, waiter: Waiter, deadline: float | None) -> bool:
        """Read until `waiter.done`; then give the role up. False on a timeout."""
        try:
            while not waiter.done and self.closed is None:
                if self._deferred and not self._poll.poll(0):
                    with self.lock:
                        self.flush()
                if deadline is None:
                    ready = self._poll.poll()
                else:
                    left = deadline - time.monotonic()
                    ready = self._poll.poll(left * 1000 + 1) if left > 0 else []
                    if not ready:
                        return False
                if ready[0][0] != self._fd:
                    self._silence()
                self.read()
            return True
        finally:
            self.release()

    def _silence(self) -> None:
        if self._bell is not None:
            self._bell.silence()

    def interrupt(self, waiter: Waiter) -> None:
        """`wake`, for what does not come over the connection (a cancellation, a timeout), so that a leader does not learn
        of it by reading."""
        waiter.wake()
        with self.lock:
            if self._reading and self._bell is not None and self.closed is None:
                self._bell.ring()

    def settle(self) -> bool:
        """See `reactor.Lingering`: give the descriptor back to the workers when no thread has begun to lead for a tick."""
        with self.lock:
            if self.closed is not None:
                return True
            if self._deferred:
                self.flush()  # Nobody waits for an answer, so that nobody has flushed.
                if self._lingering:
                    return False
            if self._leads_seen != self._leads_taken:
                self._leads_seen = self._leads_taken
                return False
            if self._lingering:
                self._lingering = False  # Who still leads, waits for long, and arms the descriptor when he has what he wants.
                self._arm()
            self._ticking = False
            return True

    def release(self) -> None:
        """Give the role up: to a follower, else to the reactor, at once or when it has lingered."""
        with self.lock:
            if self.connection.out and not self._deferred:
                self.flush()
            while self._followers:
                follower = self._followers.popleft()
                if not follower.done:
                    follower.leading = True
                    sleeper, follower.sleeper = follower.sleeper, None
                    if sleeper is not None:
                        _release(sleeper)
                    return
            self._reading = False
            if self.closed is not None:
                self._close_if_unused()
            elif not self._lingering:
                self._arm()

    def _arm(self) -> None:
        """With the lock held: ask the reactor for what nobody else watches."""
        if self.closed is None:
            events = (0 if self._reading or self._lingering else READ) | (WRITE if self._blocked and not self._pollers else 0)
            self._watch.arm(events)

    def linger(self, worker: Worker | None) -> bool:
        """Wait a little for the next bytes, on the worker that holds the role: a client that calls in a loop is back at
        once, and the way through the reactor costs more than the wait. True where there is something to read."""
        if self.closed is not None:
            return False
        if self.connection.out:
            with self.lock:
                self.flush()
        if worker is None:
            return bool(self._poll.poll(0))
        worker.lingering = True
        try:
            return bool(self._poll.poll(LINGER))
        finally:
            worker.lingering = False
            worker.turn += 1

    def read(self) -> None:
        """Read a TLS record, or a burst of a large body, and dispatch it. By the holder of the role; never blocks."""
        connection = self.connection
        failure = None
        with self.lock:
            if self.closed is not None:
                return
            try:
                while True:
                    buffer = connection.get_buffer()
                    n = self._read(ALL, buffer)
                    if not n:
                        raise ConnectionFailed("the peer closed the connection")
                    size = len(buffer)
                    if connection.direct and n < size:
                        n = self._fill(buffer, n)
                    connection.received(n)
                    if n < size or not self._pending():
                        break  # A record that did not fit would be finished: no poller tells of what TLS holds.
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
                pass
            except (OSError, ValueError, ConnectionFailed) as error:
                failure = _closed(error)
            if connection.out and not self._deferred:
                self.flush()
            if connection.windows_opened and self._writers:
                for writer in self._writers:
                    writer.wake()
                self._writers.clear()
            connection.windows_opened = 0
        try:
            if connection.messages:
                messages, connection.messages = connection.messages, []
                self._owner.on_messages(messages)
            events = connection.events
            while events:
                self._owner.on_event(events.popleft())
        except Exception as error:  # What the peer sent was beyond the owner. The role must not be lost with it.
            report_bug("what a peer sent")
            failure = failure or _closed(error)
        if failure is not None:
            self.fail(failure)

    def _fill(self, buffer: memoryview, n: int) -> int:
        """Go on reading into the application's own memory while there is something: one record at a time."""
        limit = min(len(buffer), DIRECT_BURST)
        read = self._read
        try:
            while n < limit:
                more = read(ALL, buffer[n:])
                if not more:
                    break
                n += more
        except (ssl.SSLWantReadError, BlockingIOError):
            pass
        return n

    def _on_ready(self, events: int) -> None:
        """On a reactor worker: the descriptor is ready for what was armed."""
        with self.lock:
            if events & WRITE and self._blocked:
                self._blocked = False
                self.flush()
            if self._reading or not events & READ or self.closed is not None:
                self._arm()
                return
            self._reading = True
            if self._blocked:
                self._arm()
        self._owner.on_readable()

    # -- The end -----------------------------------------------------------------------------------------------------

    def _fail_later(self, error: BaseException) -> None:
        """From under the lock: `fail` takes it, and tells others."""
        self.connection.out.clear()
        self._blocked = True
        if not self._failing:
            self._failing = True
            closed = _closed(error)
            # Whoever reads finds the end too, and before it what the peer had to say: answers, or why it hung up.
            self._reactor.call_later(LAST_WORDS, lambda: self.fail(closed))
            self._arm()

    def fail(self, closed: Closed) -> None:
        """End the connection, because of `closed`; the first reason counts."""
        with self.lock:
            if self.closed is not None:
                return
            self.closed = closed
            self._blocked = False
            self.flush_last()
            self._watch.close()
            waiters = [*self._followers, *self._writers]
            self._followers.clear()
            self._writers.clear()
        self._owner.on_closed(closed)
        for waiter in waiters:
            waiter.wake()
        with self.lock:
            try:
                self._sock.shutdown(socket.SHUT_RDWR)  # Wakes whoever polls.
            except OSError:
                pass
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        """With the lock held: a descriptor that somebody is about to poll could be somebody else's by then."""
        if not self._reading and not self._pollers and not self._ended:
            self._ended = True
            self._sock.close()
            if self._bell is not None:
                self._bell.close()

    def flush_last(self) -> None:
        """Offer what is left (a GOAWAY, perhaps) to the socket, once."""
        try:
            for part in self.connection.out:
                if self._write(part) < len(part):
                    break
        except (OSError, ValueError):
            pass
        self.connection.out.clear()

    def abort(self) -> None:
        """End the connection with a TCP reset, as a power cut would: for tests, and for peers that do not answer."""
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass
        self.fail(Closed("aborted"))


def _closed(error: BaseException) -> Closed:
    """Foreign exceptions are translated here, once."""
    if isinstance(error, ConnectionFailed):
        return Closed(str(error))
    if isinstance(error, ssl.SSLError):
        return Closed(f"TLS: {getattr(error, 'reason', None) or error}")
    if isinstance(error, ConnectionResetError):
        return Closed("the peer reset the connection")
    if isinstance(error, BrokenPipeError):
        return Closed("the peer closed the connection")
    if isinstance(error, OSError) and error.strerror:
        return Closed(error.strerror)
    return Closed(f"{type(error).__name__}: {error}")


def handshake(sock: ssl.SSLSocket, deadline: float) -> None:
    """Complete the TLS handshake of a non-blocking `sock` on this thread. Raises `Closed`."""
    poll = select.poll()
    try:
        while True:
            try:
                sock.do_handshake()
                return
            except ssl.SSLWantReadError:
                poll.register(sock, select.POLLIN)
            except ssl.SSLWantWriteError:
                poll.register(sock, select.POLLOUT)
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise Closed("no answer to the TLS handshake")
    except (OSError, ValueError) as error:
        raise _closed(error) from error


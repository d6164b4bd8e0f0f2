"""The agent: receives a program on a host that has nothing but Python, and becomes the machine that executes it.

Its text and its settings (`main`) come on its standard input: neither is on a command line, in the environment or on disk. When
it listens it says so in a line of JSON on its standard output, ``{"port": …, "pid": …}``. Then it serves HTTPS/1.1, for one
bootstrap:

==================================  ========================================================================================
GET  /info                          what this host is, the Pythons that it has, the parts that it holds; with
                                    ``?python=<minor version>`` one of that version alone, where it has one
HEAD /parts/<digest>                200: it is here. 204: ``Upload-Offset`` bytes of it have arrived. 422, 507: how it failed
PUT  /parts/<digest>?size=<tar's>   the zlib stream of a part's tar, from ``Upload-Offset`` on (none: 0). 201
GET  /parts/<digest>                that stream, from ``Upload-Offset`` on; also for peers, with a ``Ticket``
POST /fetch                         ``digest``, ``size``, ``from``: get a part from one of those peers. 201
POST /exec                          become a machine: the request's fields are `_Plan`'s. 200, and no more
POST /shutdown                      end
==================================  ========================================================================================

A refusal has a body of JSON, ``{"error": "one line"}``, and perhaps more: 409 the state does not allow it (a part is being sent
by somebody else, parts are missing, no such Python), 422 not what its digest says, 507 no space, 502 no peer has it.

Rule 1. Only the session's driver is obeyed: TLS 1.3 with a certificate of its CA and that role. A peer needs no certificate (an
agent's is no client's) but a ticket, the driver's word that it may have this part: HMAC(secret, digest); the secret is made
here, and told to the driver alone.
Rule 2. Nobody blocks anybody: a thread a connection, and those that have not proved who they are have little time.
Rule 3. What is under way lies in a directory of this process's own, which is removed in the end, or by the next agent.
Rule 4. Whom no driver talks to ends by itself.

The standard library only, Python 3.9 and later, no import of bigmachine but this package's: all are sent as one text.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import select
import shutil
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from .arrival import Upload
from .parts import CHUNK, install
from .pythons import Pythons
from .requests import PROVE_WITHIN, STALL, Handler, cut_off, patience
from .store import Refused, Store, locked, refusal

PROTOCOL = 1
"""Of what is said here: raised when a driver of another version could not follow."""

TAKE_OVER = 2.0
"""Seconds without a byte after which an upload may be continued on another connection: its own has probably gone."""

RESUMABLE = 120.0
"""Seconds for which an interrupted upload is kept."""

MARGIN = 60.0
"""Seconds that a dead man's switch waits after an agent should have ended."""

MAX_CONNECTIONS = 200
"""A driver has a few, each peer one or two. Threads cost little, but not nothing."""


class Ended(Exception):
    """The agent's end; its text is why."""


class Peer(http.client.HTTPConnection):
    """Another agent of the same launch, from which a part is fetched."""

    def __init__(self, context: ssl.SSLContext, host: str, port: int, name: str) -> None:
        super().__init__(host, port, timeout=PROVE_WITHIN)
        self._tls = context
        self._name = name

    def connect(self) -> None:
        super().connect()
        self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._name)


class _Plan:
    """What to execute. Made of the request ``/exec``: ``machine``, ``credentials``, ``address``, ``lease``, ``maxprocs`` (0:
    the host's cores), ``python`` (a minor version), ``parts`` (digests of distributions, in order), ``code`` (the code part's),
    ``program`` (the content of program.json), ``args``, ``environ``, ``cwd``, ``on_exit``; ``supervisor`` and ``worker`` are
    the interpreter's arguments for the two, before their own."""

    def __init__(self, request: dict[str, Any], python: str, site: str, folder: str, fields: dict[str, Any]) -> None:
        self.address: str = request["address"]
        self.maxprocs: int = request["maxprocs"] or fields["cpus"]
        self.folder = folder
        self.cwd: str = request.get("cwd") or ""
        worker = [python, *request["worker"], site, folder, *request["args"]]
        self.argv: list[str] = [python, *request["supervisor"], site, request["machine"], *worker]
        self.environ: dict[str, str] = {**os.environ, **request["environ"]}
        self.handover: dict[str, Any] = {
            "credentials": request["credentials"],
            "address": self.address,
            "maxprocs": self.maxprocs,
            "lease": request["lease"],
            "on_exit": request.get("on_exit") or fields["on_exit"],
            **{name: fields[name] for name in ("remove", "deadman", "notices")},
        }
        for text in [*self.argv, *self.environ, *self.environ.values()]:
            if "\0" in text:
                raise Refused(400, f"an argument or variable with a NUL: {text[:80]!r}")


class Agent:
    """See the module."""

    def __init__(self, settings: dict[str, Any]) -> None:
        credentials = settings["credentials"]
        self.name = "agent.{}.bigmachine".format(credentials["identity"].rsplit("/", 1)[1])
        self.idle: float = settings.get("idle", 600.0)
        self.on_exit: list[str] = settings.get("on_exit") or []
        self.deadman: str = settings.get("deadman", "")
        self.notices: str = settings.get("notices", "")
        self.marks: dict[str, str] = settings.get("ages", {})
        self.secret = os.urandom(16).hex()
        self.store = Store(settings.get("cache", ""))
        self.uploads: dict[str, Upload] = {}
        self.visitors: dict[socket.socket, float] = {}  # By when they must have said something; infinity: they have.
        self._server = _context(credentials, ssl.PROTOCOL_TLS_SERVER)
        self._peers = _context({"ca": credentials["ca"]}, ssl.PROTOCOL_TLS_CLIENT)
        self._lock = threading.Lock()
        self._touched = time.monotonic()
        self._told = 0.0
        self._plan: _Plan | None = None
        self._shut = threading.Event()
        self._answered = threading.Event()
        self._reason = ""
        self.pythons = Pythons()
        bind, port = settings.get("bind", "0.0.0.0"), settings.get("port", 0)
        self.listener = socket.socket(socket.AF_INET6 if ":" in bind else socket.AF_INET)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.listener.bind((bind, port))
        except OSError as error:
            raise OSError(f"cannot listen at port {port} of {bind}: {error.strerror}") from None
        self.listener.listen(1024)
        self.listener.setblocking(False)
        self._wake, self._waker = socket.socketpair()

    # -- Life ------------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve, until it becomes a machine (then this does not return) or ends: raises `Ended`."""
        threading.Thread(target=self.store.clean, daemon=True).start()
        port = self.listener.getsockname()[1]
        print(json.dumps({"port": port, "pid": os.getpid()}), flush=True)
        tick = min(1.0, self.idle / 4)
        while self._plan is None:
            ready = select.select([self.listener, self._wake], [], [], tick)[0]
            if self._reason:
                raise Ended(self._reason)
            if self.listener in ready and self._plan is None:
                self._accept()
            self._look()
        self._shut.set()
        self._answered.wait(PROVE_WITHIN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        if self._reason:
            raise Ended(self._reason)
        self._execute(self._plan)

    def _accept(self) -> None:
        try:
            sock, address = self.listener.accept()
        except OSError:
            return
        if len(self.visitors) >= MAX_CONNECTIONS:
            sock.close()
            return
        self.visitors[sock] = time.monotonic() + PROVE_WITHIN
        threading.Thread(target=self._serve, args=(sock, address), daemon=True).start()

    def _serve(self, sock: socket.socket, address: Any) -> None:
        tls = sock
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(PROVE_WITHIN)
            tls = self._server.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            self.visitors[tls] = self.visitors.pop(sock)
            tls.do_handshake()
            self.visitors[tls] = patience(tls)
            Handler(tls, address, self)  # type: ignore[arg-type] # It uses no more of a server than we have.
        except (OSError, EOFError, ValueError):
            pass  # It has gone, or is nobody whom we know.
        finally:
            self.visitors.pop(sock, None)
            self.visitors.pop(tls, None)
            tls.close()

    def _look(self) -> None:
        """What time brings about."""
        now = time.monotonic()
        for sock, deadline in list(self.visitors.items()):
            if now > deadline:
                cut_off(sock)
        for digest, upload in list(self.uploads.items()):
            if now - upload.active > RESUMABLE and not upload.busy.locked():
                upload.abort(Refused(422, "it was not continued"))
                self.uploads.pop(digest, None)
        if now - self._touched > self.idle:
            raise Ended(f"no driver within {self.idle:g} s")

    def touch(self) -> None:
        """A driver was here. The dead man's switch is told so at most once a second, in place and as long as ever: it needs no
        space then, and nobody reads half of it."""
        now = time.monotonic()
        if self.deadman and now - self._told > 1.0:
            self._told = now
            with contextlib.suppress(OSError):  # What it said before still counts.
                fd = os.open(self.deadman, os.O_WRONLY | os.O_CREAT, 0o600)
                os.write(fd, b"%-15d\n" % (uptime() + self.idle + MARGIN))
                os.close(fd)
        self._touched = now

    def end(self, reason: str) -> None:
        """Make `run` end. Also for signal handlers."""
        self._reason = self._reason or reason
        self._waker.send(b"!")

    def close(self) -> None:
        """Leave nothing behind."""
        self.listener.close()
        for upload in list(self.uploads.values()):
            upload.abort(Refused(503, "the agent is ending"))
        self.store.close()
        if self.store.temporary:
            shutil.rmtree(self.store.temporary, ignore_errors=True)

    # -- Requests --------------------------------------------------------------------------------------------------------

    def info(self, version: str) -> dict[str, Any]:
        found = self.pythons.find(version) if version else None
        known = [(version, found)] if found is not None else self.pythons.all()
        machine = os.uname().machine.lower()
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
        libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else None
        status = os.statvfs(self.store.root)
        return {
            "id": self.name,
            "hostname": socket.gethostname(),
            "platform": f"{sys.platform}/{machine}",
            "glibc": (libc or "").rpartition(" ")[2],
            "cpus": cpus(),
            "pythons": [{"version": version, "path": path} for version, path in known],
            "parts": self.store.held(),
            "free": status.f_bavail * status.f_frsize,
            "store": self.store.id,
            "secret": self.secret,
            "agent": PROTOCOL,
            "ages": ages(self.marks),
        }

    @contextlib.contextmanager
    def sending(self, digest: str, size: int, offset: int | None, cut: Callable[[], object]) -> Iterator[Upload]:
        """The upload of a part, to be continued at `offset` (None: wherever it is), for one at a time."""
        with self._lock:
            upload = self.uploads.get(digest)
            if upload is not None and upload.busy.locked() and time.monotonic() - upload.active > TAKE_OVER:
                upload.cut()
                if upload.busy.acquire(timeout=PROVE_WITHIN):
                    upload.busy.release()
            if upload is not None and not upload.busy.locked() and (offset == 0 or upload.over is not None):
                upload.abort(Refused(422, "it was begun again"))
                upload = None
            if upload is None:
                if offset:
                    raise Refused(409, "nothing of it is here", offset=0)
                upload = self.uploads[digest] = self._begin(digest, size)
            if not upload.busy.acquire(blocking=False):
                raise Refused(409, "somebody else is sending it", offset=upload.offset)
        try:
            if offset is not None and upload.offset != offset:
                raise Refused(409, f"{upload.offset} bytes of it are here", offset=upload.offset)
            upload.cut = cut
            yield upload
            self.uploads.pop(digest, None)
        finally:
            upload.cut = int
            upload.active = time.monotonic()
            upload.busy.release()

    def _begin(self, digest: str, size: int) -> Upload:
        try:
            return Upload(self.store, digest, size)
        except OSError as error:
            raise refusal(error) from error

    def fetch(self, digest: str, size: int, peers: list[dict[str, Any]]) -> None:
        """Get a part from the first of the peers who gives it; where one breaks off, the next goes on."""
        failures = []
        with self.sending(digest, size, None, int) as upload:
            for peer in peers:
                connection = Peer(self._peers, peer["host"], peer["port"], peer["name"])
                try:
                    upload.feed(self._received(connection, upload, peer["ticket"]))
                    return
                except (OSError, EOFError, ValueError, http.client.HTTPException) as error:
                    failures.append("{host}:{port}: {0}".format(error, **peer))
                finally:
                    connection.close()
            refused = Refused(502, "no peer gave it: " + "; ".join(failures))
            upload.abort(refused)
            raise refused

    def _received(self, connection: Peer, upload: Upload, key: str) -> Iterator[bytes]:
        connection.connect()
        connection.sock.settimeout(STALL)
        headers = {"Ticket": key, "Upload-Offset": str(upload.offset)}
        connection.request("GET", f"/parts/{upload.digest}", headers=headers)
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(response.read(500).decode("utf-8", "replace").strip())
        left = int(response.headers["Content-Length"])
        while left:
            data = response.read1(min(left, CHUNK))
            if not data:
                raise EOFError("the connection ended")
            left -= len(data)
            self.touch()
            yield data

    def prepare(self, request: dict[str, Any]) -> _Plan:
        """Lay out what is to be executed."""
        version = request["python"]
        python = self.pythons.find(version)
        if python is None:
            others = ", ".join(f"{found} ({path})" for found, path in sorted(self.pythons.all()))
            raise Refused(409, f"no Python {version} on {socket.gethostname()}; there are {others}")
        wanted = [*request["parts"], request["code"]]
        if missing := [digest for digest in wanted if not self.store.holds("parts", digest)]:
            raise Refused(409, f"parts are missing: {', '.join(missing)}", missing=missing)
        trees = [os.path.join(self.store.path("parts", digest), "tree") for digest in wanted]
        program = json.dumps(request["program"]).encode()

        def fill(folder: str) -> None:
            install([trees[-1]], os.path.join(folder, "code"))
            with open(os.path.join(folder, "program.json"), "wb") as file:
                file.write(program)

        # Apart, so that another code finds the distributions as they are, with their bytecode.
        site = self.store.make("images", _key(*wanted[:-1]), lambda folder: install(trees[:-1], f"{folder}/site"))
        folder = self.store.make("images", _key(wanted[-1], program.hex()), fill)
        fields = {"cpus": cpus(), "on_exit": self.on_exit, "remove": self.store.temporary}
        fields.update(deadman=self.deadman, notices=self.notices)
        plan = _Plan(request, python, os.path.join(site, "site"), folder, fields)
        plan.handover["locks"] = [locked(site), locked(folder)]
        return plan

    def become(self, plan: _Plan) -> None:
        """Returns when nobody is accepted any more: who connects from now on waits for the machine."""
        with self._lock:
            if self._plan is not None:
                raise Refused(409, "it is becoming a machine already", becoming=True)
            self._plan = plan
        self._waker.send(b"!")
        self._shut.wait()

    def answered(self) -> None:
        """The driver knows."""
        self._answered.set()

    def _execute(self, plan: _Plan) -> None:
        """Become the machine: the same process, with the listener, and who it is on its standard input."""
        for upload in list(self.uploads.values()):
            upload.abort(Refused(503, "the agent is ending"))
        self.store.close()
        plan.handover["listener"] = self.listener.fileno()
        for fd in (self.listener.fileno(), *plan.handover["locks"]):
            os.set_inheritable(fd, True)
        if os.path.isdir(plan.cwd):
            os.chdir(plan.cwd)
        reader, writer = os.pipe()
        os.write(writer, json.dumps(plan.handover).encode() + b"\n")  # Below a pipe's 64 KiB: does not block.
        os.close(writer)
        os.dup2(reader, 0)
        os.execve(plan.argv[0], plan.argv, plan.environ)


def cpus() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def uptime() -> float:
    """Seconds since the host's start, whatever its clock is set to."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def ages(marks: dict[str, str]) -> dict[str, float]:
    """How many seconds ago things began: ``kernel``, ``init`` (process 1), ``agent`` (this process), and those of which a file
    says at what uptime; as far as this system tells."""
    found = {}
    with contextlib.suppress(OSError, AttributeError, ValueError):
        ticks = os.sysconf("SC_CLK_TCK")
        now = found["kernel"] = uptime()
        for name, path in {"init": "/proc/1/stat", "agent": "/proc/self/stat", **marks}.items():
            with contextlib.suppress(OSError, ValueError, IndexError), open(path) as file:
                text = file.read()
                began = float(text.split()[0]) if name in marks else int(text.rpartition(")")[2].split()[19]) / ticks
                found[name] = now - began
    return found


def _key(*words: str) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def _context(credentials: dict[str, str], protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(cadata=credentials["ca"])
    if "key" in credentials:
        context.verify_mode = ssl.CERT_OPTIONAL
        context.num_tickets = 0
        with _readable(credentials["certificate"]) as certificate, _readable(credentials["key"]) as key:
            context.load_cert_chain(certificate, key)
    return context


@contextlib.contextmanager
def _readable(pem: str) -> Iterator[str]:
    """A path from which it can be read once: OpenSSL is given file names only, and a key must not reach a disk."""
    reader, writer = os.pipe()
    os.write(writer, pem.encode())
    os.close(writer)
    try:
        yield f"/dev/fd/{reader}"
    finally:
        os.close(reader)


def main(settings: dict[str, Any]) -> None:
    """Be an agent. `settings`: ``credentials`` as `Credentials.to_json` has them, of role agent; and, where they are to be
    others than these, ``port`` 0, ``bind`` "0.0.0.0", ``cache`` "" (see `Store`), ``idle`` 600.0 (seconds without a driver
    after which it ends), ``on_exit`` [] (a command that is executed when it has ended without becoming a machine), ``deadman``
    "" (a file that says until when the host is to live, in seconds since its start: who ends the host reads it), ``notices``
    "" (for the machine: see `supervisor.notices`), ``ages`` {} (names and files: see `ages`)."""
    agent: Agent | None = None
    code = 1

    def on_signal(number: int, _: Any) -> None:
        if agent is None:
            raise Ended(f"signal {number}")
        agent.end(f"signal {number}")  # Not raised: it may be ending already.

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    try:
        agent = Agent(settings)
        agent.run()
    except Ended as ended:
        _say(f"bigmachine agent: ended: {ended}")
        code = 0
    except Exception as error:  # Whoever reads our stderr is to know.
        _say(f"bigmachine agent: {type(error).__name__}: {error}")
    if agent is not None:
        agent.close()
    if on_exit := settings.get("on_exit"):
        try:
            os.execvp(on_exit[0], on_exit)
        except OSError as error:
            _say(f"bigmachine agent: cannot execute {on_exit[0]}: {error.strerror}")
    os._exit(code)  # Threads may hang on their connections.


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

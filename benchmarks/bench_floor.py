"""The floor: pickles on a bare TLS socket with client certificates. One connection, one worker process, nothing else.

``raw-mtls`` sends an array inside its pickle. ``raw-mtls-oob`` sends it beside the pickle (protocol 5, out of band), into a
bytearray; ``raw-mtls-oob-thp`` into `numpy.empty`, whose memory comes in huge pages where the kernel gives them on request.
"""

from __future__ import annotations

import os
import pickle
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import Peer, Rated, main, pump
from work import Work

CERTIFICATES = Path(os.environ.get("BENCH_DIR", "bench-work")).resolve() / "floor"
BUFFER = 1 << 16
HUGE = 1 << 20


def context(side: str) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if side == "server" else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.load_cert_chain(CERTIFICATES / f"{side}.pem")
    made.load_verify_locations(CERTIFICATES / "ca.pem")
    made.verify_mode = ssl.CERT_REQUIRED
    return made


def make_certificates() -> None:
    """A CA and a certificate with its key for either side, once."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import NameOID

    if (CERTIFICATES / "ca.pem").exists():
        return
    CERTIFICATES.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("server", "client", "ca")}
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")])
    for name, key in keys.items():
        is_ca = name == "ca"
        usage = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False)
        usage |= {"digital_signature": not is_ca, "key_cert_sign": is_ca, "crl_sign": is_ca}
        builder = (
            x509.CertificateBuilder(
                issuer, x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key.public_key()
            )
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=365))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), True)
            .add_extension(x509.KeyUsage(**usage, encipher_only=False, decipher_only=False), True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys["ca"].public_key()), False)
        )
        pem = builder.sign(keys["ca"], hashes.SHA256()).public_bytes(Encoding.PEM)
        if not is_ca:
            pem += key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path = CERTIFICATES / f"{name}.pem"
        path.touch(mode=0o600)
        path.write_bytes(pem)


class InBand:
    """Messages on a socket: a length, then a pickle."""

    LENGTH = struct.Struct(">I")

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self.sock = sock
        self._buffer = memoryview(bytearray(BUFFER))
        self._start = self._end = 0

    def send(self, message: Any) -> None:
        body = pickle.dumps(message, 5)
        head = self.LENGTH.pack(len(body))
        if len(body) < BUFFER:
            self.sock.sendall(head + body)
        else:
            self.sock.sendall(head)
            self.sock.sendall(body)

    def recv(self) -> Any:
        (size,) = self.LENGTH.unpack(self._read(self.LENGTH.size))
        return pickle.loads(self._read(size))

    def _memory(self, size: int) -> Any:
        return bytearray(size)

    def _receive(self, into: memoryview) -> int:
        received = self.sock.recv_into(into)
        if not received:
            raise EOFError
        return received

    def _read(self, size: int) -> Any:
        """Small ones through the buffer, large ones straight into their memory."""
        ready = self._end - self._start
        if ready < size:
            if size > BUFFER:
                memory = self._memory(size)
                view = memoryview(memory)
                view[:ready] = self._buffer[self._start : self._end]
                self._start = self._end = 0
                while ready < size:
                    ready += self._receive(view[ready:])
                return memory
            self._buffer[:ready] = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, ready
            while self._end < size:
                self._end += self._receive(self._buffer[self._end :])
        self._start += size
        return bytes(self._buffer[self._start - size : self._start])


class OutOfBand(InBand):
    """The lengths of the pickle and of each buffer, then those."""

    def send(self, message: Any) -> None:
        buffers: list[pickle.PickleBuffer] = []
        body = pickle.dumps(message, 5, buffer_callback=buffers.append)
        raw = [buffer.raw() for buffer in buffers]
        self.sock.sendall(struct.pack(f">{2 + len(raw)}I", len(body), len(raw), *map(len, raw)) + body)
        for each in raw:
            self.sock.sendall(each)

    def recv(self) -> Any:
        size, count = struct.unpack(">II", self._read(8))
        sizes = struct.unpack(f">{count}I", self._read(4 * count)) if count else ()
        body = self._read(size)
        return pickle.loads(body, buffers=[self._read(each) for each in sizes])


class IntoArrays(OutOfBand):
    def _memory(self, size: int) -> Any:
        if size < HUGE:
            return bytearray(size)
        import numpy as np

        return np.empty(size, np.uint8)


WIRES: dict[str, type[InBand]] = {"raw-mtls": InBand, "raw-mtls-oob": OutOfBand, "raw-mtls-oob-thp": IntoArrays}


def serve(wire: type[InBand]) -> None:
    """A worker: one connection, its requests in order. It ends with the connection."""
    work = Work()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        tls = context("server")
        print(listener.getsockname()[1], flush=True)
        listener.settimeout(60)
        plain, _ = listener.accept()
    plain.settimeout(None)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with tls.wrap_socket(plain, server_side=True) as sock:
        connection = wire(sock)
        try:
            while True:
                method, argument = connection.recv()
                connection.send(getattr(work, method)(argument))
        except (EOFError, ConnectionError):
            pass


class Floor(Peer):
    variant = "raw-mtls"
    phases: Sequence[str] = (
        "start1",
        "start5",
        "start20",
        "latency",
        "latency1cpu",
        "latency2cpu",
        "throughput",
        "bulk",
        "rss",
        "pi",
    )

    def __init__(self) -> None:
        self.workers: list[subprocess.Popen[bytes]] = []
        self.connections: list[InBand] = []

    def start(self, n: int) -> None:
        command = [sys.executable, __file__, "--worker", self.variant]
        self.workers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(n)]
        for worker in self.workers:
            assert worker.stdout is not None
            with worker.stdout:
                address = ("127.0.0.1", int(worker.stdout.readline()))
            plain = socket.create_connection(address)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock = context("client").wrap_socket(plain, server_hostname="localhost")
            self.connections.append(WIRES[self.variant](sock))
            self.connections[-1].send(("inc", 1))
        for connection in self.connections:
            assert connection.recv() == 2

    def stop(self) -> None:
        for connection in self.connections:
            connection.sock.close()
        for worker in self.workers:
            worker.wait(30)

    def _ask(self, method: str, argument: Any) -> Any:
        self.connections[0].send((method, argument))
        return self.connections[0].recv()

    def call(self, x: int) -> int:
        return self._ask("inc", x)  # type: ignore[no-any-return]

    def send(self, array: Any) -> int:
        return self._ask("take", array)  # type: ignore[no-any-return]

    def recv(self, size: int) -> Any:
        return self._ask("give", size)

    def pi(self, samples: int) -> int:
        for connection in self.connections:
            connection.send(("pi", samples // len(self.connections)))
        return sum(connection.recv() for connection in self.connections)

    def worker_pids(self) -> list[int]:
        return [self.workers[0].pid]

    def ways(self) -> dict[str, Callable[[float], Rated]]:
        first = self.connections[0]
        return {"window": lambda seconds: pump(lambda x: first.send(("inc", x)), lambda _: first.recv(), seconds)}


class FloorOutOfBand(Floor):
    variant = "raw-mtls-oob"
    phases = ("latency1cpu", "bulk")


class FloorIntoArrays(Floor):
    variant = "raw-mtls-oob-thp"
    phases = ("bulk",)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        serve(WIRES[sys.argv[2]])
    else:
        make_certificates()
        main({kind.variant: kind for kind in (Floor, FloorOutOfBand, FloorIntoArrays)})

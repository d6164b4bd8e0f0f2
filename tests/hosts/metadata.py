"""The metadata service of one instance: HTTP at 169.254.169.254 in its network namespace, as `Metadata` answers it.

A token is needed where the instance was launched so. cloud-init is let in without: in a container it sees none of the marks
by which it knows EC2's machines, and so does not ask for one.
"""

from __future__ import annotations

import ctypes
import http.server
import json
import re
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from email.message import Message
from typing import Any

ADDRESS = "169.254.169.254"

CLONE_NEWNET = 0x40000000
IP_FREEBIND = 15

CLOUD_INIT = ("Cloud-Init", "python-requests")
"""How it calls itself; for user-data it does not set a name."""

TOKEN = "X-aws-ec2-metadata-token"

Tree = Mapping[str, "str | Tree"]


class Metadata:
    """Answers by what `tree` and `user_data` give at the time: a tree has the paths under /latest."""

    def __init__(self, tree: Callable[[], Tree], user_data: Callable[[], bytes], *, token_required: bool) -> None:
        self._tree = tree
        self._user_data = user_data
        self._token_required = token_required
        self._tokens: set[str] = set()
        self._server: http.server.ThreadingHTTPServer | None = None

    def start(self, pid: int) -> None:
        """Serve in the network namespace of process `pid`."""
        answers = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self._reply(*answers.put(self.path, self.headers))

            def do_GET(self) -> None:
                self._reply(*answers.get(self.path, self.headers))

            def _reply(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        server = http.server.ThreadingHTTPServer((ADDRESS, 80), Handler, bind_and_activate=False)
        server.socket.close()
        server.socket = _listener(pid)
        server.daemon_threads = True
        self._server = server
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def put(self, path: str, headers: Message) -> tuple[int, bytes]:
        if path != "/latest/api/token":
            return 404, b""
        if not headers.get(f"{TOKEN}-ttl-seconds", "").isdecimal():
            return 400, b""
        token = secrets.token_urlsafe(40)
        self._tokens.add(token)
        return 200, token.encode()

    def get(self, path: str, headers: Message) -> tuple[int, bytes]:
        token, trusted = headers.get(TOKEN), headers.get("User-Agent", "").startswith(CLOUD_INIT)
        if token not in self._tokens and (token is not None or (self._token_required and not trusted)):
            return 401, b""
        found = self._find([part for part in path.partition("?")[0].split("/") if part])
        return (404, b"") if found is None else (200, found)

    def _find(self, path: list[str]) -> bytes | None:
        if not path:
            return b"1.0\n2021-03-23\nlatest"
        if not re.fullmatch(r"latest|1\.0|\d{4}-\d\d-\d\d", path[0]):
            return None
        if path[1:] == ["user-data"]:
            return self._user_data() or None
        node: str | Tree = self._tree()
        for part in path[1:]:
            # A key has a number in paths, and in lists its name too: 0=name.
            names = {} if isinstance(node, str) else {name.partition("=")[0]: name for name in node}
            if isinstance(node, str) or part not in names:
                return None
            node = node[names[part]]
        if isinstance(node, str):
            return node.encode()
        plain = {name for name, under in node.items() if isinstance(under, str) or "=" in name}
        return "\n".join(name if name in plain else f"{name}/" for name in node).encode()


def tree(instance: Any, *, interruption: str = "", rebalance: str = "") -> Tree:
    """What moto's `instance` is told about itself; with the times, in AWS's form, of what awaits it."""
    nic = instance.nics[0]
    groups = "\n".join(group.name for group in nic.group_set)
    interface = {"device-number": "0", "local-ipv4s": nic.private_ip_address, "mac": nic.mac_address}
    about: dict[str, str | Tree] = {
        "ami-id": instance.image_id,
        "ami-launch-index": str(instance.ami_launch_index),
        "hostname": instance.private_dns_name,
        "instance-action": "none",
        "instance-id": instance.id,
        "instance-life-cycle": "spot" if instance.lifecycle == "spot" else "on-demand",
        "instance-type": instance.instance_type,
        "local-hostname": instance.private_dns_name,
        "local-ipv4": nic.private_ip_address,
        "mac": nic.mac_address,
        "network": {"interfaces": {"macs": {nic.mac_address: interface}}},
        "placement": {"availability-zone": instance.availability_zone, "region": instance.region_name},
        "reservation-id": "r-0",
        "security-groups": groups,
        "services": {"domain": "amazonaws.com", "partition": "aws"},
    }
    if nic.public_ip:
        about |= {"public-hostname": instance.public_dns_name, "public-ipv4": nic.public_ip}
    if instance.key_name:
        key = instance.ec2_backend.describe_key_pairs([instance.key_name])[0].material_public
        text = key if isinstance(key, str) else key.decode()
        about["public-keys"] = {f"0={instance.key_name}": {"openssh-key": text}}
    if interruption:
        action = json.dumps({"action": "terminate", "time": interruption})
        about["spot"] = {"instance-action": action, "termination-time": interruption}
    if rebalance:
        about["events"] = {"recommendations": {"rebalance": json.dumps({"noticeTime": rebalance})}}
    return {"meta-data": about, "dynamic": {"instance-identity": {"document": _document(instance)}}, "user-data": ""}


def _document(instance: Any) -> str:
    return json.dumps(
        {
            "accountId": instance.owner_id,
            "architecture": instance.architecture,
            "availabilityZone": instance.availability_zone,
            "imageId": instance.image_id,
            "instanceId": instance.id,
            "instanceType": instance.instance_type,
            "privateIp": instance.private_ip_address,
            "region": instance.region_name,
        }
    )


def _listener(pid: int) -> socket.socket:
    """A socket keeps the namespace of the thread that has made it."""
    made: list[socket.socket] = []
    failures: list[BaseException] = []

    def make() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            with open(f"/proc/{pid}/ns/net") as namespace:
                if libc.setns(namespace.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            listener = socket.socket()
            # The address need not be there yet.
            listener.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((ADDRESS, 80))
            listener.listen(64)
            made.append(listener)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return made[0]

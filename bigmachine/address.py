"""Addresses of machines: ``https://localhost:42409/m-7f3a9c/`` says where a machine is, and who must be there."""

from __future__ import annotations


def format_address(host: str, port: int, id: str) -> str:
    """The address of machine `id` at `host`, `port`."""
    return f"https://{f'[{host}]' if ':' in host else host}:{port}/{id}/"


def parse_address(address: str) -> tuple[str, int, str]:
    """(host, port, machine id). Raises ValueError with the address in its text."""
    scheme, _, rest = address.partition("://")
    place, _, id = rest.rstrip("/").partition("/")
    host, _, port = place.rpartition(":")
    if scheme != "https" or not host or not port.isdigit() or not id:
        raise ValueError(f"not a machine's address: {address!r}; one looks like https://localhost:42409/m-7f3a9c/")
    return host.strip("[]"), int(port), id

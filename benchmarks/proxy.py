"""A TCP proxy that adds a delay to each round trip, and counts what clients send.

A process of its own around one `select`: its timeout has microseconds, where that of an asyncio
loop has milliseconds, and it costs less of the two cores than streams would. (The proxy of the
tests speaks PostgreSQL's protocol and breaks it; this one must not know what it carries.)
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import time
from collections import deque
from typing import NamedTuple

READ = 262_144  # bytes


class Parcel(NamedTuple):
    """What a client sent, and when it is to arrive; no data: the client has closed."""

    due: float
    target: socket.socket
    data: bytes


class Relay:
    """Passes bytes between clients and a server; the way to the server takes `delay` seconds."""

    def __init__(self, host: str, port: int, delay: float) -> None:
        self._server = (host, port)
        self._delay = delay
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._peers: dict[socket.socket, socket.socket] = {}
        self._clients: set[socket.socket] = set()
        self._unsent: dict[socket.socket, bytearray] = {}
        self._parcels: deque[Parcel] = deque()  # one delay for all: in the order they are due
        self.requests = 0
        """Pieces received from clients: a lower bound of their round trips, and all but equal."""

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def run(self, control: int) -> None:
        """Serve until the file descriptor `control` ends; a line in it asks for the count."""
        while True:
            wait = max(0.0, self._parcels[0].due - time.monotonic()) if self._parcels else None
            watched: list[socket.socket | int] = [control, self._listener, *self._peers]
            readable, writable, _ = select.select(watched, list(self._unsent), [], wait)
            for each in readable:
                if each is self._listener:
                    self._accept()
                elif isinstance(each, int):
                    if not sys.stdin.readline():
                        return
                    print(json.dumps({"requests": self.requests}), flush=True)
                elif each in self._peers:
                    self._receive(each)
            for each in writable:
                if each in self._unsent:
                    self._send(each, b"")
            now = time.monotonic()
            while self._parcels and self._parcels[0].due <= now:
                parcel = self._parcels.popleft()
                if parcel.target not in self._peers:
                    continue
                if parcel.data:
                    self._send(parcel.target, parcel.data)
                else:
                    self._close(parcel.target)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection(self._server)
        for each, other in ((client, server), (server, client)):
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._peers[each] = other
        self._clients.add(client)

    def _receive(self, source: socket.socket) -> None:
        try:
            data = source.recv(READ)
        except ConnectionError:
            data = b""
        target = self._peers[source]
        if source in self._clients:
            self.requests += bool(data)
            self._parcels.append(Parcel(time.monotonic() + self._delay, target, data))
            if not data:
                # Its end is on the way; nothing more can be read meanwhile.
                del self._peers[source]
        elif data:
            self._send(target, data)
        else:
            self._close(source)

    def _send(self, target: socket.socket, data: bytes) -> None:
        unsent = self._unsent.pop(target, bytearray())
        unsent += data
        try:
            sent = target.send(unsent)
        except BlockingIOError:
            sent = 0
        except ConnectionError:
            self._close(target)
            return
        if sent < len(unsent):
            self._unsent[target] = unsent[sent:]

    def _close(self, side: socket.socket) -> None:
        other = self._peers.get(side)
        for each in (side, other):
            if each is not None:
                self._peers.pop(each, None)
                self._unsent.pop(each, None)
                self._clients.discard(each)
                each.close()


class Proxy:
    """A relay in a process of its own, until `close`."""

    def __init__(self, host: str, port: int, delay: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, host, str(port), str(delay)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port: int = self._line()["port"]

    def count(self) -> int:
        """How many pieces clients have sent so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("count\n")
        self._process.stdin.flush()
        return self._line()["requests"]

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate(timeout=10)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self) -> dict[str, int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("The proxy has ended")
        found: dict[str, int] = json.loads(line)
        return found


if __name__ == "__main__":
    relay = Relay(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    print(json.dumps({"port": relay.port}), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        relay.run(sys.stdin.fileno())

"""A way to a PostgreSQL server that breaks when a test says so, and where it says so."""

from __future__ import annotations

import asyncio
import contextlib
import re
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from sqlalchemy import make_url

from .postgres import free_port

LENGTH = struct.Struct("!I")  # of a message, itself included and its type byte not
CODES = {"encryption": (80877103, 80877104), "cancel": (80877102,)}
READ = 65_536  # bytes
COMMIT = "COMMIT"
WRITES = re.compile(r"\b(?:INSERT INTO|UPDATE|DELETE FROM) |_append\W")
WRITTEN = ("INSERT", "UPDATE", "DELETE")  # how the tags of such statements begin, if not calls


@dataclass
class Loss:
    """A message that is to get lost, with its connection; `struck` counts how often it was."""

    way: Literal["request", "contact", "answer"]
    of: str
    touching: re.Pattern[str]
    times: int
    then: Callable[[], None] | None
    struck: int = 0
    happened: asyncio.Event = field(default_factory=asyncio.Event)

    def strikes(self, ways: tuple[str, ...], text: str, statements: list[str]) -> bool:
        """Whether it happens now, to this statement or tag after those of its transaction."""
        if self.way not in ways or self.struck == self.times or not text.startswith(self.of):
            return False
        if not any(self.touching.search(statement) for statement in statements):
            return False
        self.struck += 1
        self.happened.set()
        return True


class Proxy:
    """Passes PostgreSQL's messages on, without TLS, in the event loop that opened it.

    `async with Proxy(url) as proxy` and `proxy.url` leads to the same database. Counters say
    what has really happened: `accepted`, `cuts` and `turned_away` connections; `committed` has
    the statements of every transaction whose COMMIT the server has confirmed.
    """

    def __init__(self, url: str) -> None:
        self._target = make_url(url)
        self._listener: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._losses: list[Loss] = []
        self._flows = asyncio.Event()
        self._flows.set()
        self._port = free_port()
        self._refusal: bytes | None = None
        self.accepted = 0
        self.cuts = 0
        self.turned_away = 0
        self.committed: list[list[str]] = []

    async def __aenter__(self) -> Proxy:
        await self.accept()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.refuse()
        ended = [link.ended for link in self._links]
        self.cut()
        if ended:
            await asyncio.wait(ended)

    @property
    def url(self) -> str:
        """The database's URL, by way of this proxy."""
        here = self._target.set(host="127.0.0.1", port=self._port)
        return here.render_as_string(hide_password=False)

    def lead_to(self, url: str) -> None:
        """Let new connections go to another server, as an address that moves."""
        self._target = make_url(url)

    def cut(self) -> int:
        """Drop all connections now; how many there were."""
        links = list(self._links)
        for link in links:
            link.drop()
        self.cuts += len(links)
        return len(links)

    def refuse(self) -> None:
        """Refuse new connections, as a machine does where no server listens."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def turn_away(self, sqlstate: str, message: str) -> None:
        """Answer new connections with this error, as a server does that is starting up or full."""
        fields = [f"S{'FATAL'}", f"V{'FATAL'}", f"C{sqlstate}", f"M{message}"]
        body = b"".join(item.encode() + b"\0" for item in fields) + b"\0"
        self._refusal = b"E" + LENGTH.pack(len(body) + LENGTH.size) + body

    def hang_up(self) -> None:
        """Drop new connections once they are made, as a balancer does that has no server left."""
        self._refusal = b""

    async def accept(self) -> None:
        """Let connections through again."""
        self._refusal = None
        if self._listener is None:
            self._listener = await asyncio.start_server(self._link, "127.0.0.1", self._port)

    def stall(self) -> None:
        """Let no byte through, in either direction, and close nothing."""
        self._flows.clear()

    def stall_open(self) -> None:
        """Let no byte through on the connections there are; new ones are as ever."""
        self._flows.clear()
        self._flows = asyncio.Event()
        self._flows.set()

    def resume(self) -> None:
        """Let what has been held back go on."""
        self._flows.set()

    def lose_answer(
        self,
        of: str = "COMMIT",
        times: int = 1,
        *,
        touching: str = "",
        then: Callable[[], None] | None = None,
    ) -> Loss:
        """Drop the connection in place of the server's word that a command is done.

        `of` is how its tag begins ("COMMIT", "INSERT 0 2", "SELECT"); a lone statement that
        writes commits as well. Only where a statement of
        the same transaction, itself included, contains the pattern `touching`. `then` is called
        as it happens.
        """
        return self._expect(Loss("answer", of, re.compile(touching), times, then))

    def lose_request(
        self,
        of: str = "COMMIT",
        times: int = 1,
        *,
        touching: str = "",
        then: Callable[[], None] | None = None,
    ) -> Loss:
        """Drop the connection before the server gets to see a statement that begins with `of`."""
        return self._expect(Loss("request", of, re.compile(touching), times, then))

    def lose_contact(
        self,
        of: str = "COMMIT",
        times: int = 1,
        *,
        touching: str = "",
        then: Callable[[], None] | None = None,
    ) -> Loss:
        """Drop the client's connection once the server has got such a statement, and not its own.

        The server works on it in peace, and may be done much later than the client tries again.
        """
        return self._expect(Loss("contact", of, re.compile(touching), times, then))

    def _expect(self, loss: Loss) -> Loss:
        self._losses.append(loss)
        return loss

    def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        link = _Link(self, reader, writer)
        self._links.add(link)
        link.ended.add_done_callback(lambda _: self._links.discard(link))


class _Link:
    """One connection through the proxy."""

    def __init__(
        self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._proxy = proxy
        self._flows = proxy._flows
        self._client = (reader, writer)
        self._writers = [writer]
        self._prepared: dict[bytes, str] = {}
        self._statements: list[str] = []  # of the transaction under way
        self._in_block = False  # between BEGIN and COMMIT
        self._last: Loss | None = None  # contact is lost once the statement is whole
        self._alone = False  # the client has lost contact
        self.ended = asyncio.ensure_future(self._run())

    def drop(self) -> None:
        """Close both sides at once, whatever is on its way."""
        for writer in self._writers:
            writer.transport.abort()
        self.ended.cancel()

    async def _run(self) -> None:
        pumps: list[asyncio.Task[None]] = []
        try:
            hello = await self._hello()
            if self._proxy._refusal is not None:
                self._proxy.turned_away += 1
                self._client[1].write(self._proxy._refusal)
                await self._client[1].drain()
                return
            target = self._proxy._target
            server = await asyncio.open_connection(target.host, target.port or 5432)
            self._writers.append(server[1])
            server[1].write(hello)
            if LENGTH.unpack_from(hello, LENGTH.size)[0] in CODES["cancel"]:
                await server[1].drain()
                return
            pumps = [
                asyncio.ensure_future(self._pump(self._client[0], server[1], self._request)),
                asyncio.ensure_future(self._pump(server[0], self._client[1], self._answer)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if self._alone:
                await pumps[1]
        except (OSError, asyncio.IncompleteReadError):
            pass  # one side has left, or there is no server
        finally:
            for pump in pumps:
                pump.cancel()
            for writer in self._writers:
                writer.close()
                with contextlib.suppress(OSError, asyncio.CancelledError):
                    await writer.wait_closed()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _hello(self) -> bytes:
        """The first message, which has no type; an offer of encryption before it is declined."""
        reader, writer = self._client
        while True:
            await self._flows.wait()
            head = await reader.readexactly(LENGTH.size)
            body = await reader.readexactly(LENGTH.unpack(head)[0] - LENGTH.size)
            if LENGTH.unpack_from(body)[0] not in CODES["encryption"]:
                return head + body
            writer.write(b"N")

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        look: Callable[[bytes, bytes], Loss | None],
    ) -> None:
        """Pass messages on, whole ones only, until the connection ends or one is to be lost."""
        buffer = bytearray()
        while chunk := await reader.read(READ):
            await self._flows.wait()
            buffer += chunk
            for kind, body, message in _messages(buffer):
                loss = look(kind, body)
                if loss is not None and loss.way == "contact" and kind == b"B":
                    # Without its Execute and Sync the server would do nothing.
                    self._last, loss = loss, None
                elif kind == b"S" and self._last is not None:
                    loss, self._last = self._last, None
                if loss is None:
                    if not self._alone:
                        writer.write(message)
                    elif kind == b"Z":
                        return
                    continue
                if loss.way == "contact":
                    self._alone = True
                    writer.write(message)
                    await writer.drain()
                    self._writers[0].transport.abort()
                else:
                    for each in self._writers:
                        each.transport.abort()
                if loss.then is not None:
                    loss.then()
                return
            if not self._alone:
                await writer.drain()

    def _request(self, kind: bytes, body: bytes) -> Loss | None:
        if kind == b"P":  # Parse: name, statement
            name, statement, _ = body.split(b"\0", 2)
            self._prepared[name] = statement.decode()
        sql = None
        if kind == b"Q":
            sql = body[:-1].decode()
        elif kind == b"B":  # Bind: portal, name
            sql = self._prepared.get(body.split(b"\0", 2)[1], "")
        if sql is None:
            return None
        self._statements.append(sql)
        commits = not self._in_block and WRITES.search(sql) is not None
        return self._loss(("request", "contact"), sql, commits=commits)

    def _answer(self, kind: bytes, body: bytes) -> Loss | None:
        if kind == b"C":  # CommandComplete: tag
            tag = body[:-1].decode()
            writes = tag.startswith(WRITTEN) or any(map(WRITES.search, self._statements[-1:]))
            commits = not self._in_block and writes
            if commits or tag == COMMIT:
                self._proxy.committed.append(list(self._statements))
            return self._loss(("answer",), tag, commits=commits)
        if kind == b"Z":  # ReadyForQuery
            self._in_block = body != b"I"
            if not self._in_block:
                self._statements.clear()
        return None

    def _loss(self, ways: tuple[str, ...], text: str, *, commits: bool) -> Loss | None:
        """`commits`: a statement that is a transaction by itself is its own COMMIT."""
        texts = (text, COMMIT) if commits else (text,)
        for loss in self._proxy._losses:
            if any(loss.strikes(ways, each, self._statements) for each in texts):
                return loss
        return None


def _messages(buffer: bytearray) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Take the complete messages out of the buffer: type, body, and the whole of each."""
    head = 1 + LENGTH.size
    while len(buffer) >= head:
        end = 1 + LENGTH.unpack_from(buffer, 1)[0]
        if len(buffer) < end:
            return
        message = bytes(buffer[:end])
        del buffer[:end]
        yield message[:1], message[head:], message


@contextlib.asynccontextmanager
async def severed(proxy: Proxy) -> AsyncIterator[None]:
    """An outage: no connection is left, and none can be made, until the block ends."""
    proxy.refuse()
    proxy.cut()
    try:
        yield
    finally:
        await proxy.accept()

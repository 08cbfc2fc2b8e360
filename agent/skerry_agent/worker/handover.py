"""Passing every connection to the next worker without failing a request.

A connection is passed at a request boundary: nothing in work, every byte of the last reply in the kernel. The bytes read
and not yet answered go along as ``head``, so a half-sent or pipelined request is served by the successor from its first byte.
Idle connections go at once, busy ones after their reply. Nothing is ever closed because it is idle: a keep-alive client that
sends its next request at that moment would fail.

The own copy of the socket is dropped with ``abort``, which closes the descriptor and says nothing to the peer.
"""

from __future__ import annotations

import asyncio

from skerry_agent import workerwire as ww
from skerry_agent.channel import Channel
from skerry_agent.worker.server import Connection, Server

_POLL_S = 0.002


class Handover:
    """One drain: passes connections until none is left or the deadline comes."""

    def __init__(self, server: Server, channel: Channel) -> None:
        self._server = server
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self.passed = 0

    async def run(self, deadline_s: float) -> int:
        """Stops accepting and passes everything on.

        Returns:
            How many connections could not be passed and were closed: their request was still in work, or their client
            did not read its reply, within ``deadline_s``.
        """
        server = self._server
        server.stop_accepting()
        end = self._loop.time() + deadline_s
        # From now on every connection comes by when it has answered, or when it was accepted just before.
        server.on_boundary = self._give_soon
        for connection in list(server.connections):
            self._give(connection)
        while not server.empty and self._loop.time() < end and not self._channel.closed:
            await asyncio.sleep(_POLL_S)
            # Replies that the client was slow to read leave their connection without a further event.
            for connection in list(server.connections):
                self._give(connection)
        unpassed = sum(not connection.leaving for connection in server.connections)
        server.close()
        return unpassed

    def _give_soon(self, connection: Connection) -> None:
        # Not from within the connection's own callback: the transport still has the reply to write.
        self._loop.call_soon(self._give, connection)

    def _give(self, connection: Connection) -> None:
        if connection not in self._server.connections or not connection.at_boundary:
            return
        self._channel.send(ww.Conn(head=connection.unanswered(), own=connection.own), connection.fileno())
        connection.abandon()
        self.passed += 1

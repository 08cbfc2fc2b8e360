"""Metadata and documents out of a folder, as the updater asks for them. Apart from ``folder``: a download needs no TUF."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO
from urllib.parse import unquote

from tuf.api import exceptions as tuf_errors

from skerry_agent.courier.folder import PIECE_BYTES, Absent, UpdateFolder, unreadable
from skerry_agent.courier.safe_updater import MemoryFetcher

URL = "folder:"
"""Stands for the folder where the updater wants the repository's address."""


class Fetcher(MemoryFetcher):
    """As ``safe_updater.Fetcher``, from a folder: addresses begin with ``URL``."""

    def __init__(self, folder: UpdateFolder) -> None:
        self._folder = folder

    def _fetch(self, url: str) -> Iterator[bytes]:
        with self._open(url) as stream:
            try:
                while piece := stream.read(PIECE_BYTES):
                    yield piece
            except OSError as error:
                raise unreadable(self._folder, error) from None

    def _open(self, url: str) -> BinaryIO:
        name = unquote(url.removeprefix(URL).lstrip("/"))
        try:
            return self._folder.open(name)
        except Absent as error:
            # As tuf wants to hear it: a missing next root is the usual case.
            raise tuf_errors.DownloadHTTPError(error.detail, 404) from error

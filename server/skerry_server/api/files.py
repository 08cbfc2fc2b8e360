"""The update repository over HTTP: static files with ETag, conditional requests and ranges.

Only the four folders of the repository's layout are served, so nothing that the server keeps beside them can leak. Metadata
that is replaced in place must be asked for anew each time; blobs and targets never change under their names. A delta may be made
anew, to the same result: a cache may keep it for a day.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from skerry_contract import layout
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response
from starlette.staticfiles import NotModifiedResponse, StaticFiles
from starlette.types import Scope

FOLDERS = (layout.METADATA_DIR, layout.TARGETS_DIR, "blobs", "deltas")
FRESH = "no-cache"
A_DAY = "public, max-age=86400"
FOREVER = "public, max-age=31536000, immutable"


class RepositoryFiles(StaticFiles):
    """Serves the repository's folder, read only."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        first, *rest = path.replace(os.sep, "/").split("/")
        if first not in FOLDERS or any(part.startswith(".") for part in rest):
            raise HTTPException(404)
        return await super().get_response(path, scope)

    def file_response(
        self, full_path: Any, stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        folder, name = self.get_path(scope).split(os.sep, 1)
        numbered = name.split(".")[0].isdigit()
        asked = Headers(scope=scope)
        fresh = folder == layout.METADATA_DIR and not numbered
        lasting = A_DAY if folder == "deltas" else FOREVER
        headers = {"cache-control": FRESH if fresh else lasting, "x-content-type-options": "nosniff"}
        if folder == "blobs":
            # The name is the sha256: the same tag on every mirror, so a download resumes on another.
            headers["etag"] = f'"{name.rsplit(os.sep, 1)[-1]}"'
        media_type = "application/json" if name.endswith(".json") else "application/octet-stream"
        if fresh and status_code == 200:
            # It may be replaced at any moment. Read at once, its bytes and their length are of one version.
            data = Path(full_path).read_bytes()
            headers["etag"] = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            whole = Response(data, headers=headers, media_type=media_type)
            return NotModifiedResponse(whole.headers) if self.is_not_modified(whole.headers, asked) else whole
        response = FileResponse(
            full_path, status_code=status_code, headers=headers, media_type=media_type, stat_result=stat_result
        )
        if self.is_not_modified(response.headers, asked):
            return NotModifiedResponse(response.headers)
        return response

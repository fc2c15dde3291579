"""The browser page and its files. FLOOR 5.

Read into memory when the application is made: there are few, they are small, and a name in a URL never becomes a
path on disk. Every load asks again (`no-cache`) and is told by ETag that nothing has changed, so a new version is
there at once.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import Response

from service.web.context import JOB_ID, has_etag
from service.web.problems import not_found

_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json",
}

router = APIRouter(include_in_schema=False)


class PageFile(NamedTuple):
    """A file as it is served."""

    body: bytes
    media_type: str
    etag: str


def install(app: FastAPI) -> None:
    """Read the files."""
    app.state.page = {
        path.name: PageFile(
            body := path.read_bytes(), _TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        )
        for path in (Path(__file__).parent / "page").iterdir()
        if path.suffix in _TYPES
    }


@router.get("/")
async def page(request: Request) -> Response:
    """The page."""
    return _serve(request, "index.html")


@router.get("/jobs/{job_id}/view")
async def view(request: Request, job_id: str) -> Response:
    """The page, at one job; whether there is such a job it asks by itself, with the caller's key."""
    if not JOB_ID.fullmatch(job_id):
        raise not_found()
    return _serve(request, "index.html")


@router.get("/page/{name}")
async def page_file(request: Request, name: str) -> Response:
    """What the page is made of."""
    return _serve(request, name)


def _serve(request: Request, name: str) -> Response:
    file: PageFile | None = request.app.state.page.get(name)
    if file is None:
        raise not_found("file")
    headers = {"ETag": file.etag, "Cache-Control": "no-cache"}
    if has_etag(request.headers.get("if-none-match"), file.etag):
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers=headers, media_type=file.media_type)

"""The HTTP edge, put together. FLOOR 5.

`create_app` is the whole of it as one ASGI application: the routes inside, around them who may call, and around
that what holds for every response. `create_worker_app` is what a worker shows of itself, under the same rules. The
runtime is opened by whoever serves; nothing here starts or ends it.
"""

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from service.runtime import Runtime
from service.web import deliveries, documents, events, jobs, ops, pages, problems, tokens, transcripts
from service.web.auth import Authenticator, Guard
from service.web.edge import Afterwards, Edge, Linger
from service.web.limits import Uploads

MODULES = (jobs, events, transcripts, tokens, deliveries, ops, documents, pages)


def create_app(runtime: Runtime) -> ASGIApp:
    """The application that serves `runtime`."""
    routes = [route for module in MODULES for route in module.router.routes]
    app = _application(runtime, routes)
    app.state.uploads = Uploads()
    documents.install(app, routes)
    pages.install(app)
    return _guarded(app, runtime)


def create_worker_app(runtime: Runtime) -> ASGIApp:
    """Health and metrics, nothing else, for the process of a worker."""
    return _guarded(_application(runtime, ops.router.routes), runtime)


def _application(runtime: Runtime, routes: Sequence[BaseRoute]) -> FastAPI:
    app = FastAPI(routes=list(routes), openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.runtime = runtime
    app.state.tokens = tokens.Tokens(runtime.token_secret)
    app.state.authenticator = Authenticator(runtime.settings.api_keys, runtime.stored_keys, runtime.store.keys.all)
    problems.install(app)
    return app


def _guarded(app: FastAPI, runtime: Runtime) -> ASGIApp:
    return Edge(Linger(Guard(Afterwards(app), runtime, app.state.authenticator, app.state.tokens)))

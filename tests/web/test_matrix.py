"""Every route of the OpenAPI document, tried by everybody who may not. What the document lacks is not served."""

import re
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from service.web.app import MODULES
from service.web.documents import make_openapi
from tests.web.served import Json, Served, refused, serving, wav

pytestmark = pytest.mark.asyncio(loop_scope="module")

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
AS_ALICE, AS_BOB, AS_NOBODY = ({"Authorization": f"Bearer {key}"} for key in (ALICE, BOB, f"{ALICE}x"))
OPEN = {("get", "/healthz"), ("get", "/readyz")}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keyed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serving(tmp_path_factory.mktemp("keyed"), api_keys=f"alice:{ALICE},bob:{BOB}") as served:
        yield served


def routes(document: Json, job_id: str) -> Iterator[tuple[str, str, bool]]:
    """Method, URL, whether it is of a job."""
    for path, operations in document["paths"].items():
        url = path.replace("{job_id}", job_id).replace("{form}", "txt")
        for method in operations:
            if (method, path) not in OPEN:
                yield method.upper(), re.sub(r"\{\w+\}", "x", url), "{job_id}" in path


async def test_route_by_caller(keyed: Served) -> None:
    mine, other = [(await keyed.http.post("/jobs", content=wav(), headers=AS_ALICE)).json()["id"] for _ in range(2)]
    made = await keyed.http.post(f"/jobs/{other}/token", headers=AS_ALICE)
    foreign = {"token": made.json()["token"]}
    document = (await keyed.http.get("/openapi.json")).json()
    tried = list(routes(document, mine))
    of_a_job = [(method, url) for method, url, is_of_job in tried if is_of_job]
    assert len(of_a_job) >= 11
    assert len(tried) >= len(of_a_job) + 3
    for method, url, is_of_job in tried:
        no_key = await keyed.http.request(method, url)
        wrong_key = await keyed.http.request(method, url, headers=AS_NOBODY)
        of_another = await keyed.http.request(method, url, params=foreign)
        for answer in (no_key, wrong_key, of_another):
            refused(answer, "unauthorized")
        assert no_key.content == wrong_key.content == of_another.content, url
        if is_of_job:
            refused(await keyed.http.request(method, url, headers=AS_BOB), "not_found")
            if method != "GET":
                own = (await keyed.http.post(f"/jobs/{mine}/token", headers=AS_ALICE)).json()["token"]
                refused(await keyed.http.request(method, url, params={"token": own}), "unauthorized")
    job = (await keyed.http.get(f"/jobs/{mine}", headers=AS_ALICE)).json()
    assert job["status"] == "queued", "nobody of them changed anything"
    assert (await keyed.http.get("/jobs", headers=AS_BOB)).json()["data"] == []


async def test_the_document_knows_every_route() -> None:
    served = {
        (method.lower(), route.path)
        for module in MODULES
        for route in module.router.routes
        for method in route.methods or ()
    }
    document = make_openapi([route for module in MODULES for route in module.router.routes], keys_needed=True)
    told = {(method, path) for path, operations in document["paths"].items() for method in operations}
    untold = {path for method, path in served - told if method != "head"}
    assert untold <= {
        "/",
        "/jobs/{job_id}/view",
        "/page/{name}",
        "/docs",
        "/openapi.json",
        "/asyncapi.json",
    }, "a route nobody tries above"

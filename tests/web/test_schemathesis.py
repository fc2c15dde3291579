"""schemathesis over the OpenAPI document, against `turnwire serve` in a process of its own and a sandbox."""

import asyncio
import sys
from pathlib import Path

import pytest

from tests.e2e.process import ROOT, serving

KEY = "tester-0123456789abcdef"
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "response_headers_conformance,unsupported_method,allow_header_conformance,ignored_auth,use_after_free,"
    "ensure_resource_availability"
)


async def explore(tmp_path: Path, *options: str) -> str:
    """Its report; fails unless it found nothing."""
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    async with serving(tmp_path, api_keys=f"tester:{KEY}", webhook_secret=secret, log_level="info") as (service, _):
        await service.start()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json",
            "--header", f"Authorization: Bearer {KEY}", "--checks", CHECKS, "--continue-on-failure", "--no-color",
            "--request-timeout", "20", *options,
            cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            env={"PATH": "/usr/bin:/bin", "SCHEMATHESIS_HOOKS": "tests.web.generators", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        report = (await process.communicate())[0].decode()
        assert process.returncode == 0, report
        assert service.running()
        assert '"level":"error"' not in service.errors.read_text()
    return report


async def test_the_service_does_what_it_documents(tmp_path: Path) -> None:
    await explore(tmp_path, "--seed", "1", "--generation-deterministic", "--max-examples", "5")


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_the_service_does_what_it_documents_at_length(tmp_path: Path, seed: int) -> None:
    print(await explore(tmp_path, "--generation-database", "none", "--seed", str(seed), "--max-examples", "100"))

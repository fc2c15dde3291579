"""The worker, where the database answers some questions and not others."""

from pathlib import Path

import pytest

from service.core.errors import Unavailable
from service.intake import Intake
from tests.kit import running, spoken
from tests.marked import marked_wav, words


async def test_a_claim_that_cannot_be_told_of_is_worked_on_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def tell_newest(_: Intake, __: str) -> None:
        raise Unavailable

    monkeypatch.setattr(Intake, "tell_newest", tell_newest)
    async with running(tmp_path) as kit:
        job, events = await kit.run(marked_wav(1600))
        assert (job.status, job.attempt) == ("completed", 1)
        assert spoken(events) == words(8)

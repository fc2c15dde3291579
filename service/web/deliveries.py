"""What became of a job's webhooks, and sending one again. FLOOR 5.

A delivery is one webhook with all its attempts; its id is the `webhook-id` that the receiver saw.
"""

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

from service.core.job import to_json
from service.store.outbox import Attempt, Delivery
from service.web.context import OwnJob, Services
from service.web.problems import not_found
from service.web.schemas import Schema, components, problem_answers

JSON = "application/json"


class DeliveryList(msgspec.Struct):
    """The webhooks of a job, oldest first."""

    data: list[Delivery]


def _answer(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {JSON: {"schema": schema}}}


def _delivery_schema() -> Schema:
    """In one piece, made of the structs that are encoded."""
    schemas = components((Attempt, Delivery))
    schemas["Delivery"]["properties"]["attempts"]["items"] = schemas["Attempt"]
    return schemas["Delivery"]


_DELIVERY = _delivery_schema()
_LIST = {"type": "object", "properties": {"data": {"type": "array", "items": _DELIVERY}}, "required": ["data"]}

router = APIRouter()


@router.get(
    "/jobs/{job_id}/deliveries",
    summary="Webhook attempts",
    responses={200: _answer("The webhooks of the job, oldest first", _LIST), **problem_answers("not_found")},
)
async def list_deliveries(record: OwnJob, runtime: Services) -> Response:
    """Empty for a job that asked for no webhook or has not ended."""
    deliveries = await runtime.store.outbox.deliveries(record.job.id)
    return Response(to_json(DeliveryList(deliveries)), media_type=JSON)


@router.post(
    "/jobs/{job_id}/deliveries/{delivery}/redeliver",
    status_code=202,
    summary="Send a webhook again",
    responses={
        202: _answer("Sent soon, and on its schedule from the start", _DELIVERY),
        **problem_answers("not_found"),
    },
)
async def redeliver(record: OwnJob, runtime: Services, delivery: str) -> Response:
    """With the same `webhook-id` and body; one that is being sent this moment is left to it."""
    after = await runtime.store.outbox.redeliver(record.job.id, delivery)
    if after is None:
        raise not_found("delivery")
    return Response(to_json(after), 202, media_type=JSON)

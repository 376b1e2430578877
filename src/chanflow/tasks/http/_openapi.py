"""The description of the app: OpenAPI 3.1, made from the type hints of the handlers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from importlib.metadata import version
from typing import Any
from urllib.parse import quote

from chanflow.tasks._handler import Handler
from chanflow.tasks._schema import describe as schema_of
from chanflow.tasks.http._problem import Kind
from chanflow.tasks.record import TaskStatus
from chanflow.tasks.wire import TIMES

__all__ = ["describe"]

REFERENCE = "#/components/schemas/{name}"
TEXT: dict[str, Any] = {"type": "string"}
CURSOR: dict[str, Any] = {"type": "string", "pattern": "^[0-9a-f]{32}$"}
NUMBER: dict[str, Any] = {"type": "number"}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
MAYBE_TEXT: dict[str, Any] = {"type": ["string", "null"]}
MAYBE_TIME: dict[str, Any] = {"type": ["string", "null"], "format": "date-time"}
SECONDS: dict[str, Any] = {"type": "integer", "minimum": 0}


def thing(properties: dict[str, Any], optional: Iterable[str] = ()) -> dict[str, Any]:
    """Describe an object of which all is there but what is optional."""
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in set(optional)],
    }


def refer(name: str) -> dict[str, Any]:
    return {"$ref": REFERENCE.format(name=name)}


STATUS: dict[str, Any] = {"type": "string", "enum": [status.value for status in TaskStatus]}
PROGRESS = thing({"done": NUMBER, "total": NUMBER, "message": TEXT})
SUMMARY: dict[str, Any] = {
    "id": TEXT,
    "name": TEXT,
    "status": STATUS,
    "attempts": COUNT,
    "error_type": MAYBE_TEXT,
    "error_message": MAYBE_TEXT,
    "progress": {"anyOf": [PROGRESS, {"type": "null"}]},
    "priority": {"type": "integer"},
    "idempotency_key": MAYBE_TEXT,
    "worker": MAYBE_TEXT,
    "cancel_requested": {"type": "boolean"},
    **dict.fromkeys(TIMES, MAYBE_TIME),
}
DEAD_MESSAGE = thing(
    {
        "id": TEXT,
        "topic": TEXT,
        "group": TEXT,
        "reason": TEXT,
        "attempts": COUNT,
        "body": TEXT,
        "key": MAYBE_TEXT,
        "headers": {"type": "object", "additionalProperties": TEXT},
        "died_at": MAYBE_TIME,
    }
)
OWN = "chanflow"
"""What the names of the schemas that are always there begin with."""
SCHEMAS: dict[str, Any] = {
    "chanflow.Task": thing({**SUMMARY, "arguments": {"type": "object"}, "result": {}}),
    "chanflow.TaskSummary": thing(SUMMARY),
    "chanflow.Accepted": thing({"task_id": TEXT, "status": STATUS, "status_url": TEXT}),
    "chanflow.Problem": thing(
        {
            "type": {"type": "string", "enum": [kind.uri for kind in Kind]},
            "title": TEXT,
            "status": {"type": "integer"},
            "detail": TEXT,
        }
    ),
    "chanflow.DeadMessage": DEAD_MESSAGE,
}
TASK_ID = {"name": "task_id", "in": "path", "required": True, "schema": TEXT}
PREFER = {
    "name": "Prefer",
    "in": "header",
    "description": "`wait=SECONDS`: wait so long for the end of the task, RFC 7240.",
    "schema": TEXT,
}
KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "A second submission with the same key and the same arguments is the same task. Quotes around it "
    "are optional.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]([ -~]*[!-~])?$"},
}
DELAY = {
    "name": "delay",
    "in": "query",
    "description": "Seconds before which the task is not begun.",
    "schema": {"type": "number", "minimum": 0, "maximum": 31_536_000},
}
PRIORITY = {
    "name": "priority",
    "in": "query",
    "description": "Of the tasks that are due, those with a higher one are begun first.",
    "schema": {"type": "integer", "minimum": -1000, "maximum": 1000},
}
LAST_EVENT = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": "The `id` of the last message that the client has seen.",
    "schema": TEXT,
}
RETRY_AFTER = {"Retry-After": {"description": "Seconds after which to ask again.", "schema": SECONDS}}
PROBLEMS = {
    400: "The body is not JSON.",
    401: "A valid bearer token is needed.",
    403: "The token doesn't allow this, or another site's page asks.",
    404: "There is no such task, or it has expired.",
    409: "The task is not in a state for that.",
    410: "The cursor has expired: begin with the first page.",
    413: "The body is too long.",
    415: "The body is not `application/json`.",
    421: "The service does not answer for this host.",
    422: "A parameter or an argument is not as it must be, or the key was used for another task.",
    503: "Too much is pending, the service is stopping, or its store is away.",
}

ALWAYS = {401, 403, 421, 503}


def answer(description: str, schema: dict[str, Any], media: str = "application/json", **rest: Any) -> dict[str, Any]:
    return {"description": description, "content": {media: {"schema": schema}}, **rest}


def operation(name: str, summary: str, answers: dict[int, Any], *problems: int, **rest: Any) -> dict[str, Any]:
    """Describe an operation; each may be refused for want of a token, the right host or a store."""
    responses = {str(status): each for status, each in answers.items()}
    for status in sorted({*ALWAYS, *problems} - set(answers)):
        headers = {"headers": RETRY_AFTER} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}
        responses[str(status)] = answer(
            PROBLEMS[status], refer("chanflow.Problem"), "application/problem+json", **headers
        )
    return {"operationId": name, "summary": summary, "responses": responses, **rest}


def describe(handlers: Mapping[str, Handler[Any, Any]]) -> dict[str, Any]:
    """Describe the app of a service with these handlers."""
    components: dict[str, Any] = dict(SCHEMAS)
    submissions: dict[str, Any] = {}
    taken = {OWN}
    for number, (name, handler) in enumerate(handlers.items()):
        # The types of a handler go under its name, of which only this may be in the name of a schema. Where another
        # handler is spelled alike then, a number tells them apart.
        place = re.sub(r"[^a-zA-Z0-9\-_]", "_", name)
        place = f"{place}.{number}" if place in taken else place
        taken.add(place)
        schema, parts = schema_of(handler.arguments, REFERENCE.replace("{name}", f"{place}.{{name}}"))
        components |= {f"{place}.{part}": each for part, each in parts.items()}
        # A name may have braces, which would stand for a parameter.
        submissions[f"/tasks/{quote(name, safe='')}"] = {"post": submission(name, handler, schema)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tasks",
            "version": version("chanflow"),
            "description": "Submit slow work, get a task id at once, and ask for status and result later.",
        },
        "paths": submissions | paths(),
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        # A service without tokens needs none.
        "security": [{"token": []}, {}],
    }


def submission(name: str, handler: Handler[Any, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Describe how to submit a task to a handler."""
    location = {"Location": {"description": "Where to ask for it.", "schema": TEXT}}
    description = {"description": handler.__doc__} if handler.__doc__ else {}
    return operation(
        f"submit_{name}",
        f"Submit {name}",
        {
            200: answer("It ended while the client waited.", refer("chanflow.Task"), headers=location),
            202: answer("It is accepted.", refer("chanflow.Accepted"), headers=location | RETRY_AFTER),
        },
        *(400, 404, 413, 415, 422),
        parameters=[PREFER, KEY, DELAY, PRIORITY],
        requestBody={"required": True, "content": {"application/json": {"schema": schema}}},
        **description,
    )


def paths() -> dict[str, Any]:
    """Describe the routes that are always there."""
    task = answer("The task.", refer("chanflow.Task"))
    page = thing({"tasks": {"type": "array", "items": refer("chanflow.TaskSummary")}, "next": MAYBE_TEXT})
    topics = thing({"topic": TEXT, "messages": {"type": "array", "items": refer("chanflow.DeadMessage")}})
    handler = thing({"name": TEXT, "description": MAYBE_TEXT, "arguments": {"type": "object"}})
    health = thing({"status": {"type": "string", "enum": ["ok", "draining"]}})
    ids = {
        "type": "object",
        "properties": {"ids": {"type": ["array", "null"], "items": TEXT}},
        "additionalProperties": False,
    }
    topic = {"name": "topic", "in": "path", "required": True, "schema": TEXT}
    listing = [
        {"name": "status", "in": "query", "schema": STATUS},
        {"name": "name", "in": "query", "schema": TEXT},
        {"name": "after", "in": "query", "description": "The `next` of the page before.", "schema": CURSOR},
        {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}},
    ]
    draining = {503: answer("Not so.", health, headers=RETRY_AFTER)}
    # Each message of a stream, with its data as text.
    stream = thing({"event": TEXT, "id": TEXT, "data": TEXT}, ["id"]), "text/event-stream"
    return {
        "/tasks": {
            "get": operation(
                "list_tasks",
                "List tasks, the newest first",
                {200: answer("A page.", page)},
                410,
                422,
                parameters=listing,
            )
        },
        "/tasks/{task_id}": {
            "parameters": [TASK_ID],
            "get": operation("get_task", "Ask for a task", {200: task}, 404, parameters=[PREFER]),
            "delete": operation(
                "cancel_task",
                "Cancel a task",
                {200: task, 202: answer("It still runs.", refer("chanflow.Task"))},
                404,
            ),
        },
        "/tasks/{task_id}/retry": {
            "parameters": [TASK_ID],
            "post": operation(
                "retry_task",
                "Run a task again that failed or was cancelled",
                {202: answer("It is pending again.", refer("chanflow.Task"))},
                404,
                409,
            ),
        },
        "/tasks/{task_id}/events": {
            "parameters": [TASK_ID],
            "get": operation(
                "watch_task",
                "Watch a task: a message `record` after each change, until its end",
                {200: answer("The messages.", *stream), 204: {"description": "It has ended, as the client has seen."}},
                404,
                parameters=[LAST_EVENT],
            ),
        },
        "/handlers": {
            "get": operation(
                "list_handlers",
                "What can be submitted",
                {200: answer("The handlers.", thing({"handlers": {"type": "array", "items": handler}}))},
            )
        },
        "/events": {
            "get": operation(
                "watch",
                "Watch the service: a message `snapshot` each second",
                {200: answer("The messages.", *stream)},
            )
        },
        "/dead-letters": {
            "get": operation(
                "list_dead_letters",
                "List dead letters",
                {200: answer("By topic.", thing({"topics": {"type": "array", "items": topics}}))},
            )
        },
        "/dead-letters/{topic}/replay": {
            "parameters": [topic],
            "post": operation(
                "replay_dead_letters",
                "Move dead letters back to where they come from",
                {200: answer("How many.", thing({"replayed": COUNT}))},
                400,
                404,
                413,
                415,
                422,
                requestBody={"content": {"application/json": {"schema": ids}}},
            ),
        },
        "/health": {
            "get": operation("health", "Whether tasks are accepted", {200: answer("They are.", health), **draining})
        },
        "/metrics": {
            "get": operation("metrics", "Figures for Prometheus", {200: answer("The figures.", TEXT, "text/plain")})
        },
        "/openapi.json": {"get": operation("describe", "This description", {200: answer("It.", {"type": "object"})})},
    }

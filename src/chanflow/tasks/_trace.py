"""Spans for OpenTelemetry, from the submission of a task to its run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from chanflow.tasks.record import TaskRecord

__all__ = ["Tracing", "find_tracing"]


class Tracing:
    """Makes spans, with the names and attributes of the semantic conventions for messaging.

    Source:
        OpenTelemetry, Semantic conventions for messaging spans.
    """

    def __init__(self, trace: Any, propagate: Any) -> None:
        self._trace = trace
        self._propagate = propagate
        self._tracer = trace.get_tracer("chanflow")

    def _attributes(self, operation: str, topic: str, task_id: str) -> dict[str, str]:
        return {
            "messaging.system": "chanflow",
            "messaging.operation.name": operation,
            "messaging.operation.type": operation,
            "messaging.destination.name": topic,
            "messaging.message.id": task_id,
        }

    @contextmanager
    def submitting(self, topic: str, task_id: str) -> Iterator[dict[str, str]]:
        """Make a span of a submission, and give the headers that say so to the run."""
        attributes = self._attributes("send", topic, task_id)
        kind = self._trace.SpanKind.PRODUCER
        with self._tracer.start_as_current_span(f"send {topic}", kind=kind, attributes=attributes):
            headers: dict[str, str] = {}
            self._propagate.inject(headers)
            yield headers

    @contextmanager
    def running(self, topic: str, record: TaskRecord) -> Iterator[None]:
        """Make a span of an attempt; an error that goes through it is its own."""
        attributes: dict[str, Any] = self._attributes("process", topic, record.id)
        attributes["chanflow.task.attempt"] = record.attempts
        kind = self._trace.SpanKind.CONSUMER
        parent = self._propagate.extract(record.trace or {})
        with self._tracer.start_as_current_span(
            f"process {topic}", context=parent, kind=kind, attributes=attributes
        ) as span:
            try:
                yield
            except Exception as error:
                span.set_attribute("error.type", type(error).__name__)
                raise


def find_tracing() -> Tracing | None:
    """Make spans if the program uses OpenTelemetry; else nothing of it is imported."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import propagate, trace  # noqa: PLC0415 -- see above

    return Tracing(trace, propagate)

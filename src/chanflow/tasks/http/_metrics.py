"""Figures for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from chanflow.tasks._statistics import BOUNDS, Histogram, TaskStatistics
from chanflow.tasks.record import TaskStatus

__all__ = ["render"]


class Figures(Collector):
    """The figures of one moment."""

    def __init__(self, counts: Mapping[TaskStatus, int], figures: TaskStatistics) -> None:
        self._counts = counts
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        """Give them to the library."""
        handlers = self._figures.handlers
        tasks = GaugeMetricFamily("chanflow_tasks", "Tasks in the store.", labels=["status"])
        for status, number in self._counts.items():
            tasks.add_metric([status.value], number)
        yield tasks
        yield GaugeMetricFamily("chanflow_workers", "Tasks that may run here.", self._figures.workers)
        running = GaugeMetricFamily("chanflow_tasks_running", "Tasks that run here.", labels=["task"])
        submitted = CounterMetricFamily("chanflow_tasks_submitted", "Tasks accepted here.", labels=["task"])
        ended = CounterMetricFamily("chanflow_tasks_ended", "Tasks that ended here.", labels=["task", "status"])
        retried = CounterMetricFamily(
            "chanflow_tasks_retried", "Attempts here that failed, and were repeated.", labels=["task"]
        )
        waited = HistogramMetricFamily(
            "chanflow_task_wait_seconds", "From when a task could begin until it did.", labels=["task"]
        )
        ran = HistogramMetricFamily(
            "chanflow_task_run_seconds", "From the beginning of the last attempt to the end.", labels=["task"]
        )
        for name, each in handlers.items():
            running.add_metric([name], each.running)
            submitted.add_metric([name], each.submitted)
            retried.add_metric([name], each.retried)
            for status, number in each.ended.items():
                ended.add_metric([name, status.value], number)
            waited.add_metric([name], buckets(each.waited), each.waited.total)
            ran.add_metric([name], buckets(each.ran), each.ran.total)
        yield from (running, submitted, ended, retried, waited, ran)


def buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Give the intervals as the library takes them: each with all that are shorter."""
    return list(zip([*map(str, BOUNDS), "+Inf"], accumulate(histogram.counts), strict=True))


def render(counts: Mapping[TaskStatus, int], figures: TaskStatistics) -> bytes:
    """Give the figures in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(Figures(counts, figures))
    return generate_latest(registry)

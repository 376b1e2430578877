"""When a failed job is attempted again."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from attrs import evolve
from attrs.exceptions import FrozenInstanceError
from hypothesis import given
from hypothesis import strategies as st

from chanflow import Retry
from chanflow._check import show
from tests.support.messages import whole


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"attempts": 0}, ValueError("attempts must be >= 1, got 0")),
        ({"attempts": -1}, ValueError("attempts must be >= 1, got -1")),
        ({"attempts": True}, TypeError("attempts must be an int, got True")),
        ({"attempts": 1.5}, TypeError("attempts must be an int, got 1.5")),
        ({"attempts": math.inf}, TypeError("attempts must be an int, got inf")),
        ({"delay": -0.1}, ValueError("delay must be >= 0, got -0.1")),
        ({"delay": math.nan}, ValueError("delay must be >= 0, got nan")),
        ({"max_delay": -1}, ValueError("max_delay must be >= 0, got -1")),
        ({"max_delay": math.nan}, ValueError("max_delay must be >= 0, got nan")),
        ({"factor": 0.9}, ValueError("factor must be >= 1, got 0.9")),
        ({"factor": math.nan}, ValueError("factor must be >= 1, got nan")),
        ({"delay": "1"}, TypeError("delay must be a number, got '1'")),
        ({"delay": 10**400}, ValueError(f"delay must be a number that fits a float, got {show(10**400)}")),
        ({"on": "x"}, TypeError("on must be an error class, a tuple of them or a function that is not async, got 'x'")),
        (
            {"on": [OSError]},
            TypeError(f"on must be an error class, a tuple of them or a function that is not async, got {[OSError]!r}"),
        ),
        ({"jitter": -0.1}, ValueError("jitter must be from 0 to 1, got -0.1")),
        ({"jitter": 1.1}, ValueError("jitter must be from 0 to 1, got 1.1")),
        ({"jitter": math.nan}, ValueError("jitter must be from 0 to 1, got nan")),
    ],
    ids=str,
)
def test_arguments_are_checked(arguments: dict[str, Any], error: Exception) -> None:
    """Each error names the argument, the rule and the value."""
    with pytest.raises(type(error), match=whole(str(error))):
        Retry(**{"attempts": 3, **arguments})


def test_bounds_are_accepted() -> None:
    """The least and the most of each argument."""
    assert Retry(1, delay=0, factor=1, max_delay=0, jitter=0).backoff(1) == 0
    assert Retry(1, delay=1, factor=1, max_delay=math.inf, jitter=1).attempts == 1


def test_it_is_a_value() -> None:
    """Equal by what it says, and never changed."""
    retry = Retry(3, delay=1)
    assert retry == Retry(3, delay=1.0)
    assert evolve(retry, attempts=4) == Retry(4, delay=1)
    with pytest.raises(FrozenInstanceError):
        retry.attempts = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        Retry(3, 1)  # type: ignore[call-arg]


def test_backoff_grows_up_to_its_bound() -> None:
    """`delay * factor ** (n - 1)`, at most `max_delay`."""
    retry = Retry(10, delay=0.5, factor=3, max_delay=20, jitter=0)
    assert [retry.backoff(attempts) for attempts in range(1, 7)] == [0.5, 1.5, 4.5, 13.5, 20, 20]


def test_a_factor_of_one_is_a_constant_wait() -> None:
    """For ever."""
    retry = Retry(10, delay=2, factor=1, jitter=0)
    assert [retry.backoff(attempts) for attempts in (1, 2, 100, 10**6)] == [2, 2, 2, 2]


def test_defaults() -> None:
    """A tenth of a second, doubled, up to a minute, less up to a half; any Exception."""
    retry = Retry(3)
    assert (retry.delay, retry.factor, retry.max_delay, retry.jitter, retry.on) == (0.1, 2.0, 60.0, 0.5, Exception)


@pytest.mark.parametrize("factor", [2, 2.0, 1.5, 1.01, 1.001, 10.0, 1e200])
def test_regression_a_small_factor_reaches_the_bound_too(factor: float) -> None:
    """After enough attempts the wait is `max_delay`, however slowly it grows."""
    retry = Retry(10**6, delay=0.1, factor=factor, max_delay=60, jitter=0)
    assert retry.backoff(10**6) == 60


@given(
    attempts=st.integers(1, 10**6),
    delay=st.floats(0, 1e308),
    factor=st.floats(1, 1e308) | st.integers(1, 1000),
    max_delay=st.floats(0, 1e308),
    jitter=st.floats(0, 1),
)
def test_backoff_stays_within_its_bounds(
    attempts: int, delay: float, factor: float, max_delay: float, jitter: float
) -> None:
    """Never an overflow, never more than `max_delay`, never less than the share that is left of it."""
    retry = Retry(10**6, delay=delay, factor=factor, max_delay=max_delay, jitter=0)
    most = retry.backoff(attempts)
    assert min(delay, max_delay) <= most <= max_delay
    drawn = evolve(retry, jitter=jitter).backoff(attempts)
    assert most * (1 - jitter) * (1 - 1e-9) <= drawn <= most


@given(attempts=st.integers(1, 10**6), factor=st.floats(1, 100))
def test_backoff_never_shrinks(attempts: int, factor: float) -> None:
    """A later attempt waits no less."""
    retry = Retry(10**6, delay=0.1, factor=factor, jitter=0)
    assert retry.backoff(attempts) <= retry.backoff(attempts + 1)


def test_jitter_is_spread_over_its_share() -> None:
    """Full jitter goes from nothing to everything; none at all is exact."""
    for jitter in 0.5, 1.0:
        retry = Retry(3, delay=1, jitter=jitter)
        drawn = [retry.backoff(1) for _ in range(1000)]
        assert 1 - jitter <= min(drawn) < 1 - 0.9 * jitter
        assert 1 - 0.1 * jitter < max(drawn) <= 1


def test_a_seeded_program_stays_reproducible() -> None:
    """Backoff draws from a generator of its own."""
    random.seed(1)
    expected = random.random()
    random.seed(1)
    Retry(3).backoff(1)
    assert random.random() == expected


class SpecialError(ValueError):
    pass


@pytest.mark.parametrize(
    ("on", "wanted"),
    [
        (Exception, [True, True, True]),
        (ValueError, [True, False, True]),
        ((KeyError, SpecialError), [False, True, True]),
        ((), [False, False, False]),
        (lambda error: "again" in str(error), [True, False, False]),
    ],
)
def test_which_errors_are_worth_another_attempt(on: Any, wanted: list[bool]) -> None:
    """A class with its subclasses, a tuple of them, or a function."""
    retry = Retry(3, on=on)
    errors = [ValueError("again"), KeyError("k"), SpecialError("s")]
    assert [retry.wants(error, 1) for error in errors] == wanted
    assert [retry.wants(error, 2) for error in errors] == wanted
    assert [retry.wants(error, 3) for error in errors] == [False] * 3


def test_the_function_is_not_asked_after_the_last_attempt() -> None:
    """There is nothing left to decide."""
    asked = []
    retry = Retry(2, on=lambda error: not asked.append(error))
    error = ValueError()
    assert retry.wants(error, 1)
    assert not retry.wants(error, 2)
    assert asked == [error]


def test_an_error_of_the_function_is_passed_on() -> None:
    """Whoever asks decides what it means."""

    def predicate(error: Exception) -> bool:
        raise KeyError from error

    with pytest.raises(KeyError):
        Retry(2, on=predicate).wants(ValueError(), 1)

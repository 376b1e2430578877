"""What becomes of the jobs of a worker group that failed for good."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from anyio import WouldBlock, wait_all_tasks_blocked

from chanflow import Channel, DeadLetter, ResultCancelledError, Retry, WorkerGroup
from tests.support.channels import assert_at_rest
from tests.support.messages import whole
from tests.support.worker_groups import assert_nothing_left, echo, fail

pytestmark = pytest.mark.anyio


async def test_what_failed_for_good_goes_to_the_dead_letters() -> None:
    """With the error and the number of attempts; and only that."""
    letters = Channel[DeadLetter[Any]](10)
    error = ValueError("bad")

    async def handle(job: Any) -> Any:
        if isinstance(job, Exception):
            raise job
        return job

    async with WorkerGroup(handle, retry=Retry(3, delay=0), dead_letters=letters) as group:
        failing, good = group.submit_nowait(error), group.submit_nowait(1)
        with pytest.raises(ValueError, match=whole("bad")):
            await failing
        assert await good == 1
    letter = letters.receive_nowait()
    assert letter == DeadLetter(error, error, 3)
    assert (letter.job, letter.error, letter.attempts) == (error, error, 3)
    with pytest.raises(WouldBlock):
        letters.receive_nowait()
    assert_nothing_left(group)
    assert_at_rest(letters)


async def test_dead_letters_press_back() -> None:
    """A worker waits until its letter is taken; through a sending end as well."""
    letters = Channel[DeadLetter[Any]](0)
    async with WorkerGroup(fail, workers=1, dead_letters=letters.sender) as group, letters.sender:
        results = [group.submit_nowait(ValueError(number)) for number in range(2)]
        await wait_all_tasks_blocked()
        assert group.statistics()[:3] == (1, 1, 1)
        for number in range(2):
            assert str((await letters.receive()).error) == str(number)
        for result in results:
            await wait_all_tasks_blocked()
            assert isinstance(result.exception(), ValueError)
    letters.close()
    assert_nothing_left(group)


@pytest.mark.parametrize("closing", ["sender", "receiver", "before"])
async def test_letters_that_can_not_be_sent_are_logged(closing: str, caplog: pytest.LogCaptureFixture) -> None:
    """The job fails as it would have, and the group goes on."""
    letters = Channel[DeadLetter[Any]](0)
    if closing == "before":
        letters.close()
    error = ValueError("bad")
    async with WorkerGroup(fail, workers=1, dead_letters=letters) as group:
        result = group.submit_nowait(error)
        await wait_all_tasks_blocked()
        if closing == "sender":
            letters.close()
        elif closing == "receiver":
            letters.receiver.close()
        with pytest.raises(ValueError, match=whole("bad")):
            await result
    why = f"channel at {id(letters._state):#x} {'has no receiver left' if closing == 'receiver' else 'is closed'}"
    [record] = [record for record in caplog.records if record.name == "chanflow"]
    assert record.getMessage() == f"job {error!r} could not be sent to the dead letters: {why}"
    assert record.levelno == logging.WARNING
    assert group.statistics().failed == 1
    assert_nothing_left(group)


async def test_stopping_while_a_letter_waits_leaves_the_job_over() -> None:
    """It is not lost unseen."""
    letters = Channel[DeadLetter[Any]](0)
    job = ValueError("bad")
    async with WorkerGroup(fail, dead_letters=letters) as group:
        result = group.submit_nowait(job)
        assert await group.shutdown(5) == [job]
        with pytest.raises(ResultCancelledError):
            await result
    assert_nothing_left(group)
    assert_at_rest(letters)


async def test_a_receiving_end_is_no_dead_letter_channel() -> None:
    """Letters are sent."""
    receiver = Channel[Any]().receiver
    message = f"dead_letters must be a Channel, SendChannel or None, got {receiver!r}"
    with pytest.raises(TypeError, match=whole(message)):
        WorkerGroup(echo, dead_letters=receiver)  # type: ignore[call-overload]
    receiver.close()

"""The tests. Whatever two of their modules share is in `tests.support`, or, where it is a fixture, in `conftest.py`."""

import pytest

# So that a helper that asserts says what it compared, as a test does.
pytest.register_assert_rewrite("tests.support")

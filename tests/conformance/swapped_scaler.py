"""A pytest plugin: fastbn's StandardScaler in the place of scikit-learn's, in its own tests.

Those that have to do with it run, and what came of each is written to the file REPORT names.
"""

from __future__ import annotations

import json
import os
import types
from collections.abc import Iterator
from typing import Any

import pytest
import sklearn.preprocessing
from sklearn.base import BaseEstimator

import fastbn.sklearn

THEIRS = sklearn.preprocessing.StandardScaler
outcomes: dict[str, list[str]] = {}


def pytest_configure() -> None:
    """Before the modules of the tests import it."""
    assert fastbn.sklearn.StandardScaler.__base__ is THEIRS
    sklearn.preprocessing.StandardScaler = fastbn.sklearn.StandardScaler


def pytest_collection_modifyitems(config: Any, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if concerned(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def concerned(item: Any) -> bool:
    names = set(names_in(item.function.__code__))
    given = getattr(item, "callspec", None)
    parts = [] if given is None else list(parts_of(list(given.params.values())))
    return "StandardScaler" in names or any(
        isinstance(part, THEIRS) or (isinstance(part, type) and issubclass(part, THEIRS))
        for part in parts
    )


def names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def parts_of(value: Any) -> Iterator[Any]:
    """What is in lists, tuples and estimators."""
    yield value
    inner: list[Any] = []
    if isinstance(value, (list, tuple)):
        inner = list(value)
    elif isinstance(value, BaseEstimator):
        inner = list(vars(value).values())
    for part in inner:
        yield from parts_of(part)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Iterator[None]:
    report = (yield).get_result()  # type: ignore[misc]
    if report.when == "call" or report.outcome != "passed":
        error = call.excinfo
        said = "" if error is None else f"{error.typename}: {error.value}"
        outcomes[item.name] = [item.module.__name__, report.outcome, said]


def pytest_sessionfinish() -> None:
    with open(os.environ["REPORT"], "w", encoding="utf-8") as file:
        json.dump(outcomes, file)

"""The examples of docstrings and of the README do what they say."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import numpy as np
import pytest

import fastbn

README = Path(__file__).parents[1] / "README.md"
PUBLIC = [name for name in fastbn.__all__ if callable(getattr(fastbn, name))]
# What they print or return is the machine's affair.
WITHOUT_EXAMPLE = {"get_num_threads", "show_config"}
TORCH_LAYERS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")


def run(test):
    assert test.examples
    report = []
    runner = doctest.DocTestRunner(verbose=False)
    with np.printoptions(precision=8, linewidth=75):
        runner.run(test, out=report.append, clear_globs=False)
    assert runner.failures == 0, "".join(report)
    return runner.tries


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.DocTestFinder(exclude_empty=True).find(
        getattr(fastbn, name), name, globs={"__name__": "__main__"}
    )
    assert getattr(fastbn, name).__doc__
    tests = [test for test in found if test.examples]
    assert tests or name in WITHOUT_EXAMPLE, f"{name} has no example"
    for test in tests:
        run(test)


@pytest.mark.parametrize("name", ["moments", "normalize", "denormalize"])
def test_docstrings_of_dask(name):
    pytest.importorskip("dask.array", reason="needs the extra fastbn[dask]")
    import fastbn.dask

    function = getattr(fastbn.dask, name)
    for test in doctest.DocTestFinder().find(function, name, globs={"__name__": "__main__"}):
        run(test)


@pytest.mark.parametrize("name", ["batch_norm", "convert", "SyncBatchNorm", *TORCH_LAYERS])
def test_docstrings_of_torch(name):
    torch = pytest.importorskip("torch", reason="needs the extra fastbn[torch]")
    if name == "SyncBatchNorm" and not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    import fastbn.torch

    finder = doctest.DocTestFinder(exclude_empty=True)
    found = finder.find(getattr(fastbn.torch, name), name, globs={"__name__": "__main__"})
    tests = [test for test in found if test.examples]
    assert tests
    for test in tests:
        run(test)


def test_docstrings_of_sklearn():
    pytest.importorskip("sklearn", reason="needs the extra fastbn[sklearn]")
    from fastbn.sklearn import StandardScaler

    found = doctest.DocTestFinder(exclude_empty=True).find(
        StandardScaler, "StandardScaler", globs={"__name__": "__main__"}
    )
    tests = {test.name: test for test in found if test.examples}
    assert set(tests) == {"StandardScaler", "StandardScaler.merge"}
    for test in tests.values():
        run(test)
    for name in ("partial_fit", "fit_transform", "transform", "inverse_transform", "merge"):
        assert vars(StandardScaler)[name].__doc__


def blocks(text):
    found = re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(m[1], text.count("\n", 0, m.start(1))) for m in found if ">>>" in m[1]]


# And what they need beside NumPy.
PAGES = {
    "README.md": (),
    "docs/statistics.md": (),
    "docs/extremes.md": (),
    "docs/arrays.md": ("pandas", "polars", "pyarrow"),
    "docs/dask.md": ("dask.array",),
    "docs/torch.md": ("torch",),
    "docs/sklearn.md": ("sklearn", "pandas"),
}


@pytest.mark.parametrize("name", PAGES)
def test_pages(name, tmp_path, monkeypatch):
    """The blocks of one are a session, from top to bottom."""
    for library in PAGES[name]:
        pytest.importorskip(library, reason="needs the extra fastbn[test]")
    page = README.parent / name
    monkeypatch.chdir(tmp_path)
    found = blocks(page.read_text(encoding="utf-8"))
    assert found
    session = {"__name__": "__main__"}
    for text, line in found:
        test = doctest.DocTestParser().get_doctest(text, session, page.name, str(page), line)
        assert run(test) == text.count(">>> ")
        session = test.globs


def test_a_wrong_example_is_noticed():
    [(text, line)] = blocks("Text\n\n```python\n>>> 1 + 1\n3\n```\n\n```python\nx\n```\n")
    assert line == 3
    test = doctest.DocTestParser().get_doctest(text, {}, "text", None, line)
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2\s"):
        run(test)

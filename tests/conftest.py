"""Which fastbn is tested: the reference, and the kernels of every instruction set here."""

from __future__ import annotations

import hypothesis
import pytest

# How many cases property tests draw, in percent. The first two draw the same ones in every run;
# `pytest --slow --hypothesis-profile=search --hypothesis-seed=1` draws others.
SAME = {"deadline": None, "database": None, "derandomize": True}
SAME["suppress_health_check"] = [hypothesis.HealthCheck.too_slow]  # as any is on a busy machine
hypothesis.settings.register_profile("quick", max_examples=100, **SAME)
hypothesis.settings.register_profile("slow", max_examples=2000, **SAME)
OTHERS = {**SAME, "derandomize": False, "print_blob": True}
hypothesis.settings.register_profile("search", max_examples=2000, **OTHERS)


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hypothesis-profile", None):
        hypothesis.settings.load_profile("slow" if config.getoption("--slow") else "quick")
    try:
        import fastbn  # noqa: F401
    except ImportError as error:
        raise pytest.UsageError(f"the tests need fastbn with its kernels: {error}") from None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes, and say so: pytest counts them as deselected."""
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_report_header(config: pytest.Config) -> str:
    from fastbn import _runtime

    return "fastbn: " + ", ".join(f"{k} {v}" for k, v in _runtime.config().items())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    import strategies

    if strategies.tried:
        cases, tests = sum(strategies.tried.values()), len(strategies.tried)
        terminalreporter.write_line(f"property tests: {cases} cases in {tests} tests")


@pytest.hookimpl(trylast=True)  # so that they vary fastest, and a test's data can be kept
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    from fastbn import _runtime

    available = _runtime.instruction_sets()
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", ["reference", *available], indirect=True)
    if "simd" in metafunc.fixturenames:
        metafunc.parametrize("simd", available, indirect=True)


def _on(name, monkeypatch):
    import fastbn
    from fastbn import _runtime

    monkeypatch.setattr(_runtime, "kernels", _runtime.load_kernels(name))
    assert _runtime.kernels.simd == name  # what the compiler made, not what was asked for
    return fastbn


@pytest.fixture
def simd(request, monkeypatch):
    """The package, on one instruction set."""
    return _on(request.param, monkeypatch)


@pytest.fixture
def implementation(request, monkeypatch):
    """The functions: the reference's, or the package's on one instruction set."""
    import fastbn.reference

    if request.param == "reference":
        return fastbn.reference
    return _on(request.param, monkeypatch)


@pytest.fixture(autouse=True)
def _threads_as_they_were(monkeypatch):
    from fastbn import _runtime

    monkeypatch.setattr(_runtime, "_threads", _runtime._threads)

"""The faults that ``tests/attacks/mutate.py`` plants are still where its tables say."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest
from attacks import faults

FAULTS = faults.read()


@pytest.mark.skipif(
    not (faults.ROOT / "fastbn").exists(), reason="an installed fastbn has no kernels' sources"
)
def test_every_fault_can_be_planted():
    texts = {f.path: (faults.ROOT / f.path).read_text(encoding="utf-8") for f in FAULTS}
    for fault in FAULTS:
        changed = fault.planted(texts[fault.path])  # which finds its place
        assert changed != texts[fault.path], fault.name
        if not fault.build:
            ast.parse(changed, fault.name)


def test_there_are_enough_of_every_kind():
    """60, and 40 of them in kernels: what is asked for; there are several times as many."""
    assert len(FAULTS) >= 60
    assert sum(bool(f.build) for f in FAULTS) >= 40
    assert {f.kind for f in FAULTS} == set(faults.KINDS)


def test_names_are_different_and_tests_are_there():
    assert max(Counter(f.name for f in FAULTS).values()) == 1
    for fault in FAULTS:
        for test in fault.tests:
            name, _, function = test.partition("::")
            text = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
            assert f"\ndef {function}" in text, (fault.name, test)


def test_a_fault_that_is_not_there_or_there_twice_is_found_out():
    fault = faults.parse("a fault\nrunning.py, sign: test_running\n- a + b\n+ a - b")
    assert fault.planted("x = a + b\n") == "x = a - b\n"
    for text in ("x = a+b\n", "x = a + b\ny = a + b\n"):
        with pytest.raises(ValueError, match=r"^a fault: expected 1 of this in running\.py"):
            fault.planted(text)
    second = faults.parse("a fault\nrunning.py, sign 2/3: test_running\n- a\n- b\n+ c")
    assert second.planted("a\nb a\nb a\nb") == "a\nb c a\nb"
    with pytest.raises(ValueError, match="not a fault"):
        faults.parse("a fault\nrunning.py, sign: test_running\n* a\n+ b")

"""The session in docs/files.md prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastbn.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "files.md"


def block(kind):
    text = PAGE.read_text("utf-8")
    [found] = re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return found


def test_the_session(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pyarrow", reason="needs the extra fastbn[files]")
    pytest.importorskip("sklearn", reason="needs the extra fastbn[demo]")
    monkeypatch.chdir(tmp_path)
    exec(block("python"), {})
    session, code = "", 0
    for command in re.findall(r"^\$ (.*)", block("console"), re.MULTILINE):
        if command == "echo $?":
            printed = f"{code}\n"
        else:
            code = main(command.split()[1:])
            out, err = capsys.readouterr()
            printed = err + out
        session += f"$ {command}\n{printed}"
    assert session == block("console")
    assert session.count("$ fastbn") == 5

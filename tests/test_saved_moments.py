"""`Moments` in files: whole or not at all, and no other file is taken for one."""

from __future__ import annotations

import os
import pickle
import stat
import sys
import threading

import numpy as np
import pytest
from helpers import make

import fastbn
from fastbn import Moments

NAMES = ("size", "größe", "a b")
A = Moments([4, 1, 0], [1.5, -2.0, np.nan], [5.0, 0.0, 0.0])


def test_save_and_load(tmp_path):
    x = make("offset 0", (9, 300), 1, np.float32)
    for m in (A, fastbn.moments(x), fastbn.moments(x[:, :0])):
        for path in (tmp_path / "a.npz", str(tmp_path / "no ending")):
            m.save(path)
            assert Moments.load(path) == m  # and the second time it is written over
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "no ending"]
    with pytest.raises(FileNotFoundError):
        Moments.load(tmp_path / "none")


def test_names_in_files(tmp_path):
    path = os.fsencode(tmp_path / "m")  # a path of bytes is one as well
    for names in (NAMES, ("", "b", "c"), None):
        A.named(names).save(path)
        again = Moments.load(path)
        assert (again, again.names) == (A, names)
    Moments.empty(0, ()).save(path)
    assert Moments.load(path).names == ()
    A.named(NAMES).save(path)
    with np.load(tmp_path / "m", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["count", "m2", "mean", "mean_low", "names"]
        assert arrays["names"].tolist() == list(NAMES)
    with (tmp_path / "m").open("wb") as file:  # written before there were names
        np.savez(file, count=A.count, mean=A.mean, m2=A.m2)
    assert Moments.load(path) == A


def test_paths_are_checked(tmp_path):
    with (tmp_path / "m").open("wb") as file:
        for path in (None, 1, file):
            for call in (A.save, Moments.load):
                with pytest.raises(TypeError, match=r"^path: expected a path, got "):
                    call(path)


@pytest.mark.skipif(sys.platform == "win32", reason="modes and links are those of POSIX")
def test_a_saved_file_is_like_one_from_open(tmp_path):
    before = os.umask(0o027)
    try:
        A.save(tmp_path / "m")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o640
    (tmp_path / "m").chmod(0o600)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to("../m")
    (A + A).save(tmp_path / "elsewhere" / "link")
    assert Moments.load(tmp_path / "m") == A + A
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o600
    assert (tmp_path / "elsewhere" / "link").is_symlink()
    (tmp_path / "long").mkdir()
    A.save(tmp_path / "long" / ("n" * 255))  # as long as a name can be
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()), daemon=True)
    reader.start()
    A.save(pipe)
    reader.join(10)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "received").write_bytes(received[0])
    assert Moments.load(tmp_path / "received") == A


def test_a_file_cut_off_anywhere(tmp_path):
    path = tmp_path / "m"
    A.named(NAMES).save(path)
    content = path.read_bytes()
    for n in range(0, len(content), 17):
        path.write_bytes(content[:n])
        with pytest.raises(ValueError, match=r"^path: .* holds no Moments"):
            Moments.load(path)


def test_a_file_with_any_byte_changed(tmp_path):
    """Either what was saved, or a ValueError: never other numbers, never another error."""
    path = tmp_path / "m"
    A.save(path)
    content = path.read_bytes()
    others = {}
    for n in range(len(content)):
        for flip in (0x01, 0x80):
            path.write_bytes(content[:n] + bytes([content[n] ^ flip]) + content[n + 1 :])
            try:
                assert Moments.load(path) == A
            except ValueError:
                pass
            except Exception as error:
                others.setdefault(f"{type(error).__name__}: {error}", n)
    assert not others


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "no .npz file"),
        ("text", "no .npz file"),
        ("pickle", "no .npz file"),
        ("npy", "no .npz file"),
        ("zip", "'count' is missing"),
        ("npz", "'count' is missing"),
        ("object", "Object arrays cannot be loaded"),
        ("negative", "m2: expected numbers >= 0"),
        ("nan", "count: expected finite numbers"),
        ("shapes", r"m2: expected shape \(2,\)"),
        ("few names", "names: expected 2 names, got 1"),
        ("numbers", "names: expected strings, got "),
    ],
)
def test_foreign_files(kind, message, tmp_path):
    path = tmp_path / "file.npz"
    if kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind in ("empty", "text", "pickle"):
        path.write_bytes({"empty": b"", "text": b"mean 3", "pickle": pickle.dumps({})}[kind])
    elif kind == "zip":
        np.savez(path)
    else:
        count, mean, m2 = np.ones(2), np.ones(2), np.ones(2)
        arrays = {
            "npz": {"mean": mean, "var": m2},
            "object": {"count": count, "mean": np.array([{}, 1], object), "m2": m2},
            "negative": {"count": count, "mean": mean, "m2": -m2},
            "nan": {"count": count * np.nan, "mean": mean, "m2": m2},
            "shapes": {"count": count, "mean": mean, "m2": m2[:1]},
            "few names": {"count": count, "mean": mean, "m2": m2, "names": np.array(["a"])},
            "numbers": {"count": count, "mean": mean, "m2": m2, "names": np.ones(2)},
        }[kind]
        np.savez(path, **arrays)
    with pytest.raises(ValueError, match=rf"^path: .*file\.npz holds no Moments: .*{message}"):
        Moments.load(path)


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "m"
    A.save(path)

    def full(file, **arrays):
        file.write(b"half of")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    for target in (path, tmp_path / "new"):
        with pytest.raises(OSError, match="no space"):
            (A + A).save(target)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["m"]
    assert Moments.load(path) == A
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        A.save(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["folder", "m"]


def test_threads_that_save_to_one_file(tmp_path):
    """The file is whole at any time, and whoever came last has written it."""
    path, errors = tmp_path / "m", []

    def save(m):
        try:
            for _ in range(50):
                m.save(path)
                assert Moments.load(path).mean.size == 3
        except BaseException as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=save, args=[m]) for m in (A, A + A, A + A + A)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert os.listdir(tmp_path) == ["m"]

"""What an environment makes of fastbn: each import in a Python of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import run_python

import fastbn
from fastbn import _runtime

AVAILABLE = _runtime.instruction_sets()
PACKAGE = Path(fastbn.__file__).parent


def output(code, **environment):
    result = run_python(code, "-W", "error", **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def last_line(code, **environment):
    """What an import that must fail says."""
    result = run_python(code, "-W", "error", **environment)
    assert result.returncode != 0, result.stdout
    return result.stderr.splitlines()[-1]


# --- Instruction sets -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*AVAILABLE, ""])
def test_an_instruction_set_by_name(name):
    """Only its kernels are loaded: others may hold instructions that the CPU does not have."""
    code = """
import sys, fastbn
from fastbn import _runtime
print(_runtime.kernels.simd)
print(*sorted(m for m in sys.modules if m.startswith("fastbn.kernels._")))
print(fastbn.moments([1.0, 2.0, 4.5]).mean[0])
fastbn.show_config()
"""
    simd, modules, mean, *config = output(code, FASTBN_ISA=name)
    expected = name or AVAILABLE[0]
    assert simd == expected
    assert set(modules.split()) == {"fastbn.kernels._cpu", f"fastbn.kernels._{expected}"}
    assert mean == "2.5"
    assert f"instruction set  {expected} (of {', '.join(AVAILABLE)})" in config


def test_this_process_runs_what_its_environment_chose():
    """`FASTBN_ISA=generic pytest` tests the generic kernels, wherever a test names none."""
    chosen = os.environ.get("FASTBN_ISA") or AVAILABLE[0]
    assert _runtime.kernels.simd == chosen
    assert _runtime.kernels.__name__ == f"fastbn.kernels._{chosen}"
    assert _runtime.config()["instruction set"] == f"{chosen} (of {', '.join(AVAILABLE)})"


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx2,generic", "_cpu", "../x"])
def test_an_instruction_set_that_is_not_there(name):
    expected = f"expected one of {', '.join(AVAILABLE)} on this machine"
    message = last_line("import fastbn", FASTBN_ISA=name)
    assert message == f"ValueError: FASTBN_ISA={name!r}: {expected}"


def test_an_instruction_set_that_this_build_lacks(monkeypatch):
    """What the CPU can do and the compiler could not is left out."""
    real = _runtime.importlib.util.find_spec
    best = AVAILABLE[0]

    def find_spec(name):
        return None if name.endswith(f"_{best}") else real(name)

    monkeypatch.setattr(_runtime.importlib.util, "find_spec", find_spec)
    assert _runtime.instruction_sets() == AVAILABLE[1:]


def test_every_operation_calls_the_kernels_in_use(monkeypatch):
    real, called = _runtime.kernels, []

    def kernel(name):
        def record(*arguments):
            called.append((name, any(type(a) is int and a == 3 for a in arguments)))
            return getattr(real, name)(*arguments)

        return record

    names = ("moments", "forward", "normalize", "backward")
    stub = types.SimpleNamespace(**{name: kernel(name) for name in names})
    x = np.ones((4, 2))
    m = fastbn.moments(x)
    monkeypatch.setattr(_runtime, "kernels", stub)
    with fastbn.num_threads(3):
        fastbn.moments(x)
        fastbn.batch_norm(x)
        fastbn.normalize(x, m)
        fastbn.batch_norm_backward(x, x, m)
        fastbn.denormalize(x, m)
    assert called == [(name, True) for name in (*names, "normalize")]


# --- Threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"FASTBN_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": " 4, 2,1"}, 4),
        ({"FASTBN_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, 3),
        ({"FASTBN_NUM_THREADS": "", "OMP_NUM_THREADS": ""}, None),
    ],
)
def test_threads_from_the_environment(environment, expected):
    code = "import fastbn; print(fastbn.get_num_threads()); fastbn.show_config()"
    threads, *config = output(code, **environment)
    usable = _runtime.usable_cpus()
    assert int(threads) == (expected or usable)
    assert f"threads          {threads} (of {usable} usable CPUs)" in config
    assert f"fastbn           {fastbn.__version__}" in config
    assert f"NumPy            {np.__version__}" in config


@pytest.mark.parametrize("name", ["FASTBN_NUM_THREADS", "OMP_NUM_THREADS"])
@pytest.mark.parametrize("value", ["0", "-2", "two", "2.5"])
def test_bad_threads_in_the_environment(name, value):
    message = f"ValueError: {name}={value!r}: expected a positive integer"
    assert last_line("import fastbn", **{name: value}) == message


@pytest.mark.parametrize("limit", [{"OMP_THREAD_LIMIT": "3"}, {"OMP_DYNAMIC": "true"}])
def test_fewer_threads_than_asked_for(limit):
    """OpenMP may give fewer than fastbn asks for."""
    code = """
import hashlib
import numpy as np
import fastbn

x = np.random.default_rng(0).standard_normal((1301, 257), np.float32)
y, m = fastbn.batch_norm(x)
results = y, m.mean, m.m2, *fastbn.batch_norm_backward(x, x, m)
print(hashlib.sha256(b"".join(a.tobytes() for a in results)).hexdigest())
"""
    expected = output(code, FASTBN_NUM_THREADS="1")
    assert output(code, FASTBN_NUM_THREADS="8", **limit) == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a system without CPU affinity")
def test_threads_respect_affinity():
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import fastbn
print(fastbn.get_num_threads())
"""
    assert output(code) == ["1"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu.max": "250000 100000"}, 3),  # two and a half
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "9900000 100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({"cpu.max": "nonsense"}, 64),
        ({"cpu/cpu.cfs_quota_us": "400000"}, 64),
    ],
)
def test_threads_respect_the_control_group(files, expected, tmp_path, monkeypatch):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")

    def open_there(path):
        return open(str(path).replace("/sys/fs/cgroup", str(tmp_path)))

    monkeypatch.setattr(_runtime, "open", open_there, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    assert _runtime.usable_cpus() == expected


# --- Memory ---------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's peak of memory in use")
def test_scratch_memory_is_freed():
    """After calls that are made, and after those that are refused late."""
    code = """
import contextlib, resource
import numpy as np
import fastbn

x = np.ones((2, 500000), np.float32)
gamma = np.ones(500000, np.float32)
out, m = np.empty_like(x), fastbn.moments(x)

def once():
    fastbn.moments(x)
    fastbn.batch_norm(x, gamma, out=out)
    fastbn.normalize(x, m, gamma, gamma, out=out)
    fastbn.batch_norm_backward(x, x, m, gamma, out=out)
    for call in (
        lambda: fastbn.batch_norm(x, gamma, gamma[1:]),
        lambda: fastbn.batch_norm(x, gamma, out=out[1:]),
        lambda: fastbn.normalize(x, (gamma, -gamma), gamma),
        lambda: fastbn.batch_norm_backward(None, x, m, gamma),
        lambda: fastbn.batch_norm_backward(x, x, m, gamma, residual=x[1:]),
    ):
        with contextlib.suppress(ValueError, TypeError):
            call()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

once()
before = peak()
for _ in range(20):
    once()
print(peak() - before)
"""
    [grown] = output(code)
    assert int(grown) < 60  # MB; a call uses some 30 for scratch memory


# --- Imports --------------------------------------------------------------------------------------


def test_numpy_alone_is_imported():
    code = """
import sys
import numpy
before = set(sys.modules)
import fastbn
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - set(sys.stdlib_module_names)))
print(*sorted({"sklearn", "matplotlib", "torch", "tqdm", "scipy"} & set(sys.modules)))
"""
    ours, others = output(code)
    # Modules that Cython compiled share some between them.
    assert [name for name in ours.split() if "cython" not in name] == ["fastbn"]
    assert not others


def uncompiled(folder):
    """The package as a source tree that was never built."""
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "*.c", "__pycache__")
    shutil.copytree(PACKAGE, folder / "fastbn", ignore=ignored)
    return folder


def test_an_uncompiled_source_tree_says_so(tmp_path):
    message = last_line("import fastbn", PYTHONPATH=str(uncompiled(tmp_path)))
    assert message.startswith("ImportError: fastbn's compiled kernels are not in ")
    assert str(tmp_path / "fastbn") in message
    assert "pip install -e ." in message


def test_the_tests_refuse_an_uncompiled_source_tree(tmp_path):
    tree = uncompiled(tmp_path)
    tests = tree / "tests"
    tests.mkdir()
    shutil.copy(Path(__file__).parent / "conftest.py", tests)
    (tests / "test_nothing.py").write_text("def test_nothing(): pass\n")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tree, "tests"],
        cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == pytest.ExitCode.USAGE_ERROR, result
    assert "the tests need fastbn with its kernels: fastbn's compiled" in result.stderr
    assert "passed" not in result.stdout


def test_public_names():
    assert sorted(fastbn.__all__) == fastbn.__all__
    assert all(hasattr(fastbn, name) for name in fastbn.__all__)
    assert {"BatchNorm", "Moments", "RunningMoments", "moments", "normalize", "batch_norm",
            "batch_norm_backward", "denormalize", "set_num_threads", "get_num_threads",
            "num_threads", "show_config"} <= set(fastbn.__all__)  # fmt: skip

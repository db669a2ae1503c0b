"""Plant faults in the kernels for AVX-512, and see that the test suite catches each.

One build holds all of them: every line below is compiled as `fault == n ? wrong : right`, and the
environment variable FASTBN_FAULT picks one for a process. It is the emulated build of
emulate_avx512.py, so any CPU with AVX2 will do; on one with AVX-512 `--native` emulates nothing.
A fault that no test notices is a failure.

    python tests/attacks/avx512_faults.py
    python tests/attacks/avx512_faults.py --native
    python tests/attacks/avx512_faults.py --folder /tmp/faults --only 3 17
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import emulate_avx512

# (the line's function, what is right, what is planted): expressions of one type.
ZERO, ZEROS = "_mm512_setzero_ps()", "_mm512_setzero_pd()"
FAULTS = [
    ("define F16_FIRST", "((__mmask16)((1u << (k)) - 1))", "((__mmask16)((2u << (k)) - 1))"),
    ("define F16_FIRST", "((__mmask16)((1u << (k)) - 1))", "((__mmask16)((1u << (k)) / 2))"),
    ("define D8_FIRST", "((__mmask8)((1u << (k)) - 1))", "((__mmask8)((2u << (k)) - 1))"),
    ("define D8_FIRST", "((__mmask8)((1u << (k)) - 1))", "((__mmask8)(((1u << (k)) - 1) >> 1))"),
    ("f16 f16_load_part", "F16_FIRST(k)", "0xffff"),
    ("d8 d8_load_part", "D8_FIRST(k)", "0xff"),
    ("void f16_store_part", "F16_FIRST(k)", "0xffff"),
    ("void f16_store_part", "F16_FIRST(k)", "F16_FIRST(k) & 0x7fff & ~(1 << 8)"),
    ("void d8_store_part", "D8_FIRST(k)", "0xff"),
    ("d8 d8_widen_part", "D8_FIRST(k)", "0xff"),
    ("d8 d8_widen_part", "D8_FIRST(k)", "D8_FIRST(k) & 0x0f"),
    ("void d8_narrow", "D8_FIRST(k)", "0xff"),
    ("void d8_narrow", "D8_FIRST(k)", "D8_FIRST(k) & 0x7f"),
    ("void f16_stream", "_mm512_stream_ps(p, a)", f"_mm512_stream_ps(p, {ZERO})"),
    ("void d8_stream", "_mm512_stream_pd(p, a)", f"_mm512_stream_pd(p, {ZEROS})"),
    ("d8 f16_low", "_mm512_castps512_ps256(a)", "_mm512_extractf32x8_ps(a, 1)"),
    ("d8 f16_high", "_mm512_extractf32x8_ps(a, 1)", "_mm512_extractf32x8_ps(a, 0)"),
    ("f16 f16_sub", "_mm512_sub_ps(a, b)", "_mm512_sub_ps(b, a)"),
    ("d8 d8_sub", "_mm512_sub_pd(a, b)", "_mm512_sub_pd(b, a)"),
    ("f16 f16_fma", "_mm512_fmadd_ps(a, b, c)", "_mm512_add_ps(_mm512_mul_ps(a, b), c)"),
    ("d8 d8_fma", "_mm512_fmadd_pd(a, b, c)", "_mm512_add_pd(_mm512_mul_pd(a, b), c)"),
    ("d8 d8_less", "_mm512_fmsub_pd(a, one, p)", "_mm512_fmsub_pd(p, one, a)"),
    ("d8 d8_div", "_mm512_div_pd(a, b)", "_mm512_div_pd(b, a)"),
    ("d8 d8_sqrt", "_mm512_sqrt_pd(a)", "a"),
    ("f16 f16_relu", f"_mm512_max_ps({ZERO}, a)", f"_mm512_max_ps(a, {ZERO})"),
    ("d8 d8_relu", f"_mm512_max_pd({ZEROS}, a)", f"_mm512_max_pd(a, {ZEROS})"),
    ("f16 f16_where_positive", "_CMP_NLE_UQ", "_CMP_GT_OQ"),
    ("f16 f16_where_positive", "_CMP_NLE_UQ", "_CMP_NLT_UQ"),
    ("d8 d8_where_positive", "_CMP_NLE_UQ", "_CMP_GT_OQ"),
    ("d8 d8_where_positive", "_CMP_NLE_UQ", "_CMP_NLT_UQ"),
    ("d8 d8_keep", "D8_FIRST(k)", "0xff"),
    ("d8 d8_finite_or_zero", "_CMP_EQ_OQ", "_CMP_UNORD_Q"),
    ("int d8_any_less", "_CMP_LT_OQ", "_CMP_GT_OQ"),
    ("f16 f16_where(", "_CMP_NEQ_UQ", "_CMP_EQ_OQ"),
    ("d8 d8_where(", "_CMP_NEQ_UQ", "_CMP_EQ_OQ"),
    ("f16 f16_where_number", "_CMP_ORD_Q", "_CMP_UNORD_Q"),
    ("d8 d8_where_number", "_CMP_ORD_Q", "_CMP_UNORD_Q"),
    ("d8 d8_where_bytes", "_mm_test_epi8_mask(v, v)", "(_mm_test_epi8_mask(v, v) & 0x0f)"),
    ("int d8_numbers", "_CMP_ORD_Q", "_CMP_UNORD_Q"),
    ("f16 f16_flags", "_mm_test_epi8_mask(v, v)", "(_mm_test_epi8_mask(v, v) & 0x00ff)"),
    ("f16 f16_flags", "F16_FIRST(k)", "0xffff"),
    ("d8 d8_flags", "F16_FIRST(k)", "0xffff"),
    ("d8 d8_flags", "_mm_test_epi8_mask(v, v)", "(_mm_test_epi8_mask(v, v) >> 1)"),
]
# What is most likely to notice first; the first test that fails ends a run.
TESTS = [f"tests/test_{name}.py" for name in
         ("exact", "samples", "extremes", "gradients", "layout", "overlap", "threads",
          "guard_pages")]  # fmt: skip
SWITCH = """
#include <stdlib.h>
static int fastbn_fault;
__attribute__((constructor)) static void fastbn_pick(void) {
    const char *n = getenv("FASTBN_FAULT");
    fastbn_fault = n ? atoi(n) : 0;
}
"""


def plant(folder: Path) -> None:
    """Every fault into a copy's simd.h, switched off, and the switch."""
    path = folder / "fastbn/kernels/simd.h"
    text = path.read_text()
    end = text.index("#elif defined(__AVX2__)")
    branch, rest = text[:end], text[end:]
    for n, (where, right, wrong) in enumerate(FAULTS, 1):
        start = branch.index(where)
        stop = branch.find("\nINLINE", start)
        at = branch.rindex(right, start, stop if stop >= 0 else len(branch))
        size = len(right)
        if right.startswith("_CMP_"):  # a constant in the instruction: the last of the call
            call = branch.rindex("_mm512_cmp_", start, at)
            right = branch[call : at + size + 1]
            wrong = branch[call:at] + wrong + ")"
            at, size = call, len(right)
        new = f"(fastbn_fault == {n} ? {wrong} : {right})"
        branch = branch[:at] + new + branch[at + size :]
    path.write_text(SWITCH + branch + rest)


def caught_by(folder: Path, n: int) -> str:
    """The first test that fails with fault n; nothing where all pass."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no",
         "-k", "avx512", *TESTS],
        cwd=folder, check=False, text=True, capture_output=True,
        env={**emulate_avx512.environment(folder), "FASTBN_FAULT": str(n)},
    )  # fmt: skip
    failed = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if result.returncode == 0:
        return ""
    if result.returncode == 1 and failed:
        return failed[0].partition(" - ")[0]
    return f"a process that ended with status {result.returncode}: {result.stderr[-200:]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to build; kept (default: a new one)")
    parser.add_argument("--native", action="store_true", help="for a CPU that has AVX-512")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these faults")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as new:
        folder = (options.folder or Path(new) / "fastbn").resolve()
        if not any((folder / "fastbn/kernels").glob("_avx512.*.so")):
            emulate_avx512.copy_tree(folder)
            plant(folder)
            if not options.native:
                emulate_avx512.emulate(folder)
            emulate_avx512.build(folder)
        emulate_avx512.check_which_runs(folder, emulated=not options.native)
        survived = []
        numbers = options.only or range(1, len(FAULTS) + 1)
        without = caught_by(folder, 0) if not options.only else ""
        if without:
            print(f"without any fault: {without}")
            return 1
        for n in numbers:
            where, right, wrong = FAULTS[n - 1]
            by = caught_by(folder, n)
            survived += [] if by else [n]
            print(f"{n:2} {where}: {wrong} for {right}: {by or 'NOT CAUGHT'}", flush=True)
    print(f"avx512_faults: {len(numbers) - len(survived)} of {len(numbers)} faults were caught")
    return 1 if survived else 0


if __name__ == "__main__":
    os.environ.pop("FASTBN_FAULT", None)
    sys.exit(main())

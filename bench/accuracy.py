"""Accuracy beside NumPy, PyTorch and oneDNN: errors in ulps, and right digits of NIST's data.

    python bench/accuracy.py                    about three minutes
    python bench/accuracy.py -o tables.md       write the tables to a file as well
    python bench/accuracy.py --quick            seconds: 1024 samples a feature alone

For data with mean / std of 0, 1e3, 1e6 and 1e8: the worst error of each result over all elements or
features of two arrays, (1024, 32) and (1000000, 2). A cell has three of them: rows (N, C),
channels-first, channels-last. Every library normalises and differentiates with the statistics that
it found itself. An error is in ulps of the dtype that the result has, of

    mean            max(|mean|, std)
    var             var
    y, normalize    max(|y|, 1)
    denormalize     max(|x|, std)
    dx              max(|dx|, gamma / std)
    dgamma, dbeta   the result

Exit code 1 if fastbn is worse than LIMITS.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import environment

RATIOS = (0.0, 1e3, 1e6, 1e8)
STATISTICS = ("mean", "var", "dgamma", "dbeta")
ELEMENTS = ("y", "normalize", "denormalize", "dx")
SIZES = ((32, (4, 16, 16)), (2, (16, 250, 250)))
FLOAT32_ALONE = ("NumPy in float64", "oneDNN")

# What fastbn must not exceed: ulps of float64 for statistics, of the data's dtype for elements.
# Those of float64 have the error of the variance in them, which for float32 is far below an ulp.
_STATISTICS = {"mean": 8, "var": 64, "dgamma": 64, "dbeta": 16}
LIMITS = {
    "float32": {**_STATISTICS, "y": 4, "normalize": 4, "denormalize": 4, "dx": 16},
    "float64": {**_STATISTICS, "y": 64, "normalize": 64, "denormalize": 16, "dx": 128},
}

# (dtype, result, contender, layout, ratio) -> (worst in ulps, worst relative, dtype of the result)
Found = dict[tuple[str, str, str, str, float], tuple[float, float, str]]


def measure(dtype: str, ratio: float, quick: bool, runs: dict[str, Any], found: Found) -> float:
    """Fill in the worst errors; returns the largest |mean| / std of the data as rounded."""
    import exact
    from contenders import Given

    most = 0.0
    for features, sides in SIZES[:1] if quick else SIZES:
        problem = exact.Problem(features, sides, dtype, ratio)
        most = max(most, problem.most)
        for layout in exact.LAYOUTS:
            x, dy, y = (problem.laid_out(a, layout) for a in (problem.x, problem.dy, problem.y))
            given = Given(problem.case(layout), x, dy, y, problem.gamma, problem.beta)
            for name, run in runs.items():
                if dtype == "float64" and name in FLOAT32_ALONE:
                    continue
                for key, value in run(given).items():
                    ulps, relative = problem.error(key, value)
                    cell = (dtype, key, name, layout, ratio)
                    worst = found.get(cell, (0.0, 0.0, ""))
                    found[cell] = max(ulps, worst[0]), max(relative, worst[1]), str(value.dtype)
    return most


def text(value: float) -> str:
    if value < 9.95:
        return f"{value:.1f}"
    if value < 999.5:
        return f"{value:.0f}"
    return scientific(value)


def scientific(value: float) -> str:
    return (
        f"{value:.0e}".replace("0e+00", "0")
        .replace("e-0", "e-")
        .replace("e+0", "e")
        .replace("e+", "e")
    )


def tables(found: Found) -> Iterator[str]:
    """Markdown: elements and statistics of each dtype, and float32's statistics as they compare."""
    for dtype in ("float32", "float64"):
        yield f"**Elements of {dtype}**, in ulps of {dtype}\n"
        yield from table(found, dtype, ELEMENTS, lambda c: text(c[0]), "")
        yield f"**Statistics of {dtype}**, in ulps of the dtype that the library returns\n"
        yield from table(found, dtype, STATISTICS, lambda c: text(c[0]), " ({})")
    yield "**Statistics of float32**, relative errors\n"
    yield from table(found, "float32", STATISTICS, lambda c: scientific(c[1]), "")


def table(
    found: Found, dtype: str, keys: tuple[str, ...], cell: Callable[[Any], str], suffix: str
) -> Iterator[str]:
    layouts = list(dict.fromkeys(key[3] for key in found))
    yield "| result | mean / std = 0 | 1e3 | 1e6 | 1e8 |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for key in keys:
        for name in dict.fromkeys(k[2] for k in found if k[:2] == (dtype, key)):
            rows = [[found[dtype, key, name, layout, r] for layout in layouts] for r in RATIOS]
            cells = [" / ".join(map(cell, row)) for row in rows]
            label = f"{key}, {name}" + suffix.format(rows[0][0][2])
            yield f"| {label} | " + " | ".join(cells) + " |"
    yield ""


def nist_table(torch_too: bool) -> Iterator[str]:
    """The log relative error of mean and deviation against the certified values."""
    import fastbn
    import numpy as np

    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    nist = importlib.import_module("nist")
    torch = importlib.import_module("torch") if torch_too else None
    columns = ["as float64", "fastbn", "NumPy", *(["PyTorch"] if torch else []), "E[x²] - E[x]²"]
    yield "**NIST StRD**, right digits of the certified mean / deviation, float64\n"
    yield "| data | " + " | ".join(columns) + " |"
    yield "| --- " + "| ---: " * len(columns) + "|"
    for name, data in nist.SETS.items():
        x, n = data.x, len(data.values)
        m = fastbn.moments(x)
        naive = max(float((x * x).mean() - x.mean() ** 2), 0.0) * n / (n - 1)
        results: list[tuple[Any, Any]] = [
            nist.moments(x.tolist()),
            (float(m.mean[0]), float(m.variance(ddof=1)[0] ** 0.5)),
            (float(x.mean()), float(x.std(ddof=1))),
        ]
        if torch:
            std, mean = torch.std_mean(torch.from_numpy(x))
            results.append((float(mean), float(std)))
        results.append((float(x.mean()), float(np.sqrt(naive))))
        certified = Fraction(data.mean), Fraction(data.std)
        cells = [
            " / ".join(f"{nist.digits(r, c):.1f}" for r, c in zip(pair, certified))
            for pair in results
        ]
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""


def too_far(found: Found) -> list[str]:
    """Where fastbn is worse than LIMITS."""
    return [
        f"{key} of {name}, {dtype}, {layout}, mean / std {ratio:g}: {ulps:.1f} ulp, "
        f"at most {LIMITS[dtype][key]} expected"
        for (dtype, key, name, layout, ratio), (ulps, _, _) in found.items()
        if name.startswith("fastbn") and not ulps <= LIMITS[dtype][key]
    ]


def main() -> int:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the small array alone")
    parser.add_argument("--threads", type=int, default=2, help="of fastbn, PyTorch and oneDNN")
    parser.add_argument("-o", "--out", type=Path, help="a file for the tables")
    options = parser.parse_args()
    environment.prepare(min(options.threads, environment.usable_cores()))
    import contenders

    runs, missing = contenders.load(options.threads)
    for reason in missing:
        print(f"left out: {reason}")
    found: Found = {}
    lines = []
    for dtype in ("float32", "float64"):
        most = [measure(dtype, ratio, options.quick, runs, found) for ratio in RATIOS]
        lines.append(
            f"mean / std of {dtype} data as rounded, at most: {', '.join(map(text, most))}"
        )
    lines += ["", *tables(found), *nist_table("PyTorch" in runs)]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines), encoding="utf-8")
    worse = too_far(found)
    for line in worse:
        print(line)
    print(f"{len(found)} results of {len(runs)} contenders; fastbn above its limits: {len(worse)}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())

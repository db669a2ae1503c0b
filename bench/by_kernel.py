"""The report's table by kernel: bytes per second, and the share of the memory limit."""

from __future__ import annotations

import math

from records import (
    ARRAYS,
    BIG,
    OPERATIONS,
    SUBJECT,
    Record,
    geometric_mean,
    of_limit,
    time_of,
    values,
)
from shapes import FIRST


def kernel_of(group: Record) -> str:
    """Which kernel works on a case, as `fastbn/kernels/job.pxi` decides."""
    features, run = group["shape"][1], math.prod(group["shape"][2:])
    if features == 1 or (group["layout"] == FIRST and run > 64):
        return "planes"
    if group["layout"] == FIRST and run > 1:
        return "rows of short runs"
    return "rows, folded" if features <= 256 else "rows"


def by_kernel(run: Record) -> str:
    """How fast each kernel moves its arrays, and its share of the limit, for arrays past L2."""
    groups = [g for g in run["groups"] if g["nbytes"] >= BIG]
    lines = [
        "| kernel | dtype | operation | shapes | GB/s | share of the limit | worst |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for kernel in sorted({kernel_of(g) for g in groups}):
        for dtype in values(run, "dtype"):
            for operation in OPERATIONS:
                here = [g for g in groups if kernel_of(g) == kernel]
                here = [g for g in here if g["dtype"] == dtype and g["operation"] == operation]
                if not here:
                    continue
                rates = (
                    ARRAYS[operation] * g["nbytes"] / mine / 1e3
                    for g in here
                    if (mine := time_of(g, SUBJECT))
                )
                shares = [1 / ratio for g in here if (ratio := of_limit(g))]
                lines.append(
                    f"| {kernel} | {dtype} | {operation} | {len(here)} "
                    f"| {geometric_mean(rates) or 0:.0f} "
                    f"| {geometric_mean(shares) or 0:.0%} | {min(shares, default=0):.0%} |"
                )
    text = (
        f"For x of {BIG // 1_000_000} MB and more, geometric means. GB/s counts each array that\n"
        "must be moved once; the share of the limit is its time divided by fastbn's."
    )
    return f"## By kernel\n\n{text}\n\n" + "\n".join(lines) if groups else ""

"""Which instruction sets this machine runs; safe to import on any."""

cdef extern from "cpu.h":
    int cpu_has_avx2()
    int cpu_has_avx512()


def instruction_sets():
    """Names of the instruction sets the CPU and the operating system support, best first."""
    names = []
    if cpu_has_avx512():
        names.append("avx512")
    if cpu_has_avx2():
        names.append("avx2")
    return [*names, "generic"]

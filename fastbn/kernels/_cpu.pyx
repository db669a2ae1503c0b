"""Which instruction sets this machine runs, and what needs none; safe to import on any."""

import functools

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


class Holding:
    """Holds a context variable at a value in a `with` block, or while a decorated function runs.

    Compiled, because Ctrl-C may come at any call of Python's: one that came between setting the
    variable and the block, or between the block and setting it back, would leave it set for good.
    """

    def __init__(self, variable, value):
        self.variable = variable
        self.value = value
        self.tokens = []            # several where a block is entered again inside of itself

    def __enter__(self):
        self.tokens.append(self.variable.set(self.value))

    def __exit__(self, *error):
        self.variable.reset(self.tokens.pop())

    def __call__(self, function):
        @functools.wraps(function)
        def held(*args, **kwargs):
            with Holding(self.variable, self.value):    # one a call: threads may share the function
                return function(*args, **kwargs)
        return held

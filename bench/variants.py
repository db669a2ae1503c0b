"""fastbn restricted: to one thread, or to another instruction set than the best of the machine.

They run beside fastbn in the same rounds, because two processes meet the machine in two states: on
a shared one, phases of minutes differ by more than what is compared. They are contenders with a
name that starts with "fastbn:", and no peers: fastbn is not called faster or slower by them.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from arrays import Data
from peers import FastBN, Prepared, Unavailable

SAME = "is what fastbn runs on here"


class Variant(FastBN):
    """fastbn with one variable of ``fastbn._runtime`` replaced while a call runs.

    The package reads its kernels and its number of threads there at every call. The replacement is
    one assignment there and one back, so that little of it is in the time of a short call.
    """

    tolerance = dataclasses.replace(FastBN.tolerance, reason="")  # said once, for fastbn
    variable = ""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.version = ""  # said once, for fastbn
        self.runtime: Any = importlib.import_module("fastbn._runtime")
        self.value = self.replacement()

    def replacement(self) -> Any:
        """What the variable is during a call, or `Unavailable`."""
        raise NotImplementedError

    def prepare(self, operation: str, data: Data) -> Prepared:
        prepared = super().prepare(operation, data)
        return dataclasses.replace(prepared, call=self.restricted(prepared.call))

    def restricted(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """``call`` with the replacement made before and undone after, whatever happens in it."""
        runtime, variable, value = self.runtime, self.variable, self.value

        def restricted_call() -> Any:
            before = getattr(runtime, variable)
            setattr(runtime, variable, value)
            try:
                return call()
            finally:
                setattr(runtime, variable, before)

        return restricted_call


class Serial(Variant):
    """One thread."""

    name = "fastbn:serial"
    variable = "_threads"

    def replacement(self) -> int:
        if self.threads == 1:
            raise Unavailable(SAME)
        self.value = 1
        if self.restricted(self.lib.get_num_threads)() != 1:
            raise Unavailable("this version of fastbn keeps its number of threads elsewhere")
        return 1


class InstructionSet(Variant):
    """The kernels of one instruction set: the last part of the name."""

    variable = "kernels"

    def replacement(self) -> Any:
        wanted = self.name.partition(":")[2]
        available = self.runtime.instruction_sets()
        if wanted not in available:
            raise Unavailable(f"not in this build or machine, which have {', '.join(available)}")
        kernels = self.runtime.load_kernels(wanted)
        if kernels is self.runtime.kernels:
            raise Unavailable(SAME)
        return kernels


class AVX2(InstructionSet):
    name = "fastbn:avx2"


class Generic(InstructionSet):
    name = "fastbn:generic"

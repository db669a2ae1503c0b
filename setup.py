"""Build switches only: one kernel source, one extension module per instruction set.

FASTBN_DEBUG=1 builds with bounds checks and without optimisation; FASTBN_BUILD=avx2,generic builds
those instruction sets alone. CFLAGS and LDFLAGS are respected; FASTBN_FLAGS come after all others,
for the compiler and the linker alike: FASTBN_FLAGS="-O1 -fsanitize=address".
"""

import os
import platform
import shlex
import shutil
import sys
import tempfile
from glob import glob

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = "fastbn/kernels"
SOURCES = [*glob(f"{KERNELS}/*.px[id]"), *glob(f"{KERNELS}/*.h")]

# -ffp-contract=off: a multiply-add is fused only where simd.h says so, so that AVX2 and AVX-512
# give the same bits. Nothing here changes the meaning of floating point for the process.
# -fno-strict-aliasing: a pack * points to float or double data (simd.pxd). CYTHON_INLINE: the
# inline functions of a kernel take compile-time constants, so they must really be inlined.
COMMON = [
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-strict-aliasing",
    "-g0",
    "-DCYTHON_INLINE=inline __attribute__((always_inline))",
]
# GCC's: two passes that took a third of a compilation of three minutes and made nothing faster.
TUNING = {"_generic": ["-fno-gcse-after-reload", "-fno-tree-pre"]}
# Without these a module is not what its name says, and is left out.
FLAGS = {
    "_cpu": [],
    "_generic": [],
    "_avx2": ["-mavx2", "-mfma"],
    "_avx512": [
        "-mavx512f",
        "-mavx512vl",
        "-mavx512bw",
        "-mavx512dq",
        "-mfma",
        "-mprefer-vector-width=512",
    ],
}
# The oldest NumPy that a wheel runs with, whatever NumPy it is built with (from 2.0 on).
NUMPY = [
    ("NPY_TARGET_VERSION", "NPY_1_23_API_VERSION"),
    ("NPY_NO_DEPRECATED_API", "NPY_1_23_API_VERSION"),
]
MSVC_FLAGS = {"_cpu": [], "_generic": [], "_avx2": ["/arch:AVX2"], "_avx512": ["/arch:AVX512"]}


class BuildKernels(build_ext):
    """Adds the flags that the compiler at hand accepts; without OpenMP the build is serial."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()  # a minute or so for each of them

    def build_extensions(self) -> None:
        msvc = self.compiler.compiler_type == "msvc"
        openmp = "/openmp" if msvc else "-fopenmp"
        openmp_flags = [openmp] if self.accepts([openmp], "#include <omp.h>\n") else []
        if not openmp_flags:
            print("fastbn: the compiler has no OpenMP; building serial kernels")
        kept = []
        for extension in self.extensions:
            name = extension.name.rpartition(".")[2]
            flags = MSVC_FLAGS[name] if msvc else FLAGS[name]
            if flags and not self.accepts(flags):
                print(f"fastbn: the compiler does not know {' '.join(flags)}; leaving out {name}")
                continue
            wanted = [*COMMON, *TUNING.get(name, [])]
            common = ["/O2"] if msvc else [f for f in wanted if self.accepts([f])]
            if DEBUG:
                common += ["-O0", "-g"]
            extension.extra_compile_args = common + openmp_flags + flags + LAST
            extension.extra_link_args = LAST if msvc else openmp_flags + LAST
            kept.append(extension)
        self.extensions = kept
        super().build_extensions()

    def accepts(self, flags: list[str], source: str = "") -> bool:
        """Whether a program compiles and links with these flags."""
        folder = tempfile.mkdtemp()
        try:
            path = os.path.join(folder, "probe.c")
            with open(path, "w") as file:
                file.write(source + "int main(void) { return 0; }\n")
            objects = self.compiler.compile([path], output_dir=folder, extra_postargs=flags)
            link = [] if self.compiler.compiler_type == "msvc" else flags
            self.compiler.link_executable(
                objects, os.path.join(folder, "probe"), extra_postargs=link
            )
        except Exception:  # each compiler class raises errors of its own
            return False
        finally:
            shutil.rmtree(folder)
        return True


def modules() -> list[str]:
    x86 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32
    universal = sys.platform == "darwin" and "arm64" in os.environ.get("ARCHFLAGS", "")
    names = list(FLAGS) if x86 and not universal else ["_cpu", "_generic"]
    only = os.environ.get("FASTBN_BUILD", "")
    if not only:
        return names
    asked = ["_cpu", *(f"_{name.strip()}" for name in only.split(","))]
    unknown = sorted(set(asked) - set(names))
    if unknown:
        raise SystemExit(f"FASTBN_BUILD={only}: no {', '.join(unknown)} among {', '.join(names)}")
    return asked


DEBUG = bool(os.environ.get("FASTBN_DEBUG"))
LAST = shlex.split(os.environ.get("FASTBN_FLAGS", ""))


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=cythonize(
        [
            Extension(
                f"fastbn.kernels.{name}",
                [f"{KERNELS}/{name}.pyx"],
                depends=SOURCES,
                include_dirs=[numpy.get_include()],
                define_macros=NUMPY,
            )
            for name in modules()
        ],
        compiler_directives={
            "language_level": 3,
            "boundscheck": DEBUG,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": DEBUG,
            "freethreading_compatible": True,  # what threads share: tests/test_concurrency.py
        },
    ),
)

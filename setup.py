"""The one native extension; everything else is declared in pyproject.toml.

Setuptools runs Cython on a ``.pyx`` source at build time (the compiler directives stand at the top of that file).
"""

import glob
import os
import platform
import subprocess
import sys
import tempfile

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

MEMQ = "upipe/memq"
TRIP = f"{MEMQ}/_trip.ld"


class BuildRing(build_ext):
    """Says why on a machine that uPipe cannot run on, before the compiler does in a hundred lines."""

    def run(self):
        machine = platform.machine()
        if not sys.platform.startswith("linux") or machine not in {"x86_64", "aarch64"} or sys.maxsize < 2**32:
            sys.exit(f"uPipe runs on 64-bit Linux, x86-64 or aarch64; this is {sys.platform}, {machine}.")
        super().run()

    def build_extension(self, ext):
        order = f"-Wl,-T,{TRIP}"
        if self._links(order):
            ext.extra_link_args.append(order)
        else:
            print(f"This linker cannot order functions by {TRIP}: who was asleep will answer a little later.")
        super().build_extension(ext)

    def _links(self, argument):
        """Does the linker take this? Others than GNU ld and lld do not know INSERT."""
        with tempfile.TemporaryDirectory() as folder:
            probe = [*self.compiler.linker_so, "-x", "c", os.devnull, argument, "-o", f"{folder}/probe.so"]
            return subprocess.run(probe, capture_output=True, check=False).returncode == 0


ring = Extension(
    "upipe.memq._ring",
    sources=[f"{MEMQ}/_ring.pyx"],
    depends=[*sorted(glob.glob(f"{MEMQ}/*.[hp]*")), TRIP],
    include_dirs=[MEMQ, numpy.get_include()],
    # What is `cdef inline` in Cython is hot to the compiler (_ring.pyx says why).
    define_macros=[
        ("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION"),
        ("CYTHON_INLINE", "__inline__ __attribute__((hot, unused))"),
    ],
    # No -march: a wheel runs on every machine of its architecture, and _crc.h asks the CPU at run time.
    # Strict C11, since the core is also compiled without Python. -g1 keeps line numbers in a core dump.
    # A section for each function, which the linker puts into the order of TRIP.
    extra_compile_args=[
        *("-O3", "-std=c11", "-Werror=implicit", "-g1", "-fno-plt", "-fvisibility=hidden", "-pthread"),
        "-ffunction-sections",
    ],
    extra_link_args=["-pthread"],
)

setup(ext_modules=[ring], cmdclass={"build_ext": BuildRing})

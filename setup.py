"""Builds the C++ extension ``sparseopt._C``; everything else is in pyproject.toml.

The extension is compiled when torch can be imported (``pip install . --no-build-isolation``). Without torch, or with
``SPARSEOPT_NO_EXT=1``, the package installs without it and says so at first use. A compile error is an error.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

SOURCES = [
    "accumulate.cpp",
    "bindings.cpp",
    "codec.cpp",
    "cross_entropy.cpp",
    "gather.cpp",
    "masks.cpp",
    "project.cpp",
    "remap.cpp",
    "select.cpp",
    "scatter.cpp",
    "sparse_adamw.cpp",
]


def extension_arguments() -> dict:
    if os.environ.get("SPARSEOPT_NO_EXT") == "1":
        print("sparseopt: SPARSEOPT_NO_EXT=1, the C++ kernels are not compiled.", file=sys.stderr)
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        print(
            "sparseopt: torch is not importable in the build environment, the C++ kernels are not compiled. "
            "Use `pip install . --no-build-isolation` with torch, setuptools and ninja installed to get them.",
            file=sys.stderr,
        )
        return {}
    # Portable flags only: wide instructions come from per-function clones chosen at load time (csrc/common.h).
    # -ffp-contract=off keeps the rounding of torch's own order of operations.
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    extension = CppExtension(
        "sparseopt._C",
        [str(Path("csrc") / name) for name in SOURCES],
        depends=["csrc/codec.h", "csrc/common.h", "csrc/simd.h", "csrc/tiles.h"],
        extra_compile_args={"cxx": [*flags, "-fopenmp"]},
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**extension_arguments())

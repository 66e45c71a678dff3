"""The ops as Triton kernels for GPUs: ``sparseopt.triton_kernels``."""

if __name__ != "sparseopt.triton_kernels":
    raise ImportError(
        "This folder installs as `sparseopt.triton_kernels`; the name `triton_kernels` alone belongs to Triton. "
        "Import it under its full name (pip install first)."
    )

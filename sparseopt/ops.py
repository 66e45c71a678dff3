"""``import sparseopt.ops`` registers ``torch.ops.sparseopt.*`` explicitly (any other use does it implicitly)."""

from sparseopt import _backend

_backend.load()

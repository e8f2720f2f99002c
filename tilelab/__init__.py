"""GPU kernels in pure Python (Triton): `tilelab.kernels`, `tilelab.nets`, `tilelab.perf`.

In a wheel these packages lie inside this folder. In a checkout they lie at the top level, where the
search path of this package leads, so `import tilelab.kernels` needs no installation.
"""

import pathlib

__version__ = "0.1.0"

_HERE = pathlib.Path(__file__).parent
if not (_HERE / "kernels").is_dir():
    __path__.append(str(_HERE.parent))

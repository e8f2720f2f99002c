"""Networks made of the kernels: layers, models, data and training.

The command `tilelab train` starts a training run. `nets/README.md` says what each file holds.
"""

if __name__ != "tilelab.nets":
    raise ImportError(f"this folder is the package tilelab.nets: import that, not {__name__}")

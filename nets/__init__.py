"""Networks composed of the kernels: layers, models, data, training.

Start a training run with ``tilelab train``; `nets/README.md` says what each file holds.
"""

if __name__ != "tilelab.nets":
    raise ImportError(f"this folder is the package tilelab.nets: import that, not {__name__}")

"""Networks composed of the kernels: layers, models, data, training.

Start a training run with ``python -m nets.train``; `nets/README.md` says what each file holds.
"""

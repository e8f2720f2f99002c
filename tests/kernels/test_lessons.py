"""What the docstrings of the lessons show is what comes out."""

import doctest
import importlib
import pkgutil

import pytest

from tests.tools.inputs import INTERPRET
from tilelab import kernels

LESSONS = sorted(m.name for m in pkgutil.iter_modules(kernels.__path__) if m.name[0] != "_")


@pytest.mark.skipif(not INTERPRET, reason="the examples are tensors on the CPU")
@pytest.mark.parametrize("lesson", LESSONS)
def test_examples(lesson):
    module = importlib.import_module(f"tilelab.kernels.{lesson}")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("lesson", ["conv2d_input_grad", "conv2d_weight_grad"])
def test_derivations_end_in_a_check_that_runs(lesson):
    module = importlib.import_module(f"tilelab.kernels.{lesson}")
    examples = doctest.DocTestParser().get_examples(module.__doc__)
    assert sum(bool(example.want) for example in examples) >= 2

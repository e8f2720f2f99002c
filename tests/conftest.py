"""What every test gets without asking for it. The tools that a test imports are in tests/tools:

    from tests.tools.tolerance import assert_close    is it right, and could the test have failed?
    from tests.tools.inputs import randn, gradients   seeded inputs in every layout, and gradients
    from tests.tools.poison import poison             reads and writes out of bounds
    from tests.tools.operators import OPERATORS       every operator, its samples and its reference

The same tests run on the CPU (`make test` forces Triton's interpreter) and compiled on the GPU, if
torch sees one and TRITON_INTERPRET is not set. They take their device from the `device` fixture or
from `tests.tools.inputs.DEVICE`. Tests marked `gpu` run only on a GPU, at real sizes.

`pytest --on sm_90` runs them on the CPU as compiled for such a GPU: see tests/tools/on_machine.py.
"""

import os

# Before NumPy and torch are imported: threads that wait for a busy core cost up to ten times what
# they bring.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# Nothing here imports tests.tools or tilelab before pytest_configure: an option decides between
# interpreter and compiler.

# An interpreted kernel takes milliseconds: few examples, and no deadline for the first of them.
hypothesis.settings.register_profile(
    "tilelab", deadline=None, max_examples=12, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.load_profile("tilelab")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that run compiled kernels with no GPU."""
    group = parser.getgroup("tilelab")
    group.addoption("--on", choices=("sm_80", "sm_90"), help="execute kernels as PTX for this GPU")
    group.addoption(
        "--schedule", choices=("lockstep", "random", "late"), default="random",
        help="with --on: the order in which warps run (default: random)",
    )  # fmt: skip
    group.addoption("--seed", type=int, default=0, help="with --on: of the random order")
    group.addoption(
        "--repeat", type=int, default=0, metavar="N",
        help="with --on: execute each launch in N more random orders, and compare the results",
    )  # fmt: skip
    group.addoption("--missed", action="store_true", help="with --on: list what was not executed")
    group.addoption("--record", metavar="FILE", help="with --on: what each test took and reached")


def pytest_configure(config: pytest.Config) -> None:
    """Make this process one that compiles, if `--on` is given."""
    if config.option.on:
        os.environ["TRITON_INTERPRET"] = "0"
        from tests.tools.on_machine import OnMachine

        option = config.option
        order = option.schedule, option.seed, option.repeat
        config.pluginmanager.register(OnMachine(option.on, *order, option.missed, option.record))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where kernels do not run on one."""
    from tests.tools.inputs import DEVICE

    if DEVICE == "cuda":
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # and not: "gpu" is in its name
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and TRITON_INTERPRET not set"))


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name dtypes in the ids of tests: `float16`, not `dtype1`."""
    return str(val).removeprefix("torch.") if isinstance(val, torch.dtype) else None


@pytest.fixture(autouse=True)
def full_float32():
    """float32 products in full: torch's default for convolutions is TF32, a reference's is not."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    yield
    for switch, precision in zip(switches, before, strict=True):
        switch.fp32_precision = precision


@pytest.fixture
def device() -> str:
    """Where the kernels run: "cuda", or "cpu" for the interpreter and the machine."""
    from tests.tools.inputs import DEVICE

    return DEVICE

"""What a training step launches, moves and keeps: the counts, by hand where that can be."""

import contextlib
import io
import json

import pytest
import torch

from tests.tools.tables import STEP
from tilelab.__main__ import main
from tilelab.perf.commands import training_step
from tilelab.perf.commands.training_step import Ledger, kept_bytes, listing_kept, totals
from tilelab.perf.work import cost


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the command prints and writes."""
    path = tmp_path_factory.mktemp("step") / "s.json"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["step", "--batch", "256", "--json", str(path)]) == 0
    return out.getvalue(), json.loads(path.read_text())["steps"]


@pytest.fixture(scope="module")
def counts(printed):
    (step,) = printed[1]
    return step


@pytest.mark.core
@pytest.mark.slow
def test_our_step_has_no_launch_of_torchs(counts):
    """Nothing is cast, copied, filled or added up outside of our kernels."""
    names = [name for name, _ in counts["tilelab"]["launches"]]
    assert [name for name in names if not name.endswith("_kernel")] == []
    assert names[0] == "batch_kernel" and names[-2:] == ["adamw_kernel", "record_kernel"]
    for name in ("batch", "cross_entropy", "cross_entropy_backward", "adamw", "record"):
        assert names.count(f"{name}_kernel") == 1
    assert len(names) < len(counts["torch"]["launches"]) / 2


@pytest.mark.slow
def test_bytes_by_hand(counts):
    ours = dict(counts["tilelab"]["launches"])
    # dlogits and logits, labels, one gradient for all rows, two numbers a row
    assert ours["cross_entropy_backward_kernel"] == 256 * (2 * 20 + 8 + 8) + 4
    # 28 a parameter, and for each of six tensors six addresses and a counter
    tables = ours["adamw_kernel"] - 28 * 12_810
    assert 0 < tables < 1_000
    least, mine, theirs = (totals(counts, name) for name in ("minimum", "tilelab", "torch"))
    assert least == (8, cost.train_step_bytes({"N": 256}, 2), None)
    assert least[1] < mine[1] < theirs[1] / 4 and mine[2] < theirs[2] / 4
    # the image, both outputs and their places, logits, and two numbers a row
    kept = 256 * (784 * 2 + 3 * (16 * 169 + 32 * 25) + 20 + 8 + 8)
    assert mine[2] == pytest.approx(kept, rel=1e-3)


@pytest.mark.slow
def test_the_committed_counts_are_those_of_the_code(counts):
    """README's table is made of them."""
    committed = json.loads(STEP.read_text())["steps"]
    (step,) = [step for step in committed if step["batch"] == 256]
    for name in ("tilelab", "minimum"):  # operators of torch's depend on its version
        assert step[name] == counts[name]


def test_a_ledger_lists_what_launches():
    x = torch.ones(4, 6, requires_grad=True)
    with Ledger([]) as ledger, listing_kept() as kept:
        y = x.t().reshape(-1)[::2]  # a view, a copy, a view
        z = y * y.expand(3, 12)
        z.sum().backward()
    names = [name for name, _ in ledger.events]
    assert names[:3] == ["clone", "mul", "sum"] and "t" not in names
    assert dict(ledger.events)["clone"] == 2 * 4 * 24
    assert ledger.events[2] == ("sum", 4 * 36 + 4)
    assert kept_bytes(kept, [x]) == 4 * 24  # y's storage, once
    assert kept_bytes(kept, [x, y]) == 0


@pytest.mark.slow
def test_the_command(printed):
    assert "256 images, bfloat16, sm_90" in printed[0] and "record_kernel" in printed[0]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch", "many"], "--batch takes numbers of images, not 'many'"),
        (["--batch", "0"], "--batch takes numbers of images, not '0'"),
        (["--dtype", "int8"], "--dtype is bf16, fp16 or fp32, not 'int8'"),
    ],
)
def test_wrong_input(words, message, capsys):
    assert main(["step", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_it_is_measured_on_a_gpu(capsys):
    assert main(["step", "--batch", "256"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in training_step.PEERS) and out.count("peak") == 4

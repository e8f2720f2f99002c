"""Planted faults: a few of ptx_faults.py, so that the tool and its reasons stay right.

Each kind of fault is planted once in a kernel of Ampere and in one of Hopper.
"""

import functools

import pytest

from tests.tools import ptx_faults
from tests.tools.ptx_fault_cases import CASES, launches

KERNELS = {"matmul": 10, "matmul by TMA": 24}  # and how many kinds of faults they have


@functools.cache
def launch_of(name):
    (launch,) = launches(CASES[name])
    return launch


def one_of_each(existing):
    """The last of each kind: it is in the loop, or behind it."""
    return list({fault.kind: fault for fault in existing}.values())


@pytest.mark.parametrize("name", KERNELS)
def test_each_kind_is_seen_or_explained(name):
    result = ptx_faults.examine(launch_of(name), one_of_each)
    assert result["unexplained"] == result["disputed"] == []
    assert len(result["kinds"]) >= KERNELS[name]
    seen = sum(entry["seen"].total() for entry in result["kinds"].values())
    assert seen > 0.6 * len(result["kinds"])
    assert "0 neither, 0 disputed" in ptx_faults.table({name: result})


def test_no_reason_holds_for_a_fault_that_is_seen():
    """Or the reasons would explain away a gap of the machine."""
    launch = launch_of("matmul")
    right, tried = ptx_faults.untouched(launch), 0
    for fault in one_of_each(ptx_faults.faults(launch.program, launch.maps)):
        if ptx_faults.notice(launch, fault, right) != ("", ""):
            assert ptx_faults.why(launch, fault, right) == "", fault
            tried += 1
    assert tried >= 5

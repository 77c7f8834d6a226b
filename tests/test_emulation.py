"""The instrument itself: the emulated device computes right, and reports every planted fault."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parent.parent / "build" / "emulation"

# case → (what plain runs say, AddressSanitizer's and UndefinedBehaviorSanitizer's words,
# ThreadSanitizer's words). None: not reported there, the run ends well.
FAULTS = {
    "neighbour": (None, None, "data race"),
    "two-rounds": (None, None, "data race"),
    "block-sum": (None, None, "data race"),
    "warp-memory": (None, None, "data race"),
    "global-bounds": (None, "heap-buffer-overflow", None),
    "static-bounds": (None, "out of bounds", None),
    "dynamic-bounds": (None, "heap-buffer-overflow", None),
    "cluster-memory": (None, None, "data race"),
    "cluster-bounds": (None, "heap-buffer-overflow", None),
    "divergent-cluster": ("divergent barrier",) * 3,
    "too-many-blocks": ("no device launches",) * 3,
    "divergent-barrier": ("divergent barrier",) * 3,
    "early-return": ("has left the kernel",) * 3,
    "partial-warp": ("divergent barrier",) * 3,
    "too-many-threads": ("no device launches",) * 3,
}
RESULTS = {
    "neighbour": [10 * ((i + 1) % 64) for i in range(64)],
    "two-rounds": [1] * 64,
    "block-sum": [sum(range(64))] + [0] * 63,
    "warp-memory": list(range(31, -1, -1)) + [0] * 32,
    "global-bounds": [1] * 64,
    "static-bounds": [1] * 64,
    "dynamic-bounds": [1] * 64,
    "cluster-memory": [100 + i for i in range(64)],
    "cluster-bounds": list(range(64)),
    "vote": [3 * 64] + [0] * 63,
}


@pytest.fixture(params=["plain", "address", "thread"])
def run(request):
    program = BUILD / request.param / "faults"
    if not program.exists():
        pytest.skip("`make emulation` and `make sanitize` build it")

    def run(case: str) -> subprocess.CompletedProcess:
        # setarch: ThreadSanitizer of older compilers cannot cope with much address randomisation.
        command = ["setarch", "--addr-no-randomize"] if request.param == "thread" else []
        return subprocess.run([*command, program, case], capture_output=True, text=True)

    run.kind = ("plain", "address", "thread").index(request.param)
    return run


@pytest.mark.parametrize("case", RESULTS)
def test_what_is_right_runs_and_reports_nothing(run, case):
    done = run(case)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert [int(word) for word in done.stdout.split()] == RESULTS[case]


@pytest.mark.parametrize("case", FAULTS)
def test_planted_faults_are_reported(run, case):
    words = FAULTS[case][run.kind]
    done = run(f"{case}-fault")
    if words is None:
        return  # another sanitizer's to find; without one it may end any way
    assert done.returncode != 0
    assert words in done.stderr

"""One command for whoever has a GPU: python benchmarks/gpu_report.py [--only PART ...] [--out DIR]

Builds for the card that is there in the Python that is there (nothing is fetched: NEEDED must be
installed, and nvcc), runs the CUDA tests, compute-sanitizer over a few of them, and
every benchmark against eager torch and torch.compile (max-autotune), with CUDA graphs and without.
Writes benchmarks/results/<device>.csv, a plot and report.md. What fails is reported and stops
nothing else. Ends within 16 minutes; the summary is the last thing it prints. Where a card is there
for minutes at a time, `--only` divides the parts (LIMITS names them) into turns.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Seconds after which a part is stopped, in the order in which they run. What is timed until then is
# kept.
LIMITS = {"build": 100, "tests": 200, "compile": 150}
LIMITS |= {"linear_relu": 60, "cross_entropy": 60, "conv_relu_pool": 180}
LIMITS |= {"mlp_trainer": 60, "recipes": 60, "memcheck": 40, "racecheck": 40}
COMPILERS = 6  # processes; each takes some of the card's memory
# A short list for compute-sanitizer.
SHORT_TESTS = ("tests/test_linear_relu.py", "tests/test_trainer.py")
SHORT = "cuda and (float64 and not no and (784 or 130 or 600) or hostile and not steps)"


OPS = ("linear_relu", "cross_entropy", "conv_relu_pool")
OP_TESTS = [f"tests/test_{op}.py" for op in (*OPS, "linear_cross_entropy", "trainer")]
OP_TESTS += [
    "tests/test_accelerate.py::test_cuda_graph",
    "tests/test_recipes.py::test_cuda_graphs_train_as_steps_do",
]
TIMED = (*OPS, "mlp_trainer", "recipes")
NEEDED = ("torch", "setuptools", "ninja", "pytest", "hypothesis", "typer", "matplotlib", "tqdm")


@dataclass
class Part:
    name: str
    ok: bool
    seconds: float
    said: str  # the end of what it printed


def run(name: str, command: list[str], out: Path, **environment: str) -> Part:
    """Runs a part within its limit, its output into a log."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    log = out / f"{name}.log"
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = process.wait(timeout=LIMITS[name])
            ending = "" if code == 0 else f"exit status {code}; "
        except subprocess.TimeoutExpired:
            # With all that it has started, which would go on using the card.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code, ending = -1, f"stopped after {LIMITS[name]} s; "
        except OSError as error:
            code, ending = -1, f"{error}; "
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    part = Part(name, code == 0, time.monotonic() - start, ending + (lines[-1] if lines else ""))
    print(f"   {'ok' if part.ok else 'FAILED'} in {part.seconds:.0f} s: {part.said}", flush=True)
    return part


def build(out: Path, capability: str) -> Part:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
    return run(
        "build", command, out, FASTNET_CUDA="1", TORCH_CUDA_ARCH_LIST=capability, MAX_JOBS=jobs
    )


def tests(out: Path) -> Part:
    command = [sys.executable, "-m", "pytest", "-q", *OP_TESTS, "-k", "cuda"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    return run("tests", command, out)


def compile_all(out: Path) -> Part:
    """Fills torch.compile's cache on several processors, so that the parts that time find it full:
    they take turns on the card, and would compile one case after the other."""
    command = f"from benchmarks.gpu_report import compile_some; compile_some({{}}, {COMPILERS})"
    each = "".join(f"'{sys.executable}' -c '{command.format(i)}' & " for i in range(COMPILERS))
    wait = "failed=0; for job in $(jobs -p); do wait $job || failed=1; done; exit $failed"
    return run("compile", ["bash", "-c", each + wait], out)


def compile_some(first: int, step: int) -> None:
    """Every `step`-th case of the ops, compiled and verified."""
    from fastnet.bench import harness
    from fastnet.bench.run import use_one_precision

    use_one_precision()
    cases = itertools.chain.from_iterable(
        importlib.import_module(f"fastnet.bench.{op}").cases(quick=True) for op in OPS
    )
    for i, (name, modes) in enumerate(itertools.groupby(cases, lambda case: (case.op, case.case))):
        for case in modes:
            if i % step == first and not case.mode.endswith("graph"):
                try:
                    harness.verify(case)
                except (AssertionError, RuntimeError) as error:
                    print(*name, case.mode, error, flush=True)


def sanitize(tool: str, out: Path) -> Part:
    program = shutil.which("compute-sanitizer")
    if program is None:
        return Part(tool, False, 0, "compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest"]
    return run(tool, [*command, "-q", "-x", *SHORT_TESTS, "-k", SHORT], out)


def report(parts: list[Part], rows: list[dict], card: dict, out: Path) -> Path:
    """Writes report.md: what was run, and every figure as a ratio to the card's own limits."""
    lines = [f"# fastnet on {card['name']}", "", f"{card['date']}, torch {card['torch']}.", ""]
    lines += ["| part | | seconds | |", "|---|---|---|---|"]
    lines += [
        f"| {p.name} | {'ok' if p.ok else '**failed**'} | {p.seconds:.0f} | {p.said} |"
        for p in parts
    ]
    if rows:
        gemms = [f"{float(row['gflops_limit']):,.0f}" for row in rows]  # by dtype
        lines += [
            "",
            f"Measured limits: copy {float(rows[0]['gbs_limit']):,.0f} GB/s, GEMM "
            + ", ".join(f"{limit} GFLOP/s" for limit in dict.fromkeys(gemms))
            + ". Ratios above 1 are fastnet's gain over the best of eager torch and torch.compile.",
            "",
            "| op | case | mode | fastnet, µs | ratio | peak, MB | of copy | of GEMM |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            if row["side"] != "fastnet":
                continue
            lines.append(
                f"| {row['op']} | {row['case']} | {row['mode']} | {float(row['median_us']):.1f} | "
                f"{float(row['ratio']):.2f} | {row['peak_mb']} | "
                f"{float(row['gbs']) / float(row['gbs_limit']):.1%} | "
                f"{float(row['gflops']) / float(row['gflops_limit']):.1%} |"
            )
    path = out / "report.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="PART")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-report")
    arguments = parser.parse_args()
    out, wanted = arguments.out.resolve(), arguments.only
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"fastnet: the GPU report needs {', '.join(missing)} in {sys.executable}; "
            "nothing was run.",
            file=sys.stderr,
        )
        return 2
    import torch

    if not torch.cuda.is_available():
        print(
            "fastnet: there is no NVIDIA GPU here that torch can use; nothing was run.",
            file=sys.stderr,
        )
        return 2

    out.mkdir(parents=True, exist_ok=True)
    card = {
        "name": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    parts: list[Part] = []
    rows: list[dict] = []
    if "build" in wanted:
        parts.append(build(out, capability))
    if all(part.ok for part in parts):
        if "tests" in wanted:
            parts.append(tests(out))
        if "compile" in wanted:
            parts.append(compile_all(out))
        bench = [sys.executable, "-m", "fastnet", "bench", "--quick", "--out", str(out)]
        parts += [run(name, [*bench, name], out) for name in TIMED if name in wanted]
        parts += [sanitize(tool, out) for tool in ("memcheck", "racecheck") if tool in wanted]
        try:
            from benchmarks.plot import speed_ups
            from fastnet.bench import machine, results

            table = out / f"{machine.device_slug()}.csv"
            rows = list(results.read(table).values())
            if rows:
                shutil.copy(table, ROOT / results.RESULTS)
                modes = tuple(dict.fromkeys(row["mode"] for row in rows))
                figure = speed_ups(rows, f"fastnet on {card['name']}", modes)
                figure.savefig(out / "speed-up.png", dpi=110)
        except Exception as error:  # whatever it is, the report of the other parts is still due
            parts.append(Part("summary", False, 0, f"{type(error).__name__}: {error}"))
    path = report(parts, rows, card, out)
    print(path.read_text())
    return 0 if all(part.ok for part in parts) else 1


if __name__ == "__main__":
    raise SystemExit(main())

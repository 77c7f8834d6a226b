"""One command for whoever has a GPU: python benchmarks/gpu_report.py [--only PART ...] [--out DIR]

Builds for the card that is there in the Python that is there (nothing is fetched: NEEDED must be
installed, and nvcc), runs the CUDA tests, every benchmark against eager torch and torch.compile
(max-autotune), with CUDA graphs and without, and compute-sanitizer over a few of the tests.
Puts four files into DIR: <device>.csv, tests.log, parts.log of what the other parts printed, and
report.md, which is written anew after every part; and the figures into benchmarks/results as well.
Prints the ratios of every part as they come, and last what failed: in all no more than a reader
takes in who gets the end of it only. What fails is reported and stops nothing else. All parts
together end within 17 minutes: their LIMITS, and PATIENCE with some. Where a card is there for
minutes at a time, `--only` divides the parts (LIMITS names them) into turns.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Seconds after which a part is stopped, in the order in which they run. What is timed until then is
# kept.
LIMITS = {"build": 150, "tests": 200, "compile": 110}
LIMITS |= {"cross_entropy": 70, "conv_relu_pool": 150, "linear_relu": 50}
LIMITS |= {"mlp_trainer": 50, "recipes": 50, "memcheck": 60, "racecheck": 60}
PATIENCE = 20  # seconds that a part has to end by itself when its time is up
FASTNET = "fastnet"  # of the sides; fastnet itself can be imported when it has been built
KEPT_LINES, LAST_LINES = 20, 6  # of what a part that failed has printed, and of its end at least
TELLING = ("NOT TIMED", "FAILED", "ERROR")  # how lines begin that are kept first
KEPT_WIDTH = 240
COMPILERS = 6  # processes; each takes some of the card's memory
# A short list for compute-sanitizer.
SHORT_TESTS = ("tests/test_linear_relu.py", "tests/test_trainer.py")
SHORT = "cuda and (float64 and not no and (784 or 130 or 600) or hostile and not steps)"

OPS = ("cross_entropy", "conv_relu_pool", "linear_relu")
OP_TESTS = [
    f"tests/test_{op}.py" for op in (*OPS, "linear_cross_entropy", "gather_pictures", "trainer")
]
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
    log: str = ""  # more of it, where it failed


def run(
    name: str, command: list[str], out: Path, is_asked: bool = False, **environment: str
) -> Part:
    """Runs a part within its limit, its output into a log. `is_asked`: where its time is up it is
    interrupted, as by Ctrl-C, and may still tell what it has found, before it is killed."""
    print(f"== {name}: {' '.join(command)}"[:KEPT_WIDTH], flush=True)
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
                # Which a shell has ignored by all that it starts in the background.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            code = process.wait(timeout=LIMITS[name])
            ending = "" if code == 0 else f"exit status {code}; "
        except subprocess.TimeoutExpired:
            if is_asked:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=PATIENCE)
            # With all that it has started, which would go on using the card.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code, ending = -1, f"stopped after {LIMITS[name]} s; "
        except OSError as error:
            code, ending = -1, f"{error}; "
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    seconds = time.monotonic() - start
    said = ending + (lines[-1][:KEPT_WIDTH] if lines else "")
    part = Part(name, code == 0, seconds, said, "" if code == 0 else "\n".join(kept(lines)))
    print(f"   {'ok' if part.ok else 'FAILED'} in {part.seconds:.0f} s: {part.said}", flush=True)
    return part


def kept(lines: list[str]) -> list[str]:
    """Of what a part that failed has printed: what tells of failures, and the end."""
    earlier, last = lines[:-LAST_LINES], lines[-LAST_LINES:]
    told = [line for line in earlier if line.startswith(TELLING)] or earlier
    return [line[:KEPT_WIDTH] for line in told[LAST_LINES - KEPT_LINES :] + last]


def build(out: Path, capability: str) -> Part:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
    return run(
        "build", command, out, FASTNET_CUDA="1", TORCH_CUDA_ARCH_LIST=capability, MAX_JOBS=jobs
    )


def tests(out: Path) -> Part:
    # By name, so that the log tells which were under way when the time was up.
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", *OP_TESTS, "-k", "cuda"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    return run("tests", command, out, is_asked=True, COLUMNS=str(KEPT_WIDTH))


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
                except Exception as error:  # whatever it is, the other cases are still due
                    print(*name, case.mode, f"{type(error).__name__}: {error}", flush=True)


def sanitize(tool: str, out: Path) -> Part:
    program = shutil.which("compute-sanitizer")
    if program is None:
        return Part(tool, False, 0, "compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest"]
    return run(tool, [*command, "-q", "-x", *SHORT_TESTS, "-k", SHORT], out, is_asked=True)


def figures(rows: list[dict], op: str) -> str:
    """A line for every case of an op: in each mode fastnet's ratio, its microseconds and, where a
    graph takes the card's own time, its share of what the card can do."""
    cases: dict[str, list[str]] = {}
    for row in rows:
        if row["op"] != op:
            continue
        share = max(float(row[of]) / float(row[f"{of}_limit"]) for of in ("gbs", "gflops"))
        layout = row["side"].removeprefix(FASTNET)
        words = [row["mode"].replace("forward+backward", "both") + layout]
        words += [f"{float(row['ratio']):.2f}x", f"{float(row['median_us']):.1f}"]
        words += [f"{share:.0%}"] * (row["mode"].endswith("graph") and share > 0)
        cases.setdefault(row["case"], []).append(" ".join(words))
    return "\n".join(f"{case} | {' | '.join(modes)}" for case, modes in cases.items())


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
            + ". Ratios above 1 are fastnet's gain over the best of eager torch and torch.compile, "
            "each in its better memory format.",
            "",
            "The share of a copy counts the bytes that an ideal op moves. Of cross_entropy's two "
            "passes together those are the logits once and the gradient once. Of logits below 128 "
            "MB, and of rows too large for shared memory, fastnet's backward pass on a GPU reads "
            "the logits again: two thirds are the most that memory allows it there.",
            "",
            "| op | case | mode | fastnet, µs | ratio | peak, MB | of copy | of GEMM |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            layout = row["side"].removeprefix(FASTNET)
            lines.append(
                f"| {row['op']} | {row['case']} | {row['mode']}{layout} | "
                f"{float(row['median_us']):.1f} | {float(row['ratio']):.2f} | {row['peak_mb']} | "
                f"{float(row['gbs']) / float(row['gbs_limit']):.1%} | "
                f"{float(row['gflops']) / float(row['gflops_limit']):.1%} |"
            )
    for part in parts:
        if part.log:
            lines += ["", f"Of what {part.name} printed:", "", "```", part.log, "```"]
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
    logs = Path(tempfile.mkdtemp(prefix="fastnet-gpu-report-"))
    steps: dict[str, Callable[[], Part]] = {
        "build": lambda: build(logs, capability),
        "tests": lambda: tests(out),
        "compile": lambda: compile_all(logs),
    }
    bench = [sys.executable, "-m", "fastnet", "bench", "--quick", "--out", str(out)]
    for name in TIMED:
        steps[name] = functools.partial(run, name, [*bench, name], logs)
    for tool in ("memcheck", "racecheck"):
        steps[tool] = functools.partial(sanitize, tool, logs)
    parts: list[Part] = []
    for name in (name for name in LIMITS if name in wanted):
        parts.append(steps[name]())
        log = logs / f"{name}.log"
        if log.exists():
            with (out / "parts.log").open("a") as file:
                file.write(f"== {name}\n{log.read_text(errors='replace')}\n")
        if name == "build" and not parts[-1].ok:
            report(parts, [], card, out)
            break
        try:
            rows = timed_rows(out)
            report(parts, rows, card, out)
            if name in TIMED:
                print(figures(rows, name), flush=True)
        except Exception as error:  # whatever it is, the report of the other parts is still due
            parts.append(Part("summary", False, 0, f"{type(error).__name__}: {error}"))
            report(parts, [], card, out)
    for part in parts:
        if part.log:
            print(f"\nOf what {part.name} printed:\n{part.log}")
    print(f"\n{card['name']}, torch {card['torch']}; more stands in {out}")
    for part in parts:
        print(f"{'ok    ' if part.ok else 'FAILED'} {part.name}, {part.seconds:.0f} s: {part.said}")
    return 0 if all(part.ok for part in parts) else 1


def timed_rows(out: Path) -> list[dict]:
    """fastnet's rows of what has been timed until now, in the better memory format. All rows go
    into the committed results, too, whose other rows stay: what is timed here are the quick cases.
    """
    from fastnet.bench import machine, results

    name = f"{machine.device_slug()}.csv"
    rows = results.read(out / name)
    if rows:
        results.put(rows, ROOT / results.RESULTS / name)
    return list(filter(results.has_ratio, rows.values()))


if __name__ == "__main__":
    raise SystemExit(main())

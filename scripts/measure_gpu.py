"""Measure a GPU within a few minutes, in order of value: tests, training, sampling, attention, VAE and Inception.

Every row is a command in a process of its own. The report is written after each of them, as `DATE-DEVICE.json` and
`.md`; the same command goes on where the last one stopped. Without a GPU the same rows run at tiny sizes on the CPU.
"""

import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark import device_name

from masked_diffusion import script_util
from masked_diffusion.utils.errors import UserError
from masked_diffusion.utils.files import atomic_write, write_json
from masked_diffusion.utils.options import Config, option

REPO = Path(__file__).resolve().parents[1]
GROUPS = ("tests", "training", "sampling", "attention", "VAE", "Inception")
LENGTHS = range(128, 257, 16)
BENCHMARK, ATTENTION, COMPONENT = (
    f"scripts/{name}.py" for name in ("benchmark", "attention_benchmark", "component_benchmark")
)


@dataclass(frozen=True)
class MeasureConfig(Config):
    """measuring"""

    minutes: float = option(9.0, "time for all rows; what does not fit waits for the next call", above=0)
    out: str = option(str(REPO / "benchmarks"), "folder of the report")
    tiny: bool | None = option(None, "tiny sizes on the CPU, to test the rows; None: where there is no GPU")
    again: str = option("", "rows to measure again: their names, separated by commas; failed; or all")
    commit: str | None = option(None, "commit that is measured; None: git tells it")


@dataclass(frozen=True)
class Row:
    """One measurement.

    :param words: a script of this repository with its flags, or `pytest` with its own; it also gets a file to write.
    :param seconds: what it takes about on a GPU; it does not begin when less is left, and is ended after three times as
        long (ten times at tiny sizes on a CPU, whose compiler is slow).
    """

    name: str
    group: str
    words: tuple[str, ...]
    seconds: int


# ---------------------------------------------------------------- the rows


def all_rows(tiny: bool) -> list[Row]:
    """The rows in the order of their value."""
    rows = [Row("gpu tests", "tests", ("pytest", "-m", "gpu", "-q", "tests/test_gpu.py" if tiny else "tests"), 90)]
    compiled = ("triton", "sdpa")
    for how in compiled:
        rows += [training("XL", how, tiny), training("S", how, tiny)]
    rows += [sampling("XL", compiled[0], tiny), sampling("S", compiled[0], tiny)]
    rows += [attention(6, 64, 128, tiny), attention(16, 72, 32, tiny)]
    rows += [training(size, how, tiny) for how in ("naive", "eager") for size in ("S", "XL")]
    rows += [component("vae", "VAE", 16, tiny), component("inception", "Inception", 64, tiny)]
    rows += [training(size, how, tiny) for how in (*compiled, "eager", "naive") for size in ("B", "L")]
    return rows


def training(size: str, how: str, tiny: bool) -> Row:
    """A training step with and without the optimizer.

    :param how: `naive`, in fp32 with attention as published; `eager`, in bf16; or this attention, compiled in bf16.
    """
    batch = {"S": 128, "B": 64, "L": 32, "XL": 32}[size]
    if how == "naive" and size in ("L", "XL"):
        batch //= 2  # attention written out needs the memory
    flags = {"batch_size": batch, "optimizer": "adan", "steps": 6, **forms(how)}
    flags |= {"naive": True} if how == "naive" else {}
    seconds = 60 if flags.get("compile") else 35
    return Row(f"train {size}/2 {describe(how)}", "training", benchmark(size, flags, tiny), seconds)


def sampling(size: str, how: str, tiny: bool) -> Row:
    """Guided sampling with 250 steps."""
    flags = {"mode": "draw", "batch_size": {"S": 64, "XL": 16}[size], "steps": 1, **forms(how)}
    return Row(f"sample {size}/2 {describe(how)}", "sampling", benchmark(size, flags, tiny), 50)


def forms(how: str) -> dict[str, Any]:
    """Number format, compilation and attention."""
    if how in ("naive", "eager"):
        return {"precision": "fp32" if how == "naive" else "bf16"}
    return {"precision": "bf16", "compile": True, "attention": how}


def describe(how: str) -> str:
    return {"naive": "naive fp32", "eager": "eager bf16"}.get(how, f"compiled bf16 {how}")


def benchmark(size: str, flags: dict[str, Any], tiny: bool) -> tuple[str, ...]:
    flags = {"model": f"MDTv2_{size}_2", **flags}
    if tiny:
        flags |= {"model": "MDTv2_Nano_2", "input_size": 8, "batch_size": 2, "steps": 1, "num_sampling_steps": 2}
        flags |= {"device": "cpu", "threads": 1}
        if flags.get("attention") == "triton":
            flags["attention"] = "auto"  # the kernel is for a GPU
    return (BENCHMARK, *as_words(flags))


def attention(heads: int, width: int, batch: int, tiny: bool) -> Row:
    """The attention alone, at all lengths that training sees."""
    flags = {"heads": heads, "head_width": width, "batch_size": batch}
    flags |= {"batch_size": 1, "heads": 1, "steps": 1, "device": "cpu", "implementations": "sdpa"} if tiny else {}
    lengths = map(str, LENGTHS[::8] if tiny else LENGTHS)
    return Row(f"attention width {width}", "attention", (ATTENTION, *as_words(flags), "--lengths", *lengths), 40)


def component(name: str, group: str, batch: int, tiny: bool) -> Row:
    flags = {"component": name, "batch_size": batch}
    flags |= {"batch_size": 1, "image_size": 32, "repeats": 1, "device": "cpu"} if tiny else {}
    return Row(name, group, (COMPONENT, *as_words(flags)), 25)


def as_words(flags: dict[str, Any]) -> tuple[str, ...]:
    return tuple(word for name, value in flags.items() for word in (f"--{name}", str(value)))


# ---------------------------------------------------------------- measuring


def measure(row: Row, limit: float) -> dict[str, Any] | None:
    """Run a row's command.

    :param limit: seconds after which it is ended.
    :return: `rows` and more of what it reports; or `error` or `skipped`, each a sentence; None when it was ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder, "report"), Path(folder, "log.txt")
        tests = row.words[0] == "pytest"
        words = ["-m", *row.words, "--junitxml"] if tests else [*row.words, "--json"]
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *words, str(report)],
                cwd=REPO,
                env={**os.environ, "PYTHONPATH": str(REPO)},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with the compiler's workers
                    process.wait()
        if tests and report.exists():
            return read_tests(report)
        if code == 0 and report.exists():
            return json.loads(report.read_text())
        return {"error": last_words(log.read_text(errors="replace"), code)}


def read_tests(report: Path) -> dict[str, Any]:
    """The result of the tests, from pytest's XML."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [case.get("name") for case in suite if case.find("failure") is not None or case.find("error") is not None]
    return {"rows": [{"name": "gpu tests", **counts, "failed": ", ".join(failed)}]}


def last_words(log: str, code: int) -> str:
    """Why a command failed: its error message, in one line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in reversed(lines):
        if re.match(r"(error:|[\w.]*(Error|Exception)\b)", line):
            return line[:300]
    return f"exit code {code}" + (f": {lines[-1][:300]}" if lines else "")


# ---------------------------------------------------------------- the report


def head(config: MeasureConfig) -> dict[str, Any]:
    """What was measured, where."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name("cuda" if cuda else "cpu"),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": config.commit or output_of("git", "describe", "--always", "--dirty", "--abbrev=10") or "unknown",
    }


def output_of(*words: str) -> str | None:
    """The first line that a program prints; None where it is missing or fails."""
    try:
        lines = subprocess.run(words, cwd=REPO, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0].strip() if lines else None


def report_path(folder: str, report: dict[str, Any], tiny: bool) -> Path:
    """The report's file without its ending."""
    device = re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    return Path(folder, f"{report['date']}-{device}{'-tiny' if tiny else ''}")


def read_report(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of an earlier report, by name.

    :raises UserError: for a file that is none.
    """
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no report of this script ({error!r}): move it away, or name another --out"
        ) from error


def is_due(name: str, done: dict[str, dict[str, Any]], again: str) -> bool:
    """Whether a row is to be measured: it never was, or it is asked for."""
    names = {word.strip() for word in again.split(",")}
    return name not in done or bool(names & {name, "all"}) or ("failed" in names and "error" in done[name])


def write_report(path: Path, report: dict[str, Any], rows: list[Row]) -> None:
    """`path`.json, and `path`.md with a table for every group."""
    write_json(f"{path}.json", report)
    with atomic_write(f"{path}.md") as file:
        file.write(as_markdown(report, rows).encode())


def as_markdown(report: dict[str, Any], rows: list[Row]) -> str:
    facts = [f"{key} {report[key]}" for key in ("driver", "torch", "cuda", "python", "commit") if report[key]]
    lines = [f"# {report['date']}, {report['device']}", "", f"`scripts/measure_gpu.py`: {', '.join(facts)}."]
    for group in GROUPS:
        members = [row for row in rows if row.group == group]
        found = [(row, report["rows"][row.name]) for row in members if row.name in report["rows"]]
        lines += ["", f"## {group}", ""]
        table = [{"measured": row.name, **line} for row, result in found for line in result.get("rows", ())]
        lines += table_lines(table)
        for row, result in found:
            for key in ("error", "skipped"):
                lines += [f"{row.name}: {key}: {result[key]}", ""] if key in result else []
        waiting = [row.name for row in members if row.name not in report["rows"]]
        lines += [f"Not measured yet: {', '.join(waiting)}.", ""] if waiting else []
        lines += ["```bash", *(command_line(result, report["commit"]) for _, result in found), "```"] if found else []
    peaks = [result["matmul_tflops"] for result in report["rows"].values() if "matmul_tflops" in result]
    if peaks:
        lines += ["", f"Matrix products in the same processes, in TFLOP/s: {peak_ranges(peaks)}."]
    return "\n".join(lines) + "\n"


def command_line(result: dict[str, Any], commit: str) -> str:
    return result["command"] + (f"  # commit {result['commit']}" if result["commit"] != commit else "")


def peak_ranges(peaks: list[dict[str, float]]) -> str:
    """`bf16 741 to 766, fp32 51.1 to 51.3`."""
    found = {name: [peak[name] for peak in peaks if name in peak] for name in sorted({n for p in peaks for n in p})}
    return ", ".join(f"{name} {min(values):.3g} to {max(values):.3g}" for name, values in found.items())


def table_lines(table: list[dict[str, Any]]) -> list[str]:
    """A table with the columns that some line has a value in."""
    columns = list(dict.fromkeys(key for line in table for key, value in line.items() if value not in (None, "")))
    if not columns:
        return []
    rows = [[cell(key, line.get(key)) for key in columns] for line in table]
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)] + [""]


def cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key.startswith("share"):
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1000 else f"{value:.0f}"
    return str(value)


def main() -> None:
    config = script_util.parse_flags(MeasureConfig, __doc__)
    deadline = time.monotonic() + 60 * config.minutes
    tiny = not torch.cuda.is_available() if config.tiny is None else config.tiny
    rows, report = all_rows(tiny), head(config)
    path = report_path(config.out, report, tiny)
    path.parent.mkdir(parents=True, exist_ok=True)
    report["rows"] = read_report(Path(f"{path}.json"))
    waiting = []
    for row in rows:
        if not is_due(row.name, report["rows"], config.again):
            continue
        left = deadline - time.monotonic()
        limit, start = min((10 if tiny else 3) * row.seconds, left), time.monotonic()
        result = measure(row, limit) if left >= row.seconds else None
        if result is None and limit < left:  # its own limit, not that of all rows
            result = {"error": f"it took more than {limit:.0f} s"}
        if result is None:
            waiting.append(row.name)
            continue
        seconds = time.monotonic() - start
        command = " ".join(("python", "-m", *row.words) if row.words[0] == "pytest" else ("python", *row.words))
        report["rows"][row.name] = {"command": command, "seconds": seconds, "commit": report["commit"], **result}
        write_report(path, report, rows)
        print(f"{row.name}: {result.get('error') or result.get('skipped') or 'measured'} ({seconds:.0f} s)", flush=True)
    print(f"wrote {path}.md and {path}.json")
    if waiting:
        print(f"for want of time these wait for the next call: {', '.join(waiting)}")


if __name__ == "__main__":
    script_util.run(main)

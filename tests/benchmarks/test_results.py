"""The results page is what the stored records say, and a figure without a record says so."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def results() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import results

        yield results


ABOUT = {
    "cpu": "A processor",
    "cores": 2,
    "load_1min": 0.1,
    "torch": "2.13.0",
    "commit": "abc123",
    "dirty": False,
    "date": "2026-11-21T12:00:00+00:00",
}


def keep(folder: Path, name: str, result: object, **fields: object) -> None:
    record = {"name": name, "command": "python it.py", "machine": ABOUT, "took_s": 3.2, "status": 0, "result": result}
    (folder / f"{name}.json").write_text(json.dumps(record | fields), encoding="utf-8")


def figure(results: Any, script: str) -> Any:
    """A figure that runs some Python and has one table, of what `rows` says."""
    return results.Figure("made", "Made", ("-c", script), lambda result: [results.Table(("a", "b"), result["rows"])])


def test_the_page_is_what_the_script_writes_of_the_stored_records(results: Any) -> None:
    assert results.PAGE.read_text(encoding="utf-8") == results.render(results.FOLDER)


def test_every_record_belongs_to_a_figure(results: Any) -> None:
    assert {path.stem for path in results.FOLDER.glob("*.json")} <= set(results.BY_NAME)


def test_without_records_every_figure_is_there_and_was_not_run(results: Any, tmp_path: Path) -> None:
    page = results.render(tmp_path)
    for one in results.FIGURES:
        section = page.split(f"## {one.title}\n")[1].split("\n## ")[0]
        assert f"\nNot run{' on a GPU' if one.needs_gpu else ''}. Command: `{results.shown(one)}`" in section
        assert all(f"| {name} | not run |" in section for name in one.awaited)
    assert all(one.awaited for one in results.FIGURES if one.needs_gpu)


def test_a_figure_has_its_numbers_and_under_them_where_they_come_from(results: Any, tmp_path: Path) -> None:
    errors = [{"what": "http, first samples", "count": 40, "p50_ms": 0.512, "p95_ms": 1.04, "max_ms": 250.4}]
    keep(tmp_path, "tester", {"errors": errors})
    page = results.render(tmp_path)
    assert "| http, first samples | 40 | 0.512 | 1.04 | 250 |" in page
    origin = "commit abc123 · A processor, 2 cores, load 0.1 before · torch 2.13.0 · 2026-11-21 · 3 s"
    assert f"Command: `python it.py` · {origin}" in page
    keep(tmp_path, "tester", {"errors": errors}, machine=ABOUT | {"stolen_s": 0.72})
    assert "2 cores, load 0.1 before, 0.7 s of a core stolen meanwhile · torch" in results.render(tmp_path)
    keep(tmp_path, "tester", {"errors": errors}, machine=ABOUT | {"dirty": True}, status=1)
    page = results.render(tmp_path)
    assert "commit abc123, with changes that were not committed" in page and "**It ended with status 1.**" in page


def test_a_record_that_is_none_is_named_with_what_to_do(results: Any, tmp_path: Path) -> None:
    keep(tmp_path, "tester", {"mistakes": []})
    (tmp_path / "cost.json").write_text("half a rec", encoding="utf-8")
    (tmp_path / "zonos.json").write_text("{}", encoding="utf-8")
    page = results.render(tmp_path)
    shown = "its result is not as python -m benchmarks.tester writes it (KeyError('errors')): run it again"
    assert f"**It cannot be shown: {shown}**" in page
    assert "cost.json cannot be read (" in page and "**It cannot be shown: the record zonos has no 'machine'" in page
    assert page.count("Not run") == len(results.FIGURES) - 3


def test_a_run_is_kept_with_its_command_commit_and_status(
    results: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = figure(results, 'print(\'table\'); print(\'{"result": {"rows": [["x", 1]]}}\'); raise SystemExit(3)')
    results.run_figure(made, tmp_path)
    record = json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))
    assert record["result"] == {"rows": [["x", 1]]} and record["status"] == 3
    assert record["command"].startswith("python -c") and record["machine"]["commit"] and record["took_s"] > 0
    assert record["machine"]["stolen_s"] >= 0
    assert capfd.readouterr().out == "table\n"


def test_a_run_that_fails_is_kept_as_failed_and_shown(
    results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = figure(results, "print('done'); raise SystemExit(4)")
    with pytest.raises(results.RecordError, match="ended with status 4 and not with a JSON document but with 'done'"):
        results.run_figure(failing, tmp_path)
    monkeypatch.setattr(results, "FIGURES", [failing])
    page = results.render(tmp_path)
    assert "**It failed: made ended with status 4 and not" in page and "Command: `python -c print(" in page
    other = figure(results, 'print(\'{"result": {"columns": []}}\')')
    with pytest.raises(results.RecordError, match="not as python -c .* writes it"):
        results.run_figure(other, tmp_path)
    assert json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))["result"] == {"columns": []}


PAUSE = "import signal; signal.pause()"
CHILD = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', '{PAUSE}']).pid, flush=True)"


def test_a_run_that_takes_too_long_is_ended_with_its_processes(
    results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results.Figure, "limit_s", 5.0)
    with pytest.raises(results.RecordError, match="made was ended after 5 s"):
        results.run_figure(figure(results, f"{CHILD}; print('waits', flush=True); {PAUSE}"), tmp_path)
    assert json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))["failure"] == "made was ended after 5 s"
    check_gone(int(capfd.readouterr().out))


def test_what_a_run_leaves_behind_is_ended(results: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    leaving = f"{CHILD.replace(']).pid', '], stdout=-3).pid')}; print('{{\"rows\": []}}', flush=True)"
    results.run_figure(figure(results, leaving), tmp_path)
    check_gone(int(capfd.readouterr().out))


def test_a_run_that_is_ended_takes_its_benchmark_with_it() -> None:
    command = [sys.executable, str(BENCHMARKS / "results.py"), "rehearse", "tester"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        end_s = time.monotonic() + 60
        started: list[psutil.Process] = []
        while not started:
            assert time.monotonic() < end_s and running.poll() is None
            with suppress(psutil.NoSuchProcess):
                found = psutil.Process(running.pid).children()
                started = [child for child in found if "benchmarks.tester" in child.cmdline()]
        running.terminate()
        assert running.wait(60) == 143
    check_gone(started[0].pid)


def check_gone(pid: int) -> None:
    end_s = time.monotonic() + 30
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end_s
            time.sleep(0.01)


def test_one_that_fails_stops_no_other_and_the_time_that_is_left_is_told(
    results: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = replace(figure(results, "print('{\"rows\": []}')"), name="good", minutes=2)
    bad = replace(figure(results, "raise SystemExit(1)"), name="bad", minutes=4)
    pages = []
    failures = results._run([bad, good], tmp_path, after_each=lambda: pages.append(results.render(tmp_path)))
    assert len(failures) == 1 and "bad ended with status 1" in failures[0] and len(pages) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"bad.json", "good.json"}
    said = capsys.readouterr().out
    assert "1 of 2, bad: about 4.0 min (a guess), ended after 22; all that is left about 6 min" in said
    assert "2 of 2, good: about 2.0 min (a guess), ended after 16; all that is left about 2 min" in said
    results._run([good], tmp_path)
    assert "(as last time)" in capsys.readouterr().out


def test_a_run_is_resumed_where_nothing_has_changed(
    results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / "code.py").write_text("1")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(results.machine, "ROOT", tmp_path)
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    made = figure(results, "")

    def is_done(**fields: object) -> bool:
        keep(folder, "made", {"rows": []}, **{"command": results.shown(made), "machine": about} | fields)
        return bool(results._has_current_record(made, folder))

    about: dict[str, object] = ABOUT | {"commit": commit}
    assert not results._has_current_record(made, folder)
    assert is_done()
    assert not is_done(failure="it hung") and not is_done(command="python other.py")
    assert not is_done(machine=about | {"dirty": True}) and not is_done(machine=about | {"commit": "0000"})
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "records"], check=True)
    assert is_done()
    (tmp_path / "code.py").write_text("2")
    assert not is_done()


def test_every_figure_can_be_rehearsed(results: Any) -> None:
    for one in results.FIGURES:
        script = one.command[1].replace(".", "/") + ".py" if one.command[0] == "-m" else one.command[0]
        text = (BENCHMARKS.parent / script).read_text(encoding="utf-8")
        options = [word for word in (*one.command, *one.quick) if word.startswith("--")]
        assert one.quick and all(f'"{option}"' in text for option in options), one.name
        assert one.shortest().name == one.name and one.shortest().limit_s <= 13 * 60


def test_a_run_from_elsewhere_brings_its_machine_with_it(results: Any, tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    output.write_text('table\n{"machine": {"cpu": "Another"}, "result": {"rows": []}}\n', encoding="utf-8")
    results.add_output(figure(results, ""), output, tmp_path)
    assert json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))["machine"] == {"cpu": "Another"}
    output.write_text('{"card": "NVIDIA X", "torch": "2.13.0", "rows": []}\n', encoding="utf-8")
    results.add_output(figure(results, ""), output, tmp_path)
    record = json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))
    assert record["machine"]["gpu"] == "NVIDIA X" and record["machine"]["commit"] and record["result"]["rows"] == []
    output.write_text('{"rows": []}\n', encoding="utf-8")
    with pytest.raises(results.RecordError, match="does not say on which machine"):
        results.add_output(figure(results, ""), output, tmp_path)


def test_the_default_selection_leaves_out_what_takes_long_and_a_wrong_name_is_said(results: Any) -> None:
    names = {one.name for one in results._selected([], everything=False)}
    assert {"embedded", "saturation", "one_configuration"} <= names and not {"soak", "chaos"} & names
    with pytest.raises(results.RecordError, match="no figure nothing: use embedded, "):
        results._selected(["nothing"], everything=False)


def test_what_needs_a_gpu_is_left_out_without_one(
    results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "_gpu_name", lambda: None)
    assert results._run([results.BY_NAME["gpu"]], tmp_path) == []
    assert "gpu: not run, there is no GPU here" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_the_machine_is_described_by_the_tree_without_its_own_page(results: Any) -> None:
    about = results._about()
    assert {"cpu", "cores", "commit", "dirty", "date", "torch", "gpu"} <= set(about)
    assert isinstance(about["dirty"], bool)


def test_what_the_tester_says_of_itself_is_what_the_page_reads(results: Any, tmp_path: Path) -> None:
    one = results.BY_NAME["tester"]
    results.run_figure(replace(one, command=(*one.command, "--quick")), tmp_path)
    section = results.render(tmp_path).split(f"## {one.title}\n")[1].split("\n## ")[0]
    assert "| http, first samples | 3 |" in section and "It ended with" not in section


def test_rounds_of_three_configurations_become_medians_and_ratios_to_the_default(results: Any, tmp_path: Path) -> None:
    import one_configuration as script

    def row(setup: str, load: int, first_ms: float, audio: float) -> dict[str, object]:
        measures = dict.fromkeys(script.MEASURES, 1.0)
        return {"setup": setup, "concurrency": load, **measures, "first_audio_p50_ms": first_ms, "audio_s_per_s": audio}

    rounds = [
        [row(setup, load, first_ms * factor, audio * load) for load in (1, 8)]
        for factor in (1.0, 3.0)
        for setup, first_ms, audio in (("default", 100.0, 2.0), ("small", 90.0, 1.0), ("large", 300.0, 2.2))
    ]
    rows = script._medians(rounds)
    assert [(r["concurrency"], r["setup"]) for r in rows][:3] == [(1, "default"), (1, "small"), (1, "large")]
    assert rows[0]["first_audio_p50_ms"] == 200.0
    ends = script._ends(rows, [1, 8])
    assert ends["small"] == {"first_audio_ratio": pytest.approx(0.9), "throughput_ratio": pytest.approx(0.5)}
    assert ends["large"] == {"first_audio_ratio": pytest.approx(3.0), "throughput_ratio": pytest.approx(1.1)}
    keep(tmp_path, "one_configuration", {"rows": rows, "ends": ends})
    page = results.render(tmp_path)
    assert "| 8 at a time, large | 1 | 600 | 1 | 1 | 1 | 17.6 |" in page and "| large | 3 | 1.1 |" in page


SAMPLES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "cost": (
        {
            "cost": {
                "now": {
                    "64, all run": dict(schedule_us=11.0, launch_us=2.0, commit_us=5.0, step_us=18.0, median_us=20.0),
                    "256, all run": dict(schedule_us=21.0, launch_us=3.0, commit_us=6.0, step_us=30.0, median_us=33.0),
                }
            }
        },
        (
            "| sequences | schedule us | launch us | commit us | a step, least us | median us |",
            "| 64, all run | 11 | 2 | 5 | 18 | 20 |",
            "| 256, all run | 21 | 3 | 6 | 30 | 33 |",
        ),
    ),
    "quality": (
        {"precisions": {"bfloat16": {"kl_nats": 0.5, "duration_error_percent": 3.0, "agreement": 0.98}}},
        ("| precision | same next code (share) | KL nats | durations off % |", "| bfloat16 | 0.98 | 0.5 | 3 |"),
    ),
    "vs_transformers": (
        {
            "systems": [
                dict(wall_s=2.0, system="declaim", audio_s_per_s=40.0, vs_static_batch=3.0, vs_one_by_one=9.0),
            ],
            "greedy": {"declaim vs one": {"identical_requests_percent": 75.0, "identical_codes_percent": 99.0}},
        },
        ("| declaim | 2 | 40 | 9 | 3 |", "| declaim vs one | 75 | 99 |"),
    ),
    "dropped": (
        {
            "left": [
                dict(num_streams=800, rss_mb=650.0, heap_mb=310.0, cache_mb=60.0, python_blocks=1.0e6)
                | {"threads": 30, "handles": 42, "left": {}}
            ],
            "faults": [],
        },
        (
            "| after streams | RSS MB | malloc MB | Python blocks | threads | handles |",
            "| 800 | 650 | 310 | 1000000 | 30 | 42 |",
        ),
    ),
    "soak": (
        {
            "growth_mb_per_hour": {"server 100": [7.0, 2.0]},
            "server_live": {"growth_mb_per_hour": [0.4, 0.1], "python_blocks": [800000, 801000]},
            "ends": {"whole": 9},
            "verdict": "nothing grows",
        },
        (
            "| server 100 | 7 | 2 |",
            "| of the server's, alive by malloc | 0.4 | 0.1 |",
            "| alive in the server | after the warm-up | at the end |",
            "| Python blocks | 800000 | 801000 |",
        ),
    ),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_number_is_under_its_own_name_in_whatever_order_it_was_kept(
    results: Any, tmp_path: Path, name: str
) -> None:
    result, lines = SAMPLES[name]
    line = json.dumps({"result": result})
    results.run_figure(replace(results.BY_NAME[name], command=("-c", f"print({line!r})")), tmp_path)
    page = results.render(tmp_path)
    assert [row for row in page.splitlines() if row in lines] == list(lines)
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")), sort_keys=True), encoding="utf-8")
    assert set(lines) <= set(results.render(tmp_path).splitlines())


def test_a_rate_at_which_nothing_was_heard_is_shown(results: Any, tmp_path: Path) -> None:
    run = dict.fromkeys(("good_share", "audio_s_per_s", "goodput_audio_s_per_s"), 0.0) | {
        "label": "9 requests/s",
        "first_audio_s": {"p95": None},
        "underruns": {"0": 0.0, "0.1": 0.0, "0.2": 0.0},
        "num_refused": 3,
        "refusal_s": {"p95": 0.01},
    }
    keep(tmp_path, "saturation", {"runs": [run], "claims": []})
    assert "| 9 requests/s | 0 | none | 0 | 0 | 0 | 0 | 0 | 3 | 10 |" in results.render(tmp_path)

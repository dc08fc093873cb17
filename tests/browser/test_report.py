"""Reports as a reader sees them: in a real browser, with the scripts run."""

from __future__ import annotations

import json
import re
from pathlib import Path

from gpt2hpc.evaluation.baselines import BASELINES
from gpt2hpc.run_dir import RunDir
from tests import written_runs
from tests.browser import chromium
from tests.tiny import gpt2hpc
from tests.written_runs import attempt

PREEMPTED = attempt(1, saved_step=60, last_step=60, cause="preempted")
KILLED = attempt(2, first_step=60, saved_step=100, cause="crashed", exit_code=137)
FINISHED = attempt(3, first_step=100, saved_step=200, last_step=200, cause="finished", repeats=35)
HISTORY = (PREEMPTED, KILLED, FINISHED)

PATHS = """
  return Object.fromEntries([...document.querySelectorAll("section.card")].map((card) => [
    card.id, [...card.querySelectorAll("path.line")].map((path) => (path.getAttribute("d").match(/[ML]/g) || []).length)]));
"""
DRAG = """
  const svg = document.querySelector("#chart-loss svg"), box = svg.getBoundingClientRect();
  const point = (kind, share) => svg.dispatchEvent(new PointerEvent(kind, {
    clientX: box.left + 64 + share * (box.width - 78), clientY: box.top + 100, button: 0, pointerId: 1, bubbles: true }));
  const shown = () => [document.body.dataset.domain, document.getElementById("reset").disabled,
    ...["loss", "rate"].map((key) => document.querySelector(`#chart-${key} path.line`).getAttribute("d"))];
  const before = shown();
  point("pointerdown", 0.25); point("pointermove", 0.4); point("pointerup", 0.5);
  const zoomed = shown();
"""


def report(*runs: RunDir, out: Path | None = None) -> Path:
    done = gpt2hpc("report", *(run.path for run in runs), *(["--out", out] if out else []))
    assert done.returncode == 0, done.stderr
    return out or runs[0].report


def test_a_killed_run(killed_run: RunDir, profile: Path) -> None:
    """Every chart has its curve, and the restart is marked in every one."""
    page = report(killed_run)
    seen = chromium.look(page, profile)
    assert seen.console == []
    assert (seen.facts["charts"], seen.facts["restarts"], seen.facts["domain"]) == ("4", "4", "0 12")
    assert "attempt 2 from step 6; before it: ended without a word" in seen.dom
    points = chromium.probe(page, PATHS, profile)
    assert points == {"chart-loss": [12, 3], "chart-rate": [12], "chart-lr": [12], "chart-norm": [12]}


def test_mfu_and_hellaswag_have_charts_too(tmp_path: Path, profile: Path) -> None:
    run = written_runs.write(tmp_path / "run", HISTORY, mfu=0.4, hellaswag_acc_norm=0.29)
    points = chromium.probe(report(run), PATHS, profile)
    assert list(points) == [f"chart-{key}" for key in ("loss", "hella", "rate", "mfu", "lr", "norm")]
    assert all(count >= 11 for counts in points.values() for count in counts)
    seen = chromium.look(run.report, profile)
    assert seen.console == []
    assert seen.facts["restarts"] == "12"
    assert seen.dom.count('class="level"') == len(BASELINES)
    assert "GPT-2 124M 0.29" in seen.dom


def test_a_drag_zooms_all_charts_and_a_double_click_shows_the_whole(tmp_path: Path, profile: Path) -> None:
    run = written_runs.write(tmp_path / "run", HISTORY)
    script = f"""{DRAG}
      svg.dispatchEvent(new MouseEvent("dblclick", {{ bubbles: true }}));
      return [before, zoomed, shown()];
    """
    before, zoomed, after = chromium.probe(report(run), script, profile)
    assert before == after
    assert (before[0], before[1]) == ("0 200", True)
    assert (zoomed[0], zoomed[1]) == ("50 100", False)
    for whole, part in zip(before[2:], zoomed[2:], strict=True):
        assert (whole.count("L"), part.count("L")) == (199, 52)  # and a point beyond each end


def test_a_click_is_no_zoom(tmp_path: Path, profile: Path) -> None:
    script = DRAG.replace('point("pointermove", 0.4); point("pointerup", 0.5)', 'point("pointerup", 0.251)')
    before, after = chromium.probe(
        report(written_runs.write(tmp_path / "run", HISTORY)), f"{script} return [before, zoomed];", profile
    )
    assert before == after


def test_the_pointer_reads_values_off(tmp_path: Path, profile: Path) -> None:
    run = written_runs.write(tmp_path / "run", HISTORY)
    script = f"{DRAG} svg.dispatchEvent(new MouseEvent('dblclick')); point('pointermove', 0.5); "
    told = chromium.probe(
        report(run), f"{script} return document.querySelector('#chart-loss .tip').innerText;", profile
    )
    assert re.sub(r"\s+", " ", told) == (
        "step 100 training loss 3.6567 validation loss 3.6567 attempt 3 from step 100, after: crashed"
    )


def test_scales_smoothing_and_hidden_curves(tmp_path: Path, profile: Path) -> None:
    run = written_runs.write(tmp_path / "run", HISTORY)
    script = """
      const curve = () => document.querySelector("#chart-loss path.line:not(.raw)")?.getAttribute("d");
      const set = (id, change) => {
        const control = document.getElementById(id);
        change(control);
        control.dispatchEvent(new Event("change"));
        return curve();
      };
      const seen = [curve(), set("log-y", (box) => { box.checked = true; }), set("log-x", (box) => { box.checked = true; }),
        set("smooth", (list) => { list.value = "20"; })];
      const raw = document.querySelectorAll("path.raw").length;
      const keys = document.querySelectorAll("#chart-loss .key");
      keys.forEach((key) => key.click());
      return [seen, raw, curve() ?? null];
    """
    seen, raw, hidden = chromium.probe(report(run), script, profile)
    assert len(set(seen)) == 4
    assert not any("NaN" in path or "Infinity" in path for path in seen)
    assert (raw, hidden) == (1, None)


def test_several_runs_are_in_the_same_charts(killed_run: RunDir, tmp_path: Path, profile: Path) -> None:
    other = written_runs.write(tmp_path / "other", HISTORY)
    page = report(killed_run, other, out=tmp_path / "both.html")
    points = chromium.probe(page, PATHS, profile)
    assert points["chart-loss"] == [12, 3, 200, 11]
    assert points["chart-rate"] == [12, 200]
    seen = chromium.look(page, profile)
    assert seen.console == []
    assert seen.facts["restarts"] == "12"  # one and two, in four charts
    assert not killed_run.path.joinpath("both.html").exists()


def test_texts_of_a_run_are_only_text(tmp_path: Path, profile: Path) -> None:
    """In the run's name, a sample, the settings, a job, a node and a cause."""
    evil = "</script></pre><script>document.title = 'mine'</script><img src=x onerror=document.title='mine'>&amp;\u2028"
    ended = attempt(1, saved_step=60, last_step=60, cause=evil, job=evil, nodes=evil)
    run = written_runs.write(tmp_path / evil.replace("/", "") / "<b>run", [ended, FINISHED])
    run.samples.mkdir()
    (run.samples / "step0000100<i>.txt").write_text(evil)
    run.config.write_text(f"data:\n  dir: {json.dumps(evil)}\n")
    seen = chromium.look(report(run), profile)
    assert seen.console == []
    assert seen.facts["charts"] == "4"
    assert "<title>&lt;b&gt;run</title>" in seen.dom
    script = """
      return [document.title, document.scripts.length, document.querySelectorAll("img, i").length,
        document.querySelector("pre.text").textContent];
    """
    found = chromium.probe(run.report, script, profile)
    assert found == ["<b>run", 3, 0, evil]  # the data, the charts, and this question


def test_nothing_is_fetched(tmp_path: Path) -> None:
    text = report(written_runs.write(tmp_path / "run", HISTORY)).read_text()
    assert not re.search(r"""\b(src|href)\s*=|@import|url\((?!#)""", text)
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "default-src 'none'" in text


def test_a_scripts_complaint_is_heard(tmp_path: Path, profile: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html><body data-x='1'><script>document.body.dataset.x = 2; missing()</script></body>")
    seen = chromium.look(page, profile)
    assert seen.facts == {"x": "2"}
    assert len(seen.console) == 1
    assert "missing is not defined" in seen.console[0]


def test_a_policy_that_forbids_the_script_is_heard(tmp_path: Path, profile: Path) -> None:
    page = report(written_runs.write(tmp_path / "run", HISTORY))
    page.write_text(page.read_text().replace('"use strict";', '"use strict"; '))
    seen = chromium.look(page, profile)
    assert any("Content Security Policy" in line for line in seen.console)
    assert "charts" not in seen.facts

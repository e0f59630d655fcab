"""The report as a browser shows it: a real page of a real student, opened without a network."""

import base64
import io
import json
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from policykd import report
from policykd.agents.card import Provenance
from policykd.agents.student import Student, make_student, save_student
from policykd.agents.teacher import Teacher, load_teacher
from policykd.envs.actions import action_names
from policykd.evaluation.costs import measure_costs
from policykd.evaluation.evaluate import Evaluation
from policykd.evaluation.results import about, comparison, entry, judgement, judgement_of_card
from policykd.io.files import BadFile
from policykd.legacy.trainer import Round
from policykd.report import compared_actions, filmed, newest_comparison, write_comparison_report, write_report
from policykd.report.charts import Games, Line, Point, axis_over, bin_edges, cost_chart, games_chart, line_chart
from policykd.report.data import Actions, Comparison, Report, read_run
from policykd.report.markup import blocks, tag
from policykd.report.page import page
from policykd.report.text import verdict

ROOT = Path(__file__).parents[2]
INJECTED = "<script>window.owned = 1</script><img src=x onerror='window.owned = 1'>\"&"
NAME = "<img src=x onerror=alert(1)> & co"
WHO = ("teacher", "student", "random")


def a_round(index: int) -> Round:
    """Returns what a round may measure; one has numbers that are not finite."""
    better = 0.5**index
    return Round(
        index=index, num_states=320 * (index + 1), num_updates=20 * (index + 1), loss=better, kl=better,
        action_agreement=1.0 - better / 2, new_kl=float("nan") if index == 1 else 2 * better,
        new_action_agreement=1.0 - better / 1.5, teacher_entropy=0.7, grad_norm=1.0, learning_rate=2e-3 * better,
        student_fraction=0.5, num_nonfinite_states=0, num_nonfinite_updates=0, episodes=[], student_return=None,
        scheduled={}, terms={}, teacher_disagreement=None, teacher_weights=(), state_weight=None, collect_seconds=1.0,
        label_seconds=1.0, fit_seconds=1.0, seconds=2.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(game="Pong")


@pytest.fixture(scope="module")
def student() -> Student:
    return make_student("1%", 6, seed=0).eval()


@pytest.fixture(scope="module")
def results(teacher: Teacher, student: Student) -> dict[str, Any]:
    """What scripts/distill_atari.py writes: real costs, the teacher's real games, drawn ones of the others."""
    generator = np.random.default_rng(0)
    drawn = {"student": (-8, 8, 40), "random": (-21, -18, 32)}
    protocols: dict[str, dict[str, Any]] = {who: {} for who in WHO}
    for protocol in ("noop_sampled", "sticky_greedy"):
        protocols["teacher"][protocol] = judgement_of_card(asdict(teacher.card.protocols[protocol]))
        for who, (low, high, num) in drawn.items():
            returns = generator.integers(low, high, num).astype(float).tolist()
            protocols[who][protocol] = judgement(Evaluation(returns, [1600] * num, num_truncated=int(who == "random")))
    obs = torch.zeros((1, *teacher.obs_shape), dtype=torch.uint8)
    costs = measure_costs({"teacher": teacher.net, "student": student}, obs, rounds=1, calls_per_round=5)
    rows: dict[str, Any] = {who: entry(costs.get(who), protocols[who]) for who in WHO}
    more = {"num_states_labelled": 960, "num_updates": 60, "wall_seconds": {"fit": 3.0}, "versions": {"policykd": "1"}}
    return {**rows, "comparison": comparison(rows, "Pong"), **more, "command": f"distill --name '{INJECTED}'"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, teacher: Teacher, student: Student, results: dict[str, Any]) -> Path:
    """A finished run, and a comparison of compressors beside it, whose texts all try to be markup."""
    folder = tmp_path_factory.mktemp("runs") / "Pong" / NAME
    save_student(student, folder, Provenance(game="Pong", teacher=teacher.record))
    settings = {"game": "Pong", "teacher": about(teacher), "loss": INJECTED, "teacher_weights": "equal"}
    config = {"settings": settings, "teacher_argument": "auto", "machine": {"device": INJECTED}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(asdict(a_round(k))) + "\n" for k in range(4)))
    np.savez(folder / "evaluations.npz", num_updates=np.array([40]), results=np.full((1, 16), -3.0))
    families = {"teacher": "teacher", "student": "distilled", "random": "random"}
    extra = {
        "origin": "distillation",
        "num_macs_dense": 1,
        "kl": 0.1,
        "agreement": 0.9,
        "latency_p99_microseconds": 99.0,
    }
    rows = {who: {**results[who], "label": INJECTED, "family": families[who], **extra} for who in WHO}
    (folder.parent / "compression").mkdir()
    (folder.parent / "compression" / "compression.json").write_text(
        json.dumps({"game": "Pong", "teacher": about(teacher), "rows": rows})
    )
    write_report(folder, results, student, teacher, "Pong", seconds=2.0, num_states=256)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = (os.environ.get("POLICYKD_BROWSER"), "chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        assert os.environ.get("CI") != "true", "no Chromium: install it, or say where it is with POLICYKD_BROWSER"
        pytest.skip("no Chromium on the PATH; POLICYKD_BROWSER says where it is")
    with sync_playwright() as playwright:
        args = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        with playwright.chromium.launch(executable_path=path, args=args) as browser:
            yield browser


Visit = Callable[..., Page]


@pytest.fixture(scope="module")
def visit(run: Path, browser: Browser) -> Iterator[Visit]:
    """Opens the page in a window of its own; a message, an error or a request for anything else fails the test."""
    opened = []

    def visit(width: int, height: int, **how: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **how)
        opened.append(context)
        url, wrong = (run / "report.html").as_uri(), list[str]()
        context.route("**/*", lambda route: route.continue_() if route.request.url == url else route.abort())
        shown = context.new_page()
        shown.on("console", lambda message: wrong.append(message.text))
        shown.on("pageerror", lambda error: wrong.append(str(error)))
        shown.on("dialog", lambda dialog: wrong.append(dialog.message))
        asked = lambda request: None if request.url.startswith("data:") else wrong.append(request.url)  # noqa: E731
        shown.on("request", asked)
        shown.goto(url)
        assert wrong == [url]
        return shown

    yield visit
    for context in opened:
        context.close()


@pytest.fixture(scope="module")
def desktop(visit: Visit) -> Page:
    return visit(1280, 900)


@pytest.fixture(scope="module")
def phone(visit: Visit) -> Page:
    return visit(360, 800, is_mobile=True, has_touch=True, device_scale_factor=2)


def test_the_file_is_small_and_names_nothing_outside(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert len(text) < 3_000_000
    without_pictures = re.sub(r"data:[^\"]*", "", text)
    assert not re.search(r"https?://|//[a-z]|url\(|@import|<script|<link", without_pictures)
    assert "default-src 'none'" in text.replace("&#x27;", "'")


def test_every_section_is_there_and_its_link_leads_to_it(desktop: Page) -> None:
    links = desktop.eval_on_selector_all("nav a", "links => links.map(a => [a.textContent, a.hash])")
    names = [name for name, _ in links]
    assert names[:4] == ["Result", "Film", "Every game", "Cost and return"]
    assert names[4:] == ["Other compressors", "Learning", "Actions", "How it was made"]
    for name, anchor in links:
        assert desktop.text_content(f"{anchor} h2") == name


def test_the_table_says_what_the_results_say(desktop: Page, results: dict[str, Any]) -> None:
    rows: list[list[str]] = desktop.eval_on_selector_all(
        "#result tbody tr", "rows => rows.map(row => [...row.children].map(cell => cell.textContent))"
    )
    minus = str.maketrans("\N{MINUS SIGN}", "-")
    told = [[cell.translate(minus) for cell in row] for row in rows]
    assert (
        told[1][1:3]
        == [f"{results[who]['num_parameters']:,}" for who in ("teacher", "student")]
        == ["1,687,206", "16,446"]
    )
    least = [results[who]["latency_min_microseconds"] for who in WHO[:2]]
    for column, time in enumerate(least):
        assert told[4][1 + column].endswith(f"\N{MICRO SIGN}sleast {time:,.0f} \N{MICRO SIGN}s")
    assert told[4][3].endswith(f"%of the least {least[1] / least[0]:.1%}")
    sections = {row[0]: number for number, row in enumerate(told) if len(row) == 1}
    for name, protocol in (
        ("No-op starts, sampled actions", "noop_sampled"),
        ("Sticky actions, greedy play", "sticky_greedy"),
    ):
        first = sections[name] + 1
        compared = results["comparison"][protocol]
        teacher, student, random = (results[who]["protocols"][protocol] for who in WHO)
        for row, column in ((teacher, 1), (student, 2), (random, 4)):
            low, high = row["interval"]
            assert told[first][column] == f"{row['mean']:.2f}[{low:.2f}, {high:.2f}]"
            assert told[first + 2][column] == f"{row['num_episodes']}"
            assert told[first + 3][column] == f"{row['num_distinct']}"
        low, high = compared["difference_interval"]
        assert told[first][3] == f"{compared['difference_to_teacher']:+.2f}[{low:+.2f}, {high:+.2f}]"
        assert told[first + 4][2] == f"{compared['teacher_normalised']:.1%}"
    sampled = "no-op starts, sampled actions"
    assert "below the teacher" in (desktop.text_content(".verdict") or "")
    assert desktop.text_content(".warning") == f"Random play, {sampled}, games that a time limit ended: 1."


def test_nothing_is_wider_than_a_phone_and_its_table_is_reached_by_scrolling(phone: Page) -> None:
    assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth")
    box = phone.locator("#result .scroll")
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    last = phone.locator("#result tbody:last-child tr:last-child td:last-child")
    assert not last.evaluate("cell => cell.getBoundingClientRect().right <= innerWidth")
    box.evaluate("box => { box.scrollLeft = box.scrollWidth; }")
    assert last.evaluate("cell => cell.getBoundingClientRect().right <= innerWidth")
    first = phone.locator("#result tbody:last-child tr:last-child > :first-child")
    assert first.evaluate("cell => cell.getBoundingClientRect().left >= 0")  # the names stay


def test_pictures_stand_side_by_side_where_there_is_room(desktop: Page, phone: Page) -> None:
    tops = "figures => figures.slice(0, 2).map(figure => figure.getBoundingClientRect().top)"
    for shown, is_side_by_side in ((desktop, True), (phone, False)):
        first, second = shown.eval_on_selector_all("#learning figure", tops)
        assert (first == second) is is_side_by_side
    assert desktop.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_no_table_is_wider_than_its_box_where_there_is_room(
    desktop: Page, browser: Browser, results: dict[str, Any]
) -> None:
    """Neither those of the run, nor those of 18 actions and of long labels."""
    wide = "all => all.filter(box => box.scrollWidth > box.clientWidth).map(box => box.ariaLabel)"
    assert desktop.eval_on_selector_all(".scroll", wide) == []
    names = action_names("Seaquest")
    seen = Actions(names, [1 / 18] * 18, [1 / 18] * 18, [[9] * 18] * 18, 0.1)
    costs = {"num_macs_dense": 9_346_048, "kl": 2.3288, "agreement": 0.963, "latency_p99_microseconds": 1203.0}
    costs |= {"updates_in_all": 6600, "agreement_with_float": 0.998, "num_macs": 3_234_567}
    born = {"teacher": "teacher", "student": "distillation", "pruned": "teacher", "random": ""}
    label = "structured pruning to 7%, then int8 weights"
    rows = {who: results.get(who, results["student"]) | costs | {"label": label, "origin": born[who]} for who in born}
    rows = {who: row | {"family": "random" if who == "random" else "structured"} for who, row in rows.items()}
    rows["random"]["num_parameters"] = 0
    shown = browser.new_page(viewport={"width": 1280, "height": 900})
    shown.set_content(page(Report("Seaquest", "x", results, actions=seen, comparison=Comparison(rows))))
    assert shown.locator(".scroll").count() == 6
    assert shown.eval_on_selector_all(".scroll", wide) == []
    headings = shown.eval_on_selector_all("#other-compressors h3", "all => all.map(h => h.textContent)")
    assert headings[:2] == ["No-op starts, sampled", "Sticky 0.25, greedy"]
    first = shown.eval_on_selector_all("#actions figure", "all => all.map(f => f.getBoundingClientRect().left)")
    assert first[0] == first[1]  # each takes the whole width
    shown.close()


def test_a_keyboard_scrolls_the_table(phone: Page) -> None:
    box = phone.locator("#result .scroll")
    box.evaluate("box => { box.scrollLeft = 0; }")
    phone.keyboard.press("Tab")
    assert phone.evaluate("document.activeElement.hash") == "#result"
    box.focus()
    assert phone.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    phone.keyboard.press("ArrowRight")
    phone.wait_for_timeout(300)
    assert box.evaluate("box => box.scrollLeft") > 0


def test_pictures_are_decoded_and_the_film_moves(desktop: Page, run: Path) -> None:
    pictures = desktop.eval_on_selector_all(
        "img", "all => Promise.all(all.map(i => i.decode().then(() => [i.naturalWidth, i.alt])))"
    )
    assert len(pictures) == 3  # the film, its poster, the Pareto picture
    assert all(width > 300 and len(alt) > 20 for width, alt in pictures)
    source = desktop.get_attribute("img.moving", "src") or ""
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as film:
        assert (film.format, film.n_frames) == ("WEBP", 15)  # type: ignore[attr-defined]
        film.seek(14)
        last = np.asarray(film.convert("RGB"))
        film.seek(0)
        assert (np.asarray(film.convert("RGB")) != last).any()
    named = desktop.eval_on_selector_all("svg", "all => all.map(s => s.getAttribute('aria-label').length)")
    assert len(named) == 11
    assert min(named) > 30


def test_the_film_can_be_held_and_is_still_for_who_wants_no_motion(visit: Visit, desktop: Page) -> None:
    moving, poster = desktop.locator("img.moving"), desktop.locator("img.poster")
    assert (moving.is_visible(), poster.is_visible()) == (True, False)
    desktop.get_by_role("checkbox", name="Pause").check()
    assert (moving.is_visible(), poster.is_visible()) == (False, True)
    desktop.get_by_role("checkbox", name="Pause").uncheck()
    calm = visit(1280, 900, reduced_motion="reduce")
    assert (calm.locator("img.moving").is_visible(), calm.locator("img.poster").is_visible()) == (False, True)
    calm.get_by_role("checkbox", name="Play").check()
    assert calm.locator("img.moving").is_visible()


CONTRASTS = """() => {
  const channels = text => {
    const numbers = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith('color(srgb') ? numbers.map((n, i) => i < 3 ? n * 255 : n) : numbers;
  };
  const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const c = channels(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const says = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!says || ['title', 'style'].includes(e.tagName.toLowerCase()) || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const [a, b] = [channels(e.ownerSVGElement ? style.fill : style.color), behind(e)].map(luminance);
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent.slice(0, 40)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(scheme: str, visit: Visit) -> None:
    """WCAG 2.2, 1.4.3 (AA): 4.5 to 1."""
    shown = visit(1280, 900, color_scheme=scheme)
    contrasts: list[tuple[float, str]] = shown.evaluate(CONTRASTS)
    assert len(contrasts) > 200
    assert min(contrasts)[0] >= 4.5, min(contrasts)
    background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is (scheme == "light")


def test_on_paper_everything_is_there(visit: Visit) -> None:
    printed = visit(680, 900, color_scheme="dark")  # the width of A4 between its margins
    content = printed.pdf(prefer_css_page_size=True)
    assert 4 <= len(re.findall(rb"/Type /Page\b", content)) <= 9
    width, height = map(float, re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", content)[0])
    assert (round(width), round(height)) == (595, 842)
    printed.emulate_media(media="print")
    assert printed.eval_on_selector_all("section", "all => all.every(s => s.getBoundingClientRect().height > 50)")
    assert printed.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert printed.eval_on_selector_all(".scroll", "all => all.every(box => box.scrollWidth <= box.clientWidth)")
    assert printed.locator("img.poster").is_visible()
    assert not printed.locator("img.moving").is_visible()
    assert not printed.locator("nav").is_visible()
    assert printed.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert printed.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_a_text_that_looks_like_markup_is_text(desktop: Page) -> None:
    assert desktop.title() == f"Pong: {NAME}"
    assert desktop.text_content("header .over") == f"A distilled policy: {NAME}"
    assert desktop.text_content("pre") == f"distill --name '{INJECTED}'"
    assert desktop.evaluate("[window.owned === undefined, document.scripts.length]") == [True, 0]
    assert desktop.locator("dd", has_text=INJECTED).count() == 2
    assert desktop.locator("#other-compressors tbody th", has_text=INJECTED).count() == 3 * 3  # costs, two protocols


GAMES = {
    "above": ([20.0] * 30, "the student plays above the teacher (+10.00"),
    "below": ([0.0] * 30, "the student plays below the teacher"),
    "within": ([10.0, 10.5, 9.5] * 10, "within 0.1"),
    "cannot tell": ([-20.0, 40.0] * 15, "30 games cannot tell the student from the teacher"),
}


@pytest.mark.parametrize("word", GAMES)
def test_the_verdict_claims_what_the_interval_supports(word: str) -> None:
    returns, sentence = GAMES[word]
    teacher = [10.0, 10.5, 9.5] * 20

    def judged(student: list[float]) -> dict[str, Any]:
        played = {"teacher": teacher, "student": student, "random": [-20.0] * 32}
        rows = {
            who: {
                "protocols": {p: judgement(Evaluation(r, [1] * len(r), 0)) for p in ("noop_sampled", "sticky_greedy")}
            }
            for who, r in played.items()
        }
        return {**rows, "comparison": comparison(rows, "Pong")}

    said = verdict(judged(returns), "noop_sampled")
    assert said[0] == word
    assert sentence in said[1]
    few = verdict(judged(returns[:6]), "noop_sampled")
    assert few[0] == "cannot tell"
    assert "6 games cannot tell" in few[1]


def test_within_is_never_smaller_than_the_interval(results: dict[str, Any]) -> None:
    row = {"difference_to_teacher": 0.0, "difference_interval": [-0.9701, 0.5]}
    said = verdict({**results, "comparison": {"noop_sampled": row}}, "noop_sampled")
    assert "within 0.98 points" in said[1]


def test_actions_are_those_of_both_policies(teacher: Teacher, student: Student, desktop: Page) -> None:
    def always_left(obs_BCHW: Tensor) -> Tensor:
        return torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0, 0.0]).repeat(len(obs_BCHW), 1)

    seen = compared_actions(always_left, replace(teacher, net=student), "Pong", 64, seed=0)  # type: ignore[arg-type]
    counts = np.array(seen.best_AA)
    assert counts[:, 3].sum() == counts.sum() == 64
    assert seen.student_A[3] == pytest.approx(np.exp(9.0) / (np.exp(9.0) + 5.0))
    assert sum(seen.teacher_A) == pytest.approx(1.0, abs=1e-5)
    assert max(seen.teacher_A) < 0.9
    assert list(seen.names) == ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"]
    text = desktop.text_content("#actions") or ""
    said = re.search(r"same in ([\d.]+)% of 256 states, the mean KL divergence is ([\d.]+)", text)
    assert said
    assert float(said[1]) < 90.0  # the page is of a student that has learned nothing
    assert float(said[2]) > 0.1


def test_a_film_too_large_is_cut(teacher: Teacher, student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_BYTES", 8_000)
    film = filmed(student, teacher, "Pong", 1.0, seed=0)
    assert len(film.moving) <= 8_000
    with Image.open(io.BytesIO(film.moving)) as shown:
        assert film.seconds == pytest.approx(shown.n_frames * 2 / 15, abs=0.002)  # type: ignore[attr-defined]
        assert film.seconds < 1.0


def test_results_of_something_else_leave_no_page(
    run: Path, tmp_path: Path, results: dict[str, Any], student: Student, teacher: Teacher
) -> None:
    broken = {**results, "student": {**results["student"], "num_parameters": "many"}}
    with pytest.raises(BadFile, match="its results are not those of a run"):
        write_report(tmp_path, broken, student, teacher, "Nothing that could be played", num_states=8, seconds=1.0)
    shutil.copytree(run.parent / "compression", tmp_path / "Pong" / "compression")
    damaged = tmp_path / "Pong" / "compression"
    (damaged / "compression.json").write_text('{"rows": {"teacher": {}}}')
    with pytest.raises(BadFile, match=r"compression\.json: not what a comparison writes"):
        write_comparison_report(damaged)
    assert not (damaged / "report.html").exists()


def test_a_damaged_comparison_is_left_out(
    tmp_path: Path, results: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "compression.json").write_text("{")
    (tmp_path / "folder" / "compression.json").mkdir(parents=True)
    assert newest_comparison(tmp_path / "run", results, "") is None
    said = capsys.readouterr().err
    assert said.count("compression.json: left out of the report") == said.count("\n") == 2


def test_only_a_comparison_of_the_same_teacher_is_shown(
    run: Path, results: dict[str, Any], student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest is of another one: its rows say nothing about this run, whose file is as large as it is."""
    drawn: list[dict[str, Any]] = []
    monkeypatch.setattr(report, "draw_pareto", lambda rows, to, *, highlight: drawn.append(rows[highlight]))
    save_student(student, tmp_path / "run")
    card = load_teacher(game="Pong").sha256
    for number, (name, sha256) in enumerate({"ours": card, "theirs": "aa"}.items()):
        shutil.copytree(run.parent / "compression", tmp_path / name)
        path = tmp_path / name / "compression.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"teacher": {"sha256": sha256}}))
        os.utime(path, (number, number))
    found = newest_comparison(tmp_path / "run", results, card)
    assert found is not None
    assert found.source == "ours"
    assert [row["label"] for row in drawn] == ["this run: run"]
    assert drawn[0]["num_bytes"] == (tmp_path / "run" / "student.safetensors").stat().st_size
    assert drawn[0]["num_bytes"] > 4 * drawn[0]["num_parameters"]
    assert newest_comparison(tmp_path / "run", results, "bb") is None


def test_results_from_before_there_were_least_times_are_shown(results: dict[str, Any]) -> None:
    older = {who: {k: v for k, v in results[who].items() if "least" not in k} for who in WHO}
    bare = page(Report("Pong", "older", {**results, **older}))
    assert "of the least" not in bare
    assert "Latency, one state" in bare


def test_pages_without_a_part_have_no_empty_place_for_it(results: dict[str, Any], run: Path) -> None:
    bare = page(Report("Pong", "bare", results))
    assert all(name not in bare for name in ("Learning", "Actions", "Film", "Other compressors"))
    path = write_comparison_report(run.parent / "compression")
    text = path.read_text()
    path.unlink()
    assert "what compression costs" in text
    assert "Pareto picture" not in text  # there is none beside it


def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["report.py", *args])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "report.py"), run_name="__main__")
    assert isinstance(ended.value.code, int)
    said = capfd.readouterr()
    return ended.value.code, said.out, said.err


def test_the_command_writes_the_page_of_an_older_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "Pong" / "old"
    shutil.copytree(run, old, ignore=shutil.ignore_patterns("report.html"))
    card = (old / "student.json").read_text()
    (old / "student.json").write_text(card.replace("bundled:ppo", "moved.zip"))
    how = ["--teacher", "bundled:ppo", "--seconds", "1", "--threads", "1"]
    code, out, err = command(monkeypatch, capfd, str(old), *how)
    assert (code, err) == (0, "")
    assert str(old / "report.html") in out
    assert "cannot tell" not in (old / "report.html").read_text()
    assert {p.name for p in old.iterdir()} - {p.name for p in run.iterdir()} == set()


ERRORS: dict[str, tuple[dict[str, str], int, str]] = {
    "an unfinished run": ({"config.json": "{}"}, 2, "holds no results.json"),
    "damaged results": ({"results.json": "{"}, 3, "results.json: damaged"),
    "results of something else": ({"results.json": "[]"}, 3, "results.json: not what a run writes"),
    "a configuration of something else": (
        {"results.json": "{}", "config.json": '{"settings": {"teacher": "ppo"}}'},
        3,
        "config.json: not what a run writes",
    ),
    "a hash that is none": (
        {"results.json": "{}", "config.json": '{"settings": {"teacher": {"sha256": 5}}}'},
        3,
        "config.json: not what a run writes",
    ),
    "an argument that is none": (
        {"results.json": "{}", "config.json": '{"teacher_argument": [1]}'},
        3,
        "config.json: not what a run writes",
    ),
    "a mean that is none": ({"results.json": '{"student": {"mean": NaN}}'}, 3, "results.json: student.mean is nan"),
    "a return that is none": ({"results.json": '{"a": [0, [1e999]]}'}, 3, "results.json: a.1.0 is inf"),
    "a teacher that is none": (
        {
            "results.json": "{}",
            "student.json": '{"game": "Pong", "teacher": {"ref": [1], "revision": "", "sha256": 5}}',
        },
        3,
        "student.json: does not say who its teacher was",
    ),
    "another teacher": (
        {
            "results.json": "{}",
            "student.json": '{"game": "Pong", "teacher": {"ref": "bundled:ppo", "revision": "", "sha256": "0"}}',
        },
        3,
        "any more; say where it is: --teacher REF",
    ),
    "no student": ({"results.json": "{}"}, 3, "student.json: cannot be read"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    files, expected, reason = ERRORS[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    code, _, err = command(monkeypatch, capfd, str(tmp_path), "--threads", "1")
    assert (code, err.count("\n")) == (expected, 1), err
    assert reason in err
    assert not (tmp_path / "report.html").exists()


def test_a_flag_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--secods", "3"], ["run", "--seed", "x"], ["run", "--seed", "99999999999999999999999"]):
        code, _, err = command(monkeypatch, capfd, *wrong)
        assert (code, err.count("\n")) == (2, 1), err


def test_markup_is_escaped_unless_it_was_made_here() -> None:
    assert tag("b", "<i>", tag("i", "&"), title='"') == '<b title="&quot;">&lt;i&gt;<i>&amp;</i></b>'
    assert tag("img", alt="x", hidden=True, open=False) == '<img alt="x" hidden>'
    made = "".join(blocks("## A <b>\n\n| a | b |\n|---|---|\n| <i> | -1.00 [-2.00, +0.00] |\n\n- <u>\n"))
    assert "<b>" not in made
    assert "<u>" not in made
    assert "<td>\N{MINUS SIGN}1.00<small>[\N{MINUS SIGN}2.00, +0.00]</small></td>" in made


@given(st.floats(1e-6, 1e9), st.floats(1.01, 1e6), st.booleans())
def test_an_axis_has_a_few_ticks_inside(low: float, factor: float, is_log: bool) -> None:
    axis = axis_over([low, low * factor], 0.0, 100.0, is_log=is_log)
    assert 2 <= len(axis.ticks) <= 8
    assert all(axis.low * (1 - 1e-9) <= tick <= axis.high * (1 + 1e-9) for tick in axis.ticks)
    assert 0.0 <= axis(low) < axis(low * factor) <= 100.0


@given(st.integers(2, 3000), st.sampled_from([1, 20, 250]), st.integers(-21, 21))
def test_every_bar_holds_as_many_returns_as_the_others(num: int, step: int, first: int) -> None:
    """Whatever a game can bring once each; only the last bar may be short of some."""
    returns = [float(first + step * k) for k in range(num)]
    counts, _ = np.histogram(returns, edges := bin_edges(returns))
    assert len(counts) <= 64
    assert set(counts[:-1].tolist()) <= {counts[0]}
    assert 0 < counts[-1] <= counts[0]
    assert counts.sum() == num
    assert {round((r - edges[0]) / step % 1, 6) for r in returns} == {0.5}


def test_bars_of_pong_are_all_of_one_height() -> None:
    """0 to 42 once each: 43 returns are 43 bars."""
    drawn = games_chart([Games("x", "student", [float(r) for r in range(43)], 21.0, 20.0, 22.0)], "x")
    assert len(re.findall("<rect", drawn)) == 43
    assert len(set(re.findall(r'<rect [^>]*height="([\d.]+)"', drawn))) == 1
    assert bin_edges([3.0, 3.0]).tolist() == [2.5, 3.5]
    assert len(bin_edges([0.25, 0.5])) > 2


def test_a_point_of_return_is_seen_at_the_top_of_the_costs() -> None:
    """Random play is 40 points away and the student one: on an even axis they would be one dot."""
    points = [Point("teacher", 1e6, 19.1, 18.6, 19.5), Point("student", 1e5, 18.1, 17.6, 18.5)]
    drawn = cost_chart(points, -20.7, "x", x_label="x", x_format=str)
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)" r="5"', drawn)]
    level = float(re.findall(r'<line x1="46" x2="348" y1="([\d.]+)" y2="[\d.]+" class="level', drawn)[0])
    assert 15 < heights[1] - heights[0] < 60  # evenly it would be 4
    assert heights[1] < level < 196
    low = cost_chart([points[0], Point("student", 1e5, -20.7, -21.0, -20.5)], -20.7, "x", x_label="x", x_format=str)
    assert float(re.findall(r'y="([\d.]+)"[^>]*class="name">student', low)[0]) < 196  # above the ticks


def test_a_number_that_is_none_leaves_a_gap() -> None:
    line = Line("x", "student", [1.0, 2.0, 3.0, 4.0], [1.0, float("nan"), 2.0, 3.0])
    drawn = line_chart([line], "x", x_label="x", x_format=str, y_format=str)
    assert drawn.count("<polyline") == 2
    assert drawn.count("<circle") == 3
    assert "nan" not in drawn


def test_a_run_inside_reinforcement_learning_has_tensorboards_curves(tmp_path: Path, results: dict[str, Any]) -> None:
    with SummaryWriter(str(tmp_path)) as board:
        for step in (-10, 0):
            board.add_scalar("offline/teacher_kl", 2.0 + step / 10, step)
        for step in (256, 512):
            board.add_scalar("train/teacher_kl", 256 / step, step)
    read = read_run(tmp_path, results)
    assert read.scalars == {"offline/teacher_kl": [(-10, 1.0), (0, 2.0)], "train/teacher_kl": [(256, 1.0), (512, 0.5)]}
    text = page(read)
    assert "nats, over agent steps. Last: minibatches as they are learned from: 0.5, before, on the teacher" in text
    assert "Score of games on the way" not in text  # none ended
    (tmp_path / "metrics.jsonl").write_text("")
    assert read_run(tmp_path, results).scalars == {}


def test_a_run_without_curves_is_read(tmp_path: Path, results: dict[str, Any]) -> None:
    read = read_run(tmp_path, results)
    assert (read.rounds, read.evaluations, read.comparison) == ([], [], None)
    (tmp_path / "evaluations.npz").write_bytes(b"PK")
    with pytest.raises(BadFile, match=r"evaluations\.npz: damaged"):
        read_run(tmp_path, results)

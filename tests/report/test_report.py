"""The report as a browser shows it: a real page of a real student, opened without a network."""

import base64
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from policykd import report
from policykd.agents.card import Provenance
from policykd.agents.student import Student, make_student, save_student
from policykd.agents.teacher import Teacher, load_teacher
from policykd.cli.main import execute
from policykd.compression.comparison import Comparison, Row
from policykd.compression.fine_tuning import ComparisonSettings
from policykd.envs.emulators import action_names
from policykd.evaluation.costs import measure_costs
from policykd.evaluation.evaluate import PROTOCOLS, Evaluation, ProtocolName
from policykd.evaluation.results import (
    PolicyResult,
    ProtocolResult,
    compare_with_teacher,
    protocols_of_card,
    summarise_episodes,
)
from policykd.io.files import BadFile
from policykd.io.typed import write_json
from policykd.report import ReportOptions, compare_actions, render_film
from policykd.report.compressors import ComparedMethods, newest_comparison
from policykd.report.page import ActionComparison, RunFiles, read_run, run_page, verdict
from policykd.runs.config import Settings
from policykd.runs.folder import Machine, RunRecord, RunResult, write_run_config

INJECTED = "<script>window.owned = 1</script><img src=x onerror='window.owned = 1'>\"&"
NAME = "<img src=x onerror=alert(1)> & co"
ROLES = ("teacher", "student", "random")


def played(returns: list[float], num_truncated: int = 0) -> dict[ProtocolName, ProtocolResult]:
    """Returns the same episodes under every protocol."""
    result = summarise_episodes(Evaluation(tuple(returns), (1600,) * len(returns), num_truncated))
    return dict.fromkeys(PROTOCOLS, result)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(game="Pong")


@pytest.fixture(scope="module")
def student() -> Student:
    return make_student("1%", 6, seed=0).eval()


@pytest.fixture(scope="module")
def results(teacher: Teacher, student: Student) -> RunResult:
    """Real costs, the teacher's real games, and drawn ones of the others."""
    generator = np.random.default_rng(0)
    nets: dict[str, Any] = {"teacher": teacher.net, "student": student}
    obs = torch.zeros((1, *teacher.obs_shape), dtype=torch.uint8)
    costs = measure_costs(nets, obs)
    rows = {
        "teacher": PolicyResult(protocols=protocols_of_card(teacher), **vars(costs["teacher"])),
        "student": PolicyResult(
            protocols=played(generator.integers(-8, 8, 40).astype(float).tolist()), **vars(costs["student"])
        ),
        "random": PolicyResult(
            protocols=played(generator.integers(-21, -18, 32).astype(float).tolist(), num_truncated=1)
        ),
    }
    return RunResult(
        teacher=rows["teacher"],
        student=rows["student"],
        random=rows["random"],
        comparison=compare_with_teacher(rows["student"], rows["teacher"], rows["random"], "Pong"),
        num_states_labelled=960,
        num_updates=60,
        wall_seconds={"train": 3.0},
        versions={"policykd": "1"},
        command=f"distill --name '{INJECTED}'",
    )


@pytest.fixture(scope="module")
def comparison(results: RunResult, teacher: Teacher) -> Comparison:
    settings = ComparisonSettings("Pong", teacher.sha256, INJECTED)
    names = {"teacher": "teacher", "student": INJECTED, "random": "random"}
    rows = {
        role: Row(recipe=name, family=name, settings=settings, **vars(getattr(results, role)))
        for role, name in names.items()
    }
    return Comparison(settings, rows, INJECTED, {"policykd": "1"})


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    teacher: Teacher,
    student: Student,
    results: RunResult,
    comparison: Comparison,
) -> Path:
    """A finished run, with a comparison of compression methods next to it, whose texts all try to be markup."""
    folder = tmp_path_factory.mktemp("runs") / "Pong" / NAME
    save_student(student, folder, Provenance(game="Pong", teacher=teacher.record))
    settings: Settings = {"game": "Pong", "loss": INJECTED, "teacher_weights": "equal"}
    machine = Machine(device=INJECTED, threads=1)
    write_run_config(folder, RunRecord(subcommand="distill", settings=settings, machine=machine))
    with SummaryWriter(str(folder)) as board:
        for step in range(20, 100, 20):
            board.add_scalar("data/n_states", 16 * step, step)
            board.add_scalar("data/new_kl", float("nan") if step == 40 else 2.0 / step, step)
            board.add_scalar("train/kl", 1.0 / step, step)
            board.add_scalar("train/action_agreement", 1.0 - 1.0 / step, step)
            board.add_scalar("train/learning_rate", 2e-3 / step, step)
        board.add_scalar("eval/mean_reward", -3.0, 40)
    (folder.parent / "compression").mkdir()
    write_json(folder.parent / "compression" / "compression.json", comparison)
    report.write_report(folder, results, student, teacher, ReportOptions(seconds=2.0, num_states=256))
    write_json(folder / "results.json", results)
    return folder


@pytest.fixture(scope="module")
def files(run: Path) -> RunFiles:
    return read_run(run)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = (os.environ.get("POLICYKD_BROWSER"), "chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        assert os.environ.get("CI") != "true", "Chromium not found: install it, or give its path in POLICYKD_BROWSER"
        pytest.skip("no Chromium on the PATH or in POLICYKD_BROWSER")
    with sync_playwright() as playwright:
        args = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        with playwright.chromium.launch(executable_path=path, args=args, timeout=300_000) as browser:
            yield browser


Visit = Callable[..., Page]


@pytest.fixture(scope="module")
def visit(run: Path, browser: Browser) -> Iterator[Visit]:
    """Opens the page in a window of its own; a message, an error or a request for anything else fails the test."""
    opened = []

    def visit(width: int, height: int, **how: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, **how)
        context.set_default_timeout(300_000)  # for machines that do something else too
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
    assert len(without_pictures) < 150_000
    assert not re.search(r"https?://|//[a-z]|url\((?!#)|@import|<script|<link", without_pictures)
    assert "default-src 'none'" in text
    assert not re.search(r"#00ff0\d", text)  # every placeholder has become a variable of the style sheet


def test_the_same_run_is_the_same_page(files: RunFiles) -> None:
    assert run_page(files) == run_page(files)


def test_every_section_is_there_and_its_link_leads_to_it(desktop: Page) -> None:
    links = desktop.eval_on_selector_all("nav a", "links => links.map(a => [a.textContent, a.hash])")
    names = [name for name, _ in links]
    assert names[:4] == ["Result", "Film", "Every game", "Cost and return"]
    assert names[4:] == ["Other compressors", "Learning", "Actions", "How it was made"]
    for name, anchor in links:
        assert desktop.text_content(f"{anchor} h2") == name


def test_the_table_has_the_numbers_of_the_results(desktop: Page, results: RunResult) -> None:
    rows: list[list[str]] = desktop.eval_on_selector_all(
        "#result tbody tr", "rows => rows.map(row => [...row.children].map(cell => cell.textContent))"
    )
    shown = [[cell.replace("\N{MINUS SIGN}", "-") for cell in row] for row in rows]
    assert shown[1][1:3] == ["1,687,206", "16,446"]
    assert shown[5][1] == f"{results.teacher.latency_min_microseconds:,.0f} µs"
    sections = {row[0]: number for number, row in enumerate(shown) if len(row) == 1}
    for name, protocol in (
        ("No-op starts, sampled actions", "noop_sampled"),
        ("Sticky actions, greedy play", "sticky_greedy"),
    ):
        first = sections[name] + 1
        compared = results.comparison[protocol]  # type: ignore[index]
        for role, column in (("teacher", 1), ("student", 2), ("random", 4)):
            row = getattr(results, role).protocols[protocol]
            low, high = row.interval
            assert shown[first][column] == f"{row.mean:.2f}[{low:.2f}, {high:.2f}]"
            assert shown[first + 2][column] == f"{row.num_episodes}"
            assert shown[first + 3][column] == f"{row.num_distinct}"
        low, high = compared.difference_interval
        assert shown[first][3] == f"{compared.difference_to_teacher:+.2f}[{low:+.2f}, {high:+.2f}]"
        assert shown[first + 4][2] == f"{compared.teacher_normalised:.1%}"
    assert "below the teacher" in (desktop.text_content(".verdict") or "")
    warning = "Random play, no-op starts, sampled actions, games ended by a time limit: 1."
    assert desktop.locator(".warning").first.text_content() == warning


def test_nothing_is_wider_than_a_phone_and_a_keyboard_scrolls_the_table(phone: Page) -> None:
    assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth")
    box = phone.locator("#result .scroll")
    last = phone.locator("#result tbody:last-child tr:last-child td:last-child")
    assert not last.evaluate("cell => cell.getBoundingClientRect().right <= innerWidth")
    box.focus()
    assert phone.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    phone.keyboard.press("ArrowRight")
    for _ in range(600):  # the page's policy forbids Playwright's own way to wait
        if box.evaluate("box => box.scrollLeft") > 0:
            break
        phone.wait_for_timeout(100)
    assert box.evaluate("box => box.scrollLeft") > 0
    box.evaluate("box => { box.scrollLeft = box.scrollWidth; }")
    assert last.evaluate("cell => cell.getBoundingClientRect().right <= innerWidth")
    first = phone.locator("#result tbody:last-child tr:last-child > :first-child")
    assert first.evaluate("cell => cell.getBoundingClientRect().left >= 0")  # the names stay


def test_pictures_are_next_to_each_other_if_there_is_room(desktop: Page, phone: Page) -> None:
    tops = "figures => figures.slice(0, 2).map(figure => figure.getBoundingClientRect().top)"
    for shown, is_side_by_side in ((desktop, True), (phone, False)):
        first, second = shown.eval_on_selector_all("#learning figure", tops)
        assert (first == second) is is_side_by_side
    assert desktop.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_no_table_is_wider_than_its_box_on_a_desktop(
    desktop: Page, browser: Browser, files: RunFiles, comparison: Comparison
) -> None:
    """Neither those of the run, nor those of 18 actions and of long labels."""
    wide = "all => all.filter(box => box.scrollWidth > box.clientWidth).map(box => box.ariaLabel)"
    assert desktop.eval_on_selector_all("#result .scroll, #actions .scroll", wide) == []
    actions = ActionComparison(action_names("Seaquest"), [1 / 18] * 18, [1 / 18] * 18, [[9] * 18] * 18, 0.1)
    rows = {name: replace(row, recipe="teacher+structured:0.93+int8") for name, row in comparison.rows.items()}
    rows = {name: replace(row, family="structured", updates=6600, kl=2.3288) for name, row in rows.items()}
    shown = browser.new_page(viewport={"width": 1280, "height": 900})
    compared = ComparedMethods(replace(comparison, rows=rows), "compression")
    shown.set_content(run_page(files, actions=actions, compared=compared), timeout=300_000)
    assert shown.locator(".scroll").count() == 5
    assert shown.eval_on_selector_all(".scroll", wide) == []
    lefts = shown.eval_on_selector_all("#actions figure", "all => all.map(f => f.getBoundingClientRect().left)")
    assert lefts[0] == lefts[1]  # each takes the whole width
    shown.close()


def test_pictures_are_decoded_and_the_film_moves(desktop: Page) -> None:
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
    labels = desktop.eval_on_selector_all("svg", "all => all.map(s => s.getAttribute('aria-label').length)")
    assert len(labels) == 10
    assert min(labels) > 15


def test_the_film_can_be_paused_and_is_still_for_readers_who_want_no_motion(visit: Visit, desktop: Page) -> None:
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
    assert len(contrasts) > 150
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
    assert desktop.locator("#other-compressors tbody th", has_text=INJECTED).count() == 3  # costs, two protocols


GAMES = {
    "above": ([20.0] * 30, "the student plays above the teacher (+10.00"),
    "below": ([0.0] * 30, "the student plays below the teacher"),
    "within": ([10.0, 10.5, 9.5] * 10, "within 0.1"),
    "cannot tell": ([-20.0, 40.0] * 15, "30 games cannot tell the student from the teacher"),
}


@pytest.mark.parametrize("word", GAMES)
def test_the_verdict_claims_what_the_interval_supports(word: str) -> None:
    def result(student: list[float]) -> RunResult:
        of = {"teacher": [10.0, 10.5, 9.5] * 20, "student": student, "random": [-20.0] * 32}
        rows = {role: PolicyResult(protocols=played(returns)) for role, returns in of.items()}
        compared = compare_with_teacher(rows["student"], rows["teacher"], rows["random"], "Pong")
        return RunResult(teacher=rows["teacher"], student=rows["student"], random=rows["random"], comparison=compared)

    returns, sentence = GAMES[word]
    assert sentence in verdict(result(returns), "noop_sampled")
    assert "6 games cannot tell" in verdict(result(returns[:6]), "noop_sampled")


def test_within_is_never_smaller_than_the_interval(results: RunResult) -> None:
    compared = replace(results.comparison["noop_sampled"], difference_interval=(-0.9701, 0.5))
    sentence = verdict(replace(results, comparison={"noop_sampled": compared}), "noop_sampled")
    assert "within 0.98 points" in sentence


def test_actions_are_those_of_both_policies(teacher: Teacher, student: Student, desktop: Page) -> None:
    def always_left(obs_BCHW: Tensor) -> Tensor:
        return torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0, 0.0]).repeat(len(obs_BCHW), 1)

    untrained = replace(teacher, net=student)  # type: ignore[arg-type]
    actions = compare_actions(always_left, untrained, "Pong", ReportOptions(num_states=64))
    counts = np.array(actions.greedy_AA)
    assert counts[:, 3].sum() == counts.sum() == 64
    assert actions.student_A[3] == pytest.approx(np.exp(9.0) / (np.exp(9.0) + 5.0))
    assert sum(actions.teacher_A) == pytest.approx(1.0, abs=1e-5)
    assert max(actions.teacher_A) < 0.9
    assert list(actions.names) == ["NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE"]
    text = re.sub(r"\s+", " ", desktop.text_content("#actions") or "")
    shown = re.search(r"256 states .* same in ([\d.]+)% of them, the mean KL divergence is ([\d.]+)", text)
    assert shown
    assert float(shown[1]) < 90.0  # the student has learned nothing
    assert float(shown[2]) > 0.1


def test_a_film_too_large_is_cut(teacher: Teacher, student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_FILM_BYTES", 8_000)
    film = render_film(student, teacher, "Pong", ReportOptions(seconds=1.0))
    assert len(film.webp) <= 8_000
    with Image.open(io.BytesIO(film.webp)) as shown:
        assert film.seconds == pytest.approx(shown.n_frames * 2 / 15, abs=0.002)  # type: ignore[attr-defined]
        assert film.seconds < 1.0


def test_only_a_sound_comparison_with_the_same_teacher_is_shown(
    run: Path, results: RunResult, teacher: Teacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    for number, (name, sha256) in enumerate({"ours": teacher.sha256, "theirs": "aa"}.items()):
        shutil.copytree(run.parent / "compression", tmp_path / name)
        path = tmp_path / name / "compression.json"
        path.write_text(path.read_text().replace(teacher.sha256, sha256))
        os.utime(path, (number, number))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "compression.json").write_text('{"rows": {"teacher": {}}}')
    (tmp_path / "folder" / "compression.json").mkdir(parents=True)
    found = newest_comparison(tmp_path / "run", results.student, teacher.sha256)
    assert found is not None
    assert found.source == "ours"
    assert found.has_this_run
    assert found.pareto.startswith(b"<?xml")
    warnings = capsys.readouterr().err
    assert warnings.count("compression.json: ") == warnings.count("left out of the report") == warnings.count("\n") == 2
    assert newest_comparison(tmp_path / "run", results.student, "bb") is None


def test_pages_without_a_part_have_no_empty_place_for_it(files: RunFiles) -> None:
    bare = run_page(replace(files, curves={}))
    assert all(name not in bare for name in ("Learning", "Actions", "Film", "Other compressors"))


def test_a_run_inside_reinforcement_learning_has_curves_over_its_steps(tmp_path: Path, run: Path) -> None:
    rl = tmp_path / "rl"
    shutil.copytree(run, rl, ignore=shutil.ignore_patterns("*tfevents*"))
    with SummaryWriter(str(rl)) as board:
        for step in (-10, 0, 256, 512):
            board.add_scalar("offline/teacher_kl" if step <= 0 else "train/teacher_kl", 2.0 + step / 1000, step)
    text = run_page(read_run(rl))
    assert "agent steps" in text
    assert "minibatches, before their update" in text
    assert "Return during the run" not in text  # no episode has ended
    # Damaged event files cost the curves, not the report; TensorBoard would wait forever on a FIFO.
    for path in rl.glob("*tfevents*"):
        path.write_bytes(b"\xff" * 1000)
    assert read_run(rl).curves == {}
    os.mkfifo(rl / "events.out.tfevents.1")
    with pytest.raises(BadFile, match="not a regular file"):
        read_run(rl)


def test_the_command_writes_the_pages_of_a_run_and_of_a_comparison(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "Pong" / "old"
    shutil.copytree(run, old, ignore=shutil.ignore_patterns("report.html"))
    card = (old / "student.json").read_text()
    (old / "student.json").write_text(card.replace("bundled:ppo", "moved.zip"))
    execute("report", [str(old), "--teacher", "bundled:ppo", "--seconds", "1", "--threads", "1"])
    assert str(old / "report.html") in capsys.readouterr().out
    assert {p.name for p in old.iterdir()} == {p.name for p in run.iterdir()}
    shutil.copytree(run.parent / "compression", tmp_path / "compression")
    execute("report", [str(tmp_path / "compression"), "--threads", "1"])
    assert "what compression costs" in (tmp_path / "compression" / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("results.json", None, "results.json not found"),
        ("results.json", "{", "results.json: invalid"),
        ("results.json", "[]", "results.json: invalid"),
        ("results.json", '{"student": {"num_parameters": "many"}}', "results.json: invalid"),
        ("config.json", '{"settings": 5}', "config.json: invalid"),
        ("config.json", '{"command": [1]}', "config.json: invalid"),
        ("student.json", None, "student.json"),
        ("student.json", "", "student.json: invalid"),
        ("student.json", '{"format": 1, "sha256": 5, "shape": {}}', "student.json: invalid"),
    ],
)
def test_a_damaged_run_is_one_line_and_has_no_page(
    name: str, text: str | None, reason: str, run: Path, tmp_path: Path
) -> None:
    for file in ("results.json", "config.json", "student.json", "student.safetensors"):
        shutil.copy(run / file, tmp_path)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(reason)) as raised:
        execute("report", [str(tmp_path), "--threads", "1"])
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "report.html").exists()


def test_a_config_without_a_game_takes_the_folders_name(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "Breakout" / "run"
    shutil.copytree(run, copied)
    config = json.loads((run / "config.json").read_text())
    del config["settings"]["game"]
    (copied / "config.json").write_text(json.dumps(config))
    assert read_run(run).game == "Pong"
    assert read_run(copied).game == "Breakout"


def test_numbers_that_are_not_finite_are_refused(run: Path, tmp_path: Path) -> None:
    content = json.loads((run / "results.json").read_text())
    content["student"]["protocols"]["noop_sampled"]["mean"] = float("nan")
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(BadFile, match=r"results\.json: invalid"):
        read_run(tmp_path)


@pytest.mark.parametrize("flag", [["--secods", "3"], ["--seed", "x"], ["--seed", "-1"], ["--seconds", "0"]])
def test_an_invalid_flag_is_one_line(flag: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        execute("report", ["run", *flag])

"""A run's page: what it holds, and that a browser draws it from disk without a network."""

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from small_recipe import small_recipe

from scale_smog.errors import UserError
from scale_smog.evaluation.paper import ImageCounts
from scale_smog.evaluation.program import evaluate
from scale_smog.pretrain import pretrain
from scale_smog.report.figures import MOST_POINTS, thinned
from scale_smog.report.page import _key_figures, write_comparison, write_report
from scale_smog.report.tables import _paper, evaluations, setting_rows
from scale_smog.reporting.run_record import RunRecord
from scale_smog.runtime import run_layout

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MOST_MIB = 6
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tars: Path) -> Path:
    """The folder of a run with every kind of thing that a page shows."""
    recipe = small_recipe(
        tmp_path_factory.mktemp("run"),
        tars,
        *("run.checkpoint_every=4", "run.evaluate_every=4", "evaluation.online=true"),
        *("data.num_small_crops=1", "data.global_batch=8"),
    )
    pretrain(recipe)
    folder = Path(recipe.run.dir)
    evaluate("knn", [str(folder)], [])
    gallery = json.loads((folder / run_layout.GALLERY_FILE).read_text())
    gallery["groups"][0]["classes"] = {HOSTILE: 1}  # names of classes are names of folders
    (folder / run_layout.GALLERY_FILE).write_text(json.dumps(gallery))
    return folder


@pytest.fixture(scope="module")
def page(run_dir: Path) -> Path:
    return write_report(run_dir)


PATIENCE_MS = 300_000  # a busy machine draws a page in more than the 30 s of the default


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM:
        pytest.skip("needs a chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE_MS
        )
        yield browser
        browser.close()


def opened(browser: Any, page: Path) -> tuple[Any, list[str]]:
    """The page in a browser without a network, and all that it complains of or asks for."""
    tab = browser.new_context(viewport={"width": 1280, "height": 800}, offline=True).new_page()
    tab.set_default_timeout(PATIENCE_MS)
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", lambda dialog: complaints.append(dialog.message))
    tab.on("request", lambda request: complaints.append(request.url))
    tab.goto(page.as_uri())
    complaints[:] = [x for x in complaints if x != page.as_uri() and not x.startswith("data:")]
    return tab, complaints


def test_a_browser_draws_charts_and_gallery_without_a_network_or_a_complaint(browser, page):
    tab, complaints = opened(browser, page)
    charts = tab.locator(".chart")
    assert charts.count() >= 8
    for i in range(charts.count()):
        assert charts.nth(i).locator(".scatterlayer .trace").count() >= 1
    tab.locator("#gallery img").first.scroll_into_view_if_needed()
    assert tab.locator("#gallery img").first.evaluate("x => x.decode().then(() => x.naturalWidth)")
    assert tab.locator("#gallery").inner_text().count(HOSTILE) == 1
    for name in ("Accuracy", "Loss", "Speed"):
        assert tab.get_by_role("img", name=f"{name} by step").is_visible()
    assert not complaints


def test_the_gallery_is_worked_by_keyboard(browser, page):
    tab, complaints = opened(browser, page)
    first = tab.locator("#gallery button").first
    first.focus()
    shown = tab.locator("#gallery li").first.locator("img:visible")
    before = shown.count()
    tab.keyboard.press("Enter")
    assert first.get_attribute("aria-expanded") == "true"
    assert shown.count() == tab.locator("#gallery li").first.locator("img").count() >= before

    def sizes() -> list[int]:
        texts = tab.locator("#gallery button").all_inner_texts()
        return [int(re.search(r"size (\d+)", text)[1]) for text in texts]

    tab.locator("#sort").focus()
    tab.keyboard.type("size")  # as a list of choices is worked
    assert sizes() == sorted(sizes(), reverse=True)
    tab.keyboard.press("Tab")
    tab.keyboard.press("Space")
    assert sizes() == sorted(sizes())
    assert not complaints


def test_no_screen_has_to_scroll_sideways(browser, page):
    tab, _ = opened(browser, page)
    for width in (320, 375, 1600):
        tab.set_viewport_size({"width": width, "height": 800})
        tab.reload()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_names_settings_checkpoints_machine_and_evaluations(page, run_dir):
    text = page.read_text()
    assert page.stat().st_size < MOST_MIB * 2**20
    assert text.count("<td>complete</td>") == 2
    row = re.search(r"grouping\.num_groups</code></th><td>10</td><td>3000</td><td>(.*?)</td>", text)
    assert row and row[1] == "section 4.1, Table 7c"
    assert "no comparison: the paper has no knn results of resnet_tiny" in text
    assert re.search(r"<td>1 on \S+</td><td>.*; torch .*, ddp, fp32</td>", text)
    assert HOSTILE not in text


def test_a_table_of_the_paper_has_its_digits_and_ours_as_many(run_dir):
    images = ImageCounts(num_classes=19, num_train=2975, num_test=500)
    written = {
        "evaluation": "segmentation",
        "settings": {"segmentation": {"setting": "cityscapes"}},
        "image_counts": asdict(images),
        "figures": {"miou": 0.76034, "macc": 0.8},
    }
    recipe = RunRecord.read(run_dir).recipe
    model = recipe.model.model_copy(update={"backbone": "resnet50"})
    (table,), _ = _paper(recipe.model_copy(update={"model": model}), 8, written)
    rows = {row[0]: list(row[1:]) for row in table.rows}
    assert "73.83" in {cell for row in rows.values() for cell in row}
    assert rows["ours †"] == ["76.03", "80.00", "–", "–"]


def test_results_of_a_run_that_has_gone_on_name_their_step(run_dir):
    record = RunRecord.read(run_dir)
    for step, name in ((8, "linear"), (4, "linear, step 4")):
        results = {"run": {"step": step}, "linear": {"top1": 0.5}}
        (found,) = evaluations(replace(record, results=results))
        assert found.name == name


def test_the_newest_knn_is_that_of_the_results_only_if_the_run_ended_with_it(run_dir):
    record = RunRecord.read(run_dir)
    assert record.logged[-1]["step"] == 8
    for step, words in ((8, "0.750"), (4, "0.500")):
        results = {"run": {"step": step}, "knn": {"trained": 0.75}}
        newest = replace(record, results=results, scalars={"knn": ([4, 8], [0.25, 0.5])})
        assert _key_figures(newest)["kNN top-1"] == words


def test_a_damaged_checkpoint_is_named(tmp_path, run_dir):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    file = next((copy / "checkpoints" / "step-00000008").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    text = write_report(copy).read_text()
    assert text.count("<td>complete</td>") == 1 and f"{file.name} has" in text


def test_a_run_that_has_only_begun_has_a_page(tmp_path, run_dir, browser):
    shutil.copy(run_dir / "recipe.yaml", tmp_path)
    tab, complaints = opened(browser, write_report(tmp_path))
    assert "Nothing has been logged yet" in tab.inner_text("body") and not complaints


def test_several_runs_lie_over_one_another(tmp_path, run_dir, browser):
    other = shutil.copytree(run_dir, tmp_path / "other")
    recipe = (other / "recipe.yaml").read_text().replace("seed: 0", "seed: 7")
    (other / "recipe.yaml").write_text(recipe)
    page = write_comparison([run_dir, other], tmp_path / "report.html")
    tab, complaints = opened(browser, page)
    loss = tab.get_by_role("img", name="Loss: loss by step")
    assert loss.locator(".scatterlayer .trace").count() == 2
    assert tab.get_by_role("row", name="run.seed 0 7").is_visible()
    assert not complaints


def test_a_folder_that_is_no_run_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"is not a run's folder: it has no recipe\.yaml"):
        write_report(tmp_path)


def test_long_curves_are_thinned_and_keep_their_last_point():
    steps = list(range(10, 50_010, 10))
    kept, values = thinned((steps, [float(x) for x in steps]))
    assert len(kept) <= MOST_POINTS and kept[-1] == 50_000 == values[-1]
    assert set(kept) <= set(steps)


def test_a_figure_that_is_not_a_number_costs_a_point_and_not_the_page(tmp_path, run_dir, browser):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    metrics = copy / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[2] |= {"rankme_features": math.nan, "uniformity": -math.inf}  # as earlier versions wrote
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tab, complaints = opened(browser, write_report(copy))
    assert tab.locator(".chart .scatterlayer .trace").count() >= 8 and not complaints


def test_a_page_is_passed_on_without_secrets(tmp_path):
    keys = ["run.mirror=s3://key:s3cret@host/run", "data.stream=https://h/a.tar?sig=s3cret"]
    recipe = small_recipe(tmp_path, "s3://key:s3cret@h/x", *keys, "data.loader=stream")
    rows = {row.key: row.value for row in setting_rows(recipe)}
    assert rows["run.mirror"] == "s3://host/run" and "s3cret" not in str(rows)

"""The page as a document: what it says, that nothing gets in or out, and that a screen reader finds its way."""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bdtool.report.charts import latency_against_blocks, latency_distribution
from bdtool.report.data import ReportData
from bdtool.report.page import render, write_report

VARIANTS = ("varied", "fixed", "unlabelled")
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Every start tag with its attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


@pytest.fixture(scope="session", params=VARIANTS)
def any_page(request: pytest.FixtureRequest, by_name: Callable[[str], ReportData]) -> Page:
    return Page(render(by_name(request.param)))


@pytest.fixture(scope="session")
def page(varied: ReportData) -> Page:
    return Page(render(varied))


def test_the_headline_has_the_figures(page: Page) -> None:
    for figure in ("91.25 %", "7.50 ± 1.25 of 15", "70.0 MFLOPs ± 11.0 MFLOPs", "42 among 200 images"):
        assert figure in page.text


def test_flops_without_the_policy_network_are_said_to_be(varied: ReportData) -> None:
    parts = (*varied.parts, dataclasses.replace(varied.parts[0], name="policy", kind="policy"))
    learned, heuristic = (dataclasses.replace(varied, policy=name, parts=parts) for name in ("learned:0.7", "first:7"))
    bare = dataclasses.replace(heuristic, parts=varied.parts)
    said = ["without the policy network" in Page(render(one)).text for one in (learned, heuristic, bare)]
    assert said == [False, True, False]


def test_the_fitted_line_is_said_in_words(page: Page, varied: ReportData) -> None:
    assert varied.line is not None
    assert varied.line.break_even_blocks is not None
    assert f"plus {varied.line.per_block_ms:.3f} ms for each block" in page.text
    assert f"fewer than {varied.line.break_even_blocks:.1f} blocks" in page.text


def test_a_line_with_a_negative_cost_is_said_to_be_bent(page: Page, varied: ReportData) -> None:
    assert varied.line is not None
    bent = dataclasses.replace(varied, line=dataclasses.replace(varied.line, fixed_ms=-0.4))
    assert "Fixed cost -0.400 ms" in Page(render(bent)).text
    assert "noise bends the line" in Page(render(bent)).text
    assert "noise bends the line" not in page.text


def test_classes_are_given_the_latency_of_the_line_where_there_is_one(varied: ReportData, fixed: ReportData) -> None:
    assert "by the line" in Page(render(varied)).text
    assert fixed.line is None
    assert fixed.classes
    assert "by the line" not in Page(render(fixed)).text


def test_the_papers_points_are_labelled_as_such(page: Page) -> None:
    assert "paper: ResNet-110, CIFAR-10" in page.text
    assert "Stars are the paper's own results" in page.text


def test_commands_and_warnings_are_there(page: Page, varied: ReportData) -> None:
    assert varied.commands[0] in page.text
    assert "Warning: the machine is busy" in page.text


def test_a_base_that_was_tuned_for_a_policy_is_said_beside_the_accuracies(page: Page, varied: ReportData) -> None:
    assert f"The base was fine-tuned for policy {varied.tuned_for}: other paths" in page.text
    assert "was fine-tuned for policy" not in Page(render(dataclasses.replace(varied, tuned_for=None))).text


def test_a_fixed_policy_is_said_instead_of_drawn(fixed: ReportData) -> None:
    page = Page(render(fixed))
    assert "All 200 images ran the same blocks: 0, 2, 4, 6, 8, 10, 12." in page.text
    assert "there is no line to fit" in page.text
    assert [chart["data-chart"] for chart in page.all("div") if "data-chart" in chart] == [
        "latency-distribution-data",
        "accuracy-flops-data",
        "part-costs-data",
    ]


def test_data_without_labels_skip_the_classes_and_say_so(unlabelled: ReportData) -> None:
    page = Page(render(unlabelled))
    assert "no labels, so there is no accuracy to show" in page.text
    assert "was fine-tuned for policy" not in page.text
    assert "no labels, so the policies of each class" in page.text
    assert page.all("img") == []


def test_nothing_is_loaded_from_anywhere(any_page: Page) -> None:
    addresses = [tag[key] or "" for _, tag in any_page.tags for key in ("src", "href", "srcset", "data") if key in tag]
    assert addresses
    assert [one for one in addresses if not one.startswith(("#", "data:"))] == []
    policy = next(tag["content"] or "" for tag in any_page.all("meta") if "http-equiv" in tag)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_user_texts_are_escaped(any_page: Page) -> None:
    assert [tag for _, tag in any_page.tags if "onerror" in tag] == []
    scripts = any_page.all("script")
    n_charts = len([tag for tag in any_page.all("div") if "data-chart" in tag])
    assert len(scripts) == n_charts + 2
    assert "<img src=x" in any_page.text  # as text


def test_user_texts_are_escaped_on_charts(varied: ReportData) -> None:
    _, _, rest = render(varied).partition('id="class-usage-data">')
    figure = json.loads(rest.partition("</script>")[0])
    assert figure["data"][0]["y"][1].startswith("&lt;/script&gt;")


def test_headings_descend_one_level_at_a_time(any_page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in any_page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))


def test_a_screen_reader_finds_its_way(any_page: Page) -> None:
    assert any_page.all("html")[0]["lang"] == "en"
    for landmark in ("header", "nav", "main", "footer"):
        assert len(any_page.all(landmark)) == 1
    assert len(any_page.all("caption")) == len(any_page.all("table"))
    assert all(tag.get("scope") in ("row", "col") for tag in any_page.all("th"))
    assert all(tag.get("alt") for tag in any_page.all("img"))


def test_every_chart_has_a_text_that_describes_it(any_page: Page) -> None:
    ids = [tag["id"] for _, tag in any_page.tags if "id" in tag]
    assert len(ids) == len(set(ids))
    charts = [tag for tag in any_page.all("div") if "data-chart" in tag]
    assert len(charts) == len(any_page.all("figure")) == len(any_page.all("figcaption"))
    for chart in charts:
        assert chart["role"] == "img"
        assert chart["aria-label"]
        assert {chart["aria-describedby"], chart["data-chart"]} <= set(ids)


def test_the_data_are_plain(varied: ReportData) -> None:
    assert json.loads(json.dumps(dataclasses.asdict(varied), allow_nan=False))["policy"] == "learned"


def test_the_file_is_one_page_and_replaces_the_old_one(varied: ReportData, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(path, varied)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert path.stat().st_size < 6e6  # plotly.js is 4.8 MB of it


def test_names_of_files_that_are_no_utf8_keep_no_page_from_being_written(varied: ReportData, tmp_path: Path) -> None:
    picture = dataclasses.replace(varied.classes[0].easiest[0], name=os.fsdecode(b"photo\xe9.png"))
    classes = (dataclasses.replace(varied.classes[0], easiest=(picture,)),)
    write_report(tmp_path / "report.html", dataclasses.replace(varied, classes=classes))
    assert "photo?.png" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_too_few_numbers_of_blocks_are_named_instead_of_a_line(varied: ReportData) -> None:
    blocks = tuple(4.0 if i % 2 else 7.0 for i in range(len(varied.dynamic.blocks_run)))
    dynamic = dataclasses.replace(varied.dynamic, blocks_run=blocks)
    strategies = tuple(dynamic if strategy is varied.dynamic else strategy for strategy in varied.strategies)
    data = dataclasses.replace(varied, line=None, strategies=strategies)
    assert "The timed images ran 4, 7 blocks: too few" in latency_against_blocks(data).text


def test_percentiles_of_few_images_are_left_out(varied: ReportData) -> None:
    few = [
        dataclasses.replace(one, summary_ms=one.summary_ms | {"p95": None, "p99": None}) for one in varied.strategies
    ]
    data = dataclasses.replace(varied, strategies=tuple(few))
    assert "99 % within" not in latency_distribution(data).text
    assert "90 % within" in latency_distribution(data).text
    assert "percentile" not in latency_distribution(data).text
    assert 2 * "\N{EN DASH} " in Page(render(data)).text

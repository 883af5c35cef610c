"""Reports: one page that needs nothing else, true to what it was given, whatever the names hold."""

import json
import re
from html.parser import HTMLParser

import pytest
from safetensors.numpy import save

from support.evaluations import evaluation, tokenizer, write_run
from varcli.errors import InputError
from varcli.evaluation.metrics import Figure
from varcli.evaluation.results import FIGURES, ReferenceOrigin, Result
from varcli.report import charts, load, page, tables
from varcli.report.load import label_results, parse, read_runs

VOID = {"meta", "img", "br", "link", "input", "hr"}
OTHER = ReferenceOrigin(name="other", sha256="ef" * 32, n=2000, pixels=64)
NASTY = '<script>alert("1")<b> & \' " ]]> --> `*_|[x](y)\n\u2028# $1$ {{ 7 * 7 }} \ud800 \0\x1b é 日本'


class Page(HTMLParser):
    """A page taken apart; whoever feeds it fails where elements do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words, self.tables = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        assert len(given) == len(attributes), f"{tag} has an attribute twice"
        self.elements.append((tag, given))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def of(self, tag):
        return [given for name, given in self.elements if name == tag]

    def row(self, head):
        found = next(row for table in self.tables for row in table if " ".join(row[0].split()) == head)
        return [" ".join(cell.split()) for cell in found[1:]]


def named(facts):
    return label_results([Result.from_json(each, "x") for each in facts])


def html(*facts, runs=()):
    return page.html(named(facts), runs).decode()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return read_runs([write_run(folder / "first"), write_run(folder / "stage-one", stage="tokenizer")])


MANY = [
    evaluation(),
    evaluation(n=5000, fid=6.5, warnings=["only 5000 images"]),
    evaluation("tiny64", reference=OTHER, published=None, fid=48.0),
    evaluation(NASTY, warnings=["<\\/style></script>", NASTY], published=None),
    tokenizer(),
]


# --- the page ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("many", [[], MANY[:1], MANY[-1:], MANY], ids=["runs", "one", "tokenizer", "all"])
def test_needs_nothing_else_and_can_be_read_by_everybody(many, runs):
    text = html(*many, runs=[] if len(many) == 1 else runs)
    shown = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in shown.elements}
    assert text.count("url(") == text.count("url(#") and "@import" not in text
    assert len(shown.of("style")) == 1
    for tag, given in shown.elements:
        assert not [name for name in given if name.startswith("on")]
        for name in {"src", "href", "xlink:href", "srcset", "action"} & given.keys():
            assert given[name].startswith(("data:image/png;base64,", "#")), f"{tag} {name}"
    ids = [given["id"] for _, given in shown.elements if "id" in given]
    assert len(set(ids)) == len(ids)
    assert {given["href"][1:] for _, given in shown.elements if "href" in given} <= set(ids)
    assert {given[name] for given in shown.of("svg") for name in ("aria-labelledby", "aria-describedby")} <= set(ids)
    assert all(given["role"] == "img" for given in shown.of("svg"))
    assert all(given["alt"] for given in shown.of("img"))
    assert all(given.get("scope") in ("row", "col") for given in shown.of("th"))
    assert len(shown.of("caption")) == len(shown.of("table")) > 0
    for table in shown.tables:
        assert len({len(row) for row in table}) == 1


def test_what_names_hold_is_text():
    shown = Page(html(*MANY))
    seen = " ".join(re.sub(r"[\0\x1b\ud800]", "\N{REPLACEMENT CHARACTER}", NASTY).split())
    assert shown.text.count(seen) > 3
    assert seen in " ".join(shown.of("img")[-1]["alt"].split())
    assert "49" not in shown.text.split() and "<\\/style></script>" in shown.text


@pytest.mark.slow
def test_equal_input_gives_an_equal_page(runs):
    assert html(*MANY, runs=runs) == html(*MANY, runs=runs)


def test_figures_stand_beside_the_papers():
    shown = Page(html(evaluation(), evaluation("var-d20", fid=3.7)))
    assert shown.tables[0][0][2:] == [
        *("Reference", "FID", "FID∞", "Inception score", "KID", "Precision", "Recall", "Reproductions")
    ]
    reference = "imagenet-256 abababababab"
    ours = ["3.45", "3.20", "271.50 ± 3.50", "0.00125 ± 0.00025", "0.8150", "0.4950"]
    assert shown.row("var-d16") == ["50 000", reference, *ours, "inside 3.30–3.60"]
    assert shown.row("var-d16, paper") == ["50 000", "–", "3.30", "–", "274.4", "–", "0.84", "0.51", "–"]
    assert shown.row("var-d20")[-1] == "outside 3.30–3.60"
    assert shown.row("var-d20, paper")[6:] == ["0.83", "0.56", "–"]


def test_columns_that_nothing_was_measured_for_are_left_out():
    facts = evaluation(metrics={"inception_score": 100.0}, published=None)
    assert Page(html(facts)).tables[0][0] == ["Result", "Images", "Reference", "Inception score"]


def test_a_figure_is_shown_everywhere_by_its_row(monkeypatch):
    monkeypatch.setitem(FIGURES, "sharpness", Figure("sharpness", 3, lower_is_better=True))
    facts = [evaluation(metrics={"sharpness": value}, published=None) for value in (0.25, 0.75)]
    shown = Page(html(*facts))
    assert shown.tables[0][0][-1] == "Sharpness" and shown.tables[0][1][-1] == "0.250"
    assert "Sharpness, lower is better: var-d16 0.250; var-d16 (2) 0.750" in shown.text
    assert dict(Result.from_json(facts[0], "x").lines())["sharpness"] == "0.250"


def test_marks_are_explained_where_there_are_some():
    assert "Ring: estimate" in html(evaluation(metrics={"fid": 3.0, "fid_infinity": 2.0}))
    assert "Ring: estimate" not in html(evaluation(metrics={"inception_score": 100.0}))


def test_warnings_come_first_and_are_counted_beside_the_figures():
    shown = Page(html(evaluation(warnings=["one thing", "another"]), evaluation("tiny64")))
    assert shown.text.index("one thing") < shown.text.index("another") < shown.text.index("FID")
    assert shown.row("var-d16 2 warnings")
    assert "Before comparing" not in html(evaluation())


def test_reconstructions_have_a_table_of_their_own():
    shown = Page(html(tokenizer()))
    assert shown.row("tiny64") == ["50 000", "imagenet-256 abababababab", "21.50", "19.25", "0.6250", "0.2500"]
    assert "Precision" not in shown.text


def test_all_settings_are_there_once():
    shown = Page(html(evaluation(), evaluation(settings={"cfg": 3.0})))
    assert [row[1] for row in shown.tables[-2]] == ["guidance (cfg)", "1.5", "3"]
    assert shown.row("sha256 of the extractor") == ["cd" * 32]
    assert shown.row("seed") == ["7"]
    facts = evaluation()
    shown = tables.evaluation_settings(Result.from_json(facts, "x"))
    assert all(
        key in shown for part in ("checkpoint", "protocol") for key in (f"{part}.{name}" for name in facts[part])
    )


def test_more_differences_than_results_lie_on_their_side():
    few = tables.settings_tables("X", ["a", "b", "c"], [{"cfg": str(i), "same": "1"} for i in range(3)])
    many = tables.settings_tables("X", ["a"] * 2, [{str(k): str(i) for k in range(9)} for i in range(2)])
    assert [len(each.groups[0]) for each in few] == [3, 1]
    assert [len(each.headings) for each in many] == [3]


def test_what_one_has_and_another_lacks():
    images = evaluation(checkpoint=None, source={"paths": ["made"]}, published=None)
    for many in ([images, evaluation(), tokenizer()], [evaluation(), images]):
        shown = Page(html(*many))
        assert "made" in shown.text and "guidance (cfg)" in shown.text


def test_what_is_missing_is_as_if_it_were_null():
    facts = evaluation()
    needed = {key: facts[key] for key in ("kind", "format", "version", "date", "what", "n", "extractor", "protocol")}
    assert Page(html(needed | {"metrics": {}})).row("images") == ["50 000"]


def test_no_figure_is_minus_nothing():
    shown = Page(html(evaluation(metrics={"fid": -3e-5, "fid_infinity": -1.25}, published=None)))
    assert shown.row("var-d16")[2:] == ["0.00", "−1.25"]


def test_one_image_has_no_spread():
    classes = [{"id": i, "name": f"c{i}", "n": i, "spread": 0.0 if i < 2 else 3.0} for i in range(3)]
    (each,) = named([evaluation() | {"per_class": classes}])
    assert [one.name for one in charts.classes_by_spread(each)] == ["c2"]
    (each,) = named([evaluation() | {"per_class": classes[:2]}])
    assert charts.class_spreads([each]) is None


def test_classes_of_both_ends_and_none_twice():
    for count in (1, 2, 5, 16, 40):
        classes = [{"id": i, "name": f"c{i}", "n": 2, "spread": float(i)} for i in range(count)]
        (each,) = named([evaluation() | {"per_class": classes}])
        _, lowest, highest = page._extremes(each)
        assert lowest[0] == ("c0", "0.00")
        assert count == 1 or highest[0][0] == f"c{count - 1}"
        assert not set(lowest) & set(highest) and len(lowest) + len(highest) == min(count, 16)


def test_markdown_has_whole_tables_of_plain_text(runs):
    text = page.markdown(named(MANY), runs).decode()
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
        assert re.fullmatch(r"\|( --- \|)+", block.splitlines()[1])
    assert "\\<script\\>" in text and "<script>" not in text
    assert text.count("\n## ") == 7 and "\n\n\n" not in text
    assert "| var-d16, paper | 50 000 | – | 3.30 |" in text


# --- charts ------------------------------------------------------------------------------------------


def test_steep_first_points_do_not_flatten_a_curve():
    lines = [{"step": i, "images_seen": i, "loss": 1000.0 if i == 1 else 5 + 1 / i} for i in range(1, 101)]
    (chart,) = charts.training_charts([load.TrainingRun("run", tuple(lines), {}, None)])
    assert chart.y_limits[0] < 5.01 and chart.y_limits[1] < 6
    assert "1000" in chart.description


def test_bars_are_as_long_as_their_figures_and_the_papers_mark_is_among_them():
    (fid, score, _, *rates) = charts.compared_figures(named([evaluation(fid=2.0), evaluation(fid=4.0, n=10)]))
    assert fid.parts == {"FID": [2.0, 4.0]}
    assert (fid.rings, fid.targets, fid.bands) == ([1.75, 3.75], [3.3, 3.3], [(3.3, 3.6)] * 2)
    notes = [chart.notes[0] for chart in (fid, score, *rates)]
    assert notes == ["2.00 · paper 3.30", "271.50 · paper 274.4", "0.8150 · paper 0.84", "0.4950 · paper 0.51"]


def test_distances_of_different_kinds_share_no_chart():
    other_size = evaluation("resized", protocol={"resize": "adm"}, published=None)
    elsewhere = [evaluation(name, reference=OTHER, published=None) for name in ("one", "two")]
    drawn = charts.compared_figures(named([evaluation(), *elsewhere, other_size]))
    assert [(chart.title, chart.labels) for chart in drawn[:3]] == [
        ("FID, lower is better, against imagenet-256", ["var-d16"]),
        ("FID, lower is better, against other", ["one", "two"]),
        ("Inception score, higher is better", ["var-d16", "one", "two", "resized"]),
    ]


def test_nothing_to_compare_with_makes_no_bars():
    assert charts.compared_figures(named([evaluation(published=None)])) == []


def test_fid_against_the_number_of_images_lies_on_a_line_to_its_limit():
    many = [evaluation(n=n, fid=3 + 5000 / n) for n in (2000, 50_000, 10_000)]
    many[1]["metrics"]["fid_infinity"] = 3.0
    chart = charts.fid_by_count(named(many))
    assert [text for _, text in chart.x_ticks] == ["∞", "10\u202fk", "2000"]
    curve, limit = chart.curves
    assert limit.points == [(0, 3.0)]
    assert [(fid - 3.0) / inverse for inverse, fid in curve.points] == pytest.approx([5000] * 3)


def test_other_numbers_of_other_things_are_no_series():
    assert charts.fid_by_count(named([evaluation(n=5000)])) is None
    assert charts.fid_by_count(named([evaluation(n=5000), evaluation(n=9000, settings={"cfg": 2.0})])) is None
    assert charts.fid_by_count(named([evaluation(n=5000), evaluation(n=9000, reference=OTHER)])) is None
    rejected = evaluation(n=9000, protocol=evaluation()["protocol"] | {"rejected": 0.5})
    assert charts.fid_by_count(named([evaluation(n=5000), rejected])) is None


# --- results -----------------------------------------------------------------------------------------


def test_settings_of_samples_tell_nothing_of_a_tokenizer():
    samples, rebuilt = evaluation("tiny64"), tokenizer()
    assert [each.label for each in named([samples, rebuilt])] == ["tiny64, samples", "tiny64, tokenizer"]
    greedy = evaluation("tiny64", settings={"top_k": 1})
    assert [each.label for each in named([samples, greedy, rebuilt])] == [
        "tiny64, samples, top-k 900",
        "tiny64, samples, top-k 1",
        "tiny64, tokenizer",
    ]


def test_labels_tell_results_apart_by_what_differs():
    many = [evaluation(), evaluation(settings={"cfg": 3.0}), evaluation(n=5000), evaluation("a/b/c.safetensors")]
    assert [each.label for each in named(many)] == [
        "var-d16, cfg 1.5, n 50\u202f000",
        "var-d16, cfg 3, n 50\u202f000",
        "var-d16, cfg 1.5, n 5000",
        "b/c.safetensors",
    ]
    source = {"paths": ["data\\one.npz", "/x/two"], "kind": "npz"}
    assert named([evaluation(checkpoint=None, source=source)])[0].label == "data/one.npz + x/two"
    assert [each.label for each in named([evaluation(), evaluation()])] == ["var-d16", "var-d16 (2)"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", ["\n", "\r\n\r\n", " "])
def test_one_result_or_many_as_lines_or_not(encoding, separator):
    text = separator.join([json.dumps(evaluation(), indent=1), json.dumps(tokenizer())]) + "\n"
    assert [json.loads(json.dumps(result.facts())) for result in parse(text.encode(encoding), "x")] == [
        evaluation(),
        tokenizer(),
    ]


def test_an_error_says_where_the_wrong_result_is():
    content = "\n".join(map(json.dumps, (evaluation(), evaluation() | {"n": "many"})))
    with pytest.raises(InputError, match=r"^the evaluation result x, line 2: n must be a whole number"):
        parse(content.encode(), "x")


def test_a_file_of_an_absurd_size_is_refused(monkeypatch):
    monkeypatch.setattr(load, "MAX_BYTES", 1 << 10)
    with pytest.raises(InputError, match="at most"):
        parse(json.dumps(evaluation(warnings=["x" * 2000])).encode(), "x")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"  \n",
        b"no json",
        b"\xff\xfe\x00",
        b'{"kind"',
        b"[]",
        b"3",
        b"[" * 100_000,
        b"1" * 5000,
        b"\x89PNG\r\n\x1a\n\0",
    ],
    ids=lambda content: repr(content[:10]),
)
def test_files_that_hold_no_results(content):
    with pytest.raises(InputError, match=r"^the evaluation result x[, ]"):
        parse(content, "x")


# --- runs --------------------------------------------------------------------------------------------


def test_a_run_has_curves_settings_and_its_last_sheet(runs):
    shown = Page(html(runs=runs))
    assert shown.row("first") == ["3000", "48 000", "30", "5.067", "5.1", "0.055"]
    assert shown.row("stage-one") == ["3000", "48 000", "30", "5.067", "19"]
    assert [row[1] for table in shown.tables for row in table if row[0] == "depth"] == ["2", "2"]
    assert "Loss: training from 9 to 5.067; validation from 5.1 to 5.1" in shown.text
    scales = "; ".join(f"scale {scale} from 0.5 to 0.5" for scale in (1, 2, 3))
    assert f"Codebook usage per scale: {scales}" in shown.text
    assert len(shown.of("img")) == 2


def test_runs_of_one_stage_share_their_charts(tmp_path):
    runs = read_runs([write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", depth=3)])
    (loss, *_) = charts.training_charts(runs)
    assert 6.5 < loss.y_limits[1] < 9, "only the very beginning may leave the field"
    assert [curve.label for curve in loss.curves] == [
        "a/run, training",
        "a/run, validation",
        "b/run, training",
        "b/run, validation",
    ]
    assert Page(html(runs=runs)).tables[1] == [["", "depth"], ["a/run", "2"], ["b/run", "3"]]


def test_a_run_under_way(tmp_path):
    folder = write_run(tmp_path / "run", lines=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 200, "images_seen": 3200, "loss": NaN}\n{"step": 250, "ima')
    (folder / "state.safetensors").unlink()
    (run,) = read_runs([folder])
    assert (len(run.lines), run.settings) == (4, {})
    assert len(run.points("loss")) == 3
    assert "200" in Page(html(runs=[run])).row("run")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", None, "has no metrics.jsonl"),
        ("metrics.jsonl", b"", "has no figures yet"),
        ("metrics.jsonl", b'{"step": 50, "images_seen": 800}\n[]\n{}\n', "must have figures in line 2, as"),
        ("metrics.jsonl", b'{"step": 50}\n{"step": 50, "images_seen": 9}\n', "must have figures in line 1, as"),
        (
            "metrics.jsonl",
            b'{"step": NaN, "images_seen": 9}\n{"step": 1, "images_seen": 9}\n',
            "must have figures in line 1, as",
        ),
        ("metrics.jsonl", b'{"step": 5, "images_seen": 8, "loss": "low"}\n\n', "must have figures in line 1, as"),
        (
            "metrics.jsonl",
            b'{"step": 5, "images_seen": 8, "loss": 1%s}\n\n' % (b"0" * 400),
            "must have figures in line 1, as",
        ),
        ("state.safetensors", b"cut", "state.safetensors is damaged"),
        ("state.safetensors", save({}, {"identity": "[" * 100_000}), "state.safetensors is damaged"),
    ],
)
def test_folders_that_are_no_run(tmp_path, file, content, message):
    folder = write_run(tmp_path / "run")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)):
        read_runs([folder])

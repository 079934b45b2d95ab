"""The page and the drawing: what is embedded, and what a browser makes of it."""

import re
import subprocess
from html.parser import HTMLParser
from urllib.parse import quote

import pytest
import torch
import torch.nn.functional as F
import zoo
from browser import tool, visit
from torch import nn

import mkor_fx
from mkor_fx.show.drawing import neighbourhood
from mkor_fx.show.report import report_data

PUBLISHED = mkor_fx.MKOR.published()


class Page(HTMLParser):
    """Rows of the two tables and of the graph view of a rendered page, as text."""

    def __init__(self, html):
        super().__init__()
        self.parameters, self.rows, self.summaries, self.text, self._stack = [], [], [], {}, []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("meta", "link", "input", "br"):
            return
        self._stack.append(attrs.get("id") or (self._stack[-1] if self._stack else ""))
        kind = attrs.get("class", "") or ""
        if "data-parameter" in attrs:
            self.parameters.append(attrs["data-parameter"])
        if kind.startswith("row "):
            self.rows.append([kind.split()[1], ""])
        if tag == "summary":
            self.summaries.append("")
            self._in_summary = True

    def handle_endtag(self, tag):
        if self._stack:
            self._stack.pop()
        if tag == "summary":
            self._in_summary = False

    _in_summary = False

    def handle_data(self, data):
        where = self._stack[-1] if self._stack else ""
        self.text[where] = self.text.get(where, "") + data
        if self._in_summary:
            self.summaries[-1] += data
        elif self.rows and where == "diff-body":
            self.rows[-1][1] += data


@pytest.fixture(scope="module")
def step():
    model, loss_fn, batches = zoo.build("mlp")
    step = mkor_fx.compile_step(model, loss_fn, torch.optim.SGD(model.parameters(), lr=0.1), backend="eager", rule=PUBLISHED)
    step(*batches[0])
    return step


@pytest.fixture(scope="module")
def page(step, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    step.graphs.to_html(path)
    return path


def names(stage):
    return [node.name for node in stage.graph.nodes]


def test_every_node_of_every_stage_is_embedded(step):
    data = report_data("title", [step.graphs], step.coverage)
    (program,) = data["programs"]
    assert [s["name"] for s in program["stages"]] == list(step.graphs.stages)
    for embedded, stage in zip(program["stages"], step.graphs, strict=True):
        texts = [data["texts"][t] for t in embedded["texts"]]
        assert len(texts) == stage.nodes
        assert [re.split(r"[ :(]", t)[0] for t in texts[:-1]] == names(stage)[:-1]
        labels = [data["labels"][t] for t in embedded["labels"]]
        assert labels == [n.meta.get("mkor_fx", "") for n in stage.graph.nodes]
    assert len(data["texts"]) < sum(stage.nodes for stage in step.graphs)  # shared between stages


def test_source_lines_are_embedded(step):
    data = report_data("title", [step.graphs], step.coverage)
    (place,) = step.coverage["hidden.weight"].sources
    (snippet,) = data["snippets"][place]
    assert snippet["path"] == zoo.__file__ and place == f"zoo.py:{snippet['line']}"
    assert "self.hidden(" in snippet["lines"][snippet["line"] - snippet["first"]]


def test_the_page_stands_alone(page):
    text = page.read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", text)
    assert "http://" not in text and "https://" not in text
    assert text.count("</script>") == 2 and "{{data}}" not in text


def test_nothing_embedded_ends_the_script(tmp_path):
    graphs = mkor_fx.explain(nn.Linear(3, 2), torch.randn(4, 3), rule=PUBLISHED).graphs
    graphs.captured[0].title = graphs.title = "</script><script>alert(1)</script>"
    graphs.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text().count("</script>") == 2


def test_a_browser_shows_the_tables(step, page):
    shown = Page(visit(page))
    assert shown.parameters == [entry.name for entry in step.coverage]
    stages = shown.text["stage-table"]
    assert all(stage.name in stages and f"{stage.nodes:,}" in stages for stage in step.graphs)
    assert all(
        any(s.startswith(f"{name}: statistics") for s in shown.summaries) for name in ("head.weight", "tokens.weight")
    )
    assert "zoo.py:" in shown.text["coverage-table"]


#: opens what can be opened, then says what is wider than the window, or scrolls sideways
MEASURE = """<script>addEventListener("load", () => {
  document.querySelectorAll("#diff-body details, #code-body details").forEach((d, i) => { d.open = i < 6; });
  document.querySelectorAll("button.name").forEach(b => b.click());
  setTimeout(() => {
    const wide = e => e.scrollWidth > e.clientWidth + 1 && /auto|scroll/.test(getComputedStyle(e).overflowX);
    const out = e => e.getBoundingClientRect().right > innerWidth + 1;
    const all = [...document.querySelectorAll("body *")], name = e => e.tagName + e.id + e.className;
    const found = all.filter(e => wide(e) || out(e)).map(name);
    document.title = `${innerWidth}: ${document.querySelectorAll(".detail").length} open: ${found.join(" ")}`;
  }, 500);
})</script>"""


@pytest.mark.parametrize("width", [800, 1300])
def test_nothing_scrolls_sideways(tmp_path, width):
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    step = mkor_fx.compile_step(model, F.mse_loss, torch.optim.AdamW(model.parameters()))
    step(torch.randn(7, 6), torch.randn(7, 6))
    step.graphs.to_html(tmp_path / "report.html")
    page = tmp_path / "measured.html"
    page.write_text((tmp_path / "report.html").read_text() + MEASURE)
    (title,) = re.findall("<title>(.*?)</title>", visit(page, width=width))
    code_scrolls = "" if width < 1000 else "PRE"
    assert title in (f"{width}: 6 open: ", f"{width}: 6 open: {code_scrolls}")


def test_columns_have_units_and_bars_a_heading(page):
    shown = Page(visit(page))
    assert "Refresh, flop" in shown.text["coverage-table"] and "Direction, flop a step" in shown.text["coverage-table"]
    for heading in ("Nodes", "Nodes, to scale", "Time, ms", "Time, to scale"):
        assert heading in shown.text["stage-table"]


def test_what_was_only_explained_opens_on_a_stage_that_shows_something(tmp_path):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    mkor_fx.explain(layer, torch.randn(2, 5, 8)).to_html(tmp_path / "report.html")
    shown = Page(visit(tmp_path / "report.html"))
    assert "no difference" not in shown.text["diff"] and any(kind != "same" for kind, _ in shown.rows)


def test_every_parameter_has_a_line_in_a_model_of_torchs_own_modules():
    layers = [nn.Embedding(7, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)]
    coverage = mkor_fx.explain(nn.Sequential(*layers), torch.randint(0, 7, (2, 5)))
    lines = {entry.name: entry.sources for entry in coverage}
    assert all(len(found) == 1 for found in lines.values()), lines
    assert lines["1.weight"][0].startswith("linear.py:") and lines["1.bias"] == lines["1.weight"]
    assert lines["0.weight"][0].startswith("sparse.py:") and lines["2.weight"][0].startswith("normalization.py:")
    assert "linear.py" not in str(coverage["1.bias"].declined)  # which names its weight


def test_a_browser_searches(step, page):
    shown = Page(visit(page, "#q=hidden"))
    assert shown.parameters == ["hidden.weight"]
    labelled = [n for n in step.graphs["rewrite"].graph.nodes if "hidden" in n.meta.get("mkor_fx", "")]
    texts = {text.partition(" ")[0] for _, text in shown.rows}
    assert {n.name for n in labelled} <= texts
    assert shown.text["matches"].startswith("1 parameter, ")
    assert int(shown.text["matches"].split()[2].replace(",", "")) == len(shown.rows) >= len(labelled)
    nothing = Page(visit(page, "#q=" + quote("no such thing")))
    assert nothing.parameters == [] and nothing.rows == [] and "No node matches" in nothing.text["diff-body"]


@pytest.mark.parametrize("before, after", [("capture", "canonicalize"), ("match", "rewrite"), ("rewrite", "lower")])
def test_a_browser_compares_stages(step, page, before, after):
    """Added and removed nodes are those by name; the rest is the same text or marked as changed or moved."""
    shown = Page(visit(page, f"#before={before}&after={after}&q={quote('=')}"))  # every call has one: nothing is folded
    old, new = (
        {n.name: n.meta.get("mkor_fx", "") for n in step.graphs[s].graph.nodes if n.op == "call_function"}
        for s in (before, after)
    )
    kinds = {kind: sum(k == kind for k, _ in shown.rows) for kind in ("add", "del", "chg", "mov", "same")}
    both = sum(new.get(name) == label for name, label in old.items())
    replaced = len(old) - both - kinds["del"]  # shown beside what stands there now, as one changed row
    assert replaced >= 0
    assert kinds["add"] == len(new) - both - replaced
    assert sum(kinds.values()) - kinds["add"] - kinds["del"] == both + replaced
    if before == "match":
        assert kinds["add"] > 50 and kinds["del"] == kinds["mov"] == 0


def test_a_browser_shows_one_stage_alone(step, page):
    shown = Page(visit(page, f"#before=-&after=match&q={quote('aten')}"))
    calls = [n for n in step.graphs["match"].graph.nodes if "aten" in str(n.target)]
    assert len(shown.rows) == len(calls) and all("aten" in text for _, text in shown.rows)


def test_a_drop_in_model_shows_both_programs(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    compiled = mkor_fx.compile(model, backend="eager", rule=PUBLISHED)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="nothing is compiled yet"):
        compiled.graphs.to_html(tmp_path / "report.html")
    compiled(torch.randn(7, 6)).sum().backward()
    optimizer.step()
    compiled.graphs.to_html(tmp_path / "report.html")
    shown = Page(visit(tmp_path / "report.html", "#program=1&q=2.weight"))
    assert "graph 0, forward and backward" in shown.text["tabs"] and "update of 2 weights" in shown.text["tabs"]
    assert any("mkor_fx.inverse_update" in text for _, text in shown.rows)


def test_generated_code_is_on_the_page(tmp_path):
    model = nn.Linear(6, 5)
    step = mkor_fx.compile_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1), rule=PUBLISHED)
    step(torch.randn(7, 6), torch.randn(7, 5))
    (code,) = step.graphs.code
    assert "cpp_fused" in code and "def call(" in code
    step.graphs.to_html(tmp_path / "report.html")
    shown = Page(visit(tmp_path / "report.html"))
    assert f"{len(code.splitlines()):,}"[:2] in shown.text["code-body"] and "graph 1 of 1" in shown.text["code-body"]


def test_generated_code_of_both_halves_is_kept_from_inductors_cache_too():
    for _ in range(2):
        torch._dynamo.reset()
        model = nn.Linear(6, 5)
        compiled = mkor_fx.compile(model, rule=PUBLISHED)
        compiled(torch.randn(7, 6)).sum().backward()
        assert len(compiled.graphs.captured[0].code) == 2


# ---- drawings -------------------------------------------------------------------------------------------------------


def test_a_drawing_has_product_operands_statistics_and_update(step, tmp_path):
    source = neighbourhood("head.weight", [step.graphs])
    (product,) = step.graphs.products["head.weight"]
    stage = step.graphs["rewrite"].graph
    operands = {n.name for node in stage.nodes if node.name == product for n in node.all_input_nodes}
    drawn = set(re.findall(r"^\s*p0_(\w+) \[", source, re.M))
    assert {product, *operands} <= drawn
    assert all(f"p0_{operand} -> p0_{product};" in source for operand in operands)
    own = [n for n in stage.nodes if n.meta.get("mkor_fx", "").startswith("head.weight: ")]
    assert {n.name for n in own if "mkor_fx." in str(n.target)} <= drawn
    assert "tokens" not in source and "reader_optimizer" in drawn
    links = re.findall(r"p0_(\w+) -> p0_(\w+);", source)
    assert links and {name for link in links for name in link} <= drawn
    tool("dot")
    step.graphs.to_svg(tmp_path / "head.svg", "head.weight")
    text = (tmp_path / "head.svg").read_text()
    assert "<svg" in text and "mkor_fx.inverse_update" in text


def test_explains_graphs_can_be_drawn():
    graphs = mkor_fx.explain(nn.Linear(3, 2), torch.randn(4, 3), rule=PUBLISHED).graphs
    assert graphs.captured[0].products["weight"][0] in neighbourhood("weight", list(graphs))


def test_drawing_errors(step, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'hed.weight' is no preconditioned weight.*tokens.weight"):
        step.graphs.to_svg(tmp_path / "x.svg", "hed.weight")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="Graphviz"):
        step.graphs.to_svg(tmp_path / "x.svg", "head.weight")


def test_dot_accepts_odd_names():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter('a"b\\c', nn.Parameter(torch.randn(3, 2)))

        def forward(self, x):
            return F.linear(x, getattr(self, 'a"b\\c'))

    graphs = mkor_fx.explain(Odd(), torch.randn(4, 2), rule=PUBLISHED).graphs
    source = neighbourhood('a"b\\c', list(graphs))
    subprocess.run([tool("dot"), "-Tsvg"], input=source.encode(), check=True, capture_output=True)

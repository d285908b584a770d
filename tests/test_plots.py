"""The pictures of a probe: written, not empty, the same every time, and a clear error without matplotlib."""

import dataclasses
import io
import re
import sys
from xml.etree import ElementTree

import pytest
import torch

from offramp.core.language_model import LanguageModel
from offramp.core.policy import ExitPolicy
from offramp.families.sizes import BlockShape, ModelShape
from offramp.lm.bench import run_bench
from offramp.lm.probe import Readings, summarise
from offramp.report import drawing, plots
from offramp.report import probe as probe_page
from tiny import inputs_for, tiny

mpl = pytest.importorskip("matplotlib")
imread = pytest.importorskip("matplotlib.image").imread


def _probe(depth=6, tokens=40, vocabulary=500, min_layer=3):
    """Ranks that fall with depth, and layers that are too sure."""
    shape = ModelShape((BlockShape(1000, 50, 10, 10),) * depth, 10, vocabulary, 4)
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(vocabulary / 2, 0, depth)[:, None] * torch.rand(depth, tokens, generator=generator) ** 3
    peak = torch.linspace(0.8, 0.6, depth)[:, None].expand(depth, tokens)
    readings = Readings(spread.long(), peak, peak / 2)
    return summarise(readings, shape, min_layer, model="tiny", source="prompts", examples=8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    return folder, probe_page.save_probe(_probe(), folder)


def test_all_files_are_there(saved):
    folder, paths = saved
    pictures = {f"probe-{name}.{suffix}" for name in ("rank", "confidence", "exits") for suffix in ("svg", "png")}
    assert {path.name for path in paths} == pictures
    assert {path.name for path in folder.iterdir()} == {path.name for path in paths}  # no temporary file left


def test_pictures_are_drawn_and_not_cut_off(saved):
    for path in saved[1]:
        if path.suffix != ".png":
            continue
        pixels = imread(path)[:, :, :3]
        assert min(pixels.shape[:2]) > 600
        assert (pixels < 1).any(-1).mean() > 0.02
        frame = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
        assert all((edge == 1).all() for edge in frame), path.name


def test_svg_says_what_is_seen_and_bears_no_date(saved):
    probe = _probe()
    for path in saved[1]:
        if path.suffix != ".svg":
            continue
        text = path.read_text()
        ElementTree.fromstring(text)
        assert "<dc:date>" not in text
        said = " ".join(re.findall("<!-- (.*?) -->", text))  # matplotlib notes every text it draws
        assert "layer (layer 6 is the full model)" in said
        assert f"tiny · 8 prompts, {probe.tokens} positions" in said


def test_the_same_probe_gives_the_same_bytes(saved, tmp_path):
    with mpl.rc_context({"font.size": 20}):  # whatever the user's own style is
        again = probe_page.save_probe(_probe(), tmp_path)
    for one, other in zip(saved[1], again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_global_state_is_left_alone(tmp_path):
    before, windows = mpl.rcParams.copy(), "matplotlib.pyplot" in sys.modules
    probe_page.save_probe(_probe(), tmp_path)
    assert mpl.rcParams.copy() == before
    assert ("matplotlib.pyplot" in sys.modules) == windows  # no window system was chosen


def test_rank_boxes_are_those_of_the_probe():
    probe = _probe()
    axes = probe_page.rank_figure(probe).axes[0]
    assert axes.get_yscale() == "log"
    boxes = [(bar.get_y() - 1, bar.get_y() + bar.get_height() - 1) for bar in axes.containers[0]]
    assert boxes == [pytest.approx((report.rank["p25"], report.rank["p75"])) for report in probe.layers]
    whiskers, *_, medians = [[path.vertices[:, 1] - 1 for path in lines.get_paths()] for lines in axes.collections]
    for report, whisker, median in zip(probe.layers, whiskers, medians, strict=True):
        assert list(whisker) == pytest.approx([report.rank["p5"], report.rank["p95"]])
        assert list(median) == pytest.approx([report.rank["p50"]] * 2)
    assert probe.suggested_vocabulary_size in [line.get_ydata()[0] for line in axes.lines]


def test_curves_and_shade_are_those_of_the_probe():
    probe = _probe()
    axes = probe_page.confidence_figure(probe).axes[0]
    right, sure = axes.lines[:2]
    assert list(right.get_ydata()) == [report.agreement for report in probe.layers]
    assert list(sure.get_ydata()) == [report.max_probability for report in probe.layers[:-1]]
    assert axes.collections


def test_bars_and_lines_are_those_of_the_probe():
    probe = _probe()
    axes = probe_page.exit_figure(probe).axes[0]
    heights = [[bar.get_height() * probe.tokens for bar in bars] for bars in axes.containers]
    assert heights == [pytest.approx(probe.saturation.counts), pytest.approx(probe.oracle.counts)]
    lines = [line.get_xdata()[0] for line in axes.lines]
    assert lines == pytest.approx([probe.saturation.mean, probe.break_even, probe.break_even_default])


def test_break_even_lines_that_coincide_are_drawn_once():
    probe = _probe()
    probe = dataclasses.replace(probe, break_even_default=probe.break_even)
    assert len(probe_page.exit_figure(probe).axes[0].lines) == 2


@pytest.mark.parametrize("depth", [2, 24, 48])
def test_any_depth_can_be_drawn(depth, tmp_path):
    probe = _probe(depth=depth, tokens=3, min_layer=depth // 2)
    for draw in probe_page.PICTURES.values():
        axes = draw(probe).axes[0]
        ticks = list(axes.get_xticks())
        assert ticks[0] == 1
        assert ticks[-1] == depth


def test_a_title_is_no_wider_than_its_figure():
    figure = drawing.headed("Exits that few tokens take are seldom worth what they cost: layers 2 to 11\n\n", 4, 3)
    title = figure.get_suptitle()
    assert title.endswith("cost: layers 2 to 11\n\n")  # room for a legend
    assert title.rstrip("\n").count("\n") >= 1
    figure.savefig(io.BytesIO())  # only now has it a place
    assert figure._suptitle.get_window_extent().x1 <= figure.bbox.x1


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'offramp[report]'")):
        probe_page.rank_figure(_probe())


def test_without_matplotlib_numbers_are_saved_all_the_same(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert [path.name for path in _probe().save(tmp_path)] == ["probe.json", "probe.txt"]
    assert probe_page.save_probe(_probe(), tmp_path) == []


def test_a_bench_is_drawn_with_every_arm(tmp_path):
    lm = LanguageModel(tiny("llama"))
    arms = {"softmax": ExitPolicy(threshold=0.2, min_layer=1), "static 2": ExitPolicy("static", min_layer=2)}
    bench = run_bench(lm, inputs_for("llama")["input_ids"], arms, max_new_tokens=3, repeats=2)
    paths = plots.save_bench(bench, tmp_path)
    assert sorted(path.name for path in paths) == ["bench.png", "bench.svg"]
    assert all(path.stat().st_size > 5000 for path in paths)
    axes = plots.bench_figure(bench).axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert [label.split("  ")[0] for label in labels] == [arm.name for arm in bench.arms[::-1]]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([arm.ratio.median for arm in bench.arms[::-1]])

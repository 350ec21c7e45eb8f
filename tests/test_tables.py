"""The tables and plots say what was recorded."""

from __future__ import annotations

import copy

import pytest

from gpupipe.benchmarks import plots, tables
from gpupipe.benchmarks.claims import CLAIMS
from gpupipe.benchmarks.common import RESULTS, Record, read_rows
from gpupipe.benchmarks.tables import PAGES, TABLES, fill, same_plot


@pytest.fixture(scope="module")
def rows() -> list[Record]:
    found = read_rows()
    assert found, "benchmarks/results holds no row"
    return found


@pytest.fixture(scope="module")
def other_rows(rows: list[Record]) -> list[Record]:
    """The same with every figure half as large again."""
    changed = copy.deepcopy(rows)
    for row in changed:
        if row["p50"] is not None:
            row["p50"] *= 1.5
    return changed


@pytest.fixture(scope="module")
def drawn(rows: list[Record]) -> dict[str, str]:
    pytest.importorskip("matplotlib")
    return plots.draw(rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_pages_show_the_recorded_figures(page, rows: list[Record]) -> None:
    text = page.read_text("utf-8")
    assert "<!-- table: " in text
    assert fill(text, rows) == text, "run python benchmarks/tables.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_another_figure_would_be_noticed(page, other_rows: list[Record]) -> None:
    text = page.read_text("utf-8")
    assert fill(text, other_rows) != text


def test_the_headline_s_bfloat16_is_of_its_own_run_and_template() -> None:
    def ratio(provider: str, p50: float, **other: object) -> Record:
        config = {"width": 1, "mode": "ave", "exact": True, "template": "anna", "size": [64, 48]}
        row = {"what": "end_to_end", "axis": "frames", "error": None, "metric": "ratio", "value": 300, "n": 3}
        row |= {"provider": provider, "p50": p50, "time": "2026", "device": "a CPU", "driver": None, "commit": "c"}
        return row | {"config": config | {key: other.pop(key) for key in ("template",) if key in other}} | other

    run = [ratio("gpupipe", 4), ratio("gpupipe_bfloat16", 8)]
    assert "**4.0×" in TABLES["headline"](run) and "template anna" in TABLES["headline"](run)
    assert "**8.0×** with `--precision bfloat16`" in TABLES["headline"](run)
    assert "**9.0×** with `--precision float16`" in TABLES["headline"]([*run, ratio("gpupipe_float16", 9)]), "faster"
    assert "**8.0×** with `--precision bfloat16`" in TABLES["headline"]([*run, ratio("gpupipe_float16", 7)])
    again = ratio("gpupipe_bfloat16", 7, time="2027")
    assert "**7.0×** with `--precision bfloat16`" in TABLES["headline"]([*run, again]), "the newer"
    for other in ({"template": "ben"}, {"n": 5}, {"commit": "d"}, {"device": "another"}):
        assert "bfloat16" not in TABLES["headline"]([run[0], ratio("gpupipe_bfloat16", 9, **other)]), other
    assert "bfloat16" not in TABLES["headline"]([run[0], ratio("gpupipe_bfloat16", 3)]), "slower: nobody's headline"
    assert "**4.0×" in TABLES["headline"]([*run, ratio("gpupipe", 6, template="ben", time="2027")]), (
        "the less flattering"
    )
    assert "**6.0×" in TABLES["headline"]([*run, ratio("gpupipe", 6, commit="d", time="2027")]), "the newer"
    assert "**4.0×" in TABLES["headline"]([*run, ratio("gpupipe", 6, value=60, time="2027")]), "the longer"
    speeds = [ratio("gpupipe", 12, metric="throughput"), ratio("reference_loop_onnxruntime", 8, metric="throughput")]
    assert "and 1.5× those of the same loop on ONNX Runtime, to a" in TABLES["headline"](run + speeds)
    assert "ONNX" not in TABLES["headline"]([*run, speeds[0], speeds[1] | {"commit": "d"}])


def test_readme_s_table_leaves_out_runs_without_a_peer_and_changed_trees(rows: list[Record]) -> None:
    mine = [row for row in rows if row["what"] == "end_to_end"]
    head = TABLES["end_to_end"]([])
    assert len(TABLES["end_to_end"](mine).splitlines()) > len(head.splitlines())
    assert (
        TABLES["end_to_end"]([row | {"commit": row["commit"].removesuffix("-dirty") + "-dirty"} for row in mine])
        == head
    )
    peer = "reference_loop_onnxruntime"
    assert TABLES["end_to_end"]([row for row in mine if row["provider"] != peer]) == head
    other = [row | {"commit": "another"} if row["provider"] == peer else row for row in mine]
    assert TABLES["end_to_end"](other) == head, "of another run"


@pytest.mark.parametrize(("driver", "said"), [("580", True), (None, False)], ids=["beside a GPU", "of a CPU"])
def test_onnxruntime_without_the_gpu_is_said_to_be(driver: str | None, said: bool, rows: list[Record]) -> None:
    """In every table that sets gpupipe beside it: its package for CPUs makes a GPU look faster than it is."""
    mine = copy.deepcopy([row for row in rows if row["what"] == "end_to_end" and row["axis"] == "frames"])
    mine = [row for row in mine if row["config"].get("width") == 1]  # others are nobody's headline
    newest = max((row for row in mine if row["provider"] == "reference_loop_onnxruntime"), key=lambda row: row["time"])
    mine = [row for row in mine if all(row[fact] == newest[fact] for fact in ("device", "commit"))]
    for row in mine:
        row["driver"] = driver
        if row["provider"] == "reference_loop_onnxruntime":
            row["config"]["onnxruntime_provider"] = "CPUExecutionProvider"
    for table in ("headline", "end_to_end", "side_by_side"):
        assert ("(on the CPU)" in TABLES[table](mine)) == said, table


def test_plots_show_the_recorded_figures(drawn: dict[str, str]) -> None:
    assert set(drawn) == set(plots.PLOTS)
    for name, svg in drawn.items():
        assert same_plot(svg, (RESULTS / f"{name}.svg").read_text("utf-8")), "run python benchmarks/tables.py"


def test_another_figure_would_be_noticed_in_each_plot(drawn: dict[str, str], other_rows: list[Record]) -> None:
    for name, svg in plots.draw(other_rows).items():
        assert not same_plot(svg, drawn[name]), name


def test_a_plot_of_another_matplotlib_is_held_to_what_it_says(drawn: dict[str, str]) -> None:
    svg = drawn["end_to_end"]
    other = svg.replace(f"Matplotlib v{plots.drawn_by(svg)}", "Matplotlib v0.0").replace('width="', 'width="1')
    assert same_plot(svg, other)
    assert not same_plot(svg, other.replace("LiveTalking", "DeadTalking"))


def test_precisions_of_two_widths_share_a_line() -> None:
    def of(width: float | None, metric: str, p50: float, name: str = "bfloat16") -> Record:
        config = {"frames": 24} | ({} if width is None else {"width": width})
        row = {"what": "precision", "provider": "llvm", "value": name, "metric": metric, "p50": p50, "error": None}
        return row | {"config": config, "device": "a CPU", "commit": f"c{p50:.0f}"}

    old = [of(None, "psnr", 41), of(None, "largest_difference", 30)]  # the bundled network's, before widths were told
    full = [of(1, "psnr", 47), of(1, "largest_difference", 9)]
    alone = "| bfloat16 | llvm on a CPU | 41.0 dB | 30.0 of 255 |  |  |  | `c30`, `c41` |"
    assert TABLES["precision"](old).splitlines()[2:] == [alone]
    both = "| bfloat16 | llvm on a CPU | 44.0 dB | 30.0 of 255 | 47.0 dB | 9.0 of 255 |  | `c30`, `c44`, `c47`, `c9` |"
    assert TABLES["precision"]([*old, *full, of(0.25, "psnr", 44)]).splitlines()[2:] == [both], "the newest of each"
    assert len(TABLES["precision"]([*old, of(1, "psnr", 80, "float16")]).splitlines()) == 3, (
        "needs the bundled network's"
    )


def test_a_precision_s_speed_stands_beside_its_errors() -> None:
    def of(name: str, ms: float, *, cached: bool = True, width: float = 1, device: str = "a CPU") -> Record:
        config = {"width": width, "cached": cached, "precision": name}
        row = {"what": "unet", "provider": "llvm", "value": 1, "metric": "latency", "p50": ms, "error": None}
        return row | {"config": config, "device": device, "driver": None}

    error = {"what": "precision", "provider": "llvm", "value": "bfloat16", "metric": "psnr", "p50": 41, "error": None}
    error |= {"config": {}, "device": "a CPU", "commit": "c"}
    others = [of("bfloat16", 7, cached=False), of("bfloat16", 7, width=0.5), of("bfloat16", 7, device="another")]
    speeds = [of("bfloat16", 8), of("bfloat16", 9.14), of("float32", 15.25), *others]
    assert "| 9.14 (15.2) |" in TABLES["precision"]([error, *speeds]), "the newest"
    assert "(" not in TABLES["precision"]([error, *speeds[:2], *others]).splitlines()[2], "nothing to compare with"


def test_energy_has_a_column_where_it_is_counted(rows: list[Record]) -> None:
    speed = next(
        row for row in rows if (row["what"], row["metric"], row["axis"]) == ("end_to_end", "throughput", "frames")
    )
    energy = speed | {"metric": "energy", "unit": "J/frame", "p50": 0.321}
    assert "J a frame" not in TABLES["side_by_side"](rows)
    head, _, line = TABLES["side_by_side"]([speed, energy]).splitlines()
    assert head.split("|").index(" J a frame ") == line.split("|").index(" 0.321 ")


def test_kernels_stand_beside_the_copy_bandwidth() -> None:
    def of(metric: str, p50: float, case: str = "NV12") -> Record:
        row = {"what": "paste_blend", "provider": "triton", "value": 64, "metric": metric, "error": None}
        row |= {"p50": p50, "p20": p50 / 2, "p80": 2 * p50, "config": {"case": case}, "device": "a GPU", "commit": "c"}
        return row

    older, rows = of("latency", 9), [of("latency", 1.234), of("bandwidth", 2900), of("ratio", 72.4)]
    failed = of("latency", 1, "BGR") | {"error": "RuntimeError: no"}
    tile = of("latency", 1, "pointwise") | {"what": "tiles"}
    line = "| a GPU | paste_blend | NV12 | 64 | triton | **1.23** (0.617–2.47) | 2900 | 72.4 | `c` |"
    assert TABLES["kernels"]([older, *rows, failed, tile]).splitlines()[2:] == [line]


def test_what_a_render_costs_beside_its_slower_half() -> None:
    def of(provider: str, metric: str, p50: float, **config: object) -> Record:
        row = {"what": "overlap", "provider": provider, "metric": metric, "value": 300, "p50": p50, "error": None}
        config = {"template": "speaker", "engine": "llvm", "exact": True} | config
        return row | {"config": config, "device": "a CPU", "commit": "c"}

    works = {"compute": 56.2, "encode": 174, "render": 42.9}
    rows = [of(work, "throughput", speed) for work, speed in works.items()] + [of("render", "ratio", 1.31)]
    start = "| a CPU; template speaker, full-width network | llvm, float32 | 300 frames | libx264 | 56.2 | 174 | 42.9 |"
    assert TABLES["overlap"](rows).splitlines()[2:] == [f"{start} **1.31×** |  |  | `c` |"], "an old run"
    more = [of("render", "least", 1.26), of("render", "share", 34.4), of("render", "of_encoder", 24.7)]
    whole = f"{start} **1.31×** (1.26×) | 25 % | 34 % | `c` |"
    assert TABLES["overlap"]([*rows, *more]).splitlines()[2:] == [whole]
    on_a_gpu = [row | {"config": row["config"] | {"codec": "mjpeg", "exact": False}} for row in rows]
    assert len(TABLES["overlap"]([*rows, *on_a_gpu]).splitlines()) == 4, "another way"


def test_there_are_no_pages_but_in_the_repository(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "IN_REPOSITORY", False)
    monkeypatch.setattr("sys.argv", ["tables", "--check"])
    with pytest.raises(SystemExit, match="2"):
        tables.main()
    assert "the pages are in the repository only" in capsys.readouterr().err


def test_every_claim_names_hardware_and_source_and_is_drawn_apart(drawn: dict[str, str]) -> None:
    said, table = "\n".join(plots.texts(drawn["end_to_end"])), TABLES["claims"]([])
    assert "not measured here" in said
    for claim in CLAIMS:
        assert claim.hardware and claim.source
        assert f"{claim.who}: {claim.hardware}" in said
        assert claim.who in table
        if claim.who.startswith("predecessor"):
            assert claim.url is None
        else:
            assert f"({claim.url})" in table and claim.url and claim.url.startswith("https://")
    assert CLAIMS


@pytest.mark.parametrize("device", [None, "NVIDIA RTX PRO 6000 Blackwell Server Edition"])
def test_all_that_a_plot_says_is_inside_of_it(device: str | None, rows: list[Record]) -> None:
    backend = pytest.importorskip("matplotlib.backends.backend_agg")
    from matplotlib.text import Text

    if device:
        rows = [row | {"device": device} for row in rows]
    for name, figure in plots.figures(rows).items():
        canvas, written = backend.FigureCanvasAgg(figure), []

        def draw(text: Text, *given: object, written: list[Text] = written, **how: object) -> None:
            written.append(text)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Text, "draw", draw)
            canvas.draw()
        assert len(written) > 10
        for text in written:
            box, page = text.get_window_extent(canvas.get_renderer()), figure.bbox
            inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
            assert inside or not text.get_text(), f"{name}: {text.get_text()}"


@pytest.mark.parametrize("name", sorted(TABLES))
def test_a_run_that_failed_hides_no_figure(name: str, rows: list[Record]) -> None:
    none = {"p20": None, "p50": None, "p80": None, "n": 0, "error": "RuntimeError: no"}
    never = ("instructions", "half"), ("end_to_end", "stage")  # what fails of these leaves no row
    failed = [row | none for row in rows if (row["what"], row["axis"]) not in never]
    assert TABLES[name]([*rows, *failed]) == TABLES[name](rows)


def test_a_gpu_s_figures_are_not_told_as_a_cpu_s() -> None:
    config = {"width": 1, "mode": "ave", "exact": False, "template": "anna", "size": [64, 48]}
    row = {"what": "end_to_end", "axis": "frames", "error": None, "provider": "gpupipe", "metric": "ratio", "n": 3}
    row |= {"value": 300, "p50": 90, "time": "2026", "device": "a GPU", "driver": "580", "commit": "c"}
    assert TABLES["headline"]([row | {"config": config}]).endswith(
        "on a GPU: 300 frames of 64×48, template anna, full-width network, mode ave, half precision"
        " ([how it was measured](#results))."
    )
    assert "any GPU" not in TABLES["hours"]([row | {"config": config}])
    # And what a precision gains there is told of a render's batches.
    error = {"what": "precision", "provider": "fused", "value": "float16", "metric": "psnr", "p50": 41, "error": None}
    error |= {"config": {}, "device": "a GPU", "commit": "c"}
    speeds = []
    for batch, ms in ((tables.BATCH_SIZES["cuda"], 0.125), (1, 0.75)):
        for name, more in (("float16", 0), ("float32", 1)):
            row = {"what": "unet", "provider": "fused", "value": batch, "metric": "latency", "p50": ms + more}
            config = {"width": 1, "cached": True, "precision": name}
            speeds.append(row | {"config": config, "device": "a GPU", "driver": "580", "error": None})
    assert "| 0.125 (1.12) |" in TABLES["precision"]([error, *speeds])


def test_the_newest_run_counts_whatever_its_place_in_the_file(rows: list[Record]) -> None:
    mine = [row for row in rows if (row["what"], row["metric"], row["axis"]) == ("end_to_end", "ratio", "frames")]
    newer = copy.deepcopy(mine[-1]) | {"p50": 777.0, "time": "2999-01-01T00:00:00+00:00"}
    by_time = sorted([newer, *rows], key=lambda row: row["time"])
    assert "777.0×" in TABLES["side_by_side"](by_time)
    assert "777.0×" not in TABLES["side_by_side"]([newer, *rows])  # whoever does not sort sees an older one

"""The command line: what it writes, what it prints, and how it ends."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import wave
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock, call, create_autospec

import av
import cv2
import numpy as np
import pytest
import torch
from commands import FRAMES, QUICK, render_words, run, write_clip

from gpupipe import FrameGenerationPipeline, __version__, cli
from gpupipe.cli import main
from gpupipe.farm import FarmRecord
from gpupipe.models.audio_encoder import AudioEncoder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, make_template: Any, tiny_checkpoint: Any) -> dict[str, Path]:
    return write_clip(tmp_path_factory.mktemp("clip"), make_template, tiny_checkpoint)


def test_render_writes_a_video_with_sound_and_a_record(clip: dict[str, Path], tmp_path: Path) -> None:
    result = run(*render_words(clip, tmp_path / "out.mp4", "--json", "--batch-size", 2))
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["frames"] == FRAMES
    assert record["frames_per_second"] == pytest.approx(FRAMES / record["seconds"])
    assert sum(record["stages"].values()) == pytest.approx(record["seconds"])
    assert record["engine"] and record["codec"] and record["device"] and record["fallbacks"] == []
    assert record["versions"]["gpupipe"] == __version__
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == FRAMES
        assert len(container.streams.audio) == 1


@pytest.mark.parametrize(
    ("has", "words", "told"),
    [
        ([torch.float16, torch.bfloat16], [], "float16"),
        ([torch.bfloat16], [], "bfloat16"),
        ([], [], None),
        ([torch.float16], ["--json"], None),
        ([torch.float16], ["--exact"], None),
        ([torch.float16], ["--precision", "float32"], None),
        ([torch.float16], ["--engine", "onnxruntime"], None),
    ],
)
def test_a_precision_is_suggested_where_a_cpu_has_it_unless_one_chose(
    has: list[torch.dtype],
    words: list[str],
    told: str | None,
    clip: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "llvm_obstacle", lambda dtype: None if dtype in has else "it is made of wood")
    result = run(*render_words(clip, tmp_path / "out.mp4", "--device", "cpu", *words))
    assert result.exit_code == 0, result.output
    assert result.stderr.count("tip: ") == (told is not None)
    assert told is None or f"tip: --precision {told} is usually faster" in result.stderr


@pytest.mark.parametrize("wrong", ["features", "template", "sound"])
def test_inputs_are_looked_at_before_a_network_is_loaded(
    wrong: str, clip: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr(cli, "FrameGenerationPipeline", load)
    np.save(tmp_path / "wrong", np.zeros((FRAMES, 7), np.float32))
    result = run(*render_words({**clip, wrong: tmp_path / "wrong.npy"}, tmp_path / "out.mp4"))
    assert result.exit_code == 2, result.output
    assert str(tmp_path / "wrong.npy") in " ".join(result.stderr.split())
    assert "a network was loaded" in run(*render_words(clip, tmp_path / "out.mp4")).stderr


def test_paths_that_look_like_protocols_are_files(
    clip: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FFmpeg takes what stands before a colon for a protocol."""
    monkeypatch.chdir(tmp_path)
    Path("a:b").mkdir()
    sound = Path(shutil.copy(clip["sound"], "a:b/tone:1.wav"))
    result = run(*render_words({**clip, "sound": sound}, Path("a:b/12:30.mp4"), *QUICK))
    assert result.exit_code == 0, result.output
    with av.open("file:a:b/12:30.mp4") as container:
        assert len(container.streams.audio) == 1


def test_paths_that_look_like_markup_are_printed_unchanged(clip: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a[").mkdir()
    output = tmp_path / "a[" / "b].mp4"
    result = run(*render_words(clip, output, *QUICK))
    assert result.exit_code == 0, result.output
    assert f"{output}: {FRAMES} frames" in result.stderr


def test_options_reach_the_render(clip: dict[str, Path], tmp_path: Path) -> None:
    words = render_words(clip, tmp_path / "out.mkv", "--fps", 10, "--blend", "none", "--start-frame", 1, "--exact")
    result = run(*words, "--engine", "eager", "--crf", 30, "--save-frames", "--frames-dir", tmp_path / "kept", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["engine"] == "eager"
    assert len(list((tmp_path / "kept").glob("frame_*.jpg"))) == round(FRAMES / 25 * 10), "as many as in the video"
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert container.streams.video[0].average_rate == 10


@pytest.mark.parametrize("command", ["render", "frames"])
def test_every_option_reaches_the_pipeline(
    command: str, clip: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = create_autospec(FrameGenerationPipeline)
    made.return_value.last_render = None
    monkeypatch.setattr(cli, "FrameGenerationPipeline", made)
    for name in ("print_record", "print_waterfall", "_suggest_precision"):
        monkeypatch.setattr(cli, name, lambda *_: None)
    np.save(tmp_path / "wenet.npy", np.zeros((2, 256, 16, 32), np.float32))
    inputs = {"checkpoint": clip["checkpoint"], "template": clip["template"], "audio-features": tmp_path / "wenet.npy"}
    of_both = {"mode": "wenet", "device": "cpu", "start-frame": 2, "blend": "none", "feather": 3.5, "batch-size": 6}
    of_both |= {"memory-budget": 7, "engine": "eager", "precision": "float32", "fps": 12.5}
    of_one = {"crf": 31, "codec": "hevc", "preset": "slow", "audio": clip["sound"], "profile": tmp_path / "trace.json"}
    flags, out = ["--exact", "--use-parsing"], tmp_path / "out.mp4"
    if command == "render":
        words = inputs | of_both | of_one | {"output": out, "frames-dir": tmp_path / "kept"}
    else:
        words = inputs | of_both | {"output-dir": out, "format": "png"}
    result = run(command, *(word for name, value in words.items() for word in (f"--{name}", value)), *flags)
    assert result.exit_code == 0, result.output

    def told(function: Any, call: Any, first: tuple[Any, ...] = ()) -> dict[str, Any]:
        return dict(inspect.signature(function).bind(*first, *call.args, **call.kwargs).arguments)

    assert told(FrameGenerationPipeline, made.call_args) == {
        "checkpoint_path": clip["checkpoint"], "mode": "wenet", "device": "cpu", "engine": "eager", "exact": True,
        "precision": "float32", "blend": "none", "feather": 3.5, "batch_size": 6, "memory_budget": 7_000_000,
    }  # fmt: skip
    name = "generate_video" if command == "render" else "generate_frames_only"
    asked = told(getattr(FrameGenerationPipeline, name), getattr(made.return_value, name).call_args, (None,))
    del asked["self"], asked["progress"]
    expected = {"audio_features_path": words["audio-features"], "template_dir": clip["template"], "start_frame": 2}
    expected |= {"fps": 12.5, "use_parsing": True}
    if command == "render":
        expected |= {name: of_one[name] for name in ("crf", "codec", "preset", "profile")}
        expected |= {"audio_path": clip["sound"], "output_path": out}
        expected |= {"save_frames": True, "frames_dir": tmp_path / "kept"}
    else:
        expected |= {"output_dir": out, "image_format": "png", "resample": True}
    assert asked == expected


def test_profile_prints_where_time_went(clip: dict[str, Path], tmp_path: Path) -> None:
    result = run(*render_words(clip, tmp_path / "out.mp4", "--profile", tmp_path / "trace.json", *QUICK, "--json"))
    assert result.exit_code == 0, result.output
    busy = json.loads(result.stdout.splitlines()[-1])["busy"]
    lines = result.stderr.splitlines()
    for stage, seconds in busy.items():
        [line] = [line for line in lines if line.strip().startswith(stage)]
        assert f"{seconds:.2f}" in line
    assert any(line.startswith("bounded by the ") for line in lines)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["name"] for event in events if event["ph"] == "X"} == set(busy)


def test_wenet_renders_at_20_frames_a_second(clip: dict[str, Path], tiny_checkpoint: Any, tmp_path: Path) -> None:
    features = tmp_path / "wenet.npy"
    np.save(features, np.zeros((3, 16 * 512), dtype=np.float32))
    wenet = {**clip, "checkpoint": tiny_checkpoint("wenet"), "features": features}
    result = run(*render_words(wenet, tmp_path / "out.mp4", "--mode", "wenet", *QUICK))
    assert result.exit_code == 0, result.output
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].average_rate == 20


def test_render_makes_features_from_sound(clip: dict[str, Path], golden_weights: ModuleType, tmp_path: Path) -> None:
    """The same video as from stored features, the last row repeated for as long as the sound lasts."""
    import torch

    encoder = tmp_path / "ave.pth"
    state = golden_weights.state_dict("ave-encoder")
    torch.save({name: torch.from_numpy(value) for name, value in state.items()}, encoder)
    rows = tmp_path / "rows.npy"
    assert run("features", clip["sound"], "--encoder", encoder, "-o", rows, "--bin").exit_code == 0
    assert json.loads((tmp_path / "rows.bin.json").read_text())["num_frames"] == len(np.load(rows))
    stored_rows = np.load(rows)
    with wave.open(str(clip["sound"])) as sound:
        lasting = sound.getnframes() * 25 // sound.getframerate()
    np.save(rows, np.pad(stored_rows, ((0, max(0, lasting - len(stored_rows))), (0, 0)), mode="edge"))
    words = ["render", "--checkpoint", clip["checkpoint"], "--template", clip["template"], "--audio", clip["sound"]]
    words += QUICK
    direct = run(*words, "--encoder", encoder, "--output", tmp_path / "a.mp4")
    stored = run(*words, "--audio-features", rows, "--output", tmp_path / "b.mp4")
    assert direct.exit_code == stored.exit_code == 0, direct.output + stored.output
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_frames_writes_numbered_jpegs(clip: dict[str, Path], tmp_path: Path) -> None:
    words = ("--checkpoint", clip["checkpoint"], "--template", clip["template"], "--audio-features", clip["features"])
    result = run("frames", *words, *QUICK, "--output-dir", tmp_path / "frames")
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "frames").iterdir())
    assert names == [f"frame_{i:05d}.jpg" for i in range(FRAMES)]
    assert cv2.imread(str(tmp_path / "frames" / names[0])).shape == (128, 192, 3)


def test_frames_at_another_rate_are_those_of_the_video(clip: dict[str, Path], tmp_path: Path) -> None:
    """`frames` writes as many frames as `render` with the same options keeps, and the same ones."""
    torch.save(AudioEncoder().state_dict(), tmp_path / "ave.pth")
    words = ["--checkpoint", clip["checkpoint"], "--template", clip["template"], "--encoder", tmp_path / "ave.pth"]
    words += ["--audio", clip["sound"], "--fps", 50, *QUICK]
    made = run("frames", *words, "--output-dir", tmp_path / "frames")
    assert made.exit_code == 0, made.output
    rendered = run("render", *words, "--output", tmp_path / "out.mp4", "--frames-dir", tmp_path / "kept")
    assert rendered.exit_code == 0, rendered.output
    frames, kept = (sorted((tmp_path / name).iterdir()) for name in ("frames", "kept"))
    assert len(frames) > FRAMES
    assert [path.read_bytes() for path in frames] == [path.read_bytes() for path in kept], "--frames-dir keeps them"


@pytest.mark.parametrize(
    "words", [(), ("--encoder", "ave.pth"), ("--encoder", "ave.pth", "--audio", "a.wav", "--mode", "hubert")]
)
def test_frames_without_sound_or_features_is_refused(
    words: tuple[str, ...], clip: dict[str, Path], tmp_path: Path
) -> None:
    source = ("--checkpoint", clip["checkpoint"], "--template", clip["template"])
    result = run("frames", *source, "--output-dir", tmp_path / "frames", *words)
    assert result.exit_code == 2 and "--audio" in result.stderr and "--encoder" in result.stderr
    assert not (tmp_path / "frames").exists()


def test_export_and_reference_write_their_files(clip: dict[str, Path], tmp_path: Path) -> None:
    result = run("export", "--checkpoint", clip["checkpoint"], "--output", tmp_path / "unet.onnx")
    assert result.exit_code == 0 and (tmp_path / "unet.onnx").stat().st_size > 10_000, result.output
    words = ("--checkpoint", clip["checkpoint"], "--template", clip["template"], "--audio-features", clip["features"])
    result = run("reference", *words, *QUICK, "--output-dir", tmp_path / "reference", "--num-sample-frames", 2)
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "reference" / "metadata.json").read_text())
    assert facts["sample_indices"] == [0, FRAMES - 1]


def test_the_mode_reaches_what_is_exported(
    clip: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint tells hubert's network from ave's, which would be exported without an error."""
    exported = Mock()
    monkeypatch.setattr(cli, "export_unet", exported)
    words = ("--checkpoint", clip["checkpoint"], "--mode", "hubert")
    assert run("export", *words, "--output", tmp_path / "unet.onnx").exit_code == 0
    (network, path), _ = exported.call_args
    assert (network.mode, path) == ("hubert", tmp_path / "unet.onnx")


def test_reference_frames_are_exact(clip: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = create_autospec(FrameGenerationPipeline)
    made.return_value.generate_reference_outputs.return_value = {"sample_indices": [0]}
    monkeypatch.setattr(cli, "FrameGenerationPipeline", made)
    words = ("--checkpoint", clip["checkpoint"], "--template", clip["template"], "--audio-features", clip["features"])
    words += ("--mode", "hubert", "--device", "cpu", *QUICK, "--output-dir", tmp_path, "--num-sample-frames", "3")
    assert run("reference", *words).exit_code == 0
    assert made.call_args == call(clip["checkpoint"], "hubert", "cpu", engine="eager", exact=True)
    asked = made.return_value.generate_reference_outputs.call_args
    assert asked == call(clip["features"], clip["template"], tmp_path, 3)


def exit_code(words: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The exit code of the command line itself, ``main``."""
    monkeypatch.setattr(sys, "argv", ["gpupipe", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("render --nope", "--nope"),
        ("render --crf high", "'--crf'"),
        ("render --mode deepspeech", "'--mode': 'deepspeech' is not one of 'ave', 'hubert', 'wenet'"),
        ("frames", "Missing option"),
        ("paint", "No such command 'paint'"),
    ],
)
def test_wrong_command_lines_are_reported_in_one_line(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(words, monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpupipe: ")
    assert said in line
    assert "--help" in line


@pytest.mark.parametrize(("words", "code"), [("", 2), ("--help", 0), ("--version", 0)])
def test_help_and_version_are_not_printed_as_errors(
    words: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(words, monkeypatch) == code
    assert "gpupipe: " not in capsys.readouterr().err


def test_help_prints_in_an_encoding_without_its_letters() -> None:
    command = [sys.executable, "-m", "gpupipe", "render", "--help"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert "--checkpoint" in told.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": Path("missing.pth")}, "missing.pth: no such checkpoint file"),
        ({"template": Path("nowhere")}, "nowhere: no such template directory"),
        ({"features": Path("missing.npy")}, "missing.npy: no such file of audio features"),
        ({"sound": Path("missing.wav")}, "missing.wav: no such sound file"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(
    clip: dict[str, Path], change: dict[str, Path], message: str, tmp_path: Path
) -> None:
    result = run(*render_words({**clip, **change}, tmp_path / "out.mp4", *QUICK))
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "cuda:7"), "cuda:7"),
        (("--codec", "h265000"), "h265000"),
        (("--start-frame", 3), "start frame is 3"),
        (("--crf", 99), "crf is 99"),
        (
            ("--codec", "libx264", "--preset", "foo"),
            "libx264 does not open with preset 'foo'; expected one of ultrafast,",
        ),
        (
            ("--codec", "libx265", "--preset", "foo"),
            "libx265 does not open with preset 'foo'; expected one of ultrafast,",
        ),
        (("--codec", "libsvtav1", "--preset", "foo"), "libsvtav1 does not open with preset 'foo' (Invalid argument)"),
        (("--fps", 0), "fps is 0"),
        (("--mode", "wenet"), "for mode wenet; mode ave takes it"),
        (("--mode", "deepspeech"), "deepspeech"),
        (("--encoder", "x.pth"), "either --audio-features or --encoder"),
    ],
)
def test_wrong_options_exit_2(
    clip: dict[str, Path], words: tuple[object, ...], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = run(*render_words(clip, tmp_path / "out.mp4", *QUICK, *words))
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr and "{" not in result.stderr
    assert capfd.readouterr().err == "", "printed by a library"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--memory-budget", -5), "memory budget is -5 MB; expected 0 or more"),
        (("--batch-size", 0), "batch size is 0; expected 1 or more"),
        (("--feather", -1), "feather is -1.0; expected a width in pixels, 0 or more"),
    ],
)
def test_wrong_numbers_are_reported_as_given(
    words: tuple[object, ...], told: str, clip: dict[str, Path], tmp_path: Path
) -> None:
    source = ("--checkpoint", clip["checkpoint"], "--template", clip["template"], "--audio-features", clip["features"])
    result = run("frames", *source, *QUICK, "--output-dir", tmp_path / "o", *words)
    assert result.exit_code == 2
    assert result.stderr == f"gpupipe: {told}\n"
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["out.yuv", "out.h264", "out.ogg", "out"])
def test_wrong_suffix_is_reported_before_anything_is_opened(name: str, clip: dict[str, Path], tmp_path: Path) -> None:
    render = render_words({**clip, "checkpoint": Path("missing.pth")}, tmp_path / name)
    for words in (render, ["demo", "--audio", "missing.wav", "--output", tmp_path / name]):
        result = run(*words)
        assert result.exit_code == 2
        assert f"{name}: suffix is {Path(name).suffix!r}; expected .mp4, .mkv or .mov" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["foo", "cuda:99"])
def test_wrong_device_of_features_exits_2(device: str, clip: dict[str, Path], tmp_path: Path) -> None:
    torch.save(AudioEncoder().state_dict(), tmp_path / "ave.pth")
    words = ("--encoder", tmp_path / "ave.pth", "-o", tmp_path / "rows.npy")
    result = run("features", clip["sound"], *words, "--device", device)
    assert result.exit_code == 2
    assert f"device is '{device}'" in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "rows.npy").exists()
    assert run("features", clip["sound"], *words, "--device", "auto").exit_code == 0


@pytest.mark.parametrize(
    "words",
    [
        "features {clip[sound]} --encoder {encoder} -o {out}/f.npy",
        "export --checkpoint {clip[checkpoint]} -o {out}/u.onnx",
    ],
)
def test_an_output_that_cannot_be_written_is_told_before_the_work(
    words: str, clip: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cli.load_unet", "cli.SpeechEncoder"):
        monkeypatch.setattr(f"gpupipe.{name}", pytest.fail)
    result = run(*words.format(clip=clip, encoder=tmp_path / "e.pth", out=tmp_path / "gone").split())
    assert result.exit_code == 2
    assert f"there is no folder {tmp_path / 'gone'}" in result.stderr


def test_a_render_on_a_cpu_loads_no_more_than_it_uses(clip: dict[str, Path], tmp_path: Path) -> None:
    """A command that starts in one second is more usable than in three; torchvision is needed on CUDA alone."""
    words = [str(word) for word in render_words(clip, tmp_path / "out.mp4", "--engine", "onnxruntime")]
    home = tmp_path / "home"
    heavy = ["cv2", "matplotlib", "ray", "torchvision", "torch._dynamo", "triton"]
    code = f"import sys; from gpupipe.cli import app; app({words}, standalone_mode=False)"
    code += f"; print([name for name in {heavy} if name in sys.modules])"
    environment = os.environ | {"HOME": str(home)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert not home.exists(), "ONNX Runtime keeps an identifier there, for what it reports"


@pytest.mark.parametrize("command", [[Path(sys.executable).with_name("gpupipe")], [sys.executable, "-m", "gpupipe"]])
def test_installed_command_runs(command: list[Path | str], tmp_path: Path) -> None:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == __version__
    failed = subprocess.run([*command, "export"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert failed.returncode == 2


def test_a_command_ends_without_a_search_for_cycles(tmp_path: Path) -> None:
    """Which took Python 0.4 s among PyTorch's objects."""
    told = "atexit.register(lambda: print(gc.get_freeze_count() > 100_000))"
    code = f"import atexit, gc, sys; from gpupipe.cli import main; {told}; sys.argv[1:] = ['--version']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split() == [__version__, "True"]


def test_a_standard_output_that_is_closed_is_no_crash() -> None:
    line = f"{sys.executable} -m gpupipe --version >&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_farm_s_record_is_alone_on_standard_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray prints notices to it."""

    def run_farm(*_: object, **__: object) -> FarmRecord:
        print("(raylet) A worker died or was killed")
        return FarmRecord(1, 0, 1, 0, 10, 1.0, "cpu", 1)

    monkeypatch.setattr("gpupipe.farm.run_farm", run_farm)
    result = run("farm", tmp_path / "jobs.jsonl", "--output-dir", tmp_path, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["done"] == 1
    assert "(raylet) A worker died" in result.stderr


@pytest.mark.parametrize("parked", [0, 1])
def test_every_option_reaches_the_farm(parked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is parked is told by the exit code."""
    run_farm = Mock(return_value=FarmRecord(1, 0, 1 - parked, parked, 10, 1.0, "cpu", 1))
    monkeypatch.setattr("gpupipe.farm.run_farm", run_farm)
    options = {"device": "cpu", "batch-size": 3, "memory-budget": 5, "part-seconds": 8, "workers": 2, "ray": "auto"}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    result = run("farm", tmp_path / "jobs.jsonl", "--output-dir", tmp_path, *words, "--force")
    assert result.exit_code == parked, result.output
    told = dict(run_farm.call_args.kwargs)
    del told["on_job_end"]
    assert run_farm.call_args.args == (tmp_path / "jobs.jsonl", tmp_path)
    assert told == {
        "device": "cpu", "batch_size": 3, "memory_budget": 5_000_000, "part_seconds": 8, "workers": 2,
        "address": "auto", "force": True,
    }  # fmt: skip

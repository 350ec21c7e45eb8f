"""The command line: each command is one call."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.markup import escape
from rich.table import Table

from gpupipe import __version__, options
from gpupipe.console import (
    console,
    discard_output,
    print_json,
    print_record,
    print_states,
    print_waterfall,
    progress_bar,
    reporting,
    standard_output,
    state_line,
    wrong_usage,
)
from gpupipe.demo import render_demo
from gpupipe.doctor import examine, measure_engines
from gpupipe.engines.choice import LOWER_ON_CPU
from gpupipe.errors import InputError
from gpupipe.features import SpeechFeatures, save_features, video_rate, write_features
from gpupipe.files import check_writable, replacing
from gpupipe.kernels.dispatch import llvm_obstacle
from gpupipe.models import Mode, load_unet
from gpupipe.onnx_export import export_unet
from gpupipe.pipeline import FrameGenerationPipeline
from gpupipe.seam import FEATHER
from gpupipe.speech import SpeechEncoder
from gpupipe.template import template_size
from gpupipe.video.encode import check_suffix
from gpupipe.video.images import ImageFormat
from gpupipe.video.sound import open_sound

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Lip-synced talking-head video from template frames and speech.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
Sweep = Literal["batch", "resolution", "length"]


@app.command()
def render(
    checkpoint: options.Checkpoint,
    template: options.TemplateFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="The video: .mp4, .mkv or .mov; replaced if there.")],
    audio_features: options.OptionalFeatures = None,
    encoder: options.Encoder = None,
    audio: Annotated[Path | None, typer.Option(help="Sound: any file that FFmpeg reads; silent if omitted.")] = None,
    mode: options.Mode = "ave",
    device: options.Device = None,
    start_frame: options.StartFrame = 0,
    fps: options.Fps = None,
    crf: options.Crf = 20,
    codec: options.Codec = "auto",
    preset: options.Preset = None,
    blend: options.Blend = "feather",
    feather: options.Feather = FEATHER,
    use_parsing: options.UseParsing = False,
    batch_size: options.BatchSize = None,
    memory_budget: options.MemoryBudget = None,
    engine: options.Engine = "auto",
    exact: options.Exact = False,
    precision: options.Precision = None,
    save_frames: Annotated[bool, typer.Option("--save-frames", help="Keep the frames as JPEGs too.")] = False,
    frames_dir: Annotated[
        Path | None, typer.Option(help="Keep the frames in this folder; by default <output>_frames beside the video.")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="Trace of every stage, .json; prints where time went.")] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Render a clip: checkpoint, template and speech to a video with sound."""
    with reporting(debug):
        _check_inputs(template, audio_features, encoder, audio, mode)
        check_suffix(output)
        pipeline = FrameGenerationPipeline(
            checkpoint,
            mode,
            device,
            engine=engine,
            exact=exact or None,  # the device decides
            precision=precision,
            blend=blend,
            feather=feather,
            batch_size=batch_size,
            memory_budget=_bytes(memory_budget),
        )
        with _features(audio_features, encoder, audio, device) as features, progress_bar() as progress:
            pipeline.generate_video(
                features,
                template,
                audio,
                output,
                start_frame,
                video_rate(mode, fps),
                use_parsing,
                crf,
                save_frames or frames_dir is not None,
                frames_dir,
                codec=codec,
                preset=preset,
                progress=progress,
                profile=profile,
            )
        if profile is not None:
            print_waterfall(pipeline.last_render)
        print_record(pipeline.last_render, output, as_json)
        if not as_json:
            _suggest_precision(pipeline, engine, exact or precision)


@app.command()
def frames(
    checkpoint: options.Checkpoint,
    template: options.TemplateFolder,
    output_dir: options.OutputFolder,
    audio_features: options.OptionalFeatures = None,
    encoder: options.Encoder = None,
    audio: Annotated[Path | None, typer.Option(help="Sound for --encoder; images have none.")] = None,
    mode: options.Mode = "ave",
    device: options.Device = None,
    start_frame: options.StartFrame = 0,
    fps: options.Fps = None,
    blend: options.Blend = "feather",
    feather: options.Feather = FEATHER,
    use_parsing: options.UseParsing = False,
    batch_size: options.BatchSize = None,
    memory_budget: options.MemoryBudget = None,
    engine: options.Engine = "auto",
    exact: options.Exact = False,
    precision: options.Precision = None,
    image_format: Annotated[ImageFormat, typer.Option("--format", help="Image format; png is lossless.")] = "jpeg",
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Render a clip to numbered images, one for each frame of the video that render would make."""
    with reporting(debug):
        _check_inputs(template, audio_features, encoder, audio, mode)
        pipeline = FrameGenerationPipeline(
            checkpoint,
            mode,
            device,
            engine=engine,
            exact=exact or None,  # the device decides
            precision=precision,
            blend=blend,
            feather=feather,
            batch_size=batch_size,
            memory_budget=_bytes(memory_budget),
        )
        with _features(audio_features, encoder, audio, device) as features, progress_bar() as progress:
            pipeline.generate_frames_only(
                features,
                template,
                output_dir,
                start_frame,
                video_rate(mode, fps),
                use_parsing,
                image_format=image_format,
                resample=True,
                progress=progress,
            )
        print_record(pipeline.last_render, output_dir, as_json)
        if not as_json:
            _suggest_precision(pipeline, engine, exact or precision)


@app.command()
def features(
    sound: Annotated[Path, typer.Argument(help="Sound: any file that FFmpeg reads.")],
    encoder: Annotated[Path, typer.Option(help="AVE encoder checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The features, .npy.")],
    bin_pair: Annotated[bool, typer.Option("--bin", help="Write the .bin and .bin.json pair too.")] = False,
    device: options.Device = None,
    debug: options.Debug = False,
) -> None:
    """Make speech features from sound."""
    with reporting(debug):
        check_writable(output)
        rows = SpeechEncoder(encoder, device).features(sound)
        for path in save_features(rows, output, bin=bin_pair):
            console.print(f"{path}: {len(rows)} rows", soft_wrap=True)


@app.command()
def export(
    checkpoint: options.Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file.")],
    mode: options.Mode = "ave",
    debug: options.Debug = False,
) -> None:
    """Write the network as ONNX, checked against PyTorch."""
    with reporting(debug):
        check_writable(output)
        export_unet(load_unet(checkpoint, mode), output)
        console.print(f"{output}: written; agrees with PyTorch on random inputs", soft_wrap=True)


@app.command()
def reference(
    checkpoint: options.Checkpoint,
    template: options.TemplateFolder,
    audio_features: options.Features,
    output_dir: options.OutputFolder,
    num_sample_frames: Annotated[int, typer.Option(help="How many frames, spread over the clip.")] = 5,
    mode: options.Mode = "ave",
    device: options.Device = None,
    engine: options.Engine = "auto",
    debug: options.Debug = False,
) -> None:
    """Write sample frames, features and facts for programs in other languages to compare with."""
    with reporting(debug):
        pipeline = FrameGenerationPipeline(checkpoint, mode, device, engine=engine, exact=True)
        facts = pipeline.generate_reference_outputs(audio_features, template, output_dir, num_sample_frames)
        console.print(f"{output_dir}: {len(facts['sample_indices'])} frames and metadata.json", soft_wrap=True)


@app.command()
def demo(
    audio: Annotated[Path | None, typer.Option(help="Your own sound; the bundled sample by default.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The video; a sheet of its frames goes beside it, as .png.")
    ] = Path("demo.mp4"),
    seconds: Annotated[float | None, typer.Option(help="Render only the first seconds of the sound.")] = None,
    device: options.Device = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Render the bundled avatar, speaking."""
    with reporting(debug), progress_bar() as progress:
        made = render_demo(audio, output, seconds, progress, device=device)
        console.print(f"{made.sheet}: some frames over the waveform", soft_wrap=True)
        print_record(made.record, made.video, as_json)


@app.command()
def farm(
    jobs: Annotated[Path, typer.Argument(help="Jobs, one JSON object a line with render's options as keys.")],
    output_dir: options.OutputFolder,
    device: options.Device = None,
    batch_size: options.BatchSize = None,
    memory_budget: options.MemoryBudget = None,
    part_seconds: Annotated[float, typer.Option(help="Length of the parts that clips are rendered in.")] = 20.0,
    workers: Annotated[int | None, typer.Option(help="Number of Ray workers; by default this process.")] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster; auto finds this machine's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Render finished jobs again.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Only report progress.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Render many clips; finished ones are skipped, and a stopped run is resumed."""
    from gpupipe import farm as many  # noqa: PLC0415 - the other commands do not wait for it

    with reporting(debug):
        if status:
            print_states(many.farm_status(jobs, output_dir), as_json)
            return
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints notices of its own
            record = many.run_farm(
                jobs,
                output_dir,
                device=device,
                batch_size=batch_size,
                memory_budget=_bytes(memory_budget),
                part_seconds=part_seconds,
                workers=workers,
                address=ray,
                force=force,
                on_job_end=lambda state: console.print(state_line(state), soft_wrap=True),
            )
        console.print(
            f"{output_dir}: {record.jobs} jobs: {record.done} done ({record.frames} frames in {record.seconds:.1f} s),"
            f" {record.skipped} done before, {record.parked} parked",
            soft_wrap=True,
        )
        if as_json:
            print_json(record.as_dict())
        if record.parked:
            raise typer.Exit(1)


@app.command()
def bench(
    template: Annotated[Path | None, typer.Option(help="Template directory; the bundled avatar by default.")] = None,
    audio_features: Annotated[Path | None, typer.Option(help="Speech features, .npy, with --template.")] = None,
    audio: Annotated[Path | None, typer.Option(help="Sound, with --template.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="U-Net, with --template; by default random weights, which cost the same.")
    ] = None,
    mode: options.Mode = "ave",
    width: Annotated[
        float, typer.Option(help="Width of the network with random weights, with --template; 1 is as published.")
    ] = 1.0,
    device: options.Device = None,
    engine: options.Engine = "auto",
    frames: Annotated[int, typer.Option(help="Length of the clip.")] = 100,
    rounds: Annotated[int, typer.Option(help="Turns of each contestant.")] = 3,
    crf: options.Crf = 20,
    sweep: Annotated[Sweep | None, typer.Option(help="Vary this instead of comparing.")] = None,
    values: Annotated[str, typer.Option(help="Steps of the sweep, as 1,8,64: batches, heights or seconds.")] = "",
    record: Annotated[bool, typer.Option("--record", help="Append the rows to the results.")] = False,
    results: Annotated[Path | None, typer.Option(help="Folder of recorded results.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Fail if slower than an earlier commit's rows.")] = False,
    profile: Annotated[Path | None, typer.Option(help="Only write a profiler's trace of a few steps here.")] = None,
    ncu_friendly: Annotated[bool, typer.Option("--ncu-friendly", help="Only run one step, for ncu or nsys.")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure this machine: end to end and stage by stage, beside the reference loop and the physical limits."""
    from gpupipe.benchmarks import bench as benchmark  # noqa: PLC0415 - the other commands do not wait for it

    with reporting(debug):
        asked = benchmark.Options(
            template=template,
            audio_features=audio_features,
            audio=audio,
            checkpoint=checkpoint,
            mode=mode,
            width=width,
            device=device,
            engine=engine,
            frames=frames,
            rounds=rounds,
            crf=crf,
            sweep=sweep,
            values=benchmark.whole_numbers(values),
            results=results or benchmark.RESULTS,
            record=record,
            compare=compare,
            profile=profile,
            ncu_friendly=ncu_friendly,
        )
        report = benchmark.run(asked, lambda line: console.print(line, soft_wrap=True))
        benchmark.show(report, standard_output())
        if as_json:
            print_json([row.as_dict() for row in report.rows])
        if report.failed:
            raise typer.Exit(1)


@app.command()
def doctor(
    device: options.Device = None,
    engines: Annotated[bool, typer.Option("--engines", help="Measure every engine first (minutes on a GPU).")] = False,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Report what this machine can do, and which way a render would take here."""
    with reporting(debug):
        if engines:
            measure_engines(device)
        facts = examine(device)
        if as_json:
            print_json(facts)
            return
        table = Table(box=None, show_header=False)
        for section, lines in facts.items():
            table.add_row(f"[bold]{section}")
            rows = lines if isinstance(lines, dict) else {str(i): line for i, line in enumerate(lines, 1)}
            for name, value in (rows or {"none": ""}).items():
                table.add_row(f"  {name}", escape(str(value)))
        standard_output().print(table)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line: exit 0 when done, 2 for wrong input, 130 for Ctrl-C before a command has begun, 1 for
    anything else."""
    atexit.register(gc.freeze)  # or Python would search all of PyTorch's objects for cycles before it ends: 0.4 s
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack characters of our help and tables
    try:
        with wrong_usage():
            status = app(standalone_mode=False)
        if sys.stdout is not None:  # as after >&-
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    except OSError as error:  # standard output is closed or full
        discard_output()
        console.print(f"gpupipe: standard output cannot be written: {error.strerror}", soft_wrap=True)
        status = 1
    sys.exit(status)


def _bytes(megabytes: int | None) -> int | None:
    """``--memory-budget`` in bytes."""
    if megabytes is not None and megabytes < 0:
        raise InputError(f"memory budget is {megabytes} MB; expected 0 or more")
    return None if megabytes is None else megabytes * 1_000_000


def _suggest_precision(pipeline: FrameGenerationPipeline, engine: options.Engine, chosen: object) -> None:
    """Say what a CPU has instructions for, unless an engine or a precision was chosen: it is not used unasked."""
    if engine != "auto" or chosen or pipeline.unet_model.device.type != "cpu":
        return
    for precision in LOWER_ON_CPU:
        if llvm_obstacle(getattr(torch, precision)) is None:
            told = f"tip: --precision {precision} is usually faster on this processor; mouths differ slightly"
            console.print(told, soft_wrap=True)
            return


def _check_inputs(
    template: Path, audio_features: Path | None, encoder: Path | None, audio: Path | None, mode: Mode
) -> None:
    """Check what can be known before a network is loaded and, the first time on a machine, its engines are measured."""
    if (audio_features is None) == (encoder is None):
        raise InputError("expected either --audio-features or --encoder (with --audio), not both or neither")
    if encoder is not None and audio is None:
        raise InputError("--encoder makes features from sound; expected --audio with it")
    if encoder is not None and mode != "ave":
        raise InputError(f"--encoder makes ave features and mode is {mode!r}; expected --audio-features")
    template_size(template)
    if audio_features is not None:
        SpeechFeatures(audio_features, mode)
    if audio is not None:
        open_sound(audio).close()


@contextlib.contextmanager
def _features(path: Path | None, encoder: Path | None, sound: Path | None, device: str | None) -> Iterator[Path]:
    """Yield the file of features, or a temporary one with features made from the sound."""
    if path is not None:
        yield path
        return
    assert encoder is not None and sound is not None
    with tempfile.TemporaryDirectory(prefix="gpupipe-") as folder:
        made = Path(folder) / "features.npy"
        with replacing(made) as temporary:
            write_features(SpeechEncoder(encoder, device).covering_features(sound), temporary)
        yield made

"""The four classes keep the original's argument names, order and defaults; new options are keywords."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from gpupipe import FrameGenerationPipeline, FrameGenerator, ImageProcessor, UNetModel

ORIGINAL: dict[Callable[..., Any], str] = {
    UNetModel: "checkpoint_path, mode='ave', device=None",
    UNetModel.predict: "image_tensor, audio_features",
    UNetModel.export_to_onnx: "output_path, opset_version=17",
    UNetModel.get_input_shapes: "",
    ImageProcessor: "",
    ImageProcessor.crop_face_region: "image, landmarks",
    ImageProcessor.resize_image: "image, size",
    ImageProcessor.create_masked_region: "image",
    ImageProcessor.prepare_input_tensors: "image, normalize=True",
    ImageProcessor.paste_generated_region: "full_frame, generated_region, crop_coords, original_crop_size",
    ImageProcessor.process_frame_with_parsing: (
        "full_frame, generated_region, crop_coords, original_crop_size, parsing_image=None"
    ),
    FrameGenerator: "unet_model, mode='ave'",
    FrameGenerator.generate_frame: "template_image, landmarks, audio_features, parsing_image=None",
    FrameGenerator.generate_frames_from_template_sequence: (
        "img_dir, lms_dir, audio_features, start_frame=0, parsing_dir=None, fps=25"
    ),
    FrameGenerator.save_frames: "frames, output_dir, prefix='frame'",
    FrameGenerationPipeline: "checkpoint_path, mode='ave', device=None",
    FrameGenerationPipeline.generate_video: (
        "audio_features_path, template_dir, audio_path, output_path, start_frame=0, fps=25, use_parsing=False, crf=20,"
        " save_frames=False, frames_dir=None"
    ),
    FrameGenerationPipeline.generate_frames_only: (
        "audio_features_path, template_dir, output_dir, start_frame=0, fps=25, use_parsing=False"
    ),
    FrameGenerationPipeline.export_model_to_onnx: "output_path, opset_version=17",
    FrameGenerationPipeline.generate_reference_outputs: (
        "audio_features_path, template_dir, output_dir, num_sample_frames=5"
    ),
}


@pytest.mark.parametrize("call", ORIGINAL, ids=lambda call: call.__qualname__)
def test_positional_arguments_are_the_original_s(call: Callable[..., Any]) -> None:
    arguments = [one for one in inspect.signature(call).parameters.values() if one.name != "self"]
    positional = [one.replace(annotation=one.empty) for one in arguments if one.kind is one.POSITIONAL_OR_KEYWORD]
    assert ", ".join(map(str, positional)) == ORIGINAL[call]

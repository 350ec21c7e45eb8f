"""ONNX Runtime that reports to nobody: import it from here.

By itself it keeps an identifier in the user's cache folder and looks for a host to report to (seen of 1.32 on Linux).
The variable is read when it is loaded; who wants to report sets ``ORT_DISABLE_TELEMETRY=0``.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

__all__ = ["onnxruntime"]

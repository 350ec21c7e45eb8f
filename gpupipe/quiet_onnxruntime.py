"""ONNX Runtime with its telemetry off: import it from here.

By default it keeps an identifier in the user's cache folder and looks for a host to report to (seen with 1.32 on
Linux). It reads the variable when it is loaded; users who want it to report set ``ORT_DISABLE_TELEMETRY=0``.
"""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

__all__ = ["onnxruntime"]

"""Ways of running the network: each makes a fast version of the trained U-Net for one device, at one precision.

| engine        | runs                                                   | where |
| ------------- | ------------------------------------------------------ | ----- |
| `eager`       | PyTorch, layer by layer, batch norms folded            | both  |
| `compile`     | the same through torch.compile, max-autotune           | both  |
| `fused`       | Triton kernels (:mod:`gpupipe.kernels.inverted_residual`) | CUDA |
| `gluon`       | the same, and on large maps Gluon kernels (:mod:`gpupipe.kernels.whole_block`) | CUDA |
| `llvm`        | kernels of our own (:mod:`gpupipe.kernels.levels_llvm`), float32, float16 or bfloat16 | CPU |
| `onnxruntime` | ONNX Runtime on :mod:`gpupipe.models.hoisted`, float32 | CPU   |

Every engine runs the network in two halves, so that the half that sees only the template can be cached.
"""

from gpupipe.engines.base import ENGINES, Engine, EngineName, Features, Precision
from gpupipe.engines.choice import make_engine

__all__ = ["ENGINES", "Engine", "EngineName", "Features", "Precision", "make_engine"]

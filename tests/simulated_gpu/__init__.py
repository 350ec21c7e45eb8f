"""A CUDA GPU for torch on a machine without one, so that what runs on a GPU is run by tests anywhere.

``python tests/simulated_gpu/run.py tests -m "cuda and not hardware"`` builds it and runs pytest on it:

* ``runtime.cpp`` stands in for CUDA's runtime library. torch's own streams, events, graphs and allocators work on it.
  Streams run in the most unkind order that a GPU may choose, so that a forgotten wait gives wrong values.
* ``operators.py`` runs torch's operators on the CPU, in a stream's turn, and Triton's kernels in its interpreter or,
  with ``PTX_MACHINE=90`` in the environment, compiled for that architecture on :mod:`ptx_machine`.
* ``plugin.py`` makes pytest use both.

It is no GPU: nothing runs beside anything else, arithmetic is the CPU's, and it has no NVENC, NVDEC or nvJPEG.
"""

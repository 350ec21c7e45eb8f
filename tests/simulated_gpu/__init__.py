"""A simulated CUDA GPU for torch, so that tests run the code for GPUs on any machine.

``python tests/simulated_gpu/run.py tests -m "cuda and not hardware"`` builds it and runs pytest on it:

* ``runtime.cpp`` stands in for CUDA's runtime library. torch's own streams, events, graphs and allocators work on it.
  Streams run in the worst order that a GPU may choose, so that a forgotten wait gives wrong values.
* ``operators.py`` runs torch's operators on the CPU, when it is their stream's turn. Triton's kernels run in its
  interpreter or, with ``PTX_MACHINE=90`` in the environment, compiled for that architecture on :mod:`ptx_machine`.
* ``plugin.py`` makes pytest use both.

It is not a GPU: nothing runs in parallel, arithmetic is the CPU's, and there is no NVENC, NVDEC or nvJPEG.
"""

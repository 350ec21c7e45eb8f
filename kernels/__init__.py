"""The work around and inside the network, batched: each kernel with its plain-torch reference.

    noun               reference             CUDA: Triton, or Gluon                             CPU: LLVM
    crop_resize        crop_resize.py        crop_resize_triton.py                              crop_resize_llvm.py
    paste_blend        paste_blend.py        paste_blend_triton.py                              paste_blend_llvm.py
    nv12               nv12.py               nv12_triton.py                                     nv12_llvm.py
    pointwise          pointwise.py          pointwise_triton.py
    inverted_residual  inverted_residual.py  inverted_residual_triton.py: a whole block
                                             depthwise_triton.py: what follows its expansion
    whole_block        whole_block.py        whole_block_gluon.py, whole_block_parts.py
    levels, depths     models/hoisted.py                                                        levels_llvm.py
                                                                                                maps_llvm.py
                                                                                                rows_llvm.py: parts
    cubic: taps and    cubic.py              cubic_triton.py                                    cubic_llvm.py
      weights of crop_resize and paste_blend
    what they share                          common_triton.py; packed_triton.py: half           common_llvm.py: written
                                               precision two at a time, for the network's       kernel_llvm.py: compiled

dispatch.py says which implementation runs on a device; launch_triton.py, how Triton's kernels are launched, and that an
engine's are compiled together; report.py, with report_network.py and report_gluon.py, what the compiler makes of every
kernel.
"""

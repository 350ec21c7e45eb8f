"""The work around and inside the network, batched: each kernel with its plain-torch reference.

    noun               reference             Triton                                  Gluon
    crop_resize        crop_resize.py        crop_resize_triton.py
    paste_blend        paste_blend.py        paste_blend_triton.py
    nv12               nv12.py               nv12_triton.py
    pointwise          pointwise.py          pointwise_triton.py
    inverted_residual  inverted_residual.py  inverted_residual_triton.py: a whole block
                                             depthwise_triton.py: what follows its expansion
    whole_block        whole_block.py                                                whole_block_gluon.py
                                                                                     whole_block_parts.py

    cubic              cubic.py              cubic_triton.py         taps and weights of crop_resize and paste_blend
                                             common_triton.py        what all Triton kernels share
                                             packed_triton.py        half precision two at a time, for the network's

dispatch.py says which implementation runs on a device; report.py, with report_network.py and report_gluon.py, what the
compiler makes of every kernel.
"""

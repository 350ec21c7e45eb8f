"""Compiled kernels, executed without a GPU: what Triton's compiler makes of them for one, as PTX, by NumPy.

    program.py       the text, read
    machine.py       registers, threads that part and meet, barriers; what was executed, counted
    memory.py        global and shared memory, and all that makes an access wrong
    arithmetic.py    instructions on registers
    transfers.py     loads, stores, copies beside the threads, matrices from and to shared memory
    tensor_cores.py  products of a warp and of a warpgroup
    launch.py        Triton's launches, taken here; plugin.py is for pytest, real_size.py for maps of the network's size
    ledger.py        what a frame costs an engine's kernels

Triton's interpreter runs the source: it knows no layouts, no shared memory, no barriers, no inline assembly, no Gluon.
This runs what a GPU is given, but for the assembler's last step, and counts instead of measuring.
"""

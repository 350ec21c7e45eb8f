"""Executes compiled kernels without a GPU: NumPy runs the PTX that Triton's compiler generates for one.

    program.py       reads the text
    machine.py       registers, diverging threads, barriers; counts what was executed
    memory.py        global and shared memory, and every kind of wrong access
    arithmetic.py    instructions on registers
    transfers.py     loads, stores, asynchronous copies, matrices from and to shared memory
    tensor_cores.py  products of a warp and of a warpgroup
    launch.py        intercepts Triton's launches; plugin.py for pytest, real_size.py on maps of the network's size
    ledger.py        what a frame costs an engine's kernels

Triton's interpreter runs the source: it knows no layouts, no shared memory, no barriers, no inline assembly, no Gluon.
This runs what a GPU is given, except for the assembler's last step, and counts instead of measuring time.
"""

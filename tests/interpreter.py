"""Triton's interpreter, mended.

It is made to leave ``triton.language`` as it found it. To run a kernel, it replaces the language's operations by its
own, and restores them afterwards. But each function that a kernel calls patches them once more, in
``triton.language.core`` too, and that is never undone: a kernel compiled later in the same process, for the machine in
:mod:`ptx_machine`, would call the interpreter's operations.

Triton 3.6's and older take an array of one element for a number, which newer NumPy refuses.

Triton 3.9's makes a block of a truth as one of 32-bit integers, and then does not take it as a mask: a comparison's
result has the type of what was compared.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any


def mend() -> None:
    """Make the end of an interpreted kernel undo all patches since its beginning, and blocks of a truth truths."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, list[Any]()

    def patch_and_remember(function: Any) -> Any:
        scope = patch(function)
        interpreter.tl.core.tensor.__index__ = lambda value: int(value.handle.data.item())
        if scope is None:  # of Triton before 3.6, which undoes nothing
            return None
        patched.append(scope)

        def restore() -> None:
            while patched:
                last = patched.pop()
                type(last).restore(last)
                if last is scope:
                    break

        scope.restore = restore
        return scope

    interpreter._patch_lang = patch_and_remember
    splat = interpreter.InterpreterBuilder.create_splat

    def splat_in_its_type(builder: Any, kind: Any, value: Any) -> Any:
        block = splat(builder, kind, value)
        block.data = block.data.astype(value.data.dtype)
        return block

    interpreter.InterpreterBuilder.create_splat = splat_in_its_type

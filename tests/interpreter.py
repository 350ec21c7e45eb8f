"""Triton's interpreter, made to leave ``triton.language`` as it found it.

To run a kernel, it replaces the language's operations by its own, and restores them afterwards. But each function that
a kernel calls patches them once more, in ``triton.language.core`` too, and that is never undone: a kernel compiled
later in the same process, for the machine in :mod:`ptx_machine`, would call the interpreter's operations.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any


def tidy_up_after_kernels() -> None:
    """Make the end of an interpreted kernel undo all patches since its beginning."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, list[Any]()

    def patch_and_remember(function: Any) -> Any:
        scope = patch(function)
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

"""Triton's interpreter, made to leave ``triton.language`` as it found it.

Running a kernel, it puts its own operations in the place of the language's, and takes them out again. But what a kernel
calls puts its own in once more, in ``triton.language.core`` too, and nobody takes those out: a kernel that is compiled
after that in the same process, for the machine in :mod:`ptx_machine`, would be made of them.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any


def tidy_up_after_kernels() -> None:
    """Have the end of an interpreted kernel undo all that was put in since its beginning."""
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

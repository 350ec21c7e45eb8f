"""Imports go down the list of rooms in the README, never up."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS: tuple[tuple[str, ...], ...] = (
    ("cli", "console", "options", "doctor", "__main__"),
    ("benchmarks",),
    ("farm", "demo"),
    ("pipeline",),
    ("frame_generator", "shots"),
    ("avatar",),
    ("template", "speech", "features", "mel", "landmarks", "seam", "unet_model", "image_processor"),
    ("engines", "video", "onnx_export"),
    ("kernels",),
    ("models",),
)
"""From the top down; what is not named here is below them all."""


def level(room: str) -> int:
    return next((i for i, rooms in enumerate(ROOMS) if room in rooms), len(ROOMS))


def imports(source: str) -> Iterator[str]:
    """The rooms of gpupipe that a module imports from."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "gpupipe" else [f"gpupipe.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "gpupipe" and rest and not rest.startswith("__"):
                yield rest.split(".")[0]


def upward(room: str, source: str) -> list[str]:
    return [f"{room} imports {other}" for other in imports(source) if level(other) < level(room)]


def modules() -> Iterator[tuple[str, Path]]:
    for folder in ("gpupipe", "kernels", "models", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            room = path.relative_to(ROOT / folder).parts[0].removesuffix(".py") if folder == "gpupipe" else folder
            if room != "__init__":  # the public names, from every room
                yield room, path


def test_imports_go_down() -> None:
    found = [f"{path}: {line}" for room, path in modules() for line in upward(room, path.read_text("utf-8"))]
    assert found == []


def test_every_room_is_there() -> None:
    assert {room for rooms in ROOMS for room in rooms} <= {room for room, _ in modules()}


@pytest.mark.parametrize(
    "source",
    ["from gpupipe.avatar import Avatar", "import gpupipe.avatar", "from gpupipe import avatar",
     "def late():\n    from gpupipe.avatar import Avatar"],
)  # fmt: skip
def test_an_import_that_goes_up_is_found(source: str) -> None:
    assert upward("video", source) == ["video imports avatar"]
    assert upward("pipeline", source) == []

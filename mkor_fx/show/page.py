"""Pages that are one file: a template beside this module with its data embedded as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_page(path: str | os.PathLike[str], template: str, data: dict[str, Any]) -> None:
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # nothing in it may end the script element
    page = Path(__file__).with_name(template).read_text(encoding="utf-8").replace("{{data}}", text, 1)
    Path(path).write_text(page, encoding="utf-8")

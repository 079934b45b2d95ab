"""Outside tools for tests: found, skipped with a reason, or demanded by MKOR_FX_REQUIRE_TOOLS=1."""

import os
import shutil
import subprocess

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")


def tool(*names):
    """The first of these commands that is installed."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None and os.environ.get("MKOR_FX_REQUIRE_TOOLS") == "1":
        pytest.fail(f"{names[0]} is not installed, and MKOR_FX_REQUIRE_TOOLS=1")
    if found is None:
        pytest.skip(f"{names[0]} is not installed")
    return found


def visit(page, fragment="", folder=None, width=1200):
    """The document after its scripts have run, as HTML; fails on anything that the page writes to its console."""
    arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--host-resolver-rules=MAP * ~NOTFOUND",  # there is no network for it
        f"--user-data-dir={folder or page.parent / 'profile'}",
        "--enable-logging=stderr",
        f"--window-size={width},1000",
        "--virtual-time-budget=8000",
        "--dump-dom",
        f"{page.as_uri()}{fragment}",
    ]
    done = subprocess.run([tool(*CHROMIUM), *arguments], capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    return done.stdout

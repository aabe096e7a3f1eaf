"""Chromium without a window: a page's document after its scripts ran, and what it wrote to the console."""

import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--enable-logging=stderr"),
]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is missing: apt-get install chromium")


def run(address, profile, *flags):
    """Return what Chromium prints for an address with an empty profile, and its log."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout, done.stderr


def dump_dom(address, profile, *flags):
    """Return a page's document after its scripts ran, and Chromium's log."""
    return run(address, profile, "--virtual-time-budget=60000", "--dump-dom", *flags)


def console(log):
    """Return the lines of a log that pages wrote to the console."""
    return [line for line in log.splitlines() if "CONSOLE" in line]

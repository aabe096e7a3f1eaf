"""Photograph pages in headless Chromium, as small pictures for the documentation.

    python recipes/page_pictures.py results/real_models/*.html --output docs/pages

Every page becomes one PNG file of 256 colours: its upper part, in a window of 1280 points.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("pages", nargs="+", type=Path)
parser.add_argument("--output", type=Path, required=True, help="folder")
parser.add_argument("--height", type=int, default=1150, help="of the window")
parser.add_argument("--width", type=int, default=800, help="of the picture, in pixels")
arguments = parser.parse_args()
chromium = shutil.which("chromium") or shutil.which("google-chrome")
if chromium is None:
    sys.exit("Chromium is missing: apt-get install chromium")
arguments.output.mkdir(parents=True, exist_ok=True)
for page in arguments.pages:
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile"]
        size = f"--window-size=1280,{arguments.height}"
        command = [chromium, *flags, size, f"--screenshot={shot}", page.absolute().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        picture = Image.open(shot).convert("RGB")
    height = round(picture.height * arguments.width / picture.width)
    small = picture.resize((arguments.width, height), Image.Resampling.LANCZOS).quantize(64)
    small.save(arguments.output / f"{page.stem}.png", optimize=True)

"""The images that tests run, built once in a run of tests, by whichever worker is the first to need them."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
BUILD = REPOSITORY / "deploy" / "docker" / "images.sh"
NAMES = frozenset({"VFLEET_IMAGE", "VFLEET_ETCD_IMAGE"})


def build_images(shared: Path, tag: str = "tested", source: Path = REPOSITORY) -> dict[str, str]:
    """Return the images of a tree as Compose's files name them, by variable. Those of one run are in `shared`."""
    with (shared / f"images-{tag}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = shared / f"images-{tag}.json"
        if not built.exists():
            built.write_text(json.dumps(_build(tag, source)))
        return dict(json.loads(built.read_text()))


def _build(tag: str, source: Path) -> dict[str, str]:
    environment = {**os.environ, "PYTHON": sys.executable, "TAG": tag, "SOURCE": str(source)}
    built = subprocess.run([BUILD], env=environment, capture_output=True, text=True, check=False)
    if built.returncode:
        raise AssertionError(f"{BUILD} failed:\n{built.stderr[-4000:]}")
    images = dict(line.split("=", 1) for line in built.stdout.splitlines())
    assert images.keys() == NAMES
    return images

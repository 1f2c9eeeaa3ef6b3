"""The README's "With a real virtual machine", line by line, as a person would type it."""

import os
import re
import tempfile
from pathlib import Path

import pytest
from support.guest import image
from support.readme import blocks, checkout
from support.terminal import terminal

pytestmark = pytest.mark.timeout(1800)

FEWER_LINES_THAN = 10
SECTION = "With a real virtual machine"
GUESTS_PROMPT = r"^/ # "
DATE = r"^\w{3} \w{3} +\d+ .* 20\d\d$"


async def test_what_the_readme_says_works(tmp_path: Path):
    first, inside, second = blocks(SECTION)
    assert len(first) + len(inside) + len(second) < FEWER_LINES_THAN
    image()  # its packages are fetched only once
    with tempfile.TemporaryDirectory(prefix="vfleet-readme-") as folder:  # pytest's are too long for sockets
        directory = checkout(tmp_path, "tests", "deploy")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("VFLEET_")}
        environment = {**inherited, "TMPDIR": folder, "XDG_STATE_HOME": folder, "XDG_CONFIG_HOME": folder}

        def mine(line: str) -> str:
            return line.replace("/tmp/", f"{folder}/")

        async with terminal(directory, environment) as one, terminal(directory, environment) as other:
            for line in first[:-1]:
                await one.type(mine(line), r"^Ctrl-C ends it\.$|^vfleet: .*$" if line.endswith("&") else "^typed> ")
            begun = await one.type(mine(first[-1]), f"{GUESTS_PROMPT}|^typed> ")
            assert "/dev/nvme0n1" in begun, one.text
            (line,) = inside
            await one.type(line, f"{DATE}\n(?s:.*){DATE}")
            for line in second[:-1]:
                await other.type(mine(line))
            moved = await other.type(mine(second[-1]))
            assert re.search(r"^disk1 +to +h2/nvme0 ", moved, re.MULTILINE)
            # The guest writes on, and finds what it has written.
            await one.until(f"{DATE}\n(?s:.*){DATE}")
            await one.interrupt(GUESTS_PROMPT)
            count = await one.type(
                "wc -l </mnt/log; umount /mnt && fsck.ext4 -fn /dev/nvme0n1; echo ended $?", "^ended 0$"
            )
            # Four were seen; the last may have been interrupted on its way to the file.
            assert int(re.search(r"^(\d+)$", count, re.MULTILINE)[1]) >= 3
            await one.type("poweroff -f")
            await one.type("kill %1; wait %1", "^typed> ")

"""Run the code of pages and write the outputs that it prints into them: ``python -m tests.documents [PAGE ...]``.

Read the difference (``git diff``) before you commit it: the pages' own words are to fit the new outputs.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from tests.documents.pages import ROOT, Block, pages, run, written


def main(names: list[str]) -> None:
    for page in [Path(name) for name in names] or pages():
        file = ROOT / page
        text, results, start = file.read_text(), dict[Block, str](), time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            for block, got in run(page, text, Path(folder)):
                results[block] = got
            os.chdir(ROOT)
        new = written(text, results)
        told = "changed" if new != text else "as it was"
        print(f"{page}: {told} ({time.perf_counter() - start:.0f} s)", file=sys.stderr)
        file.write_text(new)


if __name__ == "__main__":
    main(sys.argv[1:])

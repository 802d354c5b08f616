"""Sample echo clips from ECGs, as `medgen sample ecg-to-echo` does, under any launcher: the work is split by process.

`torchrun --nproc_per_node 4 sample/ecg_to_echo.py --pipeline NAME_OR_DIR --cases CASES.jsonl --out DIR`
"""

import sys

from medgen.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", "ecg-to-echo", *sys.argv[1:]]))

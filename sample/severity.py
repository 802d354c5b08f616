"""Edit films towards a severity, as `medgen sample severity` does, under any launcher: the work is split by process.

`torchrun --nproc_per_node 4 sample/severity.py --pipeline NAME_OR_DIR --cases CASES.jsonl --out DIR`
"""

import sys

from medgen.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", "severity", *sys.argv[1:]]))

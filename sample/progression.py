"""Sample patients' next visits, as `medgen sample progression` does, under any launcher: the work is split by process.

`torchrun --nproc_per_node 4 sample/progression.py --pipeline NAME_OR_DIR --cases CASES.jsonl --out DIR`
"""

import sys

from medgen.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", "progression", *sys.argv[1:]]))

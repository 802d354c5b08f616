"""Sample chest X-rays from text, as `medgen sample text-to-cxr` does, under any launcher: the work is split by process.

`torchrun --nproc_per_node 4 sample/text_to_cxr.py --pipeline NAME_OR_DIR --cases CASES.jsonl --out DIR`
"""

import sys

from medgen.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", "text-to-cxr", *sys.argv[1:]]))

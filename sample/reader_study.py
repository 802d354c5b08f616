"""Sample all that a study's protocol asks for, as `medgen study sample` does, under any launcher: the work is split by process.

`torchrun --nproc_per_node 4 sample/reader_study.py --protocol PROTOCOL.yaml --out DIR [--reference MANIFEST]`
"""

import sys

from medgen.cli import main

if __name__ == "__main__":
    sys.exit(main(["study", "sample", *sys.argv[1:]]))

"""Sample chest X-rays from text, in one process or many: `torchrun --nproc_per_node 4 sample/text_to_cxr.py --pipeline ...`."""

from __future__ import annotations

import tyro

from medgen.sampling.text_to_cxr import sample

if __name__ == "__main__":
    print(tyro.cli(sample))

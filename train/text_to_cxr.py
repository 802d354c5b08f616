"""Train `text-to-cxr`, as `medgen train text-to-cxr` does, under any launcher.

`accelerate launch --config_file configs/accelerate/ddp.yaml train/text_to_cxr.py --config RECIPE.yaml [section.field=value ...]`
"""

import sys

from medgen.training.run import main

if __name__ == "__main__":
    main("text-to-cxr", sys.argv[1:])

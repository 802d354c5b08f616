"""Train `re-identification`, as `medgen train re-identification` does, under any launcher.

`accelerate launch --config_file configs/accelerate/ddp.yaml train/re_identification.py --config RECIPE.yaml [section.field=value ...]`
"""

import sys

from medgen.training.run import main

if __name__ == "__main__":
    main("re-identification", sys.argv[1:])

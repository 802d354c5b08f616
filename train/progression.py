"""Train `progression`, as `medgen train progression` does, under any launcher.

`accelerate launch --config_file configs/accelerate/ddp.yaml train/progression.py --config RECIPE.yaml [section.field=value ...]`
"""

import sys

from medgen.training.run import main

if __name__ == "__main__":
    main("progression", sys.argv[1:])

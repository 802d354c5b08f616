"""Train `classifier`, as `medgen train classifier` does, under any launcher.

`accelerate launch --config_file configs/accelerate/ddp.yaml train/classifier.py --config RECIPE.yaml [section.field=value ...]`
"""

import sys

from medgen.training.run import main

if __name__ == "__main__":
    main("classifier", sys.argv[1:])

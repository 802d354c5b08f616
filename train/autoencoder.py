"""Train `autoencoder`, as `medgen train autoencoder` does, under any launcher.

`accelerate launch --config_file configs/accelerate/ddp.yaml train/autoencoder.py --config RECIPE.yaml [section.field=value ...]`
"""

import sys

from medgen.training.run import main

if __name__ == "__main__":
    main("autoencoder", sys.argv[1:])

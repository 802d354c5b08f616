"""Train `text-encoder`, as `medgen train text-encoder` does, under any launcher.

`accelerate launch --config_file configs/accelerate/ddp.yaml train/text_encoder.py --config RECIPE.yaml [section.field=value ...]`
"""

import sys

from medgen.training.run import main

if __name__ == "__main__":
    main("text-encoder", sys.argv[1:])

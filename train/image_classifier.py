"""Train `image-classifier`, as `medgen train image-classifier` does, under any launcher.

`accelerate launch --config_file configs/accelerate/ddp.yaml train/image_classifier.py --config RECIPE.yaml [section.field=value ...]`
"""

import sys

from medgen.training.run import main

if __name__ == "__main__":
    main("image-classifier", sys.argv[1:])

"""Train `ecg-to-echo`, as `medgen train ecg-to-echo` does, under any launcher.

`accelerate launch --config_file configs/accelerate/ddp.yaml train/ecg_to_echo.py --config RECIPE.yaml [section.field=value ...]`
"""

import sys

from medgen.training.run import main

if __name__ == "__main__":
    main("ecg-to-echo", sys.argv[1:])

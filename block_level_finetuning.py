#!/usr/bin/env python3
"""Fine-tune every variant once, beside its dense module: its input in, its output as the target.

python block_level_finetuning.py -p modules.npy -o modules_finetuned.npy
python block_level_finetuning.py --solver ls
python block_level_finetuning.py --solver grad --epochs 4
"""

from composable.commands.block_level_finetuning import main

if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Compose a configuration out of fine-tuned variants and fine-tune it as a whole.

python model_level_finetuning.py -p modules_finetuned.npy -n 0 -o model/finetuned.pth
torchrun --nproc-per-node 2 model_level_finetuning.py -n 1 -o model/finetuned_1.pth
python model_level_finetuning.py -p modules.npy -n 0 --heal lora --steps 200
"""

from composable.commands.model_level_finetuning import main

if __name__ == "__main__":
    main()

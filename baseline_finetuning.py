#!/usr/bin/env python3
"""Fine-tune a whole model, composed or dense, with no module-level fine-tuning before (control).

python baseline_finetuning.py -m model/composed.pth -o model/baseline.pth
torchrun --nproc-per-node 2 baseline_finetuning.py --epochs 3
"""

from composable.commands.baseline_finetuning import main

if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Put one configuration together out of the dense model and a bundle of variants.

python compose_model.py
python compose_model.py -p modules_finetuned.npy -n 1 -o model/composed_1.pth
python compose_model.py -p modules_l1.npy -p modules_other.npy -n 1 -o model/mixed.pth
"""

from composable.commands.compose_model import main

if __name__ == "__main__":
    main()

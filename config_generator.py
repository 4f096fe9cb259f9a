#!/usr/bin/env python3
"""Write conf.json: which rate every prunable module has in each wanted model.

./config_generator.py
./config_generator.py --attention 0.25 0.5 --linear 0.3 0.5
./config_generator.py -m model/bert.pth --attention 0.25 0.5 --ffn 0.25 0.5
./config_generator.py --sizes 0.8 0.6 --metric parameters --scores scores.npz
./config_generator.py --scores scores.npz --drop-layers 3 5 --attention 0.25 0.25
"""

from composable.commands.config_generator import main

if __name__ == "__main__":
    main()

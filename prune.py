#!/usr/bin/env python3
"""Make every variant that the scheme asks for, once, and write them as one bundle.

python prune.py -m model/dense.pth -c conf_prune.json -o modules.npy
python prune.py --attention stat --ffn stat --linear alps --data multi30k --limit 1024
python prune.py --attention head_l1 --ffn neuron_l1          # by weights alone, without texts
python prune.py --attention ranked --ffn ranked --scores scores.npz
"""

from composable.commands.prune import main

if __name__ == "__main__":
    main()

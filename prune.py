#!/usr/bin/env python3
"""Make every variant that the scheme asks for, once, and write them as one bundle.

python prune.py -m model/dense.pth -c conf_prune.json -o modules.npy
python prune.py --linear alps --attention head_gram --data multi30k
python prune.py --method l1 -p model/test.pth
"""

from composable.commands.prune import main

if __name__ == "__main__":
    main()

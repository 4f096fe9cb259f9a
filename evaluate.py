#!/usr/bin/env python3
"""Measure a model: the scores of its task, speed, loss, parameters, zeros, MACs, file size.

./evaluate.py                                         # model/finetuned.pth on the test split
./evaluate.py -m model/dense.pth --split valid --limit 64 -o eval.json
./evaluate.py -m model/composed.pth --num-beams 4 --predictions composed.de
./evaluate.py -m model/sst2.pth --data data/sst2 --predictions classes.txt
./evaluate.py -m model/lm.pth --data data/wikitext-2 --max-length 1024
"""

from composable.commands.evaluate import main

if __name__ == "__main__":
    main()

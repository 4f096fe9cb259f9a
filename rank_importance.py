#!/usr/bin/env python3
"""Measure what matters in a model, once: heads, neurons, layers, by a method of choice.

./rank_importance.py -m model/llama.pth --data texts.txt
./rank_importance.py --distance bi_score angular_last --data c4.jsonl
./rank_importance.py --data multi30k --iterative 3 --stack decoder
./rank_importance.py --method stat                       # for config_generator.py --sizes
./rank_importance.py --method fisher --limit 2048 -o fisher.npz
./rank_importance.py --method random --seed 1 -o random.npz
"""

from composable.commands.rank_importance import main

if __name__ == "__main__":
    main()

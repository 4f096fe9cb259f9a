#!/usr/bin/env python3
"""Measure how much every block of layers changes its input, on a calibration set.

./rank_importance.py -m model/llama.pth --calibration-data texts.txt
./rank_importance.py --metric bi_score angular_last --calibration-data c4.jsonl --key text
./rank_importance.py --calibration-data multi30k --iterative 3 --stack decoder
"""

from composable.commands.rank_importance import main

if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Draw scores: importances of heads and neurons, and how much blocks of layers change.

./plot_importance.py                                     # scores.npz -> scores.png
./plot_importance.py fisher.npz                          # fisher.png: a map and curves
./plot_importance.py scores.npz --distance bi_score -o bi.png
"""

from composable.commands.plot_importance import main

if __name__ == "__main__":
    main()

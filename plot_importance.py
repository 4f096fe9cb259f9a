#!/usr/bin/env python3
"""Draw how much every block of layers changes its input, and which blocks change it least.

./plot_importance.py                                     # scores.npz -> scores.png
./plot_importance.py scores.npz --distance bi_score -o bi.png
"""

from composable.commands.plot_importance import main

if __name__ == "__main__":
    main()

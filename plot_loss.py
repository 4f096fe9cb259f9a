#!/usr/bin/env python3
"""Draw the loss curves of one or more fine-tuning runs into one picture.

./plot_loss.py                                           # stats_model.csv -> loss.png
./plot_loss.py stats_baseline.csv stats_model.csv -o both.png
"""

from composable.commands.plot_loss import main

if __name__ == "__main__":
    main()

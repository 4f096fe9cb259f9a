#!/usr/bin/env python3
"""Put the evaluations of a pipeline run into one table.

./report.py -d out -o out/report.md --plot out/loss.png
"""

from composable.commands.report import main

if __name__ == "__main__":
    main()

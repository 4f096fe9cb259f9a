#!/usr/bin/env python3
"""Put the evaluations of a pipeline run into one table.

./report.py -d out/t5-small                              # writes report.md there
"""

from composable.commands.report import main

if __name__ == "__main__":
    main()

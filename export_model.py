#!/usr/bin/env python3
"""Write a model as a plain transformers folder, which AutoModel reads.

./export_model.py -m model/composed.pth -o exported
"""

from composable.commands.export_model import main

if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Fetch a pretrained model and write it as one model file.

./download_model.py                                  # google-t5/t5-small from the hub
./download_model.py -m embedded                      # the small model that comes with the program
./download_model.py -m path/to/folder -o model/mine.pth
./download_model.py -m path/to/bert --task text_classification --labels 2 -o model/bert.pth
./download_model.py -m path/to/model.gguf --dtype bfloat16 -o model/llama.pth
"""

from composable.commands.download_model import main

if __name__ == "__main__":
    main()

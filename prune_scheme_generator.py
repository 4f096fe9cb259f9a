#!/usr/bin/env python3
"""Write conf_prune.json: every variant that the configurations need, each once.

./prune_scheme_generator.py
./prune_scheme_generator.py -i conf.json -o conf_prune.json
"""

from composable.commands.prune_scheme_generator import main

if __name__ == "__main__":
    main()

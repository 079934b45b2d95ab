"""Real models are built from their configurations: nothing is looked up or downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

"""Base models and adapters: finding, loading, reading and writing them."""

import logging

# It says at every import what it could have on other machines.
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)

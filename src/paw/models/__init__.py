"""Base models and adapters: finding, loading, reading and writing them."""

import logging

logging.getLogger("bitsandbytes").setLevel(
    logging.CRITICAL
)  # it says at every import what it could have on other machines

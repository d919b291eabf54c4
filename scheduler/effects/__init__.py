"""One outside thing per file, each a Protocol plus its real self."""

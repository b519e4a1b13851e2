"""The families of released models: one file each, with its config.json and its name map."""

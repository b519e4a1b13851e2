"""Dr.LLM: routers that leave out or repeat blocks of a frozen model, against search, chance and fixed depth."""

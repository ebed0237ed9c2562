"""`cairn serve`: OpenAI's API in front of a cluster's engines."""

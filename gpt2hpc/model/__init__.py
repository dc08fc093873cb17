"""GPT-2 as published, and text from it."""

"""How good answers are; nothing here knows about models or files."""

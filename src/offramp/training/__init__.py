"""Training: the one loop and its run folder; exits and drafts of language models, what for, on what, and how."""

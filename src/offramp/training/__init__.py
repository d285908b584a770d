"""Training: the one loop; exits and drafts of language models, what for, on what, and how."""

"""Classifiers of texts and images that stop computing where they are sure enough."""

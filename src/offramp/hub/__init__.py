"""Names become models and exits: folders, packages, the hub, what comes with offramp."""

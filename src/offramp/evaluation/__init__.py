"""Quality and cost of exit policies on tasks: records of every example, summaries with intervals, run folders."""

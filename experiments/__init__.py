"""The papers' experiments at the size of one machine: a command per table, with verdicts on the papers' claims."""

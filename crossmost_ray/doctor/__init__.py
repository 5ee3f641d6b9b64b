"""What goes wrong most, looked for before a run does: a config in, findings out."""

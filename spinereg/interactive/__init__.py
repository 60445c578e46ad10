"""Pictures that answer, and a run that can be watched while it goes on."""

"""What a field did: how rigidly bones moved, how regular and accurate it is, and how that looks."""

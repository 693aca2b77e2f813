"""The deformable attention operator: reference, compiled form, choice, self-test, build."""

"""The deformable attention operator: reference, compiled form, self-test, build."""

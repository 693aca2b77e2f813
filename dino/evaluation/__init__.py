"""Average precision, and the report about a set of detections."""

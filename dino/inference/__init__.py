"""From files to detections: predictor, tiles, video, drawing, and what makes a CPU faster."""

"""`dino eval`: a self-contained page about COCO-format detections, whichever program made them."""

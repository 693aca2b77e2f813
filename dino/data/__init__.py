"""Files of people: images and annotations."""
